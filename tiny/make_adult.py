"""A SYNTHETIC twin of UCI Adult: 8,000 + 4,000 made-up people, for where UCI is not.

    python tiny/make_adult.py --data DIR [--out tiny] [--seed 0]

DIR holds the real adult.data; it takes a few seconds. No row is copied. A person is
drawn from a small Bayesian network, one group of columns after the other, each from
the real people who share a few coarse traits with what has been drawn so far. The
table behind each draw is nothing but a count on adult.data; the real adult.test is
never opened. Three things matter to the experiments and shape the network:

  quotas     how many people fall in each (sex, label) is fixed in advance, so P(sex)
             and P(y=1|sex), the natural bias of section 2, are the real ones to the
             nearest person, in both files;
  parents    columns depend on each other, not on the label alone. Were they independent
             given the label, each would be a fresh piece of evidence and the twin too
             easy: a logistic regression fitted on real rows is right on .776 of the
             balanced rows then, on .741 as it is, and on .747 of the real ones;
  back-off   where few real people share all traits, the last trait is often dropped, so
             that rare tables are not trusted.

Common rows come up again by chance: 0.16 of the real adult.test and 0.09 of the twin
equal a row of adult.data but for fnlwgt. A row that equals exactly one real person is
drawn again, and no fnlwgt is taken from adult.data.

Use it to try the code. For figures to report, take the real files.
"""
import argparse
import bisect
import collections
import hashlib
import os
import pathlib
import sys

import numpy

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import adult  # noqa: E402  (one folder up)
from beyond.people import SHA256  # noqa: E402

SIZES = {"adult.data": 8000, "adult.test": 4000}
LABELS = ("<=50K", ">50K")  # y = 0, y = 1

# A table of n people is used with probability n / (n + TRUST), else the one with a
# parent fewer.
TRUST = 10
JITTER = .1  # standard deviation of log(fnlwgt) around a real one
AGES = (20, 23, 26, 30, 35, 40, 45, 50, 55, 60, 65)  # where a new bin begins
YEARS = (9, 10, 11, 13, 14, 15)                      # of education, likewise

# Columns drawn together: their parents (names of `traits`), the most important first,
# for the last is dropped first. Drawn together are columns that fix each other: an
# education has one number of years; an occupation is "?" where the workclass is; a
# husband is married; nobody has both a capital gain and a capital loss.
NETWORK = {
    ("age",):
        ("y", "sex"),
    ("race", "native country"):
        ("y", "sex", "age"),
    ("marital status", "relationship"):
        ("sex", "y", "age", "race", "origin"),
    ("education", "number of years of education"):
        ("y", "origin", "age", "sex", "spouse"),
    ("workclass", "occupation"):
        ("y", "sex", "education", "age", "origin"),
    ("hours per week",):
        ("y", "sex", "age", "occupation", "workclass"),
    ("capital gain", "capital loss"):
        ("y", "education", "age", "sex"),
}


# ------------------------------------------------------------------ the network
# A person is a dict {column: value as written} with "y": 0 or 1, perhaps half drawn.

def traits(person):
    """What a table may depend on: a person's values, coarse where there are many."""
    age = int(person.get("age", 0))
    years = int(person.get("number of years of education", 0))
    origin = person.get("native country")
    if origin not in ("United-States", "Mexico"):
        origin = "elsewhere"
    coarse = dict(person)
    coarse["age"] = bisect.bisect(AGES, age)
    coarse["education"] = bisect.bisect(YEARS, years)
    coarse["origin"] = origin
    coarse["spouse"] = person.get("relationship") in ("Husband", "Wife")
    return coarse


def contradicts_itself(person):
    """Whether this is a husband who is no married man, or a wife who is no woman."""
    role = person["relationship"]
    sex = person["sex"]
    if role == "Wife":
        return sex != "Female"
    married_man = sex == "Male" and person["marital status"] == "Married-civ-spouse"
    return role == "Husband" and not married_man


def count(people):
    """The tables: {(columns, values of their first k parents): list}, for all k >= 1.

    The list holds the columns' values of everybody who has these parents. A list with
    repeats is a table of counts: one entry, drawn uniformly, is a draw from the counted
    frequencies. The few real rows that contradict themselves are left out.
    """
    tables = collections.defaultdict(list)
    for person in people:
        if contradicts_itself(person):
            continue
        coarse = traits(person)
        for columns, parents in NETWORK.items():
            entry = tuple(person[column] for column in columns)
            values = tuple(coarse[parent] for parent in parents)
            for k in range(1, len(values) + 1):
                tables[columns, values[:k]].append(entry)
    return tables


def back_off(tables, columns, values, rng):
    """The table of all parents' values, or of fewer of them where people are few.

    The first parent is never dropped.
    """
    for k in range(len(values), 1, -1):
        table = tables.get((columns, values[:k]), ())
        if rng.random() < len(table) / (len(table) + TRUST):
            return table
    return tables[columns, values[:1]]


def draw(tables, sex, y, rng):
    """One made-up person of this sex and label: a dict with all columns but fnlwgt."""
    person = {"sex": sex, "y": y}
    for columns, parents in NETWORK.items():
        coarse = traits(person)
        values = tuple(coarse[parent] for parent in parents)
        table = back_off(tables, columns, values, rng)
        entry = table[rng.integers(len(table))]
        person.update(zip(columns, entry))
    return person


# ------------------------------------------------------------------ a file of people

def quotas(people, n):
    """n people split over (sex, y) as in `people` -> {(sex, y): how many}.

    Rounding the running sums, not each cell, keeps the total n.
    """
    cells = collections.Counter((person["sex"], person["y"]) for person in people)
    quota = {}
    real = 0
    given = 0
    for cell in sorted(cells):
        real += cells[cell]
        quota[cell] = round(n * real / len(people)) - given
        given += quota[cell]
    return quota


def kind(person):
    """All that is known of a person but fnlwgt, to be compared."""
    values = [person[column] for column in adult.COLUMNS if column != "fnlwgt"]
    return (*values, person["y"])


def draw_weight(weights, taken, rng):
    """A final weight near one of `weights`, as text; not in `taken`, which it joins.

    A final weight all but names a census row, so no real one may come up again.
    """
    while True:
        real = weights[rng.integers(len(weights))]
        factor = float(numpy.exp(JITTER * rng.standard_normal()))
        weight = str(round(real * factor))
        if weight not in taken:
            taken.add(weight)
            return weight


def make(people, n, rng, taken):
    """n made-up people in random order -> list of dicts.

    `people`: the real ones, as dicts; `taken`: the set of fnlwgt not to be used, which
    grows. Nobody equals a real person who is the only one of the kind. A final weight
    looks like those of the same race.
    """
    tables = count(people)
    kinds = collections.Counter(kind(person) for person in people)
    weights = collections.defaultdict(list)
    for person in people:
        weights[person["race"]].append(int(person["fnlwgt"]))
    made = []
    for (sex, y), quota in quotas(people, n).items():
        for _ in range(quota):
            person = draw(tables, sex, y, rng)
            while kinds[kind(person)] == 1:
                person = draw(tables, sex, y, rng)
            person["fnlwgt"] = draw_weight(weights[person["race"]], taken, rng)
            made.append(person)
    return [made[i] for i in rng.permutation(n)]


def write(path, people):
    """Write people as UCI does, quirks included, by way of a temporary name.

    In adult.test only, there is a first line and labels end in a full stop; both files
    end in a blank line.
    """
    lines = []
    stop = ""
    if path.name == "adult.test":
        lines.append("|1x3 Cross validator")
        stop = "."
    for person in people:
        values = [person[column] for column in adult.COLUMNS]
        values.append(LABELS[person["y"]] + stop)
        lines.append(", ".join(values))
    lines.append("")
    text = "".join(line + "\n" for line in lines)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(text.encode())  # bytes: never \r\n
    os.replace(part, path)


# ------------------------------------------------------------------ the command

def read_real(path):
    """The people of the real adult.data -> list of dicts.

    Raises InputError when the file is not UCI's: no twin of a twin, say.
    """
    rows = adult.read(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256["adult.data"]:
        raise adult.InputError(f"{path} does not have the checksum of UCI's; "
                               "give --data the directory of the real file.")
    people = []
    for row in rows:
        person = dict(zip(adult.COLUMNS, row.values))
        person["y"] = row.y
        people.append(person)
    return people


def make_files(data, out, seed):
    """Both files of the twin in the folder `out`, from adult.data in the folder `data`.

    -> one line that says what was written. Raises InputError.
    """
    if seed < 0:
        raise adult.InputError(f"--seed {seed} is impossible: it must be at least 0.")
    people = read_real(data / "adult.data")
    rng = numpy.random.default_rng(seed)
    taken = {person["fnlwgt"] for person in people}
    report = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, n in SIZES.items():
            write(out / name, make(people, n, rng, taken))
            size = (out / name).stat().st_size
            report.append(f"{name} {n:,} rows, {size:,} bytes")
    except OSError as error:
        raise adult.InputError(f"{out} cannot be written ({error.strerror}); "
                               "give another folder as --out.") from None
    return "; ".join(report)


def main():
    """The command. InputError becomes one sentence and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=pathlib.Path,
                        help="directory with the real adult.data")
    parser.add_argument("--out", default=adult.TINY, type=pathlib.Path,
                        help="where the two files go (default: tiny/)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(make_files(args.data, args.out, args.seed))
    except adult.InputError as problem:
        sys.exit(f"make_adult.py: {problem}")


if __name__ == "__main__":
    main()
