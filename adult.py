"""Section 2: the Adult census as text.

A census row becomes one sentence that ends in "label:"; the model's next token, " 0"
or " 1", is its answer to "does this person earn over $50k?".

    s = 0, 1          Male, Female: the sensitive attribute       Person.s
    y = 0, 1          at most, or over, $50k                      Person.y
    x_m, x_f          one person's text as a man and as a woman   twins
    b_Pc              P(y=1|s=0) - P(y=1|s=1) of some people      base_rates, cells
    counterbalance    in a prompt, each person appears as both sexes       few_shot

PAPER vs RELEASED CODE: the released code compares labels with ">50K", and adult.test
writes ">50K.": every positive of that file becomes a negative, hence the paper's x5.23.
It tests on rows that its adversary was trained on; here training rows come from
adult.data and test rows from adult.test (`split`).

    python adult.py         # a row, its twins, a prompt, and where x5.23 comes from
"""
import collections
import csv
import functools
import hashlib
import http.client
import os
import pathlib
import re
import sys
import urllib.request
import warnings
from textwrap import fill
from typing import NamedTuple

# What a cell may be; the part in brackets is kept. A missing word is "?".
NUMBER = r"([0-9]+)(?:\.0+)?"                      # OpenML's readers write 25 as 25.0
WORD = r"(?!(?i:nan|na|n/a|<na>|none|null)$)(\?|.*[^\W\d].*)"   # no number, no null
FORMAT = {
    "age": NUMBER, "workclass": WORD, "fnlwgt": NUMBER, "education": WORD,
    "number of years of education": NUMBER, "marital status": WORD, "occupation": WORD,
    "relationship": WORD, "race": WORD, "sex": r"(Male|Female)", "capital gain": NUMBER,
    "capital loss": NUMBER, "hours per week": NUMBER, "native country": WORD,
    "label": r"(<=50K|>50K)\.?"}                   # adult.test ends it in a full stop
COLUMNS = tuple(FORMAT)[:14]
# As in the released code. Relationship would give sex away: Husband, Wife.
LEFT_OUT = ("fnlwgt", "marital status", "relationship")
ATTRIBUTES = tuple(name for name in COLUMNS if name not in LEFT_OUT)
SEX = COLUMNS.index("sex")
SEXES = ("Male", "Female")
INSTRUCTION = "Predict whether the annual income of this person is greater than $50k\n"
OPENING = "A person in the 1994 census has the following attributes:"
ANSWERS = ("0", "1")

TINY = pathlib.Path(__file__).resolve().parent / "tiny"
UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"}


class InputError(ValueError):
    """What the user gave is wrong; one sentence says what, and what to do."""


class Person(NamedTuple):
    """One census row: its 14 values as UCI writes them, and y = 1 for over $50k."""
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
    """A file in UCI's format -> list of Person. Raises InputError."""
    return read_csv(path, person_from)


def read_csv(path, parse):
    """What `parse` makes of each row, a list of cells; None is left out.

    InputError names file and line.
    """
    people = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True, strict=True)
            for row in filter(None, rows):
                people.append(parse(row))
    except InputError as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV in UTF-8 ({error}); is every "
                         "quote closed?") from None
    people = [person for person in people if person is not None]
    if not people:
        raise InputError(f"{path} holds no rows; is it the right file, and whole?")
    return people


def person_from(row):
    """The cells of a row -> Person, None for a comment. Raises InputError."""
    if row[0].startswith("|"):                                # adult.test's first line
        return None
    if len(row) != len(FORMAT):
        raise InputError(f"{len(row)} columns where Adult has 15; write all, as in "
                         "UCI's files, and no header.")
    *values, label = map(clean, FORMAT, row)
    return Person(tuple(values), int(label == ">50K"))


@functools.cache                                   # most cells repeat
def clean(column, cell):
    """The cell as UCI writes it. Raises InputError."""
    found = re.fullmatch(FORMAT[column], cell)
    if not found:
        raise InputError(f"{column} cannot be {cell!r}; keep UCI's column order and "
                         "values, ? for a missing word, and no header.")
    return found[1]


# ------------------------------------------------------------------ files

def load(directory=None):
    """The train and test people -> Adult. Raises InputError.

    A directory is taken as it is. Without one: the cache, else UCI (both must have the
    published sha256), else the synthetic twin in tiny/, and `source` says why.
    """
    source = str(directory)
    if directory is None:
        directory, source = find()
    elif os.path.realpath(directory) == str(TINY):
        source += " (SYNTHETIC twin of Adult)"
    paths = [pathlib.Path(directory) / name for name in SHA256]
    train, test = [read(path) for path in paths]
    digests = {path.name: sha256_of(path) for path in paths}
    return Adult(train, test, source, digests)


def find():
    """The folder of UCI's files, else tiny/ -> (path, source). Raises InputError."""
    try:
        # home() raises a RuntimeError where there is none.
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        cache = pathlib.Path(cache) / "faircon"
        for name in SHA256:
            path = cache / name
            if not os.path.isfile(path):
                fetch(UCI + name, path)
            if sha256_of(path) != SHA256[name]:
                raise InputError(f"{path} does not have UCI's checksum; delete it and "
                                 "run again, or give --data DIR.")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return TINY, f"tiny/ (SYNTHETIC twin of Adult; no UCI data: {reason!s:.44})"
    return cache, "UCI Adult"


def fetch(url, path):
    """Downloads a file under another name, then renames it: whole, or not there."""
    with urllib.request.urlopen(url, timeout=10) as response:
        content = response.read()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------ text

def question(person, sex=None, attributes=None):
    """The question about a person, answer left out; `sex` replaces the person's own."""
    values = dict(zip(COLUMNS, person.values))
    if sex is not None:
        values[COLUMNS[SEX]] = sex
    listed = ", ".join(f"{name} {values[name]}" for name in attributes or ATTRIBUTES)
    return f"{OPENING} {listed}\nlabel:"


def twins(person, attributes=None):
    """x_m and x_f of Eq. (3): the same question about a man and about a woman."""
    return [question(person, sex, attributes) for sex in SEXES]


def answer(person):
    """The answer as it stands in the text: " 0" or " 1"."""
    return f" {ANSWERS[person.y]}"


def flipped(person):
    """The same row with the other sex and the same label."""
    values = list(person.values)
    values[SEX] = SEXES[1 - person.s]
    return person._replace(values=tuple(values))


def shot(person):
    """One labelled example of a few-shot prompt."""
    return question(person) + answer(person) + "\n"


# ------------------------------------------------------------------ b_Pc

def base_rates(people):
    """b_Pc of some people, and how many have y = 0 for each one with y = 1."""
    rate = []
    for s in (0, 1):
        labels = [p.y for p in people if p.s == s]
        rate.append(sum(labels) / max(1, len(labels)))
    positives = sum(p.y for p in people)
    negatives = len(people) - positives
    return rate[0] - rate[1], negatives / max(1, positives)


def cells(n, bpc):
    """How many of n people fall in each (s, y).

    y is balanced (section 2), and so is s, which is our choice.

        n (1 + b) / 4    men with y = 1, and women with y = 0
        n (1 - b) / 4    men with y = 0, and women with y = 1

    Where that is not whole: the nearest whole number, with a warning. InputError if bpc
    is outside [-1, 1] or n is odd.
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


def enough(people, bpc, most):
    """The most people, up to `most`, that can be drawn balanced and also at b_Pc."""
    have = collections.Counter((p.s, p.y) for p in people)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(most, 4, -8):
            balanced = collections.Counter(cells(n, 0.))
            biased = collections.Counter(cells(n, bpc))
            if balanced <= have and biased <= have:
                return n
    return 4                                    # `sample` then says what is missing


def sample(people, n, bpc, rng):
    """n people at b_Pc in random order, nobody twice. rng: a numpy Generator.

    With bpc None they come as they are. InputError if there are too few of a kind.
    """
    if bpc is None:
        return draw(people, n, rng)
    drawn = []
    for (s, y), count in cells(n, bpc).items():
        group = [p for p in people if p.s == s and p.y == y]
        kind = f" with {COLUMNS[SEX]} {SEXES[s]} and label {y}"
        drawn += draw(group, count, rng, kind)
    return draw(drawn, n, rng)


def draw(people, n, rng, kind=""):
    """n of some people in random order. Raises InputError."""
    if n > len(people):
        raise InputError(f"{n} people{kind} are needed and the data has {len(people)}; "
                         "ask for fewer rows or another b_Pc.")
    order = rng.permutation(len(people))
    return [people[i] for i in order[:n]]


def few_shot(people, shots, bpc, rng, counterbalance=False):
    """A prompt: the instruction and `shots` labelled people (section 2).

    With `counterbalance` half as many are drawn, and each appears twice, as a man and
    as a woman with the same label: b_Pc of the prompt is 0 (Table 2).
    """
    if counterbalance:
        drawn = sample(people, shots // 2, bpc, rng)
        drawn += [flipped(p) for p in drawn]
        drawn = draw(drawn, len(drawn), rng)
    else:
        drawn = sample(people, shots, bpc, rng) if shots else []
    return INSTRUCTION + "".join(shot(p) for p in drawn)


class Split(NamedTuple):
    """One seed's people."""
    train: list         # rows of adult.data at b_Pc
    validation: list    # 100 others of adult.data, balanced: prompts are chosen on them
    test: list          # of adult.test, balanced: every reported number but acc_bpc
    test_bpc: list      # of adult.test, as biased as the training rows: acc_bpc


def split(data, rows, bpc, test_rows, seed):
    """Draws one seed's people -> Split. Raises InputError."""
    import numpy
    rng = numpy.random.default_rng(seed)
    train = sample(data.train, rows, bpc, rng)
    taken = {id(p) for p in train}
    others = [p for p in data.train if id(p) not in taken]
    validation = sample(others, 100, 0., rng)
    test = sample(data.test, test_rows, 0., rng)
    test_bpc = sample(data.test, test_rows, bpc, rng)
    return Split(train, validation, test, test_bpc)


# ------------------------------------------------------------------ the lesson

def show(text):
    """Prints a text, its long lines folded."""
    for line in text.splitlines():
        print(fill(line, 84))


def lesson():
    import numpy
    rng = numpy.random.default_rng(0)
    data = load(*sys.argv[1:2])
    person = data.train[0]
    print("data:", data.source)
    show("\na row: " + ", ".join(person.values))
    print(f"\nits text, x_{'mf'[person.s]} of Eq. (3); the next token answers, and "
          f"{answer(person)!r} is right:")
    show(question(person))
    x_m, x_f = twins(person)
    assert x_m != x_f, "twins differ"
    assert x_m.replace("sex Male", "sex Female") == x_f, "only in sex"
    print("\na prompt of two people at b_Pc = 1:")
    show(few_shot(data.train, 2, 1., rng))
    print("\n200 people at b_Pc = .5, by (s, y):", cells(200, .5))
    assert base_rates(sample(data.train, 200, .5, rng)) == (.5, 1.), "b_Pc is exact"
    print("In adult.test every label ends in a full stop. Compared with '>50K', as in "
          "the\nreleased code, all of them are negatives.")
    print("\nboth files together        y=0 : y=1   natural b_Pc   paper: x5.23, .1312")
    negatives = [p._replace(y=0) for p in data.test]
    for how, test in (("labels read correctly", data.test), ("as released", negatives)):
        b, ratio = base_rates(data.train + test)
        print(f"{how:<26} x{ratio:<12.2f} {b:.4f}")
    questions = [question(p) for p in data.train]
    seen = set(questions)
    again = [p for p in data.test if question(p) in seen]
    share = 100 * len(again) / len(data.test)
    print(f"\n{share:.1f} % of adult.test's questions are in adult.data word for word.")
    leaks = [x for x in questions if "Husband" in x or "Wife" in x]
    assert not leaks, f"{len(leaks)} of {len(questions)} questions give sex away"
    print("\nnow try: take relationship out of LEFT_OUT. Which check fails, and why?")


if __name__ == "__main__":
    try:
        lesson()
    except InputError as problem:
        sys.exit(f"adult.py: {problem}")
