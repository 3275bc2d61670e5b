"""NOT IN THE PAPER: what phi and its steps are worth in robust FairCon.

Every variant is Table 3's robust FairCon, but for what stands in VARIANTS. All are
trained on the same rows of a seed, and attacked by beyond.attacks.short.

    python -m beyond.ablation                   # every variant, one seed
    python -m beyond.ablation --only robust no-steps --seeds 10
"""
import dataclasses
from typing import NamedTuple

import torch

import adult
import faircon
import lora
import train
from beyond import attacks, report, runs, tasks
from beyond.load import load_once
from beyond.robust import FreshGame, RobustGame


# ------------------------------------------------------------------ the variants

class TwoShots(RobustGame):
    """Biased shots twice, where robust FairCon has a prompt of phi's as the second."""

    def prompts(self):
        return [self.biased_shots(), self.biased_shots()]


class OneSample(FreshGame):
    """One sample of the adversary for all of theta's steps of a round."""

    def start_phi(self):
        super().start_phi()
        self.sample = self.adversary.sample_ids()

    def prompts(self):
        return [self.sample]


class Variant(NamedTuple):
    title: str
    game: type = RobustGame
    options: dict = {}           # where they are not robust FairCon's


VARIANTS = {
    "robust": Variant("robust FairCon"),
    "no-steps": Variant("phi takes no step", options={"phi_steps": 0}),
    "two-shots": Variant("biased shots twice, no phi", TwoShots, {"phi_steps": 0}),
    "adversary": Variant("the adversary only, no shots", FreshGame),
    "noise": Variant("the adversary only, no step", FreshGame, {"phi_steps": 0}),
    "one-sample": Variant("the same, one sample a round", OneSample, {"phi_steps": 0})}
# Compared, as each is with robust. One sample a round lacks the diversity of noise;
# phi's steps give a direction, and samples that mostly agree.
PAIRS = [("noise", "adversary"), ("one-sample", "noise"), ("adversary", "one-sample")]


def run_variant(config, name, seed, folder):
    """Train one variant, measure and attack it -> [its row]; a job of `main`."""
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    data = tasks.data_of(config["task"], config["data"])
    model = load_once("tiny", "float32", "cpu")
    people = adult.split(data, config["rows"], config["bpc"], config["test_rows"], seed)
    options = dataclasses.replace(train.options_of(config, "robust"), **variant.options)
    game = variant.game(model, people.train, options, seed)
    list(game.play())                                           # all its rounds
    game.swa.apply()
    row = {"key": name, "seed": seed}
    with lora.merged(model.model):
        row.update(faircon.measure(model, people.test))
        row["follows"] = train.follows(model, people, data, config, "robust", seed)
        row.update(attacks.short(model, data, people, seed))
    runs.say(f"  {name} {seed}: ACC {row['acc']:.2f} gap {row['gap']:.3f}")
    return [row]


# ------------------------------------------------------------------ the tables

COLUMNS = {"ACC": "acc", "gap": "gap", "follows": "follows", "people": "shots",
           "climb": "climb", "texts": "texts", "gumbel": "gumbel"}
LEGEND = """
ACC, gap: without a prompt. follows: as in Table 3. Then the largest gap on 200
test rows given labelled people (any b_Pc), people searched one by one (both
directions), texts (random, written, sentences), tokens of a Gumbel search:
attacks.short. In brackets t, the mean difference over its standard error; then on
how many seeds the difference is above 0."""


def show(rows, seeds):
    print("\n" + " " * 18 + "".join(f"{name:>10}" for name in COLUMNS))
    for key, values in report.summary(rows).items():
        text = f"{key:<18}"
        for name in COLUMNS.values():
            text += f" {report.cell(values[name], seeds):>9}"
        print(text)
    show_differences(rows, ("ACC", "gap", "people"))
    show_differences(rows, ("climb", "texts", "gumbel"))
    print(LEGEND)


def show_differences(rows, columns):
    """How much more one variant has than another, seed by seed."""
    groups = report.by_key(rows)
    pairs = [(key, "robust") for key in VARIANTS if key != "robust"] + PAIRS
    pairs = [(a, b) for a, b in pairs if a in groups and b in groups]
    if pairs:
        print("\n" + " " * 28 + "".join(f"{name:>20}" for name in columns))
    for a, b in pairs:
        text = f"{a} - {b}".ljust(28)
        for name in columns:
            text += f"{difference(groups[a], groups[b], COLUMNS[name]):>20}"
        print(text)


def difference(ours, theirs, name):
    """Two variants' rows of the same seeds -> "+0.012 (2.1) 4/5"."""
    more = [a[name] - b[name] for a, b in zip(ours, theirs, strict=True)]
    mean, spread = report.mean_and_spread(more)
    t = f"{mean / spread * len(more) ** .5:.1f}" if spread else "-"
    return f"{mean:+.3f} ({t}) {sum(x > 0 for x in more)}/{len(more)}"


# ------------------------------------------------------------------ the command

def parser():
    p = runs.Parser(prog="beyond.ablation", allow_abbrev=False,
                    description=__doc__.splitlines()[0])
    p.add_argument("--data", metavar="PATH", help="as for train.py")
    p.add_argument("--task", metavar="FILE.json", help="as for train.py")
    p.add_argument("--rows", type=runs.count, default=200, help="training rows (200)")
    p.add_argument("--seeds", type=runs.count, default=1, help="how many (1)")
    p.add_argument("--seed", type=runs.seed, default=0, help="the first one (0)")
    p.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT",
                   help=", ".join(VARIANTS))
    p.add_argument("--test-rows", type=runs.count, help="1000, or as many as there are")
    p.add_argument("--shots", type=runs.count, default=16,
                   help="labelled people of the column `follows` (16)")
    p.add_argument("--jobs", type=runs.count, default=runs.cores())
    p.add_argument("--resume", type=runs.folder_name, metavar="NAME",
                   help="go on with runs/NAME, with its flags")
    p.add_argument("--name", type=runs.folder_name, default="ablation")
    return p


def run(args):
    names = [name for name in VARIANTS if name in (args.only or VARIANTS)]
    data = tasks.data_of(args.task, args.data)
    runs.say(f"data    {data.source}")
    config = {"data": args.data, "task": args.task, "rows": args.rows, "bpc": .5,
              "game": train.DEFAULTS, "seed": args.seed, "seeds": args.seeds,
              "shots": args.shots,
              "test_rows": args.test_rows or adult.enough(data.test, .5, 1000)}
    for name in names:
        runs.say(f"    {name:<18} {VARIANTS[name].title}")
    depends_on = {"format": runs.FORMAT, "config": {**config, "variants": names},
                  "data": data.sha256, "versions": runs.versions()}
    jobs = []
    for seed in range(args.seed, args.seed + args.seeds):
        jobs += [(config, name, seed) for name in names]
    with runs.open_run(args, depends_on) as folder:
        rows = runs.run_jobs(run_variant, jobs, min(args.jobs, len(jobs)), folder)
        runs.finish(folder, {
            **depends_on, "rows": rows, "summary": report.summary(rows)})
    show(rows, args.seeds)
    print(f"\nsaved in {folder}/results.json")


if __name__ == "__main__":
    with runs.one_sentence("beyond.ablation"):
        run(runs.parse(parser(), None))
