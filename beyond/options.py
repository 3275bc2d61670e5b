"""NOT IN THE PAPER: train.py's command line: ranges as argparse types, one sentence an
error, and what is refused before any work.

What faircon.Options has and no flag of train.py sets is given as --set FIELD=VALUE.
"""
import argparse
import difflib
import pathlib
import warnings

import adult
from adult import InputError

MOVED = {
    "--attack": "python -m beyond.attacks runs/NAME",
    "--baselines": "python -m beyond.ablation", "--eval": "python -m beyond.runs",
    "--ablation": "python -m beyond.ablation", "--cost": "python -m beyond.cost",
    "--plot": "python -m beyond.report"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence; for an unknown flag, what was probably meant."""
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ")[1].split()[0].split("=")[0]
            field = wrong.strip("-").replace("-", "_")
            close = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            if wrong in MOVED:
                message = f"{wrong} is now `{MOVED[wrong]}`."
            elif field in GAME:
                message = f"{wrong} is now --set {field}=VALUE."
            else:
                hint = f"did you mean {close[0]}?" if close else "see --help."
                message = f"{wrong} is unknown; {hint}"
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high):
    """An argparse type: an int or float within [low, high]."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is impossible: it lies between {low:g} and {high:g}")
        return value
    convert.__name__ = kind.__name__
    return convert


COUNT = number(int, 1, 10 ** 6)
POSITIVE = number(float, 1e-30, 1e9)
SHARE = number(float, 0, 1)


def switch(text):
    return {"true": True, "false": False}[text.lower()]


# faircon.Options and LoRA's two, each with its type; what is no flag goes by --set.
GAME = {
    "lam": number(float, 0, 1e9), "rounds": COUNT, "batch_size": COUNT, "lr": POSITIVE,
    "prompt_length": COUNT,
    "phi_steps": number(int, 0, 10 ** 6), "phi_lr": POSITIVE,
    "tau": POSITIVE, "log_odds": switch, "swa": SHARE,
    "dropout": number(float, 0, .99),
    "rank": COUNT, "alpha": POSITIVE}


def setting(text):
    """FIELD=VALUE -> (field, value)."""
    field, equals, value = text.partition("=")
    if not equals or field not in GAME:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no FIELD=VALUE; fields: {', '.join(GAME)}")
    try:
        return field, GAME[field](value)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{value!r} is no value of {field}") from None
    except argparse.ArgumentTypeError as problem:
        raise argparse.ArgumentTypeError(f"{field}={problem}") from None


def folder_name(text):
    if pathlib.PurePath(text).name != text or text in (".", "..") or "\\" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no plain folder name")
    return text


# ------------------------------------------------------------------ train.py's flags

def parser():
    p = Parser(prog="train.py", allow_abbrev=False,
               description="FairCon: a language model that stays fair under the most "
               "unfair prompt, Eq. (3), and Tables 1 to 3 of the paper.")
    what_to_run(p.add_argument_group("what to run"))
    data(p.add_argument_group("data (section 2)"))
    model(p.add_argument_group("model (section 4)"))
    game(p.add_argument_group("the game (section 3)"))
    return p


def what_to_run(g):
    g.add_argument("--table", type=int, choices=(1, 2, 3), default=3,
                   help="the paper's table (3)")
    g.add_argument("--prompt-only", action="store_true",
                   help="Eq. (4): the model frozen, a fair prompt learned")
    g.add_argument("--paper", action="store_true",
                   help="every option as in the paper, else its released code")
    g.add_argument("--quick", action="store_true",
                   help="fine-tuned and FairCon alone, shorter prompts, fewer rows")
    g.add_argument("--resume", action="store_true",
                   help="go on with the interrupted run of this name")
    g.add_argument("--jobs", type=COUNT,
                   help="models trained side by side (as many as cores; 1 for a large "
                   "model or a GPU)")
    g.add_argument("--name", type=folder_name,
                   help="results go to runs/NAME/ (default; or table1, table2, "
                   "prompt_only, paper, quick)")


def data(g):
    g.add_argument("--data", metavar="DIR",
                   help="folder of adult.data and adult.test (cache, UCI, else tiny/)")
    g.add_argument("--bpc", type=number(float, -1, 1), default=.5,
                   help="b_Pc of the training rows (0.5; paper 0.5)")
    g.add_argument("--rows", type=number(int, 2, 10 ** 6), default=200,
                   help="training rows, balanced in y and s (200; paper 200)")
    g.add_argument("--test-rows", type=number(int, 4, 10 ** 6),
                   help="balanced rows of adult.test (1000, or as many as there are)")
    g.add_argument("--shots", type=number(int, 2, 1000), default=16,
                   help="labelled people in a few-shot prompt (16; paper 16)")
    g.add_argument("--seeds", type=COUNT, default=1, help="how many seeds (1)")
    g.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0,
                   help="the first seed; it governs everything (0; released 42)")


def model(g):
    g.add_argument("--model", default="tiny",
                   help="directory or hub id of a causal language model with q_proj "
                   "and v_proj (tiny; paper EleutherAI/gpt-neo-1.3B)")
    g.add_argument("--rank", type=COUNT, help="r of LoRA (32, the paper's; released 4)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the frozen weights")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda")


def game(g):
    g.add_argument("--lam", type=GAME["lam"],
                   help="weight of the distance in Eq. (3) (1)")
    g.add_argument("--rounds", type=COUNT, help="passes over the rows (16; paper 10)")
    g.add_argument("--prompt-length", type=COUNT, help="tokens of g (560; paper 10)")
    g.add_argument("--set", type=setting, nargs="+", action="extend", default=[],
                   metavar="FIELD=VALUE", help="any other field of faircon.Options, "
                   "explained there; also alpha (16) of LoRA")


# ------------------------------------------------------------------ before any work

def check_kinds(args):
    """InputError for kinds of run that exclude each other."""
    kinds = [name for name in ("quick", "paper", "prompt_only") if getattr(args, name)]
    flags = ["--" + kind.replace("_", "-") for kind in kinds]
    if len(flags) > 1:
        raise InputError(f"{' and '.join(flags)} exclude each other; give one.")
    if args.table != 3 and kinds not in ([], ["quick"]):
        raise InputError(f"{flags[0]} is of Table 3; leave out --table {args.table}.")


def idle_fields(args):
    """Fields of GAME that the user gave and that this kind of run never reads."""
    given = {**vars(args), **dict(args.set)}
    given = [name for name in GAME if given.get(name) is not None]
    if args.table != 3:
        return given                                       # nothing is trained there
    frozen = ("lam", "lr", "swa", "dropout", "rank", "alpha")
    return [name for name in given if args.prompt_only and name in frozen]


def enough(people, bpc, most):
    """How many test rows, at most `most`, the data has both balanced and at b_Pc."""
    have = {}
    for person in people:
        have[person.s, person.y] = have.get((person.s, person.y), 0) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(most, 4, -8):
            balanced, biased = adult.cells(n, 0.), adult.cells(n, bpc)
            needed = {cell: max(balanced[cell], biased[cell]) for cell in balanced}
            if all(have.get(cell, 0) >= count for cell, count in needed.items()):
                return n
    return 4


def check_shots(model, data, args):
    """InputError for few-shot prompts that cannot be drawn, or not be read."""
    import numpy
    if args.table == 2 and args.shots % 4 or args.shots % 2:
        raise InputError(f"--shots {args.shots} cannot be balanced over two sexes; "
                         "give an even number, for Table 2 a multiple of 4.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shots = adult.few_shot(data.train, args.shots, 0., numpy.random.default_rng(0))
    before = len(model.prefix(context=shots))
    model.check_length(before, model.questions(data.test[:20]))
