"""A SYNTHETIC twin of UCI Adult: 8,000 + 4,000 made-up people, so that everything runs where UCI cannot be reached.

    python tiny/make_adult.py --data DIR [--out tiny] [--seed 0]     # DIR holds the real adult.data; a few seconds

No row is copied. A person is drawn from a small Bayesian network, one group of columns after the other, each from
the real people who share a few coarse traits with what has been drawn so far. The table behind each draw is nothing but a
count on adult.data; the real adult.test is never opened. Three things matter to the experiments and shape the network:

  quotas     how many people fall in each (sex, label) is fixed in advance, so P(sex) and P(y=1|sex), the natural bias of
             section 2, are the real ones to the nearest person, in both files;
  parents    columns depend on each other, not on the label alone. Were they independent given the label, each would be a
             fresh piece of evidence and the twin too easy: a logistic regression fitted on real rows is right on .776 of the
             balanced rows then, on .741 as it is, and on .747 of the real ones;
  back-off   where few real people share all traits, the last trait is often dropped, so that rare tables are not trusted.

Common rows come up again by chance: 0.16 of the real adult.test and 0.09 of the twin equal a row of adult.data but for
fnlwgt. A row that equals exactly one real person is drawn again, and no fnlwgt is taken from adult.data.

Use it to try the code. For figures to report, take the real files.
"""
import argparse
import collections
import hashlib
import os
import pathlib
import sys

import numpy

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import adult  # noqa: E402  (one folder up)

SIZES = {"adult.data": 8000, "adult.test": 4000}
TRUST = 10  # a table of n people is used with probability n / (n + TRUST), else the one with a parent fewer
JITTER = .1  # standard deviation of log(fnlwgt) around a real one
AGES, YEARS = (20, 23, 26, 30, 35, 40, 45, 50, 55, 60, 65), (9, 10, 11, 13, 14, 15)  # where a new bin begins

# Columns drawn together, then their parents (names of `traits`), the most important first: the last is dropped first.
# Drawn together are columns that fix each other: an education has one number of years; an occupation is "?" where the
# workclass is; a husband is married; nobody has both a capital gain and a capital loss.
NETWORK = (
    (("age",), ("y", "sex")),
    (("race", "native country"), ("y", "sex", "age")),
    (("marital status", "relationship"), ("sex", "y", "age", "race", "origin")),
    (("education", "number of years of education"), ("y", "origin", "age", "sex", "spouse")),
    (("workclass", "occupation"), ("y", "sex", "education", "age", "origin")),
    (("hours per week",), ("y", "sex", "age", "occupation", "workclass")),
    (("capital gain", "capital loss"), ("y", "education", "age", "sex")),
)


def traits(person):
    """What a table may depend on: a person's values (a dict, perhaps half drawn), coarse where there are many."""
    country = person.get("native country")
    return dict(
        person, age=numpy.searchsorted(AGES, int(person.get("age", 0)), side="right"),
        education=numpy.searchsorted(YEARS, int(person.get("number of years of education", 0)), side="right"),
        origin=country if country in ("United-States", "Mexico") else "elsewhere",
        spouse=person.get("relationship") in ("Husband", "Wife"))


def count(people):
    """The tables -> {(step of NETWORK, values of its first k parents): the values of everybody who has them}, all k >= 1.

    A list with repeats is a table of counts: one entry, drawn uniformly, is a draw from the counted frequencies. The few real
    rows that contradict themselves (a female husband) are left out.
    """
    tables = collections.defaultdict(list)
    for person in people:
        role, sex, coarse = person["relationship"], person["sex"], traits(person)
        if (role == "Husband" and (sex, person["marital status"]) != ("Male", "Married-civ-spouse")
                or role == "Wife" and sex != "Female"):
            continue
        for step, (columns, parents) in enumerate(NETWORK):
            for k in range(1, len(parents) + 1):
                tables[step, tuple(coarse[p] for p in parents[:k])].append(tuple(person[c] for c in columns))
    return tables


def draw(tables, sex, y, rng):
    """One made-up person of this sex and label -> dict of columns, all but fnlwgt. The first parent is never dropped."""
    person = {"sex": sex, "y": y}
    for step, (columns, parents) in enumerate(NETWORK):
        coarse = traits(person)
        for k in range(len(parents), 0, -1):
            table = tables.get((step, tuple(coarse[p] for p in parents[:k])), ())
            if k == 1 or rng.random() < len(table) / (len(table) + TRUST):
                break
        person.update(zip(columns, table[rng.integers(len(table))]))
    return person


def kind(person):
    """All that is known of a person but fnlwgt, to be compared."""
    return tuple(person[c] for c in adult.COLUMNS if c != "fnlwgt") + (person["y"],)


def quotas(people, n):
    """n people split over (sex, y) as in `people` -> [((sex, y), how many)]; rounding the running sums keeps the total n."""
    cells = sorted(collections.Counter((p["sex"], p["y"]) for p in people).items())
    edges = [round(n * k / len(people)) for k in numpy.cumsum([0] + [k for _, k in cells]).tolist()]
    return [(cell, edges[i + 1] - edges[i]) for i, (cell, _) in enumerate(cells)]


def make(people, n, rng, taken):
    """n made-up people in random order -> list of dicts. `people`: the real ones, as dicts; `taken`: fnlwgt not to be used.

    Nobody equals a real person who is the only one of the kind. A final weight all but names a census row: it looks like
    those of the same race, is not in `taken`, and joins it.
    """
    tables, kinds, made = count(people), collections.Counter(map(kind, people)), []
    weights = {race: [int(p["fnlwgt"]) for p in people if p["race"] == race] for race in {p["race"] for p in people}}
    for sex, y in (cell for cell, k in quotas(people, n) for _ in range(k)):
        while kinds[kind(person := draw(tables, sex, y, rng))] == 1:
            pass
        like, weight = weights[person["race"]], None
        while weight is None or weight in taken:
            weight = str(round(like[rng.integers(len(like))] * float(numpy.exp(JITTER * rng.standard_normal()))))
        taken.add(weight)
        made.append(dict(person, fnlwgt=weight))
    return [made[i] for i in rng.permutation(n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory with the real adult.data")
    parser.add_argument("--out", default=str(adult.TINY), help="where the two files go (default: tiny/)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = pathlib.Path(args.data) / "adult.data"
    try:
        people = [dict(zip(adult.COLUMNS, p.values), y=p.y) for p in adult.read(source)]
    except adult.InputError as problem:
        sys.exit(f"make_adult.py: {problem}")
    if hashlib.sha256(source.read_bytes()).hexdigest() != adult.SHA256["adult.data"]:  # no twin of a twin, say
        sys.exit(f"make_adult.py: {source} does not have the checksum of UCI's; give --data the directory of the real file.")
    out, report = pathlib.Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    rng, taken = numpy.random.default_rng(args.seed), {p["fnlwgt"] for p in people}
    for name, n in SIZES.items():
        stop = "." if name == "adult.test" else ""  # UCI's own quirks: a first line and full stops in adult.test only
        lines = ["|1x3 Cross validator"] if stop else []
        for person in make(people, n, rng, taken):
            lines.append(", ".join([person[c] for c in adult.COLUMNS] + [("<=50K", ">50K")[person["y"]] + stop]))
        (out / f"{name}.part").write_bytes("".join(line + "\n" for line in lines + [""]).encode())  # never \r\n
        os.replace(out / f"{name}.part", out / name)
        report.append(f"{name} {n:,} rows, {(out / name).stat().st_size:,} bytes")
    print("; ".join(report))


if __name__ == "__main__":
    main()
