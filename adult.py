"""Section 2: the Adult census as text.

A census row becomes one sentence that ends in "label:"; the model's next token, " 0"
or " 1", is its answer to "does this person earn over $50k?".

    s = 0, 1          Male, Female: the sensitive attribute           Person.s
    y = 0, 1          at most, or over, $50k                          Person.y
    x_m, x_f          one person's text as a man and as a woman       twins
    b_Pc              P(y=1|s=0) - P(y=1|s=1) of some people          b_pc_and_ratio
    counterbalance    in a prompt, each person appears as both sexes  few_shot

PAPER vs RELEASED CODE: the released code compares labels with ">50K", and adult.test
writes ">50K.": every positive of that file becomes a negative, hence the paper's x5.23.
It tests on rows that its adversary was trained on; here training rows come from
adult.data and test rows from adult.test (`split`).

    python adult.py         # a row, its twins, a prompt; SYNTHETIC people
    python adult.py DIR     # the same of UCI's two files, and where x5.23 comes from
"""
import pathlib
import sys
import warnings
from textwrap import fill, indent
from typing import NamedTuple

import numpy

COLUMNS = ("age", "workclass", "fnlwgt", "education", "number of years of education",
           "marital status", "occupation", "relationship", "race", "sex",
           "capital gain", "capital loss", "hours per week", "native country")
# As in the released code. Relationship would give sex away: Husband, Wife.
LEFT_OUT = ("fnlwgt", "marital status", "relationship")
ATTRIBUTES = tuple(name for name in COLUMNS if name not in LEFT_OUT)
SEX = COLUMNS.index("sex")
SEXES = ("Male", "Female")
LABELS = ("<=50K", ">50K")
INSTRUCTION = "Predict whether the annual income of this person is greater than $50k\n"
OPENING = "A person in the 1994 census has the following attributes:"
ANSWERS = ("0", "1")
TINY = pathlib.Path(__file__).resolve().parent / "tiny"


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
    sha256: dict = {}            # of each file, for a run's record: beyond/people.py


# ------------------------------------------------------------------ rows

def load(directory=TINY):
    """UCI's two files in a folder -> Adult. Raises InputError.

    Other forms of Adult, and the download, are in beyond/people.py.
    """
    directory = pathlib.Path(directory)
    train, test = [read(directory / name) for name in ("adult.data", "adult.test")]
    return Adult(train, test, called(directory))


def called(directory):
    """What to call the data of a folder."""
    if pathlib.Path(directory).resolve() == TINY:
        return f"{directory} (SYNTHETIC stand-in for Adult)"
    return str(directory)


def read(path):
    """A file as UCI writes it -> list of Person. InputError names file and line."""
    try:
        lines = pathlib.Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8")
        raise InputError(f"{path} cannot be read ({why}).") from None
    people = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("|"):                 # adult.test's first line
            people.append(person_from(line, f"{path}, line {number}"))
    if not people:
        raise InputError(f"{path} holds no rows.")
    return people


def person_from(line, where):
    """15 values, ", " between them -> Person. Raises InputError."""
    *values, label = line.split(", ")
    label = label.removesuffix(".")                # adult.test ends it in a full stop
    if len(values) != 14 or values[SEX] not in SEXES or label not in LABELS:
        raise InputError(f"{where} is not a row as UCI writes it (train.py --data "
                         "reads other forms).")
    return Person(tuple(values), LABELS.index(label))


# ------------------------------------------------------------------ text

def question(person, sex=None, attributes=None):
    """The question about a person, answer left out; `sex` replaces the person's own."""
    values = dict(zip(COLUMNS, person.values))
    if sex is not None:
        values[COLUMNS[SEX]] = sex
    names = ATTRIBUTES if attributes is None else attributes
    listed = ", ".join(f"{name} {values[name]}" for name in names)
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

def b_pc_and_ratio(people):
    """b_Pc of a list of people, and how many have y = 0 for each one with y = 1."""
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
    """How many people, `most` or fewer, can be drawn balanced and also at b_Pc."""
    for s, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
        have = sum(p.s == s and p.y == y for p in people)
        share = (1 - bpc) / 4 if s == y else (1 + bpc) / 4                    # cells
        most = min(most, have / max(1 / 4, share))
    # A multiple of 8: exact at b_Pc = .5. If there are too few, `sample` says what.
    return max(4, int(most) // 8 * 8)


def sample(people, n, bpc, rng):
    """n different people at b_Pc in random order. rng: a numpy Generator.

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
    rng = numpy.random.default_rng(seed)
    train = sample(data.train, rows, bpc, rng)
    taken = {id(p) for p in train}
    others = [p for p in data.train if id(p) not in taken]
    validation = sample(others, 100, 0., rng)
    test = sample(data.test, test_rows, 0., rng)
    test_bpc = sample(data.test, test_rows, bpc, rng)
    return Split(train, validation, test, test_bpc)


# ------------------------------------------------------------------ the lesson

def show(text, margin=""):
    """Prints a text, its long lines folded."""
    for line in text.splitlines():
        print(indent(fill(line, 84, break_on_hyphens=False), margin))


def lesson():
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
    assert b_pc_and_ratio(sample(data.train, 200, .5, rng)) == (.5, 1.), "b_Pc is exact"
    print("In adult.test every label ends in a full stop. Compared with '>50K', as in "
          "the\nreleased code, all of them are negatives. (Synthetic rows have Adult's "
          "base rates\nby construction; `python adult.py DIR` reads the real ones.)")
    print("\nboth files together        y=0 : y=1   natural b_Pc   paper: x5.23, .1312")
    negatives = [p._replace(y=0) for p in data.test]
    for how, test in (("labels read correctly", data.test), ("as released", negatives)):
        b, ratio = b_pc_and_ratio(data.train + test)
        print(f"{how:<26} x{ratio:<12.2f} {b:.4f}")
    questions = [question(p) for p in data.train]
    seen = set(questions)
    again = [p for p in data.test if question(p) in seen]
    share = 100 * len(again) / len(data.test)
    print(f"\n{share:.1f} % of adult.test's questions are in adult.data word for word: "
          "a model that was\ntrained on all of that file may remember their answers.")
    leaks = [x for x in questions if "Husband" in x or "Wife" in x]
    assert not leaks, f"{len(leaks)} of {len(questions)} questions give sex away"
    print("\nnow try: take relationship out of LEFT_OUT. Which check fails, and why?")


if __name__ == "__main__":
    try:
        lesson()
    except InputError as problem:
        sys.exit(f"adult.py: {problem}")
