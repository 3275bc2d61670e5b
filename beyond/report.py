"""NOT IN THE PAPER: long tables and every picture, from the files of finished runs.

    python -m beyond.report figure2                   the loop (Figure 2)
    python -m beyond.report figure4                   Figure 4
    python -m beyond.report table1 runs/NAME          a run of train.py --table 1
    python -m beyond.report rounds runs/NAME          the game, round by round
    python -m beyond.report curve runs/NAME           validation accuracy by round
    python -m beyond.report compare runs/NAME         accuracy against the worst gap
    python -m beyond.report table runs/NAME           every number of a run, over seeds
                                                      --out FILE.csv: as CSV

A picture goes into the run's folder, or to --out; it needs matplotlib.
"""
import argparse
import csv
import pathlib
import re

import numpy

import adult
import metrics
from adult import InputError
from beyond import runs


# ------------------------------------------------------------------ tables

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


LEGEND = """
gap: mean |p_m - p_f|, the same person asked as both, in [0, 1]. M_dpd, M_deo: Eq.
(1), (2). {shots} shots: the gap given {shots} labelled people at b_Pc = 1 or -1,
whichever is larger. follows: mean p given {shots} people who are all 1, minus all 0."""
PAPER = "  in the paper (ACC in %)"


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
    """A line a model; below it the paper's numbers, or that it is constant.

    titles: {key: title}, the key where there is none; printed: {key: (ACC in percent,
    M_dpd, M_deo)}
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
    warn(rows)


def constant(row):
    """Whether (nearly) everybody gets the same answer: fair, and useless."""
    return not .02 < row["positives"] < .98


def warn(rows):
    """Say what a reader must know before believing a row."""
    for row in rows:
        if row.get("swa_weights") == 0:
            print(f"note: {row['key']}, seed {row['seed']}: without SWA, so the last "
                  "weights are measured.")


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

def figure2(args, axes):
    """Figure 2: the loop, with the names of the code."""
    axes.figure.set_size_inches(8, 4)
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
    axes.text(3.5, 2.6, "phi_turn: phi goes UP the distance,\ntheta frozen",
              color="C3", fontsize=10)
    axes.text(2.2, .1, "theta_step: theta goes DOWN task + lam * distance, Eq. (3); "
              "phi frozen", color="C0", fontsize=10)
    axes.text(.2, .9, "a round:\nphi_turn,\nthen theta_step\nfor every batch",
              fontsize=10)


def figure4(args, axes):
    """Figure 4: a known distribution learned through Gumbel-softmax samples."""
    import gumbel
    for colour, tau in (("C0", .3), ("C1", 1.), ("C2", 2.)):
        curves = [gumbel.figure_4(tau, seed) for seed in range(10)]
        last, averaged = numpy.mean(curves, axis=0)
        axes.plot(last, color=colour, lw=.7, label=f"phi, tau {tau:g}")
        axes.plot(range(200, len(averaged)), averaged[200:], color=colour, lw=2.2,
                  label=f"average of phi since step 200, tau {tau:g}")
    axes.set(xlabel="step of Adam (64 samples each)", yscale="log",
             ylabel="total variation distance to the target")
    axes.set_title("8 tokens, mean of 10 seeds", fontsize=10)


def table1(args, left):
    """Table 1 as a curve over b_Pc of the shots; mean and spread over draws."""
    results = runs.read_json(args.run / "results.json")
    means, right = results["summary"], left.twinx()
    keys = [key for key in means if key.startswith("b = ") and "," not in key]
    for axes, name, colour, text in (
            (left, "gap", "C3", "gap: mean |p as a man - p as a woman|"),
            (right, "acc", "C0", "accuracy, balanced rows")):
        mean = [means[key][name][0] for key in keys]
        spread = [means[key][name][1] for key in keys]
        axes.errorbar([float(key[4:]) for key in keys], mean, spread, color=colour,
                      marker="o", capsize=3)
        axes.set_ylabel(text, color=colour)
    left.set_xlabel("b_Pc of the 16 labelled people in front (their bias)")
    draws = results["config"]["seeds"]
    left.set_title(f"the model not trained, {draws} draws of people", fontsize=10)


def rounds(args, axes):
    """The distance of Eq. (3) under phi's prompts, before and after phi's steps."""
    labels = ["phi's first and last step", "theta's steps of the round, mean"]
    for row in rows_of(args).get("faircon", ()):
        for record in row["history"]:
            n = record["round"]
            axes.plot([n, n + .4], record["phi"], color="C3", alpha=.6, lw=1.4,
                      label=labels[0])
            axes.plot(n + .65, record["distance"], "o", color="C0", alpha=.6, ms=3,
                      label=labels[1])
            labels = [None, None]
    axes.set(xlabel="round of the game", yscale="log",
             ylabel="distance of Eq. (3), training rows")


def curve(args, axes):
    """Accuracy on validation rows after each round, a thin line a seed, thick: mean."""
    import train
    groups = rows_of(args)
    trained = [key for key in groups if "history" in groups[key][0]]
    for k, key in enumerate(trained):
        curves = []
        for row in groups[key]:
            curves.append([now["acc"] for now in row["history"]])
            n = range(1, len(curves[-1]) + 1)
            axes.plot(n, curves[-1], color=f"C{k}", lw=.6, alpha=.6)
        axes.plot(n, numpy.mean(curves, axis=0), color=f"C{k}", lw=2.4,
                  label=train.MODELS[key].title)
    axes.set(xlabel="round of the game", ylabel="accuracy, 100 validation rows")


def compare(args, axes):
    """What each row of Table 3 trades: accuracy, and the worst gap, a dot a seed."""
    import train
    worst = {}
    for row in runs.read_json(args.run / "attacks.json")["rows"]:
        worst[row["key"], row["seed"]] = row["worst"]
    for key, rows in rows_of(args).items():
        some = [row for row in rows if (key, row["seed"]) in worst]
        if some:
            x = [worst[key, row["seed"]] for row in some]
            marker = "o" if len(axes.lines) < 10 else "s"        # there are ten colours
            axes.plot(x, [row["acc"] for row in some], marker,
                      label=train.MODELS[key].title)
    axes.set(xscale="log", xlabel="worst gap that an attack found",
             ylabel="accuracy, balanced test rows")


# ------------------------------------------------------------------ the command

def rows_of(args):
    """The rows of a finished run -> {key: its rows}."""
    return by_key(runs.read_json(args.run / "results.json")["rows"])


def table(args):
    """Every number of a run: mean and spread over seeds, then each seed's."""
    for key, rows in rows_of(args).items():
        seen = {}
        for row in rows:
            for name, value in numbers(row, args.run).items():
                seen.setdefault(name, []).append(value)
        print(f"\n{key}")
        wide = 2 + max(map(len, seen))
        for name, values in seen.items():
            mean = cell(mean_and_spread(values), len(values))
            each = " ".join(decimals(value, 4) for value in values)
            print(f"    {name:<{wide}}{mean:<11}  {each}")


def write_csv(args):
    """The same as CSV: a line a model and seed, a column a number."""
    lines, names = [], {}
    for rows in rows_of(args).values():
        for row in rows:
            found = numbers(row, args.run)
            lines.append({"key": row["key"], "seed": row["seed"], **found})
            names.update(lines[-1])
    try:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    except OSError:
        raise InputError(f"{args.out!r} cannot be written; give --out a file in a "
                         "folder that exists.") from None
    print(f"written: {args.out}")


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


PICTURES = {"figure2": figure2, "figure4": figure4, "table1": table1,
            "rounds": rounds, "curve": curve, "compare": compare}


def draw(args):
    """One of PICTURES, to a file. InputError where there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a picture needs matplotlib: "
                         "`pip install matplotlib`.") from None
    figure = Figure(figsize=(6.5, 4))
    axes = figure.subplots()
    PICTURES[args.what](args, axes)
    if not axes.texts and not any(len(line.get_xdata()) for line in axes.lines):
        raise InputError(f"{args.run} has no such row: there is nothing to draw.")
    entries = len(axes.get_legend_handles_labels()[0])
    if entries:
        legend = axes.legend(fontsize=8)
    if entries > 6:                                       # beside the picture
        legend.set(loc="center left", bbox_to_anchor=(1, .5))
    figure.tight_layout()
    out = args.out or (args.run or pathlib.Path()) / f"{args.what}.png"
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{out} cannot be drawn ({error}); give --out a file that "
                         "ends in .png in a folder that exists.") from None
    print(f"drawn: {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("table", *PICTURES))
    parser.add_argument("run", nargs="?", type=pathlib.Path,
                        help="the folder of a finished run")
    parser.add_argument("--out", metavar="FILE.png", help="table: FILE.csv")
    args = parser.parse_args(argv)
    if args.run is None and args.what not in ("figure2", "figure4"):
        raise InputError(f"{args.what} needs a run's folder, such as runs/default.")
    if args.what != "table":
        draw(args)
    elif args.out:
        write_csv(args)
    else:
        table(args)


if __name__ == "__main__":
    with runs.one_sentence("beyond.report"):
        try:
            main()
        except (LookupError, TypeError, AttributeError) as problem:
            raise InputError(f"the run lacks {problem}; is it of the right "
                             "kind?") from None
