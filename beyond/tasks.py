"""NOT IN THE PAPER: a data set other than Adult, described by a JSON file.

    python train.py --task beyond/hiring.json --rows 80 --shots 4 --longest 500

    {"files": ["hiring.csv"],                  one (a random half is the test), or two:
                                               training rows, test rows
     "attributes": {"age": "age",              what the text says: a name in the text,
                    "experience": "years"},    and the column that it is in
     "sensitive": ["gender", "man", "woman"],  a column; the value of x_m, that of x_f
     "label": ["hired", "yes", "no"],          a column; the value that is y = 1, y = 0
     "opening": "...", "instruction": "...",   in place of adult.py's
     "answers": ["0", "1"]}                    the words for y = 0 and 1: a token each

The files are CSV with a header, beside the JSON file or where --data says. A task
replaces the constants of adult.py (section 2) in this process, until another one does.

    python -m beyond.tasks      # writes the rows of beyond/hiring.csv to the screen
"""
import functools
import pathlib
import random
import re

import adult
from adult import InputError
from beyond import people, runs

# The constants of adult.py that a task replaces.
ADULT = {name: getattr(adult, name) for name in (
    "COLUMNS", "ATTRIBUTES", "SEX", "SEXES", "INSTRUCTION", "OPENING", "ANSWERS")}
KINDS = {"files": list, "attributes": dict, "sensitive": list, "label": list,
         "opening": str, "instruction": str, "answers": list}
LISTS = {"files": (1, 2), "sensitive": (3,), "label": (3,), "answers": (2,)}


def load(path=None, data=None):
    """`begin` a JSON file's task, or Adult -> its people, adult.Adult. InputError.

    data: where its CSV files are, if not beside it; for Adult see people.load.
    """
    task = begin(path)
    if task is None:
        return people.load(data)
    path = pathlib.Path(path)
    folder = pathlib.Path(data or path.parent)
    files = {name: folder / name for name in task["files"]}
    if len(files) == 1 and folder.is_file():
        files = {name: folder for name in files}
    source = f"{path} ({', '.join(files)})"
    found = people.gather(files, lambda file: read(file, task), source)
    found.sha256[path.name] = people.sha256_of(path)
    return found


read_once = functools.lru_cache(1)(load)


def data_of(path, data):
    """`load`, its files read once a process."""
    begin(path)
    return read_once(path, data)


def begin(path):
    """Make a JSON file's task (None: Adult) this process's -> it. Raises InputError."""
    for name, value in ADULT.items():
        setattr(adult, name, value)
    if path is None:
        return None
    task = description(path)
    column, *values = task["sensitive"]
    adult.COLUMNS = adult.ATTRIBUTES = tuple(task["attributes"])
    adult.SEX = list(task["attributes"].values()).index(column)
    adult.SEXES, adult.ANSWERS = tuple(values), tuple(task["answers"])
    adult.OPENING = task["opening"].strip()
    adult.INSTRUCTION = task["instruction"].strip() + "\n"
    return task


def of_run(results, path=None):
    """`begin` a finished run's task; path: where its file is now. Raises InputError."""
    path = path or results["config"].get("task")
    task, digests = begin(path), results["data"]["sha256"].values()
    if path is not None and people.sha256_of(path) not in digests:
        raise InputError(f"{path} is not the run's task: another sha256; give the one "
                         "that it was made with, or none if that is Adult.")
    return task


def description(path):
    """The JSON file, its fields checked. Raises InputError."""
    task = runs.read_json(path, give="a JSON file that describes a task")
    for name, kind in KINDS.items():
        if type(task.get(name)) is not kind:
            raise InputError(f"{path} has no {name}; beyond/tasks.py says what a task "
                             "is, beyond/hiring.json is one.")
    for name, lengths in LISTS.items():
        words = [str(word) for word in task[name]]
        if name in ("sensitive", "label"):
            words[1:] = map(clean, words[1:])                      # as cells are read
        if len(words) not in lengths or len(set(words)) < len(words) or "?" in words:
            raise InputError(f"{path}: {name} must be {' or '.join(map(str, lengths))} "
                             "texts that differ.")
        task[name] = words
    columns = [str(column) for column in task["attributes"].values()]
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: two attributes are of the same column.")
    if task["label"][0] in columns:
        raise InputError(f"{path}: the label's column {task['label'][0]} is among the "
                         "attributes: the question would hold its answer.")
    if task["sensitive"][0] not in columns:
        raise InputError(f"{path}: the sensitive column {task['sensitive'][0]} is not "
                         "among the attributes: twins would be the same text.")
    return task


def read(path, task, labelled=True):
    """A CSV file with a header (task None: Adult) -> people. InputError: line, column.

    labelled False: the label's column may be missing or empty; y is None then.
    """
    if task is None:
        return people.read(path, labelled)
    needed, header = list(task["attributes"].values()), []
    if labelled:
        needed.append(task["label"][0])

    def parse(row):
        if header:
            return person(row, header, task, labelled)
        header.extend(map(str.strip, row))
        for column in needed:
            if header.count(column) != 1:
                raise InputError(f"its header does not have the column {column} once.")

    return people.read_csv(path, parse)


def person(row, header, task, labelled):
    """One row of a CSV file -> Person. Raises InputError."""
    if len(row) != len(header):
        raise InputError("it has more or fewer cells than the header.")
    cells = dict(zip(header, row))
    values = [clean(cells[column]) for column in task["attributes"].values()]
    one_of_two(values[adult.SEX], *task["sensitive"])
    label = clean(cells.get(task["label"][0]))
    if label == "?" and not labelled:
        return adult.Person(tuple(values), None)
    return adult.Person(tuple(values), 1 - one_of_two(label, *task["label"]))


def one_of_two(word, column, first, second):
    """0 for the first, 1 for the second. Raises InputError."""
    if word not in (first, second):
        raise InputError(f"{column} is {word!r}; a task has two values, {first} and "
                         f"{second}: leave out rows that have others.")
    return int(word == second)


def clean(cell):
    """A cell as the text has it: 25.0 is 25, nothing is ?, one line."""
    cell = " ".join((cell or "").split())
    number = re.fullmatch(r"(-?[0-9]+)\.0+", cell)
    if number:
        return number[1]
    return "?" if cell.lower() in people.MISSING else cell


# ------------------------------------------------------------------ the example

def synthetic(n=600, seed=0):
    """Invented applicants, lines of CSV: as good as women, men are hired more often."""
    rng = random.Random(seed)
    yield "age,gender,degree,years,test score,department,hired"
    for _ in range(n):
        gender, years = rng.choice(("man", "woman")), rng.randrange(20)
        score = rng.randrange(40, 100)
        degree = rng.choice(("school", "bachelor", "master"))
        chance = years / 20 + score / 100 + .2 * (degree == "master") - .75
        hired = rng.random() < chance + .15 * (gender == "man")
        department = rng.choice(("sales", "design", "research", "support"))
        yield (f"{21 + years + rng.randrange(10)},{gender},{degree},{years},{score},"
               f"{department},{'yes' if hired else 'no'}")


if __name__ == "__main__":
    print("\n".join(synthetic()))
