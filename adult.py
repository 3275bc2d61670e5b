"""Section 2: the Adult census as text.

A census row becomes one sentence that ends in "label:"; the model's next token, " 0"
or " 1", is its answer to "does this person earn over $50k?".

    s = 0, 1          Male, Female: the sensitive attribute       Person.s
    y = 0, 1          at most, or over, $50k                      Person.y
    x_m, x_f          one person's text as a man and as a woman   twins
    b_Pc              P(y=1|s=0) - P(y=1|s=1) of some people      base_rates, cells
    counterbalance    each person of a prompt stands there as both sexes       few_shot

PAPER vs RELEASED CODE: the released code compares labels with ">50K", and adult.test
writes ">50K.": every positive of that file becomes a negative, hence the paper's x5.23.
Its test rows are those of its adversary; here they come from two files: `split`.

    python adult.py         # a row, its twins, a prompt, and where x5.23 comes from
"""
import csv
import hashlib
import http.client
import os
import pathlib
import sys
import urllib.error
import urllib.request
import warnings
from textwrap import fill
from typing import NamedTuple

COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "number of years of education",
    "marital status", "occupation", "relationship", "race", "sex", "capital gain",
    "capital loss", "hours per week", "native country")
# As in the released code. Relationship would give sex away: Husband, Wife.
LEFT_OUT = ("fnlwgt", "marital status", "relationship")
ATTRIBUTES = tuple(name for name in COLUMNS if name not in LEFT_OUT)
SEX = COLUMNS.index("sex")
SEXES = ("Male", "Female")
INSTRUCTION = "Predict whether the annual income of this person is greater than $50k\n"
OPENING = "A person in the 1994 census has the following attributes:"

TINY = pathlib.Path(__file__).resolve().parent / "tiny"
UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"}


class InputError(ValueError):
    """What the user gave is wrong; one sentence says what, and what to do."""


class Person(NamedTuple):
    """One census row: its 14 values as written, and y = 1 for over $50k."""
    values: tuple
    y: int

    @property
    def s(self):
        """The sensitive attribute: 0 for Male, 1 for Female."""
        return SEXES.index(self.values[SEX])


class Adult(NamedTuple):
    """The people of adult.data and of adult.test, and where they came from."""
    train: list
    test: list
    source: str
    sha256: dict


# ------------------------------------------------------------------ rows

def read(path):
    """One UCI file, as it is published -> list of Person; see `parse`."""
    return parse(contents(path), path)


def contents(path):
    """The bytes of a file. InputError."""
    path = pathlib.Path(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a data folder holds adult.data and "
                         "adult.test.") from None
    except NotADirectoryError:
        raise InputError(f"{path.parent} is a file; give the folder that holds "
                         "adult.data and adult.test.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); "
                         "give a readable file.") from None


def parse(content, path):
    """The bytes of a UCI file -> list of Person. Raises InputError.

    adult.test begins with "|1x3 Cross validator" and its labels end in a full stop;
    both files end in a blank line and write a missing value as "?", which stays.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
        rows = list(csv.reader(lines, skipinitialspace=True, strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; "
                         f"save it as such, or take {UCI}'s.") from None
    except csv.Error as error:
        raise InputError(f"{path} has a quote or a line that is no row ({error}); "
                         f"mend it, or take {UCI}'s.") from None
    people = []
    for number, row in enumerate(rows, 1):
        if not row or row[0].startswith("|"):
            continue
        check_row(row, f"{path}, line {number}")
        label = row[14].rstrip(".")
        people.append(Person(tuple(row[:14]), int(label == ">50K")))
    if not people:
        raise InputError(f"{path} holds no rows; is it the right file, and whole?")
    return people


def check_row(row, where):
    """InputError unless a row has Adult's 15 columns, none empty, in their order."""
    if row[0].strip().lower() == "age":
        raise InputError(f"{where}: a header; Adult's files have none, take it out.")
    if len(row) != 15:
        raise InputError(f"{where}: {len(row)} columns where Adult has 15; "
                         "write all, as in UCI's files.")
    if "" in row:
        raise InputError(f"{where}: an empty cell; write a missing value as ?.")
    if row[SEX] not in SEXES or row[14].rstrip(".") not in ("<=50K", ">50K"):
        raise InputError(f"{where}: sex {row[SEX]!r} or label {row[14]!r} is not one "
                         "of Adult's values; check the column order.")


def load(directory=None):
    """The train and test people -> Adult. Raises InputError.

    A directory is taken as it is. Without one: the cache, else UCI (both must have the
    published sha256), else the synthetic twin in tiny/, and `source` says why.
    """
    source, files = str(directory), {}
    if directory is None:
        directory, source, files = find()
    directory = pathlib.Path(directory)
    if directory.is_file():
        raise InputError(f"{directory} is a file; give the folder that holds "
                         "adult.data and adult.test.")
    if directory.resolve() == TINY and "SYNTHETIC" not in source:
        source += " (SYNTHETIC twin of Adult)"
    people, digests = [], {}
    for name in SHA256:
        path = directory / name
        content = files[name] if name in files else contents(path)
        people.append(parse(content, path))
        digests[name] = hashlib.sha256(content).hexdigest()
    return Adult(*people, source, digests)


def find():
    """Where the published files are -> (directory, source, {name: bytes})."""
    try:
        cache = pathlib.Path.home() / ".cache"
    except RuntimeError:                            # no HOME, and a user without a name
        cache = pathlib.Path("/nonexistent")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or cache) / "faircon"
    files = {}
    try:
        for name in SHA256:
            if (cache / name).is_file():
                files[name] = (cache / name).read_bytes()
    except OSError as error:
        raise InputError(f"{cache / name} cannot be read ({error.strerror}); make it "
                         "readable, or delete it.") from None
    if len(files) == len(SHA256):
        check_sha256(files, f"the files in {cache} do not have UCI's checksums; "
                            "delete that folder and run again.")
        return cache, "UCI Adult", files
    try:
        files = {name: fetch(UCI + name) for name in SHA256}
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        return TINY, f"tiny/ (SYNTHETIC twin of Adult; UCI gave: {reason!s:.44})", {}
    check_sha256(files, f"what {UCI} sent has a wrong checksum; fetch both files by "
                        "hand and give --data DIR.")
    return cache, "UCI Adult" + keep(files, cache), files


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def check_sha256(files, complaint):
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise InputError(complaint)


def keep(files, cache):
    """Write the files into the cache, renamed into place -> a note if it failed."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            part = cache / f"{name}.{os.getpid()}.part"
            try:
                part.write_bytes(content)
                part.replace(cache / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        return f" (not kept: {cache} cannot be written, {error.strerror})"
    return ""


# ------------------------------------------------------------------ text

def text(person, sex=None, attributes=ATTRIBUTES):
    """The question about a person, answer left out; `sex` replaces the person's own."""
    values = dict(zip(COLUMNS, person.values))
    if sex is not None:
        values["sex"] = sex
    listed = ", ".join(f"{name} {values[name]}" for name in attributes)
    return f"{OPENING} {listed}\nlabel:"


def twins(person, attributes=ATTRIBUTES):
    """x_m and x_f of Eq. (3): the same question about a man and about a woman."""
    return [text(person, sex, attributes) for sex in SEXES]


def answer(person):
    """The answer as it stands in the text: " 0" or " 1"."""
    return f" {person.y}"


def flipped(person):
    """The same row with the other sex and the same label."""
    values = list(person.values)
    values[SEX] = SEXES[1 - person.s]
    return person._replace(values=tuple(values))


def shot(person):
    """One labelled line of a few-shot prompt."""
    return text(person) + answer(person) + "\n"


# ------------------------------------------------------------------ b_Pc

def base_rates(people):
    """b_Pc of some people, and how many have y = 0 for one with y = 1."""
    rate = []
    for s in (0, 1):
        labels = [p.y for p in people if p.s == s]
        rate.append(sum(labels) / max(1, len(labels)))
    positives = sum(p.y for p in people)
    return rate[0] - rate[1], (len(people) - positives) / max(1, positives)


def cells(n, bpc):
    """How many of n people fall in each (s, y); y (section 2) and s are balanced.

        n (1 + b) / 4    men with y = 1, and women with y = 0
        n (1 - b) / 4    men with y = 0, and women with y = 1

    Where that is not whole, the nearest whole number, with a warning. InputError for
    bpc outside [-1, 1] or n not even.
    """
    if not -1 <= bpc <= 1:
        raise InputError(f"b_Pc = {bpc} is impossible: a difference of two "
                         "probabilities lies in [-1, 1].")
    if n < 2 or n % 2:
        raise InputError(f"{n} people cannot be balanced over two sexes; "
                         "ask for an even number of at least 2.")
    k = min(n // 2, round(n * (1 + bpc) / 4))
    exact = 4 * k / n - 1
    if abs(exact - bpc) > 1e-9:
        warnings.warn(f"b_Pc = {bpc:.4g} is not exact with {n} people: "
                      f"b_Pc = {exact:.4g} is used", stacklevel=2)
    return {(0, 1): k, (0, 0): n // 2 - k, (1, 1): n // 2 - k, (1, 0): k}


def sample(people, n, bpc, rng):
    """n people at b_Pc in random order, nobody twice. rng: a numpy Generator.

    bpc None: as they come (natural). InputError when there are too few of a kind.
    """
    if bpc is None:
        if n > len(people):
            raise InputError(f"{n} people asked of {len(people)}; ask for fewer.")
        return [people[i] for i in rng.permutation(len(people))[:n]]
    drawn = []
    for (s, y), count in cells(n, bpc).items():
        group = [p for p in people if p.s == s and p.y == y]
        if count > len(group):
            raise InputError(
                f"{count} people with sex {SEXES[s]} and label {y} are needed and the "
                f"data has {len(group)}; ask for fewer rows or another b_Pc.")
        drawn += [group[i] for i in rng.permutation(len(group))[:count]]
    return [drawn[i] for i in rng.permutation(n)]


def few_shot(people, shots, bpc, rng, counterbalance=False):
    """A prompt of `shots` labelled people behind the instruction (section 2).

    With `counterbalance` half as many are drawn, and each stands there twice, as a man
    and as a woman with the same label: b_Pc of the prompt is 0 (Table 2).
    """
    if counterbalance:
        drawn = sample(people, shots // 2, bpc, rng)
        drawn += [flipped(p) for p in drawn]
        drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    else:
        drawn = sample(people, shots, bpc, rng) if shots else []
    return INSTRUCTION + "".join(shot(p) for p in drawn)


class Split(NamedTuple):
    """One seed's people; see `split`."""
    train: list
    validation: list
    test: list
    test_bpc: list


def split(data, rows, bpc, test_rows, seed):
    """Draw one seed's people -> Split. Raises InputError.

    train         rows of adult.data at b_Pc
    validation    100 others of adult.data, balanced: prompts are chosen on them
    test          of adult.test, balanced: every reported number but acc_bpc
    test_bpc      of adult.test, with the bias of the training rows: acc_bpc
    """
    import numpy
    rng = numpy.random.default_rng(seed)
    train = sample(data.train, rows, bpc, rng)
    taken = {id(p) for p in train}
    others = [p for p in data.train if id(p) not in taken]
    validation = sample(others, 100, 0., rng)
    test = sample(data.test, test_rows, 0., rng)
    return Split(train, validation, test, sample(data.test, test_rows, bpc, rng))


# ------------------------------------------------------------------ the lesson

def wrapped(text):
    """Every line of a text folded to the page's width, its own line breaks kept."""
    return "\n".join(fill(line, 84) for line in text.split("\n"))


def lesson():
    import numpy
    rng = numpy.random.default_rng(0)
    data = load(sys.argv[1] if len(sys.argv) > 1 else None)
    person = data.train[0]
    print(f"data: {data.source}\n\na row: {fill(', '.join(person.values), 80)}")
    print(f"\nits text, x_{'mf'[person.s]} of Eq. (3); the next token answers, and "
          f"{answer(person)!r} is right:\n{wrapped(text(person))}")
    x_m, x_f = twins(person)
    assert x_f == x_m.replace("sex Male", "sex Female"), "twins differ in sex alone"
    print("\na prompt of two people at b_Pc = 1:\n"
          + wrapped(few_shot(data.train, 2, 1., rng)))
    print(f"200 people at b_Pc = .5, by (s, y): {cells(200, .5)}")
    assert base_rates(sample(data.train, 200, .5, rng)) == (.5, 1.), "b_Pc is exact"
    print("In adult.test every label ends in a full stop. Compared with '>50K', as in "
          "the\nreleased code, all of them are negatives.")
    print("\nboth files together        y=0 : y=1   natural b_Pc   paper: x5.23, .1312")
    for how, as_released in (("labels read correctly", False), ("as released", True)):
        people = list(data.train)
        people += [p._replace(y=0) for p in data.test] if as_released else data.test
        b, ratio = base_rates(people)
        print(f"{how:<26} x{ratio:<12.2f} {b:.4f}")
    seen = {text(p) for p in data.train}
    share = sum(text(p) in seen for p in data.test) / len(data.test)
    print(f"\n{100 * share:.1f} % of adult.test's questions stand word for word in "
          "adult.data.")
    print("\nnow try: leave sex out of ATTRIBUTES; which check fails, and why?")


if __name__ == "__main__":
    try:
        lesson()
    except InputError as problem:
        sys.exit(f"adult.py: {problem}")
