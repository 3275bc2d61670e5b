"""Sections 2, 4 and 5: train, measure, print Tables 1 to 3.

    python train.py --bpc 0.5 --lam 1.0     Table 3
    python train.py --table 1               Table 1 (--table 2: Table 2)
    python train.py --prompt-only           Eq. (4): the model frozen, a fair prompt
    python train.py --paper                 options as in the paper, else released

    Table 3's models     what is trained, on what          options, or meaning
    always-0             nothing: the answer is 0          constant
    not-trained          nothing                           the model as it is
    fine-tuned           theta, on the task alone          lam = 0, no phi
    cda                  the same, each row with its twin  counterfactual data
    paper                theta and phi, Eq. (3)            PAPER
    faircon              theta and phi, Eq. (3)            faircon.Options

PAPER vs RELEASED CODE: the paper does not say what rows Table 3 is measured on; the
released code measures on the 200 that its adversary was trained on. Here: adult.split.
"""
import dataclasses
import functools
import os
import pathlib
import re
import signal
import sys
import textwrap
import warnings

import adult
from adult import InputError
from beyond import report, runs
from beyond.options import check_kinds, check_shots, enough, idle_fields, parser
from beyond.runs import say

# What the paper has, else its released code, option by option (faircon.Options).
PAPER = {
    "prompt_length": 10, "phi_steps": 23, "phi_lr": .1, "log_odds": False,
    "rounds": 10, "batch_size": 9, "lr": 5e-4, "rank": 32, "alpha": 16.,
    "dropout": .01, "tau": 1.}
# phi_steps: a step for each of theta's, 200 rows by 9. log_odds: probabilities of all
# tokens, our reading; the released code has their logits.
QUICK = {"prompt_length": 100, "rounds": 6}
TASK_ALONE = {"lam": 0.}
MODELS = {
    "always-0": ('always "0"', None),
    "not-trained": ("not trained", None),
    "fine-tuned": ("fine-tuned", TASK_ALONE),
    "cda": ("both twins (CDA)", TASK_ALONE),
    "paper": ("FairCon, as the paper", PAPER),
    "faircon": ("FairCon", {})}
FAIR_PROMPT = {"prompt_length": 10, "phi_steps": 20, "phi_lr": .3}
EQUATION_4 = {
    "not-trained": ("no prompt", None),
    "random-prompt": ("a random prompt", None),
    "fair-prompt": ("fair prompt, Eq. (4)", FAIR_PROMPT)}
# Printed in the paper: ACC in percent, M_dpd, M_deo (there: M_eod).
TABLE_3 = {"fine-tuned": (63.0, .183, .142), "paper": (51.0, .136, .081)}
TABLES_1_2 = {
    "b = 0": (75.5, .0049, .0083), "natural, natural test rows": (85.0, .0080, .0180),
    "b = 0.5": (70.5, .0411, .0429), "b = 1": (68.5, .0940, .1019),
    "b = 0, counterbalanced": (81.5, .0028, .0082)}


def given_options(args):
    """What the user said of the game -> {field: value}."""
    flags = ("lam", "rounds", "prompt_length", "rank")
    said = {name: getattr(args, name) for name in flags}
    said = {name: value for name, value in said.items() if value is not None}
    return {**(QUICK if args.quick else {}), **said, **dict(args.set)}


def models_of(args):
    """The models of the table that was asked for -> {key: (title, options)}."""
    if args.prompt_only:
        return EQUATION_4
    models = dict(MODELS)
    if args.quick:
        del models["cda"], models["paper"]
    if args.paper:
        del models["cda"], models["faircon"]
    if runs.under_torchrun():
        models.pop("paper", None)                                 # `run` says why
    return models


# ------------------------------------------------------------------ one model

@functools.lru_cache(1)
def load_once(model, dtype, device):
    from beyond.fast import load_model
    return load_model(adult.TINY if model == "tiny" else model, dtype, device)


load_data_once = functools.lru_cache(1)(adult.load)


def options_of(config, key):
    """One model's options: the defaults, its own, then what the user may change.

        model              its own       what the user may change
        fine-tuned, cda    TASK_ALONE    all but TASK_ALONE's
        paper              PAPER         lam (with --paper: all)
        faircon            none          all

    -> (faircon.Options, rank, alpha)
    """
    import faircon
    own = dict((EQUATION_4 if config["prompt_only"] else MODELS)[key][1])
    if config["paper"]:
        own = {**PAPER, **own}
    said = dict(config["game"])
    if key in ("fine-tuned", "cda"):
        said = {name: v for name, v in said.items() if name not in TASK_ALONE}
    if key == "paper" and not config["paper"]:
        said = {name: v for name, v in said.items() if name == "lam"}
    both = {"rank": 32, "alpha": 16., **own, **said}
    rank, alpha = both.pop("rank"), both.pop("alpha")
    return faircon.Options(**both), rank, alpha


def train_model(config, key, seed, folder):
    """Train (or not) one model and measure it -> its row; a job of `run`."""
    place = pathlib.Path(folder) / f"{key}-{seed}"
    if (place / "rows.json").exists():
        return runs.read_json(place / "rows.json", list)
    import torch
    import lora
    torch.manual_seed(seed + runs.rank_of_process())
    model, _ = load_once(config["model"], config["dtype"], config["device"])
    data = load_data_once(config["data"])
    people = adult.split(data, config["rows"], config["bpc"], config["test_rows"], seed)
    lora.remove(model.model)
    row = {"key": key, "seed": seed, "g": None, "trained": False}
    if key in ("fine-tuned", "cda", "paper", "faircon"):
        row.update(play(model, people, config, key, seed, place), trained=True)
    elif key == "fair-prompt":
        row.update(fair_prompt(model, people, config, seed, place))
    elif key == "random-prompt":
        rng = torch.Generator().manual_seed(seed)
        length = options_of(config, "fair-prompt")[0].prompt_length
        chosen = torch.randint(len(model.usable), (length,), generator=rng)
        row["g"] = [model.usable[i] for i in chosen]
    if key == "always-0":
        row.update(constant(people))
    else:
        with lora.merged(model.model):
            row.update(measure_all(model, people, data, config, row["g"], seed))
    if row["g"]:
        row["prompt"] = model.decode(row["g"])
    if runs.leads():
        runs.write_json(place / "rows.json", [row])
        (place / "state.pt").unlink(missing_ok=True)
    return [row]


def play(model, people, config, key, seed, place):
    """The game of section 3 -> what to say of it.

    It leaves SWA's average in the model, which train_model then measures.
    """
    import faircon
    import lora
    options, rank, alpha = options_of(config, key)
    lora.inject(model.model, rank, alpha, options.dropout, seed)
    rows = people.train
    if key == "cda":                               # each row once as a man and a woman
        rows = rows + [adult.flipped(p) for p in rows]
        options = dataclasses.replace(options, batch_size=2 * options.batch_size)
    from beyond.robust import RobustGame
    kind = RobustGame if key == "faircon" else faircon.Game
    game = kind(model, rows, options, seed, adversary=key in ("faircon", "paper"))
    told = runs.load_state(place) or {"history": [], "prompts": []}
    if "game" in told:
        runs.restore(game, told.pop("game"))
    history = told["history"]
    while game.done < options.rounds:
        history.append(game.round())
        say(f"  {key} {seed}  {line(history[-1], options.rounds)}")
        found = [game.adversary.likeliest_ids()] if game.adversary else []
        told["prompts"] = [model.decode(g) for g in found]
        if runs.leads():
            runs.save_state(place, {"game": runs.state_of(game), **told})
    with lora.merged(model.model):
        last = faircon.measure(model, people.test)
    game.swa.apply()                                  # theta is the average from here
    if runs.leads():
        lora.save(model.model, place / "adapter", config["model"])
        runs.write_json(place / "prompts.json", told["prompts"])
    prompt = told["prompts"][0] if told["prompts"] else None
    return {"history": history, "options": dataclasses.asdict(options), "rank": rank,
            "alpha": alpha, "swa_weights": game.swa.n, "without_swa": last,
            "prompt": prompt}


def fair_prompt(model, people, config, seed, place):
    """Eq. (4): phi lowers the distance, theta is frozen -> the prompt that does best.

    Chosen on validation rows among samples of the adversaries.
    """
    import faircon
    import lora
    options, rank, _ = options_of(config, "fair-prompt")
    lora.inject(model.model, rank)                 # B = 0 and never trained
    history, found = [], []
    game = faircon.Game(model, people.train, options, seed)
    adversary = game.adversary
    adversary.sign = -1
    for k in range(options.rounds):
        history.append({"round": k + 1, "phi": game.phi_half()})
        say(f"  fair-prompt {seed}  {line(history[-1], options.rounds)}")
    for _ in range(15):
        g = adversary.sample_ids()
        found.append((faircon.measure(model, people.validation, g)["gap"], g))
    return {"history": history, "g": min(found)[1]}


def line(record, rounds):
    """A round of the game in one line."""
    text = f"round {record['round']:>2}/{rounds}"
    if record["phi"]:
        text += "  phi: distance {:.3f} -> {:.3f}".format(*record["phi"])
    if "task" in record:
        text += f"  theta: task {record['task']:.3f} distance {record['distance']:.3f}"
    return text


def constant(people):
    """The row of a model that answers 0 to everybody."""
    import metrics
    import numpy
    y, s = [x.y for x in people.test], [x.s for x in people.test]
    p = numpy.zeros((len(y), 2))
    positives = sum(x.y for x in people.test_bpc)
    return {**metrics.evaluate(p, y, s), "acc_bpc": 1 - positives / len(y),
            "shots": 0., "intervals": metrics.bootstrap(p, y, s)}


def measure_all(model, people, data, config, g, seed):
    """Everything the table says of a model, on test rows -> dict."""
    import faircon
    import metrics
    import numpy
    y, s = [x.y for x in people.test], [x.s for x in people.test]
    p = model.predict(model.questions(people.test), g)                       # (N, 2)
    row = {**metrics.evaluate(p, y, s), "intervals": metrics.bootstrap(p, y, s)}
    row["acc_bpc"] = faircon.measure(model, people.test_bpc, g)["acc"]
    seen = {adult.text(x) for x in data.train}         # the embedded model has read it
    new = numpy.array([adult.text(x) not in seen for x in people.test])      # (N,)
    right = (p[numpy.arange(len(y)), s] > .5) == y                           # (N,)
    row["acc_new"] = metrics.rate(right, new, "a question that is not in adult.data")
    if not config["prompt_only"]:
        gaps = []
        for b in (1., -1.):
            rng = numpy.random.default_rng((seed, 6))
            shots = adult.few_shot(data.train, config["shots"], b, rng)
            some = people.test[:400]
            gaps.append(faircon.measure(model, some, context=shots)["gap"])
        row["shots"] = max(gaps)
    row["mass"] = answer_mass(model, people.test[:20], g)
    return row


def answer_mass(model, people, g):
    """How much of the probability the two answers have together, mean over texts."""
    import torch
    with torch.no_grad():
        logits = model(model.prefix(g), model.questions(people))
    return logits.softmax(-1)[..., model.answers].sum(-1).mean().item()


# ------------------------------------------------------------------ Tables 1 and 2

def few_shot_rows(config, key, seed, folder):
    """The frozen model behind labelled people, one draw of prompts -> rows; a job."""
    import numpy
    import faircon
    place = pathlib.Path(folder) / f"{key}-{seed}"
    if (place / "rows.json").exists():
        return runs.read_json(place / "rows.json", list)
    model, _ = load_once(config["model"], config["dtype"], config["device"])
    data = load_data_once(config["data"])
    rows = []
    for title, b, counterbalance, test_b in cases(config["table"]):
        rng = numpy.random.default_rng(seed)
        shots = adult.few_shot(data.train, config["shots"], b, rng, counterbalance)
        people = adult.sample(data.test, config["test_rows"], test_b, rng)
        row = {"key": title, "seed": seed, "trained": False, "prompt": shots}
        rows.append({**row, **faircon.measure(model, people, context=shots)})
    say(f"  draw {seed} done")
    runs.write_json(place / "rows.json", rows)
    return rows


def cases(table):
    """-> [(title, b_Pc of the shots, counterbalanced, b_Pc of the test rows)]

    None: as the data is.
    """
    if table == 1:
        listed = [(f"b = {b:g}", b, False, 0.) for b in (-1., -.5, 0., .5, 1.)]
        return listed + [("natural, balanced test rows", None, False, 0.),
                         ("natural, natural test rows", None, False, None)]
    listed = []
    for b in (0., .5):
        listed.append((f"b = {b:g}", b, False, 0.))
        listed.append((f"b = {b:g}, counterbalanced", b, True, 0.))
    return listed


# ------------------------------------------------------------------ the run

def prepare(args):
    """Load the data and the model, say what they are -> what the run depends on."""
    data = load_data_once(args.data)
    say(f"data    {data.source}\n        {len(data.train)} and {len(data.test)} rows; "
        f"adult.data has sha256 {data.sha256['adult.data'][:16]}...")
    config = {name: getattr(args, name) for name in (
        "table", "prompt_only", "paper", "quick", "data", "bpc", "rows", "test_rows",
        "shots", "seeds", "seed", "model", "dtype", "device")}
    config["game"] = given_options(args)
    most = 200 if args.quick else 1000
    config["test_rows"] = args.test_rows or enough(data.test, args.bpc, most)
    adult.split(data, args.rows, args.bpc, config["test_rows"], args.seed)  # InputError
    warnings.filterwarnings("ignore", "b_Pc")                             # said once
    model, how = load_once(args.model, args.dtype, args.device)
    size = sum(p.numel() for p in model.model.parameters())
    say(f"model   {args.model}: {size:,} parameters, {how}")
    if not args.prompt_only:
        check_shots(model, data, args)
    if args.table == 3:
        check_prompts(model, data, args, config)
    if args.table == 3 and not args.prompt_only:
        say_theta(model, config, list(models_of(args))[-1])
    about = {"name": args.model, "sha256": runs.model_hash(model), "computed in": how,
             "small": model.small}
    depends_on = {"format": runs.FORMAT, "config": config, "data": data.sha256,
                  "model": about, "versions": runs.versions()}
    return depends_on, data


def check_prompts(model, data, args, config):
    """InputError for a prompt beyond the context, or none at all."""
    longest = 0
    for key, (_, own) in models_of(args).items():
        if own is not None:
            options = options_of(config, key)[0]
            longest = max(longest, options.prompt_length)
    before = len(model.prefix([model.usable[0]] * longest))
    model.check_length(before, model.questions(data.test[:20]))


def say_theta(model, config, key):
    import lora
    _, rank, alpha = options_of(config, key)
    count = len(lora.inject(model.model, rank, alpha))
    say(f"theta   {key}: LoRA r = {rank} on {count} projections, "
        f"{lora.share(model.model):.3f} % of the parameters")
    lora.remove(model.model)


def check_shares(args, processes):
    """InputError where torchrun's processes would not have equal shares of a batch."""
    import faircon
    batch = given_options(args).get("batch_size", faircon.Options.batch_size)
    unequal = batch % processes or args.rows % batch
    if processes > 1 and (unequal or args.paper or args.table != 3):
        raise InputError("with several processes batch_size must be a multiple of "
                         "their number and --rows of it, for Table 3, without --paper.")


def run(args):
    """One table: every model and seed, side by side, then results.json."""
    check_kinds(args)
    check_shares(args, runs.join_processes())
    if idle_fields(args):
        say(f"note: no effect on this kind of run: {', '.join(idle_fields(args))}")
    if runs.under_torchrun() and not (args.quick or args.prompt_only):
        say("note: the paper's row is left out, its batch of 9 has no equal shares")
    depends_on, data = prepare(args)
    keys = models_of(args) if args.table == 3 else [f"table{args.table}"]
    seeds = range(args.seed, args.seed + args.seeds)
    small = depends_on["model"]["small"]
    alone = small and not runs.under_torchrun()        # a process needs one core alone
    workers = args.jobs or (runs.cores() if alone else 1)
    workers = min(workers, len(keys) * args.seeds)
    with runs.open_run(args.name, depends_on, args.resume) as folder:
        jobs = []
        for seed in seeds:
            jobs += [(depends_on["config"], key, seed, str(folder)) for key in keys]
        say(f"jobs    {len(jobs)}, {workers} at a time; results go to {folder}/\n")
        if args.table == 3:
            show_question(data)
        work = train_model if args.table == 3 else few_shot_rows
        rows = rows_of(work, jobs, workers)
        if not runs.leads():
            return
        source = {"source": data.source, "sha256": data.sha256}
        runs.write_json(folder / "results.json", {
            **depends_on, "data": source, "rows": rows,
            "summary": report.summary(rows)})
    show(rows, args, folder)


# Roughly how long each takes: the longest begin first, so that no core waits.
WORK = {"paper": 2, "faircon": 3, "fair-prompt": 3, "cda": 1, "fine-tuned": 1}


def rows_of(work, jobs, workers):
    """Do every job, the longest first -> the rows of all, in the order of `jobs`."""
    longest_first = sorted(jobs, key=lambda job: -WORK.get(job[1], 0))
    done = runs.run_jobs(work, longest_first, workers)
    found = dict(zip([job[1:3] for job in longest_first], done))
    rows = []
    for job in jobs:
        rows += found[job[1:3]]
    return rows


# ------------------------------------------------------------------ what is printed

LEGEND = """
gap: mean |p as a man - p as a woman| of the same person, in [0, 1]. M_dpd, M_deo:
Eq. (1), (2). {shots} shots: the gap behind {shots} labelled people at b_Pc = 1 or -1,
whichever is larger. In the paper: ACC in percent, M_dpd, M_deo."""


def show_question(data):
    text = adult.twins(data.test[0])[0]
    say("a question (x_m; its twin x_f says Female), answered by the next token:\n")
    for part in text.split("\n"):
        say(textwrap.indent(textwrap.fill(part, 84), "    "))
    say("")


def show(rows, args, folder):
    """The table, the paper's figures beside ours; a prompt; the next command."""
    columns = {"ACC": "acc", "M_dpd": "dpd", "M_deo": "deo", "gap": "gap"}
    if args.table != 3:
        titles = {row["key"]: row["key"] for row in rows}
        report.show(rows, titles, columns, TABLES_1_2)
    elif args.prompt_only:
        titles = {key: title for key, (title, _) in EQUATION_4.items()}
        report.show(rows, titles, columns, {})
    else:
        titles = {key: title for key, (title, _) in MODELS.items()}
        columns[f"{args.shots} shots"] = "shots"
        report.show(rows, titles, columns, TABLE_3)
        say(LEGEND.format(shots=args.shots))
    report.warn(rows)
    say(f"\nsaved in {folder}/: results.json")
    if args.table == 3 and not args.prompt_only:
        show_prompt(rows[-1])
        say(f"\neach model's adapter is in {folder}/MODEL-SEED/ (PEFT's format)"
            f"\nnext:    python -m beyond.attacks {folder}")


def show_prompt(row):
    if row.get("prompt"):
        text = re.sub(r"[^\x20-\x7e]+", " ", row["prompt"])
        say(f"\nan adversary's likeliest prompt (section 5), against {row['key']}:\n"
            f"    {text[:80]}...")


def default_name(args):
    """A folder for each kind of run: one must not take the place of another."""
    if args.table != 3:
        return f"table{args.table}"
    for flag in ("prompt_only", "paper", "quick"):
        if getattr(args, flag):
            return flag
    return "default"


def interrupt(*_):
    """SIGTERM ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv=None):
    """The command. Whatever is wrong with the input is one sentence, exit status 1."""
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    args.name = args.name or default_name(args)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if args.paper:
            settings = ", ".join(f"{name} {value}" for name, value in PAPER.items())
            print(textwrap.fill(f"as in the paper: {settings}", 88))
        run(args)
    except InputError as problem:
        sys.exit(f"train.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: interrupted; finished rounds are kept, and the same "
                 "command with --resume goes on.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"train.py: {error.filename or 'a file'}: {error.strerror or error}; "
                 "finished rounds are kept, --resume goes on.")
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        sys.exit("train.py: out of memory; lower --jobs, --set batch_size=N or "
                 "--shots, use --dtype bfloat16, or a smaller --model.")


if __name__ == "__main__":
    main()
