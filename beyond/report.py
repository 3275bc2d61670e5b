"""NOT IN THE PAPER: long tables and every picture, from the files of finished runs.

    python -m beyond.report figure2                   the loop (Figure 2)
    python -m beyond.report figure4                   Figure 4
    python -m beyond.report table1 runs/NAME          a run of train.py --table 1
    python -m beyond.report rounds runs/NAME          the game, round by round
    python -m beyond.report curve runs/NAME           validation accuracy by round
    python -m beyond.report compare runs/NAME         accuracy against the worst gap
    python -m beyond.report lam runs/NAME             beyond.ablation --lam-curve
    python -m beyond.report budget runs/NAME          beyond.attacks --full
    python -m beyond.report table runs/NAME           every number of a run, over seeds;
                                                      --out FILE.csv: as CSV

A picture goes into the run's folder, or to --out; it needs matplotlib.
"""
import argparse
import csv
import io
import os
import pathlib
import re

from adult import InputError
from beyond import runs


def pyplot():
    """matplotlib, drawing to files. InputError when it is not installed."""
    try:
        os.environ.pop("MPLBACKEND", None)                   # a notebook sets its own
        import matplotlib
    except ImportError:
        raise InputError("a picture needs matplotlib: "
                         "`pip install matplotlib`.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def results_of(folder, name="results.json"):
    return runs.read_json(pathlib.Path(folder) / name)


def rows_by_key(rows, keys):
    groups = {key: [row for row in rows if row["key"] == key] for key in keys}
    return {key: some for key, some in groups.items() if some}


# ------------------------------------------------------------------ tables

def mean_and_spread(values):
    """[mean, standard deviation of the sample]; 0 for one value."""
    import numpy
    spread = numpy.std(values, ddof=min(1, len(values) - 1))
    return [float(numpy.mean(values)), float(spread)]


def summary(rows):
    """Mean and standard deviation over seeds -> {key: {metric: [mean, std]}}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["key"], []).append(row)
    result = {}
    for key, some in groups.items():
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


LEGEND = """
gap: mean |p_m - p_f|, the same person asked as both, in [0, 1]. M_dpd, M_deo: Eq.
(1), (2). {shots} shots: the gap given {shots} labelled people at b_Pc = 1 or -1,
whichever is larger. follows: mean p given {shots} people who are all 1, minus all 0."""


def show(rows, titles, columns, printed):
    """One line a model, the paper's numbers beside ours.

    titles: {key: title}, the key where there is none; columns: {heading: metric};
    printed: {key: (ACC in percent, M_dpd, M_deo)}
    """
    seeds = len({row["seed"] for row in rows})
    means = summary(rows)
    wide = 2 + max(len(titles.get(key, key)) for key in means)
    print("\n" + " " * wide + "".join(f"{name:>9}" for name in columns)
          + "   in the paper" * bool(printed))
    for key, values in means.items():
        text = f"{titles.get(key, key):<{wide}}"
        for name in columns.values():
            text += f" {cell(values.get(name), seeds):>8}"
        if key in printed:
            text += " {:.1f} {:.3g} {:.3g}".format(*printed[key]).replace(" 0.", " .")
        if any(constant(row) for row in rows if row["key"] == key):
            text += "  constant"
        print(text)


def constant(row):
    """Whether (nearly) everybody gets the same answer: fair, and useless."""
    return not .02 < row["positives"] < .98


def warn(rows):
    """Say what a reader must know before believing a row."""
    for row in rows:
        if row.get("swa_weights") == 0:
            print(f"note: {row['key']}, seed {row['seed']}: too few rounds for SWA, so "
                  "the last weights are measured.")


def show_prompt(rows):
    """The last prompt that was learned, on one line."""
    learned = [row for row in rows if row.get("prompt")]
    if learned:
        text = re.sub(r"[^\x20-\x7e]+", " ", learned[-1]["prompt"])
        print(f"\na prompt (section 5), {learned[-1]['key']}:\n    {text[:80]}")


def clock(seconds):
    """75 -> 1:15"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------ pictures

def figure2(args, plt):
    """Figure 2: the loop, with the names of the code."""
    figure, axes = plt.subplots(figsize=(8, 4))
    axes.set(xlim=(0, 10), ylim=(0, 5))
    axes.axis("off")
    boxes = [
        (1.5, 3.9, "phi: logits (L, V)\nAdversary"),
        (5.0, 3.9, "prompt g: one-hot (L, V)\ngumbel_softmax"),
        (8.5, 3.9, "g x_m  and  g x_f\nadult.twins"),
        (8.5, 1.1, "f(g, x_m),  f(g, x_f)\nLanguageModel, LoRA"),
        (5.0, 1.1, "distance of the two,\ntask on the person's own")]
    for x, y, text in boxes:
        axes.text(x, y, text, ha="center", va="center", fontsize=10,
                  bbox={"boxstyle": "round,pad=.5", "fc": "#f4f4f0", "ec": "#444"})
    arrows = [((2.8, 3.9), (3.4, 3.9), "#444"), ((6.6, 3.9), (7.2, 3.9), "#444"),
              ((8.5, 3.3), (8.5, 1.7), "#444"), ((7.0, 1.1), (6.6, 1.1), "#444"),
              ((4.6, 1.7), (1.7, 3.3), "C3"), ((5.6, .5), (7.9, .5), "C0")]
    for start, end, colour in arrows:
        style = {"arrowstyle": "->", "lw": 1.6, "color": colour}
        axes.annotate("", end, start, arrowprops=style)
    axes.text(3.5, 2.6, "phi_half: phi goes UP the distance,\ntheta frozen",
              color="C3", fontsize=10)
    axes.text(2.2, .1, "theta_step: theta goes DOWN task + lam * distance, Eq. (3); "
              "phi frozen", color="C0", fontsize=10)
    axes.text(.2, .9, "a round:\nphi_half,\nthen theta_step\nfor every batch",
              fontsize=10)
    return figure


def figure4(args, plt):
    """Figure 4: a known distribution learned through Gumbel-softmax samples."""
    import gumbel
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for colour, tau in (("C0", .3), ("C1", 1.), ("C2", 2.)):
        curves = [gumbel.figure_4(tau, seed) for seed in range(10)]
        last, averaged = (mean_of([c[k] for c in curves]) for k in (0, 1))
        axes.plot(last, color=colour, lw=.7, label=f"phi, tau {tau:g}")
        axes.plot(range(200, len(averaged)), averaged[200:], color=colour, lw=2.2,
                  label=f"average of phi since step 200, tau {tau:g}")
    axes.set(xlabel="step of Adam (64 samples each)", yscale="log",
             ylabel="total variation distance to the target")
    axes.set_title("8 tokens, mean of 10 seeds", fontsize=10)
    axes.legend(fontsize=7)
    return figure


def mean_of(curves):
    return [sum(values) / len(values) for values in zip(*curves)]


def table1(args, plt):
    """Table 1 as a curve over b_Pc of the shots."""
    results = results_of(args.run)
    points = []
    for key, values in results["summary"].items():
        if key.startswith("b = "):
            points.append((float(key[4:]), values))
    if not points:
        raise InputError(f"{args.run} is no run of --table 1: nothing to draw.")
    figure, left = plt.subplots(figsize=(6.5, 4))
    right = left.twinx()
    for axes, name, colour, text in (
            (left, "gap", "C3", "gap: mean |p as a man - p as a woman|"),
            (right, "acc", "C0", "accuracy, balanced rows")):
        errorbar(axes, points, name, colour)
        axes.set_ylabel(text, color=colour)
    left.set_xlabel("b_Pc of the 16 labelled people in front (their bias)")
    draws = results["config"]["seeds"]
    left.set_title(f"the model not trained, {draws} draws of people", fontsize=10)
    return figure


def errorbar(axes, points, name, colour, label=None):
    """Mean and standard deviation of a metric at each x."""
    x = [x for x, values in points]
    mean = [values[name][0] for x, values in points]
    spread = [values[name][1] for x, values in points]
    axes.errorbar(x, mean, spread, color=colour, marker="o", capsize=3, label=label)


def rounds(args, plt):
    """The distance of Eq. (3) under phi's prompts, before and after phi's steps."""
    rows = rows_by_key(results_of(args.run)["rows"], ["faircon"])
    if not rows:
        raise InputError(f"{args.run} has no row faircon: there is nothing to draw.")
    figure, axes = plt.subplots(figsize=(6.5, 4))
    labels = ["phi's first and last step", "theta's steps of the round, mean"]
    for row in rows["faircon"]:
        for record in row["history"]:
            n = record["round"]
            axes.plot([n, n + .4], record["phi"], color="C3", alpha=.6, lw=1.4,
                      label=labels[0])
            axes.plot(n + .65, record["distance"], "o", color="C0", alpha=.6, ms=3,
                      label=labels[1])
            labels = [None, None]
    axes.set(xlabel="round of the game", yscale="log",
             ylabel="distance of Eq. (3), training rows")
    axes.legend(fontsize=8)
    return figure


def curve(args, plt):
    """Accuracy on validation rows after each round, a thin line a seed, thick: mean."""
    import train
    figure, axes = plt.subplots(figsize=(6.5, 4))
    colours = iter(range(100))
    for key, rows in rows_by_key(results_of(args.run)["rows"], train.MODELS).items():
        curves = [[now["acc"] for now in row.get("history", ())] for row in rows]
        if not all(curves):
            continue
        colour = f"C{next(colours)}"
        lines = [*curves, mean_of(curves)]
        for i, accuracies in enumerate(lines):
            mean = i == len(curves)
            axes.plot(range(1, len(accuracies) + 1), accuracies, color=colour,
                      lw=2.4 if mean else .6, alpha=1 if mean else .6,
                      label=train.MODELS[key].title if mean else None)
    drawn(axes, args)
    axes.set(xlabel="round of the game", ylabel="accuracy, 100 validation rows")
    axes.legend(fontsize=8)
    return figure


def compare(args, plt):
    """What each row of Table 3 trades: accuracy, and the worst gap, a dot a seed."""
    import train
    worst = {}
    for row in results_of(args.run, "attacks.json")["rows"]:
        worst[row["key"], row["seed"]] = row["worst"]
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for key, rows in rows_by_key(results_of(args.run)["rows"], train.MODELS).items():
        some = [row for row in rows if (key, row["seed"]) in worst]
        if some:
            axes.plot([worst[key, row["seed"]] for row in some],
                      [row["acc"] for row in some], "o", label=train.MODELS[key].title)
    drawn(axes, args)
    axes.set(xscale="log", xlabel="worst gap that an attack found",
             ylabel="accuracy, balanced test rows")
    axes.legend(fontsize=8)
    return figure


def drawn(axes, args):
    """InputError where there was nothing to draw."""
    if not axes.lines:
        raise InputError(f"{args.run} has no such row: there is nothing to draw.")


def lam(args, plt):
    """The trade-off over lam."""
    results = results_of(args.run)
    points = []
    for key, values in results["summary"].items():
        if key.startswith("lam-"):
            points.append((float(key[4:]), values))
    figure, left = plt.subplots(figsize=(6.5, 4))
    right = left.twinx()
    errorbar(left, points, "gap", "C3", "no prompt")
    errorbar(left, points, "climb", "C1", "given people searched one by one")
    errorbar(left, points, "gumbel", "C4", "given tokens of a Gumbel search")
    errorbar(right, points, "acc", "C0")
    left.legend(fontsize=8)
    left.set(yscale="log")
    left.set_ylabel("gap: mean |p as a man - p as a woman|", color="C3")
    right.set_ylabel("accuracy, balanced rows", color="C0")
    left.set_xscale("symlog", linthresh=.1)
    left.set_xlim(-.03, 20)
    left.set_xlabel("lam of Eq. (3)")
    left.set_title(f"{results['config']['seeds']} seeds", fontsize=10)
    return figure


def budget(args, plt):
    """How the gap grows with a search: climbs over people, and GCG."""
    import numpy
    rows = results_of(args.run, "attacks-full.json")["rows"]
    figure, axes = plt.subplots(figsize=(6.5, 4))
    colours = iter(range(100))
    for key in dict.fromkeys(row["key"] for row in rows):
        for kind in ("climb", "gcg"):
            colour, gaps = f"C{next(colours)}", []
            for row in rows_by_key(rows, [key])[key]:
                curves = [curve for name, curve in row["budget"].items()
                          if name.startswith(kind)]
                worst = max(curves, key=lambda curve: curve[-1][2])
                tried = [step[0] for step in worst]
                gaps.append([step[2] for step in worst])
                axes.plot(tried, gaps[-1], color=colour, marker="o", ms=3, alpha=.7,
                          label=None if gaps[1:] else f"{key}, {kind}")
            for n, values in zip(tried, numpy.transpose(gaps)):
                gap = cell(mean_and_spread(values), len(values))
                print(f"{key:<14}{kind:<8}{n:>6} prompts: gap {gap}")
    axes.set(xlabel="prompts tried", xscale="log", ylim=(0, None),
             ylabel="gap on test rows, the search that ends worst")
    axes.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------ tables

def table(args, plt=None):
    """Every number of a run: mean and spread over seeds, then each seed's."""
    groups, rows = {}, results_of(args.run)["rows"]
    if args.out:
        return write_csv(args, rows)
    for row in rows:
        seen = groups.setdefault(row["key"], {})
        for name, value in [*numbers(row), *attacked(args.run, row)]:
            seen.setdefault(name, []).append(value)
    if not groups:
        raise InputError(f"{args.run} holds no rows.")
    for key, seen in groups.items():
        print(f"\n{key}")
        for name, values in seen.items():
            mean = cell(mean_and_spread(values), len(values))
            each = " ".join(decimals(value, 4) for value in values)
            print(f"    {name:<28}{mean:<11}  {each}")


def write_csv(args, rows):
    """A line a model and seed, a column a number."""
    lines, names = [], {"key": None, "seed": None}
    for row in rows:
        lines.append({"key": row["key"], "seed": row["seed"], **dict(numbers(row)),
                      **dict(attacked(args.run, row))})
        names.update(lines[-1])
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    runs.write(args.out, text.getvalue())
    print(f"written: {args.out}")


def numbers(row):
    """A row's numbers -> [(name, number)]; those without SWA, too."""
    found = [(name, x) for name, x in row.items() if isinstance(x, float)]
    for name, x in row.get("without_swa", {}).items():
        found.append((f"without SWA, {name}", x))
    return found


def attacked(folder, row):
    """What attacks of a run found on a row's model -> [(name, number)]."""
    found = []
    for path in sorted(pathlib.Path(folder).glob("attacks*.json")):
        for other in runs.read_json(path)["rows"]:
            if (other["key"], other["seed"]) == (row["key"], row["seed"]):
                found.append((f"worst gap, {path.stem}", other["worst"]))
                found.append((f"lowest ACC, {path.stem}", other["lowest_acc"]))
    return found


WHAT = {"figure2": figure2, "figure4": figure4, "table1": table1, "rounds": rounds,
        "curve": curve, "compare": compare, "lam": lam, "budget": budget,
        "table": table}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("run", nargs="?", help="the folder of a finished run")
    parser.add_argument("--out", metavar="FILE.png", help="table: FILE.csv")
    args = parser.parse_args(argv)
    if args.run is None and args.what not in ("figure2", "figure4"):
        raise InputError(f"{args.what} needs a run's folder, such as runs/default.")
    if args.what == "table":
        return table(args)
    plt = pyplot()
    figure = WHAT[args.what](args, plt)
    out = args.out or str(pathlib.Path(args.run or ".") / f"{args.what}.png")
    figure.tight_layout()
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{out} cannot be drawn ({error}); give --out a file that "
                         "ends in .png in a folder that exists.") from None
    print(f"drawn: {out}")


if __name__ == "__main__":
    with runs.one_sentence("beyond.report"):
        try:
            main()
        except (LookupError, TypeError, AttributeError) as problem:
            raise InputError(f"the run lacks {problem}; is it of the right "
                             "kind?") from None
