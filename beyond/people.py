"""NOT IN THE PAPER: Adult's people from UCI, or from users' own CSV files.

    --data    a folder of adult.data and adult.test; or one file, of which a random half
              is the test; without it UCI's, else the synthetic stand-in in tiny/
    header    UCI's, Kaggle's or OpenML's names in any order; without one, UCI's order.
              fnlwgt, marital status and relationship may be missing; a first column
              without a name is an index
    words     in any case; empty, NaN and ? are a missing one, "?"
    label     <=50K or >50K, or 0 or 1 (over $50k); a full stop may follow

A column of any other name is refused: ignored, it would seem to count, and a misspelt
label would seem to be missing.
"""
import csv
import functools
import hashlib
import http.client
import os
import pathlib
import re
import urllib.request

import numpy

import adult
from adult import InputError, Person
from beyond import runs

UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"}
# What a cell may be; the part in brackets is kept. OpenML's readers write 25 as 25.0,
# and its first version of Adult has age groups, 0 to 4.
NUMBER = r"([0-9]+)(?:\.0+)?"
WORD = r"(\?|.*[^\W\d].*)"                                # no number
NUMBERS = ("fnlwgt", "number of years of education", "capital gain", "capital loss",
           "hours per week")
FORMAT = {
    **dict.fromkeys(adult.COLUMNS, WORD), **dict.fromkeys(NUMBERS, NUMBER),
    "age": r"([1-9][0-9]+)(?:\.0+)?", "sex": r"(Male|Female)",
    "label": r"(<=50K|>50K|\?)"}
ABSENT = {**dict.fromkeys(adult.LEFT_OUT, "?"), "fnlwgt": "0", "label": "?"}
MISSING = ("", "nan", "na", "n/a", "<na>", "none", "null")


def plain(name):
    """A column's name without case, dots, dashes, underscores and spaces."""
    return re.sub(r"[-._\s]", "", name.lower())


NAMES = {**{plain(name): name for name in FORMAT}, "gender": "sex", "income": "label",
         "class": "label", "salary": "label",
         "educationnum": "number of years of education",
         "educationalnum": "number of years of education"}


# ------------------------------------------------------------------ where files are

def load(data=None):
    """The train and test people -> adult.Adult. Raises InputError.

    data: a folder or one file, taken as it is. Without: the cache, else UCI (both must
    have the published sha256), else tiny/, and `source` says why.
    """
    if data is None:
        folder, source = find()
    elif os.path.isdir(data):
        folder, source = pathlib.Path(data), adult.called(data)
    elif os.path.isfile(data):
        source = f"{data} (a random half is the test)"
        return gather({pathlib.Path(data).name: data}, read, source)
    else:
        raise InputError(f"{str(data)!r} is neither a folder nor a file; give --data a "
                         "folder of adult.data and adult.test, or a CSV file.")
    return gather({name: folder / name for name in SHA256}, read, source)


def gather(files, read, source):
    """{name: path} of one or two files, each by `read` -> adult.Adult.

    Of one file a random half is the test, the same for every seed.
    """
    parts = [read(path) for path in files.values()]
    if len(parts) == 1:
        people = adult.draw(parts[0], len(parts[0]), numpy.random.default_rng(0))
        parts = [people[::2], people[1::2]]
    digests = {name: sha256_of(path) for name, path in files.items()}
    return adult.Adult(*parts, source, digests)


def find():
    """The folder of UCI's files, else tiny/ -> (path, source). Raises InputError."""
    try:
        # home() raises a RuntimeError where there is none.
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        cache = pathlib.Path(cache) / "faircon"
        for name in SHA256:
            path = cache / name
            if not os.path.isfile(path):
                with urllib.request.urlopen(UCI + name, timeout=10) as response:
                    runs.write(path, response.read())
            if sha256_of(path) != SHA256[name]:
                raise InputError(f"{path} does not have UCI's checksum; delete it and "
                                 "run again, or give --data DIR.")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = f"SYNTHETIC stand-in for Adult; no UCI data: {reason!s:.44}"
        return adult.TINY, f"tiny/ ({why})"
    return cache, "UCI Adult"


def sha256_of(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


# ------------------------------------------------------------------ rows

def read(path, labelled=True):
    """A CSV file -> list of Person. Raises InputError.

    labelled: every label must be there; otherwise y is None for a missing one.
    """
    columns = []                                       # known from the first row on

    def parse(row):
        if row[0].startswith("|"):                           # adult.test's first line
            return None
        if not columns:
            header = NAMES.keys() & map(plain, row)
            columns.extend(columns_of(row) if header else FORMAT)
            if header:
                return None
        return person_from(row, columns, labelled)

    return read_csv(path, parse)


def read_csv(path, parse):
    """What `parse` makes of each row (None: left out). InputError names file, line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True, strict=True)
            people = [parse(row) for row in rows if row]
    except InputError as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}, near line {rows.line_num}: this is not CSV in UTF-8 "
                         f"({error}); save it as that, every quote closed.") from None
    people = [person for person in people if person is not None]
    if not people:
        raise InputError(f"{path} holds no rows; is it the right file, and whole?")
    return people


def columns_of(header):
    """Which of Adult's columns they are, None for an index. Raises InputError."""
    columns = [NAMES.get(plain(name), name) for name in header]
    if plain(header[0]) in ("", "unnamed:0"):                # as pandas writes an index
        columns[0] = None
    for column in columns:
        if column not in (None, *FORMAT):
            raise InputError(f"{column!r} is not one of Adult's columns; take it out, "
                             "or give it UCI's name.")
        if columns.count(column) > 1:
            raise InputError(f"two columns are {column}; keep one.")
    for column in FORMAT:
        if column not in columns and column not in ABSENT:
            raise InputError(f"the header has no {column}; add this column.")
    return columns


def person_from(row, columns, labelled):
    """The cells of a row -> Person. Raises InputError."""
    if len(row) != len(columns):
        raise InputError(f"{len(row)} cells for {len(columns)} columns; put commas "
                         "between them, and a header above columns that are not UCI's.")
    cells = {**ABSENT, **dict(zip(columns, row))}
    *values, label = [clean(column, cells[column]) for column in FORMAT]
    if labelled and label == "?":
        raise InputError("the label is missing; give <=50K or >50K, or 0 or 1.")
    return Person(tuple(values), {"<=50K": 0, ">50K": 1, "?": None}[label])


@functools.cache                                   # most cells repeat
def clean(column, cell):
    """The cell as UCI writes it. Raises InputError."""
    word = cell.strip()
    word = "?" if word.lower() in MISSING else spelling().get(word.lower(), word)
    if column == "label":
        word = re.sub(r"\s|\.0*$", "", word).upper()
        word = {"0": "<=50K", "1": ">50K"}.get(word, word)
    found = re.fullmatch(FORMAT[column], word)
    if not found or not word.isprintable():
        raise InputError(f"{column} cannot be {cell!r:.60}; a number must be whole, a "
                         "word no number (? if missing), a label <=50K, >50K, 0 or 1.")
    return found[1]


@functools.cache
def spelling():
    """UCI's spelling of each word in lower case, from tiny/'s people."""
    people = adult.read(adult.TINY / "adult.data")
    return {word.lower(): word for person in people for word in person.values}
