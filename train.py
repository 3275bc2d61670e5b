"""Sections 2, 4 and 5: train, measure, print Tables 1 to 3.

    python train.py --bpc 0.5 --lam 1.0     Table 3
    python train.py --table 1               Table 1 (--table 2: Table 2)
    python train.py --prompt-only           Eq. (4): the model frozen, a fair prompt

MODELS lists Table 3's rows, the paper's two (fine-tuned, faircon) and ours, and how
theta is trained in each. They share people, seeds, rounds and theta's rate; with both
twins (CDA, counterfactual data augmentation) a batch is twice as large, so that all
take equally many steps. In FreshGame and RobustGame (beyond/robust.py) phi has another
rate; given the adversary's prompt and shots, theta has two prompts a step.

A job is one model of one seed. A number's way: run, train_model, play_game, Game.play,
swa.apply, measure_all, metrics.evaluate; then report.show.

PAPER vs RELEASED CODE: the paper does not say what rows Table 3 is measured on; the
released code measures on the 200 that its adversary was trained on. Here: adult.split.
"""
import dataclasses
import pathlib
import time
import warnings
from typing import NamedTuple

import numpy
import torch

import adult
import faircon
import lora
import metrics
from adult import InputError
from beyond import report, runs, tasks
from beyond.load import load_once
from beyond.robust import FollowingGame, FreshGame, RobustGame, RobustOptions
from beyond.runs import say
from faircon import Game, Options


class Recipe(NamedTuple):
    """A row of Table 3: how theta is trained."""
    title: str
    game: type = None            # None: not trained
    adversary: bool = False      # whether its prompt stands in front
    distance: bool = False       # task + lam * distance; else the task only
    both_twins: bool = False     # CDA: each row once as a man and once as a woman
    sex: bool = True             # whether the question says it; shots always do
    options: dict = {}           # of its own


MODELS = {
    # not trained. always-0: the answer is 0. averaged: the mean of the twins' answers
    "always-0": Recipe('always "0"'),
    "not-trained": Recipe("not trained"),
    "averaged": Recipe("not trained, twins averaged"),
    "no-sex": Recipe("not trained, sex left out", sex=False),
    # trained, nothing in front of the question
    "fine-tuned": Recipe("fine-tuned", Game),
    "fine-tuned-no-sex": Recipe("fine-tuned, sex left out", Game, sex=False),
    "cda": Recipe("both twins (CDA)", Game, both_twins=True),
    "distance": Recipe("distance, no adversary", Game, distance=True),
    # trained with the adversary's prompt in front: Eq. (3)
    "faircon": Recipe("FairCon", Game, adversary=True, distance=True),
    "fresh": Recipe("FairCon, phi begins anew", FreshGame, adversary=True,
                    distance=True),
    # trained with biased shots in front; robust: and with the adversary's prompt
    "fine-tuned-shots": Recipe("fine-tuned with biased shots", RobustGame),
    "shots": Recipe("distance with biased shots", RobustGame, distance=True),
    "cda-shots": Recipe("CDA with biased shots", RobustGame, both_twins=True),
    "robust": Recipe("robust FairCon", RobustGame, adversary=True, distance=True),
    # as robust, but given any shots the task is to answer as the untrained model does,
    # mean of the twins. At lam = 1 the shortest way to no gap is not to read the shots
    "following": Recipe("robust FairCon that follows", FollowingGame, adversary=True,
                        distance=True, options={"lam": .3})}
# Asked for by name, or by "all".
EXTRA = ("no-sex", "fine-tuned-no-sex", "distance", "fresh", "fine-tuned-shots",
         "following")
# Where the default command departs from the released rates, for every row alike.
# (Dropout would draw each twin a mask of its own, and so add to their distance.)
DEFAULTS = {"rounds": 16, "lr": 2e-3, "dropout": 0.}
# Printed in the paper: ACC in percent, M_dpd, M_deo (there: M_eod).
PRINTED = {
    "fine-tuned": (63.0, .183, .142), "faircon": (51.0, .136, .081),
    "b = 0": (75.5, .0049, .0083), "natural, natural test rows": (85.0, .0080, .0180),
    "b = 0.5": (70.5, .0411, .0429), "b = 1": (68.5, .0940, .1019),
    "b = 0, counterbalanced": (81.5, .0028, .0082)}


# ------------------------------------------------------------------ flags

def parser():
    p = runs.Parser(prog="train.py", allow_abbrev=False,
                    description="FairCon: a language model that stays fair under the "
                    "most unfair prompt, Eq. (3), and Tables 1 to 3 of the paper.")
    g = p.add_argument_group("what to run")
    one = g.add_mutually_exclusive_group()
    one.add_argument("--table", type=int, choices=(1, 2, 3), default=3,
                     help="the paper's table (3)")
    one.add_argument("--prompt-only", action="store_true",
                     help="Eq. (4): the model frozen, a fair prompt learned")
    one.add_argument("--paper", action="store_true",
                     help="the released code's hyperparameters; the loss stays Eq. (3)")
    g.add_argument("--models", nargs="+", choices=[*MODELS, "all"], metavar="KEY",
                   help=f"some of Table 3's: {', '.join(MODELS)}; all "
                   f"(default: all but {', '.join(EXTRA)})")
    g.add_argument("--resume", type=runs.folder_name, metavar="NAME",
                   help="go on with the interrupted run runs/NAME, with its flags")
    g.add_argument("--jobs", type=runs.count, metavar="N",
                   help="models trained side by side (as many as cores; 1 for a large "
                   "model or a GPU)")
    g.add_argument("--name", type=runs.folder_name,
                   help="results go to runs/NAME/ (default; or table1, table2, "
                   "prompt_only, paper)")
    add_data_flags(p.add_argument_group("data (section 2)"))
    add_model_flags(p.add_argument_group("model (section 4)"))
    add_game_flags(p.add_argument_group("the game (section 3): faircon.Options, "
                                        "beyond.robust"))
    return p


def add_data_flags(g):
    g.add_argument("--data", metavar="PATH",
                   help="folder of adult.data and adult.test, or one CSV file, half of "
                   "it the test; beyond/people.py (cache, UCI, else tiny/)")
    g.add_argument("--task", metavar="FILE.json",
                   help="another table than Adult, as in beyond/hiring.json")
    g.add_argument("--bpc", type=float, default=.5, metavar="B",
                   help="b_Pc of the training rows (0.5; paper 0.5)")
    g.add_argument("--rows", type=runs.count, default=200, metavar="N",
                   help="training rows, balanced in y and s (200; paper 200)")
    g.add_argument("--test-rows", type=runs.count, metavar="N",
                   help="balanced rows of adult.test (1000, or as many as there are)")
    g.add_argument("--shots", type=runs.count, default=16, metavar="N",
                   help="labelled people in a few-shot prompt (16; paper 16)")
    g.add_argument("--seeds", type=runs.count, default=1, metavar="N",
                   help="how many seeds (1)")
    g.add_argument("--seed", type=runs.seed, default=0, metavar="N",
                   help="the first seed; it governs everything (0; released 42)")


def add_model_flags(g):
    g.add_argument("--model", default="tiny",
                   help="tiny, smollm2, or a directory, a .gguf file or a hub id of a "
                   "causal language model with q_proj and v_proj (paper "
                   "EleutherAI/gpt-neo-1.3B)")
    g.add_argument("--chat", action="store_true",
                   help="ask in the model's chat template: beyond/chat.py")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the frozen weights")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda")


def add_game_flags(g):
    """A flag for each field of RobustOptions; its help says which value is whose."""
    for f in dataclasses.fields(RobustOptions):
        note = f"{getattr(Options, f.name, f.default):g}"
        if f.name in DEFAULTS:
            note = f"{DEFAULTS[f.name]:g}; released {note}"
        elif f.default != getattr(Options, f.name, f.default):
            note += f"; FreshGame {f.default:g}"
        g.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar="X",
                       help=f"{f.metadata['help']} ({note})")


def given_options(args):
    """What the user said of the game, over our rates -> {name: value}."""
    said = {f.name: getattr(args, f.name) for f in dataclasses.fields(RobustOptions)}
    given = {} if args.paper else dict(DEFAULTS)
    given.update({name: value for name, value in said.items() if value is not None})
    return given


def options_of(config, key):
    """One model's options. InputError for a value outside its range."""
    recipe = MODELS[key]
    fresh = recipe.game and issubclass(recipe.game, FreshGame)
    kind = RobustOptions if fresh else Options
    names = [f.name for f in dataclasses.fields(kind)]
    given = {**recipe.options, **config["game"]}
    options = kind(**{name: x for name, x in given.items() if name in names})
    if not recipe.distance:
        options.lam = 0.
    if recipe.both_twins:                                      # as many steps as others
        options.batch_size *= 2
    return options


# ------------------------------------------------------------------ Table 3

def load_both(config):
    """A job's model and people; the task first, since a model is asked about it."""
    data = tasks.data_of(config["task"], config["data"])
    return load_once(*config["model"], config["chat"]), data


def train_model(config, key, seed, folder):
    """Train (or not) one model of Table 3 and measure it -> [its row]; a job."""
    torch.manual_seed(seed)
    place = pathlib.Path(folder) / f"{key}-{seed}"
    model, data = load_both(config)
    people = adult.split(data, config["rows"], config["bpc"], config["test_rows"], seed)
    lora.remove(model.model)
    row = {"key": key, "seed": seed}
    if MODELS[key].game:
        row.update(play_game(model, people, config, key, seed, place))
    with lora.merged(model.model):
        row.update(measure_all(model, people, data, config, key, seed, place))
    return [row]


def play_game(model, people, config, key, seed, place):
    """The game of section 3, round by round -> what to say of it.

    It leaves SWA's average in the model, which train_model then measures.
    """
    recipe, options = MODELS[key], options_of(config, key)
    rows = people.train
    if recipe.both_twins:
        rows = rows + [adult.flipped(p) for p in rows]
    game = recipe.game(model, rows, options, seed, recipe.adversary, not model.small)
    attributes = attributes_of(key)
    game.questions = model.questions(rows, attributes)
    history = runs.load_state(game, place)
    began, first = time.time(), game.done
    for record in game.play():
        with lora.merged(model.model):
            now = faircon.measure(model, people.validation, attributes=attributes)
        record.update(acc=now["acc"], gap=now["gap"])
        history.append(record)
        seconds = time.time() - began
        left = seconds / (game.done - first) * (options.rounds - game.done)
        say(f"  {key:<10} {seed} {line(record, options.rounds)}, "
            f"{report.clock(seconds)}, {report.clock(left)} left")
        runs.save_state(game, history, place)
    with lora.merged(model.model):
        last = faircon.measure(model, people.test, attributes=attributes)
    game.swa.apply()                                  # theta is the average from here
    lora.save(model.model, place / "adapter", model.public_name)
    found = {"history": history, "options": dataclasses.asdict(options),
             "swa_weights": game.swa.n, "without_swa": last}
    if game.adversary:
        found["prompt"] = model.decode(game.adversary.likeliest_ids())
    return found


def line(record, rounds):
    """A round in a line; ACC and gap are those of validation rows, without a prompt."""
    text = f"round {record['round']:>2}/{rounds} task {record['task']:.3f}"
    if "distance" in record:
        text += f" distance {record['distance']:.3f}"
    return text + f", ACC {record['acc']:.2f} gap {record['gap']:.3f}"


def attributes_of(key):
    """What a row's question says of a person; None: adult.ATTRIBUTES."""
    if not MODELS[key].sex:
        return [name for name in adult.ATTRIBUTES if name != adult.COLUMNS[adult.SEX]]


def answers_of(model, key, people, **given):
    """P(y=1) of each person as a man and as a woman, (N, 2), as the row's name says."""
    if key == "always-0":
        return numpy.zeros((len(people), 2))
    p = model.predict(model.questions(people, attributes_of(key)), **given)
    return averaged(p) if key == "averaged" else p


def averaged(p):
    """Both twins get the mean of their two answers, (N, 2)."""
    return p.mean(1, keepdims=True).repeat(2, 1)


def measure_all(model, people, data, config, key, seed, place):
    """Everything the table says of a model, on test rows -> dict."""
    p = answers_of(model, key, people.test)                              # (N, 2)
    runs.write_people(place / "people.csv", people.test, p)
    row = metrics.of_people(p, people.test)
    row["averaged"] = metrics.of_people(averaged(p), people.test)
    biased = answers_of(model, key, people.test_bpc)
    row["acc_bpc"] = metrics.of_people(biased, people.test_bpc)["acc"]
    row["shots"] = gap_given_shots(model, people, data, config, key, seed)
    row["follows"] = follows(model, people, data, config, key, seed)
    return row


def follows(model, people, data, config, key, seed):
    """Mean p of 200 test people, each as their own sex, given shots all labelled 1,
    minus that given shots all labelled 0: near 0 for a model that ignores shots."""
    some, means = people.test[:200], []
    for y in (1, 0):
        rng = numpy.random.default_rng((seed, 7))
        alike = [x for x in data.train if x.y == y]
        shots = adult.few_shot(alike, config["shots"], None, rng)
        p = answers_of(model, key, some, context=shots)
        means.append(p[numpy.arange(len(some)), [x.s for x in some]].mean())
    return float(means[0] - means[1])


def gap_given_shots(model, people, data, config, key, seed):
    """The gap of 200 test people given labelled ones, at b_Pc = 1 or -1: the larger."""
    some, gaps = people.test[:200], []
    for b in (1., -1.):
        rng = numpy.random.default_rng((seed, 6))
        shots = adult.few_shot(data.train, config["shots"], b, rng)
        p = answers_of(model, key, some, context=shots)
        gaps.append(metrics.of_people(p, some)["gap"])
    return max(gaps)


# ------------------------------------------------------------------ Tables 1 and 2

# A row's title: b_Pc of the shots, whether they are counterbalanced, b_Pc of the test
# rows. b_Pc None: as the data is.
FEW_SHOT = {
    1: {"b = -1": (-1., False, 0.),
        "b = -0.5": (-.5, False, 0.),
        "b = 0": (0., False, 0.),
        "b = 0.5": (.5, False, 0.),
        "b = 1": (1., False, 0.),
        "natural, balanced test rows": (None, False, 0.),
        "natural, natural test rows": (None, False, None)},
    2: {"b = 0": (0., False, 0.),
        "b = 0, counterbalanced": (0., True, 0.),
        "b = 0.5": (.5, False, 0.),
        "b = 0.5, counterbalanced": (.5, True, 0.)}}


def few_shot_rows(config, key, seed, folder):
    """The frozen model given labelled people, one draw of prompts -> rows; a job."""
    model, data = load_both(config)
    rows = []
    for title, (b, counterbalance, test_b) in FEW_SHOT[config["table"]].items():
        rng = numpy.random.default_rng(seed)
        shots = adult.few_shot(data.train, config["shots"], b, rng, counterbalance)
        people = adult.sample(data.test, config["test_rows"], test_b, rng)
        row = {"key": title, "seed": seed, "prompt": shots}
        rows.append({**row, **faircon.measure(model, people, context=shots)})
    return rows


# ------------------------------------------------------------------ Eq. (4)

def prompt_rows(config, key, seed, folder):
    """The frozen model without a prompt, given a random and the fair one -> rows."""
    model, data = load_both(config)
    people = adult.split(data, config["rows"], config["bpc"], config["test_rows"], seed)
    options = options_of(config, "faircon")
    generator = torch.Generator().manual_seed(seed)
    length = (options.prompt_length,)
    drawn = torch.randint(len(model.usable), length, generator=generator)
    no_steps = dataclasses.replace(options, phi_steps=0)
    prompts = {"no prompt": faircon.NO_PROMPT,
               "a random prompt": [model.usable[i] for i in drawn],
               "the best of 15 random ones": fair_prompt(model, people, no_steps, seed),
               "fair prompt, Eq. (4)": fair_prompt(model, people, options, seed)}
    rows = []
    for title, g in prompts.items():
        row = {"key": title, "seed": seed, "prompt": model.decode(g) if g else ""}
        rows.append({**row, **faircon.measure(model, people.test, g)})
    return rows


def fair_prompt(model, people, options, seed, samples=15):
    """Eq. (4): phi steps down the distance, theta is frozen -> the best prompt's ids.

    Chosen on validation rows among samples of the adversary.
    """
    # B stays 0: the base model.
    game = Game(model, people.train, options, seed, bar=not model.small)
    steps = options.rounds * options.phi_steps
    for batch in game.watch(game.batches(steps), "phi"):
        game.adversary.step([game.questions[i] for i in batch], sign=-1)
    found = []
    for _ in range(samples):
        g = game.adversary.sample_ids()
        found.append((faircon.measure(model, people.validation, g)["gap"], g))
    return min(found)[1]


# ------------------------------------------------------------------ the run

def prepare(args):
    """Load the data and the model, say what they are -> what the run depends on.

    InputError for what cannot be drawn, or would be too long, before any work.
    """
    config = config_of(args)
    rank, length = options_of(config, "robust").rank, longest_prompt(config)
    data = tasks.data_of(args.task, args.data)
    config["test_rows"] = args.test_rows or adult.enough(data.test, args.bpc, 1000)
    if config["test_rows"] < 4:
        raise InputError("--test-rows below 4 leave a group empty; give 4 or more.")
    people = adult.split(data, args.rows, args.bpc, config["test_rows"], args.seed)
    warnings.filterwarnings("ignore", "b_Pc")                             # said once
    rng = numpy.random.default_rng(0)
    shots = adult.few_shot(data.train, args.shots, 0., rng, args.table == 2)
    file, digest = next(iter(data.sha256.items()))
    say(f"data    {data.source}\n        {len(data.train)} and {len(data.test)} rows; "
        f"{file} has sha256 {digest[:16]}...")
    model = load_once(args.model, args.dtype, args.device, args.chat)
    config["model"] = [args.model, model.computed_in, args.device]
    size = sum(p.numel() for p in model.model.parameters())
    say(f"model   {args.model}: {size:,} parameters, {model.how}: {model.why}")
    longest = sorted(data.train + data.test, key=lambda x: len(adult.question(x)))[-20:]
    for prefix in (model.prefix(context=shots), model.prefix([0] * length)):
        model.check_length(len(prefix), model.questions(longest))
    lora.inject(model.model, rank)
    say(f"theta   LoRA on {len(lora.adapters(model.model))} projections, "
        f"{lora.share(model.model):.3f} % of the parameters")
    report.show_untrained(model, people.validation)
    about = {"sha256": model.sha256, "computed in": model.how, "small": model.small}
    return {"format": runs.FORMAT, "config": config, "data": data.sha256,
            "model": about, "versions": runs.versions()}, data


def config_of(args):
    """What the flags say, as a run's record has it. InputError for what cannot be."""
    config = {name: getattr(args, name) for name in (
        "table", "prompt_only", "data", "task", "bpc", "rows", "shots", "seeds", "seed",
        "chat")}
    config["game"] = given_options(args)
    asked = args.models or set(MODELS) - set(EXTRA)
    config["models"] = [key for key in MODELS if key in asked or "all" in asked]
    # The fewest shots with which every b_Pc of the table is exact.
    exact = {1: 8, 2: 16}.get(args.table, 2)
    if args.shots % exact:
        raise InputError(f"--shots {args.shots} cannot have every b_Pc of this table; "
                         f"give a multiple of {exact}, an even number.")
    return config


def longest_prompt(config):
    """How many tokens the adversary's prompt has at most, in any row of the table."""
    if config["table"] != 3:
        return 0
    options = [options_of(config, key) for key in config["models"]]
    lengths = [o.prompt_length for o in options]
    if not config["prompt_only"]:
        lengths += [getattr(o, "longest", 0) for o in options]
    return max(lengths)


def run(args):
    """One table: every model and seed, side by side, then results.json."""
    depends_on, data = prepare(args)
    config, small = depends_on["config"], depends_on["model"]["small"]
    work, keys = train_model, config["models"]
    if args.prompt_only:
        work, keys = prompt_rows, ["prompts"]
    elif args.table != 3:
        work, keys = few_shot_rows, [f"table{args.table}"]
    jobs = []
    for seed in range(args.seed, args.seed + args.seeds):
        jobs += [(config, key, seed) for key in keys]
    workers = min(args.jobs or (runs.cores() if small else 1), len(jobs))
    with runs.open_run(args, depends_on) as folder:
        say(f"jobs    {len(jobs)}, {workers} at a time; results go to {folder}/\n")
        rows = runs.run_jobs(work, jobs, workers, folder)
        runs.finish(folder, {
            **depends_on, "data": {"source": data.source, "sha256": data.sha256},
            "rows": rows, "summary": report.summary(rows)})
    titles = {key: recipe.title for key, recipe in MODELS.items()}
    report.show(rows, titles, {} if args.task else PRINTED, args.shots)
    if args.table == 3:
        report.show_prompt(rows)
    say(f"\nsaved in {folder}/: results.json")
    if work is train_model:
        say(f"each model's adapter (PEFT's format) and its answers are in "
            f"{folder}/MODEL-SEED/\nnext:    python -m beyond.attacks {folder}")


def main(argv=None):
    """The command. Whatever is wrong with the input is one sentence, exit status 1."""
    with runs.one_sentence("train.py"):
        args = runs.parse(parser(), argv)
        if args.models and (args.table != 3 or args.prompt_only):
            raise InputError("--models are Table 3's; leave it out here.")
        if args.table != 3 and given_options(args) != DEFAULTS:
            raise InputError("Tables 1 and 2 train nothing: no flags of the game.")
        usual = "default" if args.table == 3 else f"table{args.table}"
        for kind in ("paper", "prompt_only"):
            usual = kind if getattr(args, kind) else usual
        args.name = args.name or usual
        run(args)


if __name__ == "__main__":
    main()
