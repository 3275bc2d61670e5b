"""NOT IN THE PAPER: every picture, from the files of finished runs.

    python -m beyond.pictures figure2                   the loop (Figure 2)
    python -m beyond.pictures figure4                   Figure 4
    python -m beyond.pictures table1 runs/NAME          a run of train.py --table 1
    python -m beyond.pictures rounds runs/NAME          the game, round by round
    python -m beyond.pictures curve runs/NAME           validation accuracy by round
    python -m beyond.pictures compare runs/NAME         accuracy against the worst gap

A picture goes into the run's folder, or to --out; it needs matplotlib.
"""
import pathlib

import numpy

import gumbel
import train
from adult import InputError
from beyond import runs
from beyond.report import right_kind, rows_of


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
    for row in rows_of(args.run).get("faircon", ()):
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
    """Accuracy on validation rows after each round, thin: a seed, thick: the mean."""
    groups = rows_of(args.run)
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
    """What each row trades: accuracy, and the worst gap; one dot per seed."""
    worst = {}
    attacked = "a run that was attacked (beyond.attacks)"
    for row in runs.read_json(args.run / "attacks.json", give=attacked)["rows"]:
        worst[row["key"], row["seed"]] = row["worst"]
    for key, rows in rows_of(args.run).items():
        some = [row for row in rows if (key, row["seed"]) in worst]
        if some:
            x = [worst[key, row["seed"]] for row in some]
            marker = "o" if len(axes.lines) < 10 else "s"        # there are ten colours
            axes.plot(x, [row["acc"] for row in some], marker,
                      label=train.MODELS[key].title)
    axes.set(xscale="log", xlabel="worst gap that an attack found",
             ylabel="accuracy, balanced test rows")


# ------------------------------------------------------------------ the command

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
    parser = runs.Parser(prog="beyond.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=PICTURES)
    parser.add_argument("run", nargs="?", type=pathlib.Path,
                        help="the folder of a finished run")
    parser.add_argument("--out", metavar="FILE.png")
    args = parser.parse_args(argv)
    if args.run is None and args.what not in ("figure2", "figure4"):
        raise InputError(f"{args.what} needs a run's folder, such as runs/default.")
    draw(args)


if __name__ == "__main__":
    with runs.one_sentence("beyond.pictures"), right_kind():
        main()
