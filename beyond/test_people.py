"""CSV files as people have them: what is read as what, and what is refused."""
import pytest

import adult
from adult import InputError, Person
from beyond import people

REAL = adult.TINY.parent.parent / "shared" / "adult"
HEADER = ("age,workclass,fnlwgt,education,education-num,marital-status,occupation,"
          "relationship,race,sex,capital-gain,capital-loss,hours-per-week,"
          "native-country,income")
ROW = ("39,State-gov,77516,Bachelors,13,Never-married,Adm-clerical,Not-in-family,White,"
       "Male,2174,0,40,United-States,>50K")
PERSON = Person(tuple(ROW.split(",")[:14]), 1)             # no two cells are the same


@pytest.fixture()
def read(tmp_path):
    """A function that reads a text, or bytes, as a file."""
    def read(content, **given):
        path = tmp_path / "mine.csv"
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(content)
        return people.read(path, **given)
    return read


def with_cell(name, cell):
    """A file of one person in which one cell is another; `name` as in HEADER."""
    cells = ROW.split(",")
    cells[HEADER.split(",").index(name)] = cell
    return HEADER + "\n" + ",".join(cells)


@pytest.mark.parametrize("folder", [adult.TINY, REAL], ids=["tiny", "UCI"])
def test_ucis_files_are_read_as_ever(folder):
    if not (folder / "adult.data").exists():
        pytest.skip("the published Adult files are not there")
    for name in adult.SHA256:
        assert people.read(folder / name) == adult.read(folder / name)


@pytest.mark.parametrize("header", [
    HEADER, HEADER.replace("-", "."), HEADER.replace("-", "_"), HEADER.replace("-", ""),
    HEADER.replace("-", " ").title(), HEADER.upper(), ",".join(adult.FORMAT),
    HEADER.replace("education-num", "educational-num").replace("sex", "gender"),
    HEADER.replace("income", "class"), HEADER.replace("income", "label"),
    HEADER.replace("income", " Salary "),
])
def test_a_header_says_what_a_column_is(header, read):
    names, cells = header.split(","), ROW.split(",")
    for order in (range(15), range(14, -1, -1), [7, *range(7), *range(8, 15)]):
        lines = [",".join(part[i] for i in order) for part in (names, cells)]
        assert read("\n".join(lines)) == [PERSON]
        for index in ("", "Unnamed: 0", '" "'):
            assert read(f"{index},{lines[0]}\r\n17,{lines[1]}\r\n") == [PERSON]


def test_without_a_header_the_order_is_ucis(read):
    quoted = '"' + ROW.replace(",", '", "') + '"'
    assert read(f"\ufeff|1x3\n{ROW}.\n\n{ROW.lower()}\n{quoted}") == [PERSON] * 3


def test_what_the_text_leaves_out_may_be_missing(read):
    columns = zip(HEADER.split(","), adult.FORMAT, ROW.split(","))
    kept = [x for x in columns if x[1] not in adult.LEFT_OUT]
    names, _, cells = zip(*kept)
    person, = read(",".join(names) + "\n" + ",".join(cells))
    assert adult.question(person) == adult.question(PERSON) and person.y == 1
    assert [person.values[i] for i in (2, 5, 7)] == ["0", "?", "?"]
    for name in names[:-1]:
        content = f"{','.join(names)}\n{','.join(cells)}".replace(f"{name},", "", 1)
        column = adult.COLUMNS[HEADER.split(",").index(name)]
        with pytest.raises(InputError, match=f"line 1: the header has no {column};"):
            read(content)


@pytest.mark.parametrize("name, cell, wanted", [
    ("sex", "male", "Male"), ("sex", " FEMALE ", "Female"), ("age", " 39.0", "39"),
    ("workclass", " Private ", "Private"), ("workclass", "pRIVATE", "Private"),
    ("race", "asian-pac-islander", "Asian-Pac-Islander"),
    ("native-country", "united-STATES", "United-States"),
    ("native-country", "New zealand", "New zealand"), ("occupation", "", "?"),
    *(("occupation", cell, "?") for cell in (" ", "?", "NaN", "nan", "NA", "None")),
    ("relationship", "<NA>", "?"),
])
def test_a_cell_is_read_as_uci_writes_it(name, cell, wanted, read):
    person, = read(with_cell(name, cell))
    i = HEADER.split(",").index(name)
    assert person.values[i] == wanted
    others = person.values[:i] + person.values[i + 1:]
    assert others == PERSON.values[:i] + PERSON.values[i + 1:]


@pytest.mark.parametrize("cell, y", [
    (">50K", 1), (">50k.", 1), (" > 50K", 1), ("1", 1), ("1.", 1), ("1.0", 1),
    ("<=50K", 0), ("<=50k.", 0), ("<= 50K ", 0), ("0", 0), ("0.", 0), ("0.0", 0),
    ("", None), ("?", None), ("NaN", None),
])
def test_a_label_is_known_or_not(cell, y, read):
    content = with_cell("income", cell)
    assert read(content, labelled=False) == [PERSON._replace(y=y)]
    if y is not None:
        assert read(content) == [PERSON._replace(y=y)]
    else:
        with pytest.raises(InputError, match="line 2: the label is missing"):
            read(content)


def test_a_label_may_have_no_column(read):
    content = f"{HEADER}\n{ROW}".replace(",income", "").replace(",>50K", "")
    assert read(content, labelled=False) == [PERSON._replace(y=None)]
    with pytest.raises(InputError, match="line 2: the label is missing"):
        read(content)
    with pytest.raises(InputError, match="line 1: 14 cells for 15 columns"):
        read(content.splitlines()[1], labelled=False)   # or a label would be a country


FILE = f"{HEADER}\n{ROW}\n"
CELLS = {  # a column: what it cannot hold
    "age": ("", "?", "NaN", "-1", "39.5", "3", "thirty"),     # 3: a group of ages
    "fnlwgt": ("",), "hours-per-week": ("", "NaN", "40h", "1e3"),
    "workclass": ("4", "4.0", "-"), "sex": ("", "?", "M", "0", "1"),
    "income": ("2", "-1", "50000", "0.5", "10", "yes", "50K", "=50K", ">500K")}
REFUSED = [
    (f"{HEADER},height\n{ROW},180", "line 1: 'height' is not one of"),
    (f"id,{HEADER}\n1,{ROW}", "line 1: 'id' is not one of"),
    (f"{HEADER},\n{ROW},", "line 1: '' is not one of"),
    (f",,{HEADER}\n0,0,{ROW}", "line 1: '' is not one of"),
    (FILE.replace("race", "skin"), "line 1: 'skin' is not one of"),
    (FILE.replace("income", "incme"), "line 1: 'incme' is not one of"),
    (FILE.replace("race", "Sex"), "line 1: two columns are sex;"),
    (FILE.replace("race", "gender"), "line 1: two columns are sex;"),
    (FILE.replace("age,", "Class,", 1), "line 1: two columns are label;"),
    (FILE.replace("age,", ",", 1), "line 1: the header has no age;"),
    (HEADER + "\n" + FILE, "line 2: age cannot be 'age'"),
    (FILE + ROW[3:], "line 3: 14 cells for 15 columns"),
    (FILE + ROW + ",", "line 3: 16 cells for 15 columns"),
    (f"0,{ROW}", "line 1: 16 cells for 15 columns"),
    (FILE.replace(",", ";"), "line 1: 1 cells for 15 columns"),
    (FILE + "," * 14, "line 3: age cannot be ''"),
    (ROW.replace("39,State-gov", "State-gov,39"), "line 1: age cannot be 'State-gov'"),
    (f"{','.join(map(str, range(15)))}\n{ROW}", "line 1: age cannot be '0'"),
    (FILE.replace("White", '"White'), "cannot be read as CSV"),
    (FILE.encode("utf-16"), "cannot be read as CSV"),
    ("", "holds no rows"), (HEADER, "holds no rows")]
for name, cells in CELLS.items():
    column = "label" if name == "income" else name.replace("-", " ")
    for cell in cells:
        why = f"line 2: {column} cannot be {cell!r}"
        REFUSED.append((with_cell(name, cell), why))


@pytest.mark.parametrize("content, why", REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_ambiguous_or_wrong_is_one_sentence(content, why, read):
    for labelled in (True, False):
        with pytest.raises(InputError) as refused:
            read(content, labelled=labelled)
        message = str(refused.value).partition("mine.csv")[2]
        assert message.strip(", ").startswith(why), message
        assert "\n" not in message


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    for name, why in (("nothing.csv", "No such file"), (".", "Is a directory")):
        with pytest.raises(InputError, match=rf"cannot be read \({why}"):
            people.read(tmp_path / name)
