"""CSV files as people have them: what is read as what, and what is refused."""
import hashlib
import http.client
import io
import os
import pathlib
import re
import urllib.error
import urllib.request

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


@pytest.mark.parametrize("folder", [adult.TINY, REAL], ids=["tiny", "UCI"])
def test_ucis_files_are_read_as_ever(folder):
    """The same people in the same order as the lesson's reader, and UCI's checksums."""
    if not (folder / "adult.data").exists():
        pytest.skip("the published Adult files are not there")
    found = people.load(folder)
    assert found._replace(sha256={}) == adult.load(folder)
    assert list(found.sha256) == ["adult.data", "adult.test"]
    assert (found.sha256 == people.SHA256) == (folder == REAL)


def as_kaggle(file):
    """A file of UCI's with a header, an index, another order, labels 0 and 1."""
    lines = ["," + HEADER[4:] + ",age"]
    for i, person in enumerate(adult.read(file)):
        age, *others = person.values
        lines.append(",".join([str(i), *others, str(person.y), age]).lower())
    return "\n".join(lines)


def test_a_folder_may_have_headers_and_one_file_is_halved(tmp_path):
    """The same people either way; of one file each is in one half, the same for all."""
    whole = adult.load(adult.TINY)
    train, test = [as_kaggle(adult.TINY / name) for name in people.SHA256]
    (tmp_path / "adult.data").write_text(train)
    (tmp_path / "adult.test").write_text(test)
    found = people.load(tmp_path)
    assert (found.train, found.test) == (whole.train, whole.test)
    path = tmp_path / "mine.csv"
    path.write_text(test)
    half = people.load(path)
    assert sorted(half.train + half.test) == sorted(whole.test)
    assert len(half.train) == len(half.test) and half == people.load(str(path))
    assert half.train != whole.test[::2], "a file may be sorted"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert half.sha256 == {"mine.csv": digest} and "half is the test" in half.source


@pytest.mark.parametrize("header", [
    HEADER, HEADER.replace("-", ".").upper(), HEADER.replace("-", ""),
    HEADER.replace("-", " ").title(), ",".join(people.FORMAT),
    HEADER.replace("education-num", "educational_num").replace("sex", "gender"),
    HEADER.replace("income", "class"), HEADER.replace("income", " Salary ")])
def test_a_header_says_what_a_column_is(header, read):
    names, cells = header.split(","), ROW.split(",")
    for order in (range(15), range(14, -1, -1)):
        lines = [",".join(part[i] for i in order) for part in (names, cells)]
        assert read("\n".join(lines)) == [PERSON]
        for index in ("", "Unnamed: 0", '" "'):
            assert read(f"{index},{lines[0]}\r\n17,{lines[1]}\r\n") == [PERSON]


def test_without_a_header_the_order_is_ucis(read):
    quoted = '"' + ROW.replace(",", '", "') + '"'
    assert read(f"\ufeff|1x3\n{ROW}.\n\n{ROW.lower()}\n{quoted}") == [PERSON] * 3


def test_what_the_text_leaves_out_may_be_missing(read):
    columns = zip(HEADER.split(","), people.FORMAT, ROW.split(","))
    kept = [x for x in columns if x[1] not in adult.LEFT_OUT]
    names, _, cells = zip(*kept)
    person, = read(",".join(names) + "\n" + ",".join(cells))
    assert adult.question(person) == adult.question(PERSON) and person.y == 1
    assert [person.values[i] for i in (2, 5, 7)] == ["0", "?", "?"]
    for name in names[:-1]:
        content = f"{','.join(names)}\n{','.join(cells)}".replace(f"{name},", "", 1)
        with pytest.raises(InputError, match="line 1: the header has no "):
            read(content)


CELLS = {  # a column, and what UCI writes: what others write
    ("sex", "Male"): ("male", " MALE "), ("age", "39"): ("39", " 39.0"),
    ("workclass", "Private"): (" Private ", "pRIVATE"),
    ("race", "Asian-Pac-Islander"): ("asian-pac-islander",),
    ("native country", "United-States"): ("united-STATES",),
    ("native country", "New zealand"): ("New zealand",),
    ("occupation", "?"): ("", " ", "?", "NaN", "NA", "None", "<NA>"),
    ("label", ">50K"): (">50k.", " > 50K", "1", "1.", "1.0"),
    ("label", "<=50K"): ("<=50k.", "<= 50K ", "0", "0.", "0.0"),
    ("label", "?"): ("", "?", "NaN")}
IMPOSSIBLE = {
    "age": ("", "?", "NaN", "-1", "39.5", "3", "thirty"),     # 3: a group of ages
    "fnlwgt": ("",), "hours per week": ("", "NaN", "40h", "1e3"),
    "workclass": ("4", "4.0", "-", "a\0b", "\x1b[31m"), "sex": ("", "?", "M", "0", "1"),
    "label": ("2", "-1", "50000", "0.5", "10", "yes", "50K", "=50K", ">500K")}


def test_a_cell_is_read_as_uci_writes_it():
    for (column, wanted), cells in CELLS.items():
        for cell in cells:
            assert people.clean(column, cell) == wanted, (column, cell)
    for column, cells in IMPOSSIBLE.items():
        for cell in cells:
            with pytest.raises(InputError) as refused:
                people.clean(column, cell)
            assert str(refused.value).startswith(f"{column} cannot be {cell!r}; ")


def test_a_label_may_be_missing_where_it_need_not_be_known(read):
    unknown = [PERSON._replace(y=None)]
    for content in (FILE.replace(">50K", ""), f"{NO_LABEL}\n{ROW[:-5]}"):
        assert read(content, labelled=False) == unknown
        with pytest.raises(InputError, match="line 2: the label is missing"):
            read(content)


FILE = f"{HEADER}\n{ROW}\n"
NO_LABEL = HEADER.replace(",income", "")
REFUSED = [
    (f"{HEADER},height\n{ROW},180", "line 1: 'height' is not one of"),
    (f"{HEADER},\n{ROW},", "line 1: '' is not one of"),
    (FILE.replace("income", "incme"), "line 1: 'incme' is not one of"),
    (FILE.replace("race", "gender"), "line 1: two columns are sex;"),
    (FILE.replace("age,", ",", 1), "line 1: the header has no age;"),
    (FILE + ROW + ",", "line 3: 16 cells for 15 columns"),
    (ROW[:-5], "line 1: 14 cells for 15 columns"),     # or a label would be a country
    (FILE.replace(",", ";"), "line 1: 1 cells for 15 columns"),
    (FILE + "," * 14, "line 3: age cannot be ''"),
    (FILE.replace("White", '"White'), "near line 2: this is not CSV in UTF-8 (unexp"),
    (FILE.encode("utf-16"), "near line 0: this is not CSV in UTF-8"),
    ("", "holds no rows"), (HEADER, "holds no rows")]


@pytest.mark.parametrize("content, why", REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_ambiguous_or_wrong_is_one_sentence(content, why, read):
    for labelled in (True, False):
        with pytest.raises(InputError) as refused:
            read(content, labelled=labelled)
        message = str(refused.value).partition("mine.csv")[2]
        assert message.strip(", ").startswith(why), message
        assert "\n" not in message


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    for data in (tmp_path / "nothing", "", os.devnull):
        with pytest.raises(InputError, match="neither a folder nor"):
            people.load(data)
    for name, why in (("nothing.csv", "No such file"), (".", "Is a directory")):
        with pytest.raises(InputError, match=rf"cannot be read \({why}"):
            people.read(tmp_path / name)


@pytest.fixture()
def uci(monkeypatch, tmp_path):
    """UCI sends tiny/'s files and the cache is empty -> (what was asked for, cache)."""
    asked = []

    def send(url, **_):
        asked.append(url)
        name = url.split("/")[-1]
        return io.BytesIO((adult.TINY / name).read_bytes())
    for name in people.SHA256:
        monkeypatch.setitem(people.SHA256, name, people.sha256_of(adult.TINY / name))
    monkeypatch.setattr(urllib.request, "urlopen", send)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked, tmp_path / "faircon"


def test_a_download_is_checked_and_kept(uci, monkeypatch):
    asked, _ = uci
    for _ in range(2):
        found = people.load()
        assert found.source == "UCI Adult"
        assert found.sha256 == people.SHA256
        assert (len(found.train), len(found.test)) == (8000, 4000)
    once = [people.UCI + name for name in people.SHA256]
    assert asked == once, "kept, yet asked for again"
    monkeypatch.setitem(people.SHA256, "adult.test", "0" * 64)
    with pytest.raises(InputError, match="adult.test does not have UCI's checksum"):
        people.load()


@pytest.mark.parametrize("thing, name, error", [
    (urllib.request, "urlopen", urllib.error.URLError("no route")),
    (urllib.request, "urlopen", http.client.IncompleteRead(b"39, Sta")),
    (pathlib.Path, "replace", OSError("no space left")),
    (pathlib.Path, "home", RuntimeError("no home")),
])
def test_without_ucis_data_the_twin_says_why(uci, monkeypatch, thing, name, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(thing, name, fail)
    if name == "home":
        monkeypatch.setenv("XDG_CACHE_HOME", "")
    why = str(error).strip("<>").removeprefix("urlopen error ")
    assert re.search(f"SYNTHETIC.*{re.escape(why[:20])}", people.load().source)
    _, cache = uci
    assert not list(cache.glob("*")), "the next run would take it for the data"
