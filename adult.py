"""Section 2: the Adult census as text. Rows, their counterfactual twins, samples at an exact b_Pc, few-shot prompts.

A row of the UCI file becomes one sentence ending in "label:", and the model's next token, " 0" or " 1", is its answer.
Where we depart from the paper: train rows come from adult.data and test rows from adult.test only, labels lose their full
stop (see `read`), and people are drawn without replacement.

    python adult.py [DIR]      # the base rates behind the paper's "x5.23" and "b = 0.1312", and where they come from
"""
import csv
import hashlib
import os
import pathlib
import socket
import sys
import urllib.error
import urllib.request
import warnings
from typing import NamedTuple

COLUMNS = ("age", "workclass", "fnlwgt", "education", "number of years of education", "marital status", "occupation",
           "relationship", "race", "sex", "capital gain", "capital loss", "hours per week", "native country")
# Left out as in the released code: final weight, marital status, and relationship (Husband / Wife would give sex away).
ATTRIBUTES = tuple(c for c in COLUMNS if c not in ("fnlwgt", "marital status", "relationship"))
SEX = COLUMNS.index("sex")
SEXES = ("Male", "Female")  # s = 0, s = 1
INSTRUCTION = "Predict whether the annual income of this person is greater than $50k\n"
OPENING = "A person in the 1994 census has the following attributes:"
TINY = pathlib.Path(__file__).resolve().parent / "tiny"
UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {"adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
          "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"}


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence saying what, and what to do."""


class Person(NamedTuple):
    """One census row: its 14 values as written, and y = 1 when the income is above $50k."""
    values: tuple
    y: int

    @property
    def s(self):
        """The sensitive attribute: 0 for Male, 1 for Female (§2)."""
        return SEXES.index(self.values[SEX])


class Adult(NamedTuple):
    """`load`'s result: people of adult.data, people of adult.test, and where they came from."""
    train: list
    test: list
    source: str
    sha256: dict
    directory: pathlib.Path


# ---------------------------------------------------------------- rows

def read(path, labels_as_released=False):
    """Parse one UCI file exactly as it is published -> list of Person.

    adult.test opens with "|1x3 Cross validator" and ends every label with a full stop; both files end in a blank line and
    write a missing value as "?", which stays. PAPER vs RELEASED CODE: `labels_as_released` compares the raw label with
    ">50K", which turns every positive of adult.test (">50K.") into a negative. Raises InputError.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a directory that holds adult.data and adult.test.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; download it again from {UCI}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a readable file.") from None
    people = []
    for number, row in enumerate(csv.reader(lines, skipinitialspace=True), 1):
        if not row or row[0].startswith("|"):
            continue
        if len(row) != 15:
            raise InputError(f"{path}, line {number}: {len(row)} columns where Adult has 15; is this UCI's file, whole?")
        label = row[14] if labels_as_released else row[14].rstrip(".")
        if row[SEX] not in SEXES or label.rstrip(".") not in ("<=50K", ">50K"):
            raise InputError(f"{path}, line {number}: sex {row[SEX]!r} or label {row[14]!r} is not one of Adult's values; "
                             "check the column order.")
        people.append(Person(tuple(row[:14]), int(label == ">50K")))
    if not people:
        raise InputError(f"{path} holds no rows; download it again from {UCI}.")
    return people


def load(directory=None):
    """The train and test people -> Adult. Without a directory: the cache, else UCI, else the synthetic twin in tiny/.

    A directory is taken as it is. The cache and the download must have the published sha256. Raises InputError.
    """
    source = str(directory)
    if directory is None:
        directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "faircon"
        source = "UCI Adult"
        if not all((directory / name).exists() for name in SHA256) and not _download(directory):
            directory, source = TINY, "tiny/ (SYNTHETIC twin of Adult: UCI could not be reached)"
    directory = pathlib.Path(directory)
    train, test = read(directory / "adult.data"), read(directory / "adult.test")
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in SHA256}
    if source == "UCI Adult" and digests != SHA256:
        raise InputError(f"the files in {directory} do not have UCI's checksums; delete that directory and run again.")
    if directory.resolve() == TINY and "SYNTHETIC" not in source:
        source += " (SYNTHETIC twin of Adult)"
    return Adult(train, test, source, digests, directory)


def _download(directory):
    """Fetch both files into `directory`, checked and renamed into place; False when there is no network or no room."""
    try:
        socket.create_connection((UCI.split("/")[2], 443), timeout=3).close()  # an absent network costs seconds
        for name, digest in SHA256.items():
            data = urllib.request.urlopen(UCI + name, timeout=10).read()
            if hashlib.sha256(data).hexdigest() != digest:
                raise InputError(f"{UCI}{name} arrived with a wrong checksum; fetch it by hand and pass --data DIR.")
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.part").write_bytes(data)
            (directory / f"{name}.part").replace(directory / name)
    except (urllib.error.URLError, OSError):
        return False
    return True


def base_rates(people):
    """§2's two figures of a data set -> (b, ratio): P(y=1|s=0) - P(y=1|s=1), and people with y=0 per person with y=1."""
    rate = [sum(p.y for p in people if p.s == s) / max(1, sum(p.s == s for p in people)) for s in (0, 1)]
    positives = sum(p.y for p in people)
    return rate[0] - rate[1], (len(people) - positives) / max(1, positives)


# ---------------------------------------------------------------- text

def text(person, sex=None, attributes=ATTRIBUTES):
    """The question about one person, without its answer; `sex` replaces the person's own (the counterfactual)."""
    values = dict(zip(COLUMNS, person.values))
    values["sex"] = sex or values["sex"]
    return f"{OPENING} " + ", ".join(f"{name} {values[name]}" for name in attributes) + "\nlabel:"


def twins(person):
    """x_m and x_f of Eq. (3): the same question about a man and about a woman."""
    return tuple(text(person, sex) for sex in SEXES)


def answer(person):
    """The answer as it stands in the text: " 0" or " 1"."""
    return f" {person.y}"


# ---------------------------------------------------------------- sampling at a chosen b_Pc

def cells(n, bpc):
    """How many of n people fall in each (s, y) for b_Pc = P(y=1|s=0) - P(y=1|s=1), with y and s both balanced (§2).

    n(1+b)/4 men with y=1 and women with y=0, n(1-b)/4 of the others. Where that is not whole, the nearest whole number is
    taken and a warning tells the b that results. Raises InputError for bpc outside [-1, 1] or n that is not even.
    """
    if not -1 <= bpc <= 1:
        raise InputError(f"b_Pc = {bpc} is impossible: a difference of two probabilities lies in [-1, 1].")
    if n < 2 or n % 2:
        raise InputError(f"{n} people cannot be balanced over two sexes; ask for an even number of at least 2.")
    k = min(n // 2, round(n * (1 + bpc) / 4))
    if abs(4 * k / n - 1 - bpc) > 1e-9:
        warnings.warn(f"b_Pc = {bpc:.4g} is not exact with {n} people: b_Pc = {4 * k / n - 1:.4g} is used", stacklevel=2)
    return {(0, 1): k, (0, 0): n // 2 - k, (1, 1): n // 2 - k, (1, 0): k}


def sample(people, n, bpc, rng):
    """n people without replacement at b_Pc, shuffled; bpc=None draws them as they come (natural). rng: numpy Generator.

    Raises InputError when a cell has too few people.
    """
    if bpc is None:
        if n > len(people):
            raise InputError(f"{n} people asked of {len(people)}; ask for fewer.")
        return [people[i] for i in rng.permutation(len(people))[:n]]
    drawn = []
    for (s, y), count in cells(n, bpc).items():
        group = [p for p in people if p.s == s and p.y == y]
        if count > len(group):
            raise InputError(f"{count} people with sex {SEXES[s]} and label {y} are needed and the data has {len(group)}; "
                             "ask for fewer rows or another b_Pc.")
        drawn += [group[i] for i in rng.permutation(len(group))[:count]]
    return [drawn[i] for i in rng.permutation(n)]


def few_shot(people, shots, bpc, rng, counterbalance=False):
    """A prompt of `shots` labelled people, instruction first (§2).

    With `counterbalance` half as many are drawn and each stands there twice, as a man and as a woman, with the same label.
    """
    drawn = sample(people, shots // 2 if counterbalance else shots, bpc, rng) if shots else []
    lines = [text(p) + answer(p) for p in drawn]
    if counterbalance:
        lines = [text(p, sex) + answer(p) for p in drawn for sex in SEXES]
        lines = [lines[i] for i in rng.permutation(len(lines))]
    return INSTRUCTION + "".join(line + "\n" for line in lines)


if __name__ == "__main__":
    try:
        data = load(sys.argv[1] if len(sys.argv) > 1 else None)
    except InputError as problem:
        sys.exit(f"adult.py: {problem}")
    print(f"data: {data.source}, adult.data and adult.test merged")
    for how, released in (("labels read correctly", False), ("labels compared with '>50K' as the released code does", True)):
        b, ratio = base_rates([p for name in SHA256 for p in read(data.directory / name, released)])
        print(f"  {how}: y=0 : y=1 = x{ratio:.2f}, natural b_Pc = {b:.4f}")
    print("paper: x5.23, b_Pc = 0.1312")
