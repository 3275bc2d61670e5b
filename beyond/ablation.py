"""NOT IN THE PAPER: what each part of the recipe is worth.

Every variant is the game of faircon.py with one line changed, which stands below. All
are trained on the same rows and attacked with the same prompts as Table 3's FairCon.

    python -m beyond.ablation                   # every variant, one seed
    python -m beyond.ablation --lam-curve       # the trade-off over lam
    python -m beyond.ablation --only faircon no-phi-steps --seeds 5
"""
import argparse
import pathlib
import sys
from dataclasses import replace

import numpy

import adult
import faircon
import lora
import train
from adult import InputError
from beyond import attacks, runs
from beyond.fast import load_model
from beyond.options import COUNT, folder_name

DEFAULT = faircon.Options()


class RandomPrompts(faircon.Game):
    """No search at all: tokens at random."""

    def prompts(self):
        usable, length = self.model.usable, self.options.prompt_length
        return [faircon.CLEAN, list(self.rng.choice(usable, length))]


class TrainingRows(faircon.Game):
    """phi begins around labelled training rows, section 2's unfair few-shot prompts.

    Nothing that the model writes is needed; b_Pc is 1 or -1 by turns.
    """

    def start_phi(self):
        length = self.options.prompt_length
        for k, adversary in enumerate(self.adversaries):
            b = (1., -1.)[k % 2]
            people = adult.sample(self.people, len(self.people) // 4 * 2, 0., self.rng)
            shots = "".join(adult.shot(biased(p, b)) for p in people)
            adversary.start_around(self.model.ids(shots)[:length])


def biased(person, b):
    """The same row with the label that b_Pc = b (1 or -1) gives its sex."""
    return person._replace(y=1 - person.s if b > 0 else person.s)


# name: (what is changed, the game, the options)
VARIANTS = {
    "faircon": ("", faircon.Game, {}),
    "no-adversary": ("the clean prompt alone", faircon.Game, {"adversaries": 0}),
    "random-prompts": ("tokens at random", RandomPrompts, {"phi_steps": 0}),
    "no-phi-steps": ("the model's texts, no phi step", faircon.Game, {"phi_steps": 0}),
    "training-rows": ("phi begins at training rows", TrainingRows, {}),
    "rows-no-phi": ("training rows, phi untrained", TrainingRows, {"phi_steps": 0}),
    "noise": ("phi begins at noise, goes on", faircon.Game, {"starts": "noise"}),
    "no-clean": ("never without a prompt", faircon.Game, {"clean": False}),
    "one-adversary": ("one instead of two", faircon.Game, {"adversaries": 1}),
    "prompts-80": ("prompts of 80 tokens", faircon.Game, {"prompt_length": 80}),
    "prompts-10": ("prompts of 10 tokens", faircon.Game, {"prompt_length": 10}),
    "eps-1e-8": ("Adam's usual eps for phi", faircon.Game, {"phi_eps": 1e-8}),
    "no-swa": ("the last weights", faircon.Game, {"swa": 0.}),
    "no-sex": ("sex left out of the text", faircon.Game, {"adversaries": 0, "lam": 0.})}
LAMS = (0., .1, .3, 1., 3., 10.)


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
    changed, game_class, options = config["variants"][name]
    attributes = adult.ATTRIBUTES
    if name == "no-sex":
        attributes = tuple(a for a in adult.ATTRIBUTES if a != "sex")
    game_class = globals().get(game_class, faircon.Game)
    lora.inject(model.model, seed=seed)
    game = game_class(model, people.train, replace(DEFAULT, **options), seed)
    game.questions = model.questions(people.train, attributes)
    while game.done < game.options.rounds:
        game.round()
    game.swa.apply()
    lora.merge(model.model)
    row = {"key": name, "seed": seed, "changed": changed,
           **faircon.measure(model, people.test, attributes=attributes)}
    if name != "no-sex":                     # there twins are one text: nothing to find
        row.update(attacks.short(model, data, people, seed))
    print(f"  {name} {seed}: gap {row['gap']:.3f}", flush=True)
    runs.write_json(place / "rows.json", [row])
    return [row]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="as for train.py")
    parser.add_argument("--seeds", type=COUNT, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", metavar="VARIANT")
    parser.add_argument("--lam-curve", action="store_true", help="lam from 0 to 10")
    parser.add_argument("--test-rows", type=COUNT, default=1000)
    parser.add_argument("--jobs", type=COUNT, default=runs.cores())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--name", type=folder_name, default="ablation")
    args = parser.parse_args()
    variants = {}
    for name, (changed, game, options) in variants_of(args).items():
        variants[name] = [changed, game.__name__, options]
    data = adult.load(args.data)
    print(f"data    {data.source}")
    config = {"data": args.data, "test_rows": args.test_rows, "variants": variants,
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
            **depends_on, "rows": rows, "summary": train.summary(rows)})
    show(rows, args.seeds)
    print(f"\nsaved in {folder}/results.json")


def show(rows, seeds):
    columns = {"ACC": "acc", "gap": "gap", "16 shots": "shots", "climb": "climb"}
    print("\n" + " " * 36 + "".join(f"{name:>12}" for name in columns))
    for key, values in train.summary(rows).items():
        changed = next(row["changed"] for row in rows if row["key"] == key)
        text = f"{changed or 'FairCon':<36}"
        for name in columns.values():
            text += f"{train.cell(values.get(name), seeds):>12}"
        print(text)
    print("\n16 shots: gap behind 16 labelled people, the largest over b_Pc. climb: "
          "behind\npeople searched one by one, in both directions (beyond/attacks.py).")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"beyond.ablation: {problem}")
