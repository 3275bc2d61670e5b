"""NOT IN THE PAPER: what each part of the recipe is worth.

Every variant is the game of faircon.py with what stands below changed. All are trained
on the same rows, and attacked by beyond/attacks.py's `short`.

    python -m beyond.ablation                   # every variant, one seed
    python -m beyond.ablation --lam-curve       # the trade-off over lam
    python -m beyond.ablation --only faircon no-phi-steps --seeds 5
"""
import argparse
import pathlib
import sys
from dataclasses import replace

import adult
import faircon
import lora
import train
from adult import InputError
from beyond import attacks, report, runs
from beyond.fast import load_model
from beyond.options import COUNT, enough, folder_name

DEFAULT = faircon.Options()


class Written(faircon.Game):
    """Texts that the model writes itself in the place of labelled rows.

    The paper's own thought, section 4: "replace the categorical distribution to another
    LLM".
    """

    def start_phi(self):
        super().start_phi()
        length = self.options.prompt_length
        self.texts = self.model.write(4, length, self.generator)     # in every round

    def unfair_rows(self):
        text = self.texts[self.rng.integers(len(self.texts))]
        return text[-self.some_length():]


class BothTwins(faircon.Game):
    """CDA: each row once as a man and once as a woman."""

    def __init__(self, model, people, options, seed):
        both = people + [adult.flipped(person) for person in people]
        options = replace(options, batch_size=2 * options.batch_size)
        super().__init__(model, both, options, seed)


GAMES = {game.__name__: game for game in (faircon.Game, Written, BothTwins)}
# name: (what is changed, the game, the options)
VARIANTS = {
    "faircon": ("", faircon.Game, {}),
    "no-phi-steps": ("phi takes no step", faircon.Game, {"phi_steps": 0}),
    "no-adversary": ("no adversary: rows alone", faircon.Game, {"adversaries": 0}),
    "no-rows": ("no rows: the adversary alone", faircon.Game, {"labelled": False}),
    "noise-alone": ("no rows, phi takes no step", faircon.Game,
                    {"labelled": False, "phi_steps": 0}),
    "cda-rows": ("CDA behind rows, lam = 0", BothTwins, {"lam": 0., "adversaries": 0}),
    "written": ("texts of the model for rows", Written, {}),
    "goes-on": ("phi goes on over rounds", faircon.Game, {"renew": False}),
    "probabilities": ("f_theta: probabilities", faircon.Game, {"log_odds": False}),
    "no-sex": ("sex left out of the text", faircon.Game,
               {"adversaries": 0, "labelled": False, "lam": 0.})}
LAMS = (0., .1, 1., 10.)


def variants_of(args):
    if args.lam_curve:
        curve = {}
        for lam in LAMS:
            curve[f"lam-{lam:g}"] = (f"lam = {lam:g}", faircon.Game, {"lam": lam})
        return curve
    unknown = set(args.only or ()) - set(VARIANTS)
    if unknown:
        raise InputError(f"{', '.join(unknown)} is no variant; there are "
                         f"{', '.join(VARIANTS)}.")
    return {name: VARIANTS[name] for name in args.only or VARIANTS}


def run_variant(config, name, seed, folder):
    """Train and measure one variant -> its row; a job of `main`."""
    place = pathlib.Path(folder) / f"{name}-{seed}"
    if (place / "rows.json").exists():
        return runs.read_json(place / "rows.json", list)
    model, _ = load_model(adult.TINY, "float32", "cpu")
    data = train.load_data_once(config["data"])
    people = adult.split(data, 200, .5, config["test_rows"], seed)
    changed, game_name, options = config["variants"][name]
    attributes = adult.ATTRIBUTES
    if name == "no-sex":
        attributes = tuple(a for a in adult.ATTRIBUTES if a != "sex")
    lora.inject(model.model, seed=seed)
    game = GAMES[game_name](model, people.train, replace(DEFAULT, **options), seed)
    game.questions = model.questions(game.people, attributes)
    while game.done < game.options.rounds:
        game.round()
    game.swa.apply()
    lora.merge(model.model)
    row = {"key": name, "seed": seed, "changed": changed,
           **faircon.measure(model, people.test, attributes=attributes)}
    if name != "no-sex":                     # there twins are one text: nothing to find
        row.update(attacks.short(model, data, people, seed))
    runs.say(f"  {name} {seed}: gap {row['gap']:.3f}")
    runs.write_json(place / "rows.json", [row])
    return [row]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="as for train.py")
    parser.add_argument("--seeds", type=COUNT, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", metavar="VARIANT")
    parser.add_argument("--lam-curve", action="store_true", help="lam from 0 to 10")
    parser.add_argument("--test-rows", type=COUNT, help="1000, or as many as there are")
    parser.add_argument("--jobs", type=COUNT, default=runs.cores())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--name", type=folder_name, default="ablation")
    args = parser.parse_args()
    variants = {}
    for name, (changed, game, options) in variants_of(args).items():
        variants[name] = [changed, game.__name__, options]
    data = adult.load(args.data)
    print(f"data    {data.source}")
    test_rows = args.test_rows or enough(data.test, .5, 1000)
    config = {"data": args.data, "test_rows": test_rows, "variants": variants,
              "seed": args.seed, "seeds": args.seeds}
    depends_on = {"config": config, "data": data.sha256}
    seeds = range(args.seed, args.seed + args.seeds)
    with runs.open_run(args.name, depends_on, args.resume) as folder:
        jobs = []
        for seed in seeds:
            jobs += [(config, name, seed, str(folder)) for name in variants]
        rows = []
        for some in runs.run_jobs(run_variant, jobs, min(args.jobs, len(jobs))):
            rows += some
        runs.write_json(folder / "results.json", {
            **depends_on, "rows": rows, "summary": report.summary(rows)})
    show(rows, args.seeds)
    print(f"\nsaved in {folder}/results.json")


LEGEND = """
ACC, M_dpd, gap: without a prompt. Then the largest gap on 200 test rows behind labelled
people (any b_Pc), people searched one by one (both directions), texts (random, written,
sentences), tokens of a Gumbel search: attacks.short."""


def show(rows, seeds):
    columns = {"ACC": "acc", "M_dpd": "dpd", "gap": "gap", "people": "shots",
               "climb": "climb", "texts": "texts", "gumbel": "gumbel"}
    print("\n" + " " * 28 + "".join(f"{name:>10}" for name in columns))
    for key, values in report.summary(rows).items():
        changed = next(row["changed"] for row in rows if row["key"] == key)
        text = f"{changed or 'FairCon':<28}"
        for name in columns.values():
            text += f"{report.cell(values.get(name), seeds):>10}"
        print(text)
    show_differences(rows)
    print(LEGEND)


def show_differences(rows):
    """How much more is found on a variant than on FairCon, and on how many seeds."""
    groups = {}
    for row in rows:
        groups.setdefault(row["key"], []).append(row)        # seeds in their order
    ours = groups.pop("faircon", None)
    attacked = {key: some for key, some in groups.items() if "climb" in some[0]}
    if not ours or not attacked:
        return
    print(f"\n{'more than on FairCon':<28}{'people':>17}{'climb':>17}{'texts':>17}"
          f"{'gumbel':>17}")
    for key, theirs in attacked.items():
        text = f"{key:<28}"
        for name in ("shots", "climb", "texts", "gumbel"):
            more = [their[name] - our[name] for their, our in zip(theirs, ours)]
            mean = report.cell(report.mean_and_spread(more), len(more))
            text += f"{mean:>13} {sum(x > 0 for x in more)}/{len(more)}"
        print(text)


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"beyond.ablation: {problem}")
