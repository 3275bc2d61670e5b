"""NOT IN THE PAPER: tables: what a run prints, and every number of a finished one.

    python -m beyond.report runs/NAME                   mean and spread, then each seed
    python -m beyond.report runs/NAME --out FILE.csv    the same as CSV
"""
import csv
import io
import pathlib
import re
from contextlib import contextmanager

import numpy

import adult
import metrics
from adult import InputError
from beyond import runs


# ------------------------------------------------------------------ numbers

def by_key(rows):
    """-> {key: its rows}, in their order."""
    groups = {}
    for row in rows:
        groups.setdefault(row["key"], []).append(row)
    return groups


def mean_and_spread(values):
    """[mean, standard deviation of the sample]; 0 for one value."""
    spread = numpy.std(values, ddof=min(1, len(values) - 1))
    return [float(numpy.mean(values)), float(spread)]


def summary(rows):
    """Mean and standard deviation over seeds -> {key: {metric: [mean, std]}}."""
    result = {}
    for key, some in by_key(rows).items():
        result[key] = {}
        for name in some[0]:
            values = [row.get(name) for row in some]
            if all(isinstance(value, float) for value in values):
                result[key][name] = mean_and_spread(values)
    return result


def cell(value, seeds):
    """.779±.016 over several seeds, .779 of one, - of none."""
    if value is None:
        return "-"
    mean, spread = map(decimals, value)
    return f"{mean}±{spread}" if seeds > 1 else mean


def decimals(x, n=3):
    """.779, without the 0 in front."""
    text = f"{x:.{n}f}"
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


# ------------------------------------------------------------------ what a run prints

LEGEND = """
gap: mean |p_m - p_f|, the same person asked as both, in [0, 1]. M_dpd, M_deo: Eq.
(1), (2). {shots} shots: the gap given {shots} labelled people at b_Pc = 1 or -1,
whichever is larger. follows: mean p given {shots} people who are all 1, minus all 0."""
PAPER = "  paper, not comparable"


def show_untrained(model, people):
    """One question, and what the model answers before anything is trained."""
    import torch
    questions = model.questions(people)
    with torch.no_grad():
        p = model(model.prefix(), questions[:20]).softmax(-1)            # (2, B, V)
    mass = p[..., model.answers].sum(-1).mean().item()
    now = metrics.of_people(model.predict(questions), people)
    note = " (constant)" if constant(now) else ""
    runs.say(f"\na question (x_m; its twin x_f says {adult.SEXES[1]}), answered by the "
             "next token:\n")
    text = adult.INSTRUCTION + adult.twins(people[0])[0]
    adult.show(model.before + text + model.after, "    ")
    runs.say(f"\nnot trained: ACC {now['acc']:.2f}, gap {now['gap']:.3f}, answers 1 to "
             f"{100 * now['positives']:.0f} % of {len(people)} validation rows"
             f"{note};\nthe two answers have {mass:.2f} of the probability\n")


def show(rows, titles, printed, shots):
    """A line for each model; below it the paper's numbers, or that it is constant.

    titles: {key: title}, else the key; printed: {key: (ACC in percent, M_dpd, M_deo)}
    """
    columns = {"ACC": "acc", "M_dpd": "dpd", "M_deo": "deo", "gap": "gap"}
    if "shots" in rows[0]:
        columns.update({f"{shots} shots": "shots", "follows": "follows"})
    seeds, means = len({row["seed"] for row in rows}), summary(rows)
    names = [titles.get(key, key) for key in means]
    wide = max(map(len, [PAPER, *names]))

    def line(title, cells):
        print(title.ljust(wide) + "".join(f" {x}".rjust(10) for x in cells))

    print()
    line("", columns)
    for key, some in by_key(rows).items():
        values = [means[key].get(name) for name in columns.values()]
        line(titles.get(key, key), [cell(value, seeds) for value in values])
        if key in printed:
            text = "{:.1f} {:.3g} {:.3g}".format(*printed[key])
            line(PAPER, text.replace(" 0.", " .").split())
        if any(map(constant, some)):
            print("  constant: (nearly) everybody gets the same answer")
    if "shots" in rows[0]:
        print(LEGEND.format(shots=shots))
    for row in rows:
        if row.get("swa_weights") == 0:
            print(f"note: {row['key']}, seed {row['seed']}: without SWA, so the last "
                  "weights are measured.")


def constant(row):
    """Whether (nearly) everybody gets the same answer: fair, and useless."""
    return not .02 < row["positives"] < .98


def show_prompt(rows):
    """The likeliest prompt of the last row that has an adversary, on one line."""
    learned = [row for row in rows if row.get("prompt")]
    if learned:
        text = re.sub(r"[^\x20-\x7e]+", " ", learned[-1]["prompt"])
        print(f"\nphi's likeliest prompt, {learned[-1]['key']}:\n    {text[:80]}")


def clock(seconds):
    """75 -> 1:15"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------ a finished run

def rows_of(run):
    """The rows of a finished run -> {key: its rows}."""
    return by_key(runs.read_json(run / "results.json")["rows"])


def table(run):
    """Every number of a run: mean and spread over seeds, then each seed's."""
    for key, rows in rows_of(run).items():
        seen = {}
        for row in rows:
            for name, value in numbers(row, run).items():
                seen.setdefault(name, []).append(value)
        print(f"\n{key}")
        wide = 2 + max(map(len, seen))
        for name, values in seen.items():
            mean = cell(mean_and_spread(values), len(values))
            each = " ".join(decimals(value, 4) for value in values)
            print(f"    {name:<{wide}}{mean:<11}  {each}")


def write_csv(run, out):
    """The same as CSV: a line for each model and seed."""
    lines, names = [], {}
    for rows in rows_of(run).values():
        for row in rows:
            found = numbers(row, run)
            lines.append({"key": row["key"], "seed": row["seed"], **found})
            names.update(lines[-1])
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    runs.write(out, file.getvalue())
    print(f"written: {out}")


def numbers(row, run):
    """A row's numbers, and what attacks of its run found -> {name: number}."""
    found = {name: x for name, x in row.items() if isinstance(x, float)}
    for part, words in (("without_swa", "without SWA"), ("averaged", "twins averaged")):
        for name, x in row.get(part, {}).items():
            found[f"{words}, {name}"] = x
    turns = [now["phi"] for now in row.get("history", ())[1:] if now.get("phi")]
    if turns:                                  # all rounds but the first
        first, last = numpy.mean(turns, axis=0)
        found.update({"phi's first step": first, "phi's last step": last})
    for path in sorted(run.glob("attacks*.json")):
        for other in runs.read_json(path)["rows"]:
            if (other["key"], other["seed"]) == (row["key"], row["seed"]):
                found[f"worst gap, {path.stem}"] = other["worst"]
                found[f"lowest ACC, {path.stem}"] = other["lowest_acc"]
    return found


@contextmanager
def right_kind():
    """A field that a run's file lacks is one sentence."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as problem:
        raise InputError(f"the run lacks {problem}; is it of the right "
                         "kind?") from None


def main(argv=None):
    parser = runs.Parser(prog="beyond.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="the folder of a finished run")
    parser.add_argument("--out", metavar="FILE.csv", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.out:
        write_csv(args.run, args.out)
    else:
        table(args.run)


if __name__ == "__main__":
    with runs.one_sentence("beyond.report"), right_kind():
        main()
