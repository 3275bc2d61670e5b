"""NOT IN THE PAPER: Adult's columns from users' own CSV files.

    header    UCI's, Kaggle's or OpenML's names in any order; without one, UCI's order.
              It may lack what the text leaves out; a first column may have no name
    words     in any case; empty, NaN and ? are a missing one, "?"
    label     <=50K or >50K, or 0 or 1 (over $50k); a full stop may follow

A column of any other name is refused: ignored, it would seem to count, and a misspelt
label would seem to be missing.
"""
import functools
import re

import adult
from adult import InputError, Person

# OpenML's first version of Adult has age groups, 0 to 4.
FORMAT = {**adult.FORMAT, "age": r"([1-9][0-9]+)(?:\.0+)?", "label": r"(<=50K|>50K|\?)"}
ABSENT = {**dict.fromkeys(adult.LEFT_OUT, "?"), "fnlwgt": "0", "label": "?"}
MISSING = ("", "nan", "na", "n/a", "<na>", "none", "null")


def plain(name):
    """A column's name without case, dots, dashes, underscores and spaces."""
    return re.sub(r"[-._\s]", "", name.lower())


NAMES = {**{plain(name): name for name in FORMAT}, "gender": "sex", "income": "label",
         "class": "label", "salary": "label",
         "educationnum": "number of years of education",
         "educationalnum": "number of years of education"}


def read(path, labelled=True):
    """A CSV file -> list of Person. Raises InputError.

    labelled: every label must be there; otherwise y is None for a missing one.
    """
    columns = []                                       # known from the first row on

    def parse(row):
        if row[0].startswith("|"):                           # adult.test's first line
            return None
        if not columns and NAMES.keys() & map(plain, row):
            columns.extend(columns_of(row))
            return None
        columns.extend([] if columns else FORMAT)
        return person_from(row, columns, labelled)

    return adult.read_csv(path, parse)


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
    if not found:
        raise InputError(f"{column} cannot be {cell!r}; a number must be whole, a word "
                         "be no number (? if missing), a label <=50K, >50K, 0 or 1.")
    return found[1]


@functools.cache
def spelling():
    """UCI's spelling of each word in lower case, from tiny/'s people."""
    people = adult.read(adult.TINY / "adult.data")
    return {word.lower(): word for person in people for word in person.values}
