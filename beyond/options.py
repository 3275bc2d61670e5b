"""NOT IN THE PAPER: the command line: ranges as argparse types, errors in one sentence.

What faircon.Options has and no flag of train.py sets is given as --set FIELD=VALUE.
"""
import argparse
import difflib
import pathlib

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


def start(text):
    if text not in ("texts", "noise"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither texts nor noise")
    return text


# faircon.Options and LoRA's two, each with its type; what is no flag goes by --set.
GAME = {
    "lam": number(float, 0, 1e9), "rounds": COUNT, "batch_size": COUNT, "lr": POSITIVE,
    "prompt_length": COUNT, "adversaries": number(int, 0, 100), "starts": start,
    "phi_steps": number(int, 0, 10 ** 6), "phi_lr": POSITIVE, "phi_eps": POSITIVE,
    "tau": POSITIVE, "two_sided": switch, "behind": switch,
    "cut": switch, "clean": switch, "swa": SHARE, "dropout": number(float, 0, .99),
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
