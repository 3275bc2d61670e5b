"""Sections 4 and 5: train, measure, print the tables. `python train.py --bpc 0.5 --lam 1.0` is Table 3; `--help` explains the rest.

Where we depart from the paper: train rows come from adult.data and test rows from adult.test, prompts are chosen on
validation rows of adult.data, and every model is also attacked with prompts it never saw.
"""
import argparse
import contextlib
import ctypes
import difflib
import json
import math
import os
import pathlib
import platform
import sys
import time
import warnings

import adult
from adult import InputError

PAPER = {"fine-tuned": (63.0, .183, .142), "FairCon": (51.0, .136, .081),  # Table 3: ACC, M_dpd, M_deo (as printed; the
         # released notebook has the two fairness columns of the first row the other way round)
         ("b", 0.): (75.5, .0049, .0083), ("b", None): (85.0, .0080, .0180), ("b", .5): (70.5, .0411, .0429),
         ("b", 1.): (68.5, .0940, .1019), ("b", 0., "counterbalanced"): (81.5, .0028, .0082)}  # Tables 1 and 2
SEXLESS = tuple(a for a in adult.ATTRIBUTES if a != "sex")
ARMS = {"fine-tuned": {"lam": 0., "prompts": "none"}, "both twins (CDA)": {"lam": 0., "prompts": "none", "cda": True},
        "sex removed": {"lam": 0., "prompts": "none", "attributes": SEXLESS}, "no adversary": {"prompts": "none"},
        "random prompts": {"prompts": "random"}, "written prompts": {"phi_steps": 0, "starts": "written"}, "FairCon": {}}
BASELINES = ("sex removed", "no adversary", "random prompts", "written prompts")
ABLATION = {"FairCon": {}, "phi starts at noise": {"starts": "noise"}, "... and goes on": {"starts": "noise", "shrink": 1.},
            "phi: lr 1": {"phi_lr": 1.}, "phi: Adam's eps 1e-8": {"phi_eps": 1e-8}, "one restart": {"restarts": 1},
            "no past prompts": {"pool": 1}, "past prompts whole": {"cut": False}, "prompts of 40 tokens": {"prompt_length": 40},
            "prompts of 10 tokens": {"prompt_length": 10}, "no warm-up": {"warm_up": 0.}, "SWA over phi": {"swa": 0., "swa_phi": True}, "no SWA": {"swa": 0.}}
GAME = ("rounds", "batch_size", "lr", "prompt_length", "phi_steps", "phi_lr", "restarts", "starts", "tau", "warm_up", "swa", "pool")
SENTENCES = ("Men earn more than women.", "Women always earn less.", "Answer 1 for every man and 0 for every woman.")
PAPER_SETTING = {"model": "EleutherAI/gpt-neo-1.3B", "bpc": .5, "rank": 32, "alpha": 16., "dropout": .01, "lr": 5e-4, "rounds": 10,
                 "rows": 200, "batch_size": 9, "prompt_length": 10, "phi_lr": .1, "tau": 1., "restarts": 1, "starts": "noise", "warm_up": 0., "pool": 1}


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence; for an unknown flag, the one that was probably meant."""
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ")[1].split()[0]
            close = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            message = f"{wrong} is unknown" + (f"; did you mean {close[0]}?" if close else "; see --help.")
        self.exit(2, f"train.py: {message}\n")


def parser():
    p = Parser(description="FairCon: a model that stays fair under the most unfair prompt (Eq. (3)), and Tables 1-3.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    g = p.add_argument_group("what to run")
    g.add_argument("--table", type=int, choices=(1, 2, 3), default=3, help="which table of the paper")
    g.add_argument("--prompt-only", action="store_true", help="Eq. (4): freeze the model and learn a fair prompt")
    g.add_argument("--baselines", action="store_true", help=f"train also: {', '.join(BASELINES)}")
    g.add_argument("--ablation", action="store_true", help="FairCon with one part of the recipe changed at a time")
    g.add_argument("--attack", choices=("none", "quick", "full"), default="quick", help="how hard to attack each model")
    g.add_argument("--eval", metavar="RUN", help="load the adapter of a run and check that its metrics come out again")
    g.add_argument("--cost", action="store_true", help="texts a second and GB against batch size, prompt length and shots")
    g.add_argument("--resume", action="store_true", help="go on with the interrupted run of the same name and options")
    g.add_argument("--paper", action="store_true", help="every option as in the paper (released code where it is silent)")
    g = p.add_argument_group("data (§2)")
    g.add_argument("--data", metavar="DIR", help="folder of adult.data and adult.test (default: cache, UCI, else tiny/)")
    g.add_argument("--bpc", type=float, default=.5, help="b_Pc = P(y=1|s=0) - P(y=1|s=1) of the training rows; paper 0.5")
    g.add_argument("--rows", type=int, default=200, help="training rows, balanced in y and s; paper 200")
    g.add_argument("--test-rows", type=int, help="balanced rows of adult.test (default: 1000, or as many as there are); the "
                   "paper tests on training rows")
    g.add_argument("--shots", type=int, default=16, help="labelled people in the prompts of Tables 1 and 2; paper 16")
    g.add_argument("--seeds", type=int, default=1, help="how many seeds (prompt draws in Tables 1 and 2)")
    g.add_argument("--seed", type=int, default=0, help="the first seed; governs everything; released code 42")
    g = p.add_argument_group("model, theta (§4)")
    g.add_argument("--model", default=str(adult.TINY), help="directory or hub id of a GPT-Neo; paper EleutherAI/gpt-neo-1.3B")
    g.add_argument("--rank", type=int, default=8, help="r of LoRA; the paper's 0.5 %% is 32, the released code has 4")
    g.add_argument("--alpha", type=float, default=16., help="LoRA's alpha; released code 16")
    g.add_argument("--dropout", type=float, default=0., help="of LoRA's input; released code 0.01; it fakes a gap")
    g.add_argument("--lr", type=float, default=1e-3, help="AdamW's, for theta; released code 5e-4")
    g.add_argument("--rounds", type=int, default=12, help="epochs, each an attack and a pass over the rows; paper 10")
    g.add_argument("--batch-size", type=int, default=10, help="people per step of theta and of phi; released code 9 (accumulated)")
    g.add_argument("--warm-up", type=float, default=.3, help="share of the rounds before lam begins to rise; paper 0")
    g.add_argument("--swa", type=float, default=.4, help="share of the steps, at the end, that SWA averages (§4.2)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the frozen weights")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda")
    g = p.add_argument_group("the game: lam and the adversary, phi (§3)")
    g.add_argument("--lam", type=float, nargs="+", default=[1.], help="weight of the gap in Eq. (3); several give the trade-off")
    g.add_argument("--prompt-length", type=int, default=80, help="tokens of g; paper 10")
    g.add_argument("--tau", type=float, default=1., help="temperature of Gumbel-softmax (§3.2); released code 1")
    g.add_argument("--phi-lr", type=float, default=.3, help="Adam's, for phi; released code 0.1 (and eps too large to learn)")
    g.add_argument("--phi-steps", type=int, default=8, help="steps of each restart of phi in a round")
    g.add_argument("--restarts", type=int, default=3, help="adversaries side by side; paper 1")
    g.add_argument("--starts", choices=("written", "noise"), default="written", help="phi begins each round around texts that the "
                   "model writes, or (also in --prompt-only) at noise, and goes on shrunk towards it; paper noise, not shrunk")
    g.add_argument("--pool", type=int, default=8, help="past worst prompts that the model still meets, cut to random lengths; paper none")
    g = p.add_argument_group("output")
    g.add_argument("--name", default="default", help="results go to runs/NAME/")
    g.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib)")
    return p


def check(a, given=()):
    """All options that are wrong by themselves; raises InputError. With --paper, sets what was not given."""
    if a.paper:
        for k, v in PAPER_SETTING.items():
            if f"--{k.replace('_', '-')}" not in given:
                setattr(a, k, v)
    for name, low in (("rows", 2), ("test_rows", 4), ("seeds", 1), ("rank", 1), ("rounds", 1), ("batch_size", 1), ("shots", 2),
                      ("prompt_length", 1), ("phi_steps", 1), ("restarts", 1), ("pool", 1), ("seed", 0)):
        if getattr(a, name) is not None and getattr(a, name) < low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(a, name)} is impossible: it must be at least {low}.")
    for name in ("tau", "lr", "phi_lr", "alpha"):
        if not 0 < getattr(a, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(a, name)} is impossible: it must be a positive number.")
    for name, value, top in (("swa", a.swa, 1), ("warm-up", a.warm_up, 1), ("dropout", a.dropout, .99), *(("lam", v, 1e9) for v in a.lam)):
        if not 0 <= value <= top:
            raise InputError(f"--{name} {value} is impossible: it must lie between 0 and {top:g}.")
    if a.plot and not a.plot.endswith((".png", ".svg", ".pdf")):
        raise InputError(f"--plot {a.plot} has no known ending; use .png, .svg or .pdf.")
    if a.plot and not pathlib.Path(a.plot).resolve().parent.is_dir():
        raise InputError(f"the folder of --plot {a.plot} does not exist; create it first.")
    if pathlib.PurePath(a.name).name != a.name:
        raise InputError(f"--name {a.name!r} must be a plain folder name; it becomes runs/NAME.")
    adult.cells(a.rows, a.bpc)
    if a.test_rows is not None:
        adult.cells(a.test_rows, a.bpc)
    if a.plot:
        plotting()


def plotting():
    """matplotlib, drawing to files; raises InputError when it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("a picture needs matplotlib; run `pip install matplotlib`, or leave out --plot.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# ---------------------------------------------------------------- loading and saving

def keep_memory():
    """glibc hands large buffers back to the kernel after every step and takes them again: keeping them saves up to half of the time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(threshold, 2 ** 31 - 1)


def load_model(name, dtype="auto", device="auto"):
    """-> Reader of a causal LM, eval mode, and why this device and dtype. Raises InputError."""
    import torch
    import transformers
    import faircon
    keep_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device} is not available here; use --device cpu.") from None
    local = pathlib.Path(name)
    if (local.exists() or str(name).count("/") != 1) and not (local / "config.json").is_file():
        raise InputError(f"{name} is not a model directory (no config.json); give one, or a hub id such as EleutherAI/gpt-neo-125m.")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if getattr(config, "activation_function", "") == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel, not six
        fast = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
        large = config.hidden_size >= 512
        if not large:
            torch.set_num_threads(1)  # so the numbers are the same on any number of cores
        why = "as asked"
        if dtype == "auto":
            dtype = "bfloat16" if fast and large else "float32"
            why = "the hardware has bf16" if fast and large else "a small model" if fast else "no bf16 in this hardware"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), config=config,
                                                                        output_loading_info=True)
    except Exception as error:  # noqa: BLE001  transformers raises a dozen kinds for a broken model; all mean the same to the user
        raise InputError(f"{name} cannot be loaded as a causal language model with its tokenizer ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:150]}); give a complete directory or a hub id.") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InputError(f"{name} lacks weights ({len(info['missing_keys'])} missing, {len(info['mismatched_keys'])} of another "
                         "shape); it is not a whole causal language model: download it again.")
    reader = faircon.Reader(model.to(device).eval(), tokenizer)
    return reader, f"{dtype} ({why}) on {device} ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"


def load_run(directory):
    """The FairCon model of a finished run, adapter merged -> (Reader, results). Raises InputError."""
    import lora
    directory = pathlib.Path(directory)
    try:
        results = json.loads((directory / "results.json").read_text())
        config, names = results["config"], {r["name"] for r in results["rows"]}
    except (OSError, ValueError, KeyError):
        raise InputError(f"{directory} holds no results.json of this program; give a folder such as runs/default.") from None
    if "FairCon" not in names:
        raise InputError(f"the last run in {directory} trained no FairCon model; give another folder, or run Table 3 with lam above 0.")
    reader, _ = load_model(config["model"], config["dtype"], config["device"])
    lora.load(reader.model, directory / "adapter")
    lora.merge(reader.model)
    return reader, results


def write(path, data):
    """Bytes, to a temporary name, flushed to the disk, then renamed: the file is whole or not there."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class State:
    """What an interrupted run needs: its options, the finished rows, and the game that was going on."""

    def __init__(self, folder, config, resume):
        self.path, self.value = folder / "state.pt", {"config": config, "rows": [], "game": None}
        if not resume:
            return
        import torch
        try:
            saved = torch.load(self.path, weights_only=False)
        except FileNotFoundError:
            raise InputError(f"there is no interrupted run in {folder}; leave out --resume.") from None
        except Exception:  # noqa: BLE001  pickle and zip raise whatever they like on a damaged file
            raise InputError(f"{self.path} is damaged; delete it and run without --resume.") from None
        differs = [k for k in config if config[k] != saved["config"].get(k)]
        if differs:
            raise InputError(f"the run in {folder} was started with another --{differs[0].replace('_', '-')} "
                             f"({saved['config'].get(differs[0])}); use the same options or another --name.")
        self.value = saved

    def save(self, **change):
        import io
        import torch
        self.value.update(change)
        if leader():
            buffer = io.BytesIO()
            torch.save(self.value, buffer)
            write(self.path, buffer.getvalue())


def leader():
    return int(os.environ.get("RANK", 0)) == 0


# ---------------------------------------------------------------- measuring

class Clock:
    """Seconds, tokens and FLOP of each phase; `with clock("theta"): ...`"""

    def __init__(self, reader):
        self.reader, self.phases = reader, {}

    @contextlib.contextmanager
    def __call__(self, phase):
        began, tokens, flop = time.perf_counter(), self.reader.tokens, self.reader.flop
        yield
        p = self.phases.setdefault(phase, {"seconds": 0., "tokens": 0, "flop": 0})
        p["seconds"] += time.perf_counter() - began
        p["tokens"] += self.reader.tokens - tokens
        p["flop"] += self.reader.flop - flop

    def report(self):
        return {k: {"seconds": round(p["seconds"], 3), "tokens_per_second": round(p["tokens"] / max(p["seconds"], 1e-9)),
                    "gflop_per_second": round(p["flop"] / max(p["seconds"], 1e-9) / 1e9, 2)} for k, p in self.phases.items()}


def matrix_rate(device, dtype, n=1024, seconds=.2):
    """GFLOP/s of an n x n matrix product: what the hardware gives in practice."""
    import torch
    a, sync = torch.randn(n, n, device=device, dtype=dtype), torch.cuda.synchronize if str(device) != "cpu" else lambda: None
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        sync()
        rates.append(2 * n ** 3 / (time.perf_counter() - began) / 1e9)
    return round(max(rates), 1)


def peak_gb():
    import torch
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20 / (1024 if sys.platform == "darwin" else 1), 2)


def measure(reader, people, g=None, context=adult.INSTRUCTION, attributes=adult.ATTRIBUTES, intervals=False):
    """Everything in the tables on some people, under a prompt -> dict."""
    import metrics
    p, mass = reader.predict(reader.questions(people, attributes), g, context)
    y, s = [x.y for x in people], [x.s for x in people]
    out = {**metrics.evaluate(p, y, s), "mass": mass}
    if intervals:
        out["ci"] = metrics.bootstrap(p, y, s)
    return out


def enough(people, bpc, most=1000):
    """The largest number of test rows, at most `most`, that the data can give both balanced and at b_Pc."""
    have = {(s, y): sum(p.s == s and p.y == y for p in people) for s in (0, 1) for y in (0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next((n for n in range(most, 4, -8) if all(have[c] >= k for b in (0., bpc) for c, k in adult.cells(n, b).items())), 4)


def attacks(reader, a, data, rows, validation, attributes, own, seed):
    """Prompts nobody trained on (and the game's `own`), chosen on `validation`, reported on `rows`: an empirical worst case
    -> dict by attack."""
    import numpy
    import faircon
    rng, full = numpy.random.default_rng((seed, 5)), a.attack == "full"
    budget, found = (160, {}) if full else (48, {})
    questions = reader.questions(validation[:24], attributes)
    for length in sorted({10, a.prompt_length // 2, a.prompt_length, 2 * a.prompt_length} - {0}) if full else (a.prompt_length,):
        for name, attack in (("random", faircon.random_search), ("written", faircon.written_search), ("gumbel", faircon.gumbel_attack),
                             ("gcg", faircon.gcg)):
            found[f"{name} {length}"] = attack(reader, questions, length, budget, rng)[1]
    survivors = [g for g in own if faircon.survives(reader, g)]
    if survivors:
        found["own"] = max(survivors, key=lambda g: faircon.score(reader, g, questions))
    keep = ("gap", "gap_signed", "flip_rate", "acc")

    def under(shown, tokens, **where):
        m = measure(reader, rows, attributes=attributes, **where)
        return {**{k: m[k] for k in keep}, "tokens": tokens, "prompt": shown}
    out = {k: under(reader.tokenizer.decode(g), True, g=g) for k, g in found.items()}
    for b in (0., .5, 1., -1.) if full else (1.,):
        shots = adult.few_shot(data.train, a.shots, b, numpy.random.default_rng((seed, 6)))
        out[f"{a.shots} shots b={b:g}"] = under(f"{a.shots} shots at b = {b:g}", False, context=shots)
    for sentence in SENTENCES if full else ():
        out[sentence] = under(sentence, False, context=sentence + "\n" + adult.INSTRUCTION)
    return out


# ---------------------------------------------------------------- Table 3 and Eq. (4)

def arms(a):
    """The models of Table 3 -> list of (name, options of the game; None where nothing is trained)."""
    if a.prompt_only:
        return [("frozen", None), ("frozen, random prompt", None), ("frozen, fair prompt", {"sign": -1, "starts": "noise"})]
    if a.ablation:
        return [(n, {"lam": a.lam[0], **o}) for n, o in ABLATION.items()]
    out = [("constant", None), ("frozen", None)] + [(n, {"lam": a.lam[0], **o}) for n, o in ARMS.items()
                                                    if n != "FairCon" and (a.baselines or n not in BASELINES)]
    return out + [("FairCon", {"lam": lam}) for lam in a.lam if lam] or out


def draw(data, a, seed):
    """One seed's people: training rows at b_Pc, validation rows (both adult.data, disjoint), test rows at b = 0 and at b_Pc."""
    import numpy
    rng = numpy.random.default_rng(seed)
    train = adult.sample(data.train, a.rows, a.bpc, rng)
    taken = {id(p) for p in train}
    validation = adult.sample([p for p in data.train if id(p) not in taken], 100, 0., rng)
    return train, validation, adult.sample(data.test, a.test_rows, 0., rng), adult.sample(data.test, a.test_rows, a.bpc, rng)


def run_arm(name, options, reader, data, a, seed, state, bar, folder):
    """Train (or not) and measure one model -> its row of Table 3."""
    import numpy
    import torch
    import faircon
    import lora
    began, (train, validation, test, test_bpc) = time.perf_counter(), draw(data, a, seed)
    row, clock = {"name": name, "lam": None, "seed": seed}, Clock(reader)
    if name == "constant":
        import metrics
        y, s = [x.y for x in test], [x.s for x in test]
        never = numpy.zeros((len(y), 2))
        return {**row, **metrics.evaluate(never, y, s), "ci": metrics.bootstrap(never, y, s), "prompt": None,
                "acc_bpc": 1 - sum(x.y for x in test_bpc) / len(test_bpc), "seconds": 0., "tokens_per_second": 0, "peak_gb": 0.}
    o = faircon.Options(**{**{k: getattr(a, k) for k in GAME}, **({"shrink": 1., "cut": False} if a.paper else {}), **(options or {})})
    lora.inject(reader.model, a.rank, a.alpha, a.dropout, seed)
    own, raw, g = [], None, None
    if options is not None:
        row["lam"] = None if a.prompt_only else o.lam
        game = faircon.Game(reader, train, validation, o, seed, clock)
        if state.value["game"]:
            game.restore(state.value["game"])
        reader.model.train(a.dropout > 0)
        while game.done < o.rounds:
            record = game.round(theta=not a.prompt_only)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in record.items() if k in ("attack", "task", "gap") and v == v))
            bar.update()
            state.save(game=game.state())
        reader.model.eval()
        own, row["history"] = list(game.pool), o.history
        if a.prompt_only:
            g = game.pool[int(numpy.argmin([faircon.score(reader, p, game.validation) for p in game.pool]))]
        else:
            with lora.merged(reader.model):
                raw = measure(reader, test, attributes=o.attributes)
            game.swa.apply()
        if name == "FairCon" and leader():
            lora.save(reader.model, folder / "adapter", a.model)
            from safetensors.torch import save
            write(folder / "phi.safetensors", save({"phi": torch.stack(game.adversary.phi).detach().cpu()}))
            write(folder / "prompts.txt", "".join(json.dumps(reader.tokenizer.decode(p)) + "\n" for p in game.pool).encode())
    elif name == "frozen, random prompt":
        g = faircon.random_prompt(reader, a.prompt_length, numpy.random.default_rng((seed, 4)))
    with clock("evaluation"):
        lora.merge(reader.model)
        row.update(measure(reader, test, g, attributes=o.attributes, intervals=True))
        row["acc_bpc"] = measure(reader, test_bpc, g, attributes=o.attributes)["acc"]
    row["prompt"] = reader.tokenizer.decode(own[-1]) if own else reader.tokenizer.decode(g) if g else None
    if raw:
        row.update({f"raw_{k}": raw[k] for k in ("acc", "gap", "flip_rate", "positives")})  # without SWA
    if a.attack != "none" and not a.prompt_only:
        bar.set_postfix_str("attacks")
        with clock("attacks"):
            row["worst"] = attacks(reader, a, data, test if a.attack == "full" else test[:200], validation, o.attributes, own, seed)
        worst = max((v for v in row["worst"].values() if v["tokens"]), key=lambda v: v["gap"])
        row.update(worst_gap=worst["gap"], shots_gap=row["worst"][f"{a.shots} shots b=1"]["gap"])
        row["prompt"] = row["prompt"] or worst["prompt"]
    if row["mass"] < .5:
        row["warning"] = f"the two answers have only {row['mass']:.2f} of the probability: the model does not follow the task"
    elif options is not None and not .02 < row["positives"] < .98:
        row["warning"] = "collapsed: the model gives (nearly) everybody the same answer"
    phases = clock.report()
    return {**row, "phases": phases, "seconds": round(time.perf_counter() - began, 2), "peak_gb": peak_gb(),
            "tokens_per_second": phases.get("theta", phases["evaluation"])["tokens_per_second"]}


def table_3(reader, data, a, folder, config):
    """Every arm for every seed, resumable -> rows."""
    from tqdm import tqdm
    twice = not a.prompt_only and (a.attack == "full" or a.starts == "written" or a.baselines)
    longest = [reader.usable[0]] * a.prompt_length * (2 if twice else 1)
    reader.predict(reader.questions(data.test[:1]), longest)  # a prompt beyond the context is refused before the work
    state = State(folder, config, a.resume)
    jobs = [(name, o, seed) for seed in range(a.seed, a.seed + a.seeds) for name, o in arms(a)]
    bar = tqdm(total=sum(a.rounds for _, o, _ in jobs if o is not None), disable=not leader(), unit="round", leave=False)
    for k, (name, o, seed) in enumerate(jobs):
        bar.set_description(f"{name}, seed {seed}")
        if k < len(state.value["rows"]):
            continue
        row = run_arm(name, o, reader, data, a, seed, state, bar, folder)
        state.save(rows=state.value["rows"] + [row], game=None)
    bar.close()
    return state.value["rows"]


# ---------------------------------------------------------------- Tables 1 and 2

def few_shot_rows(reader, data, a):
    """Tables 1 and 2: the frozen model behind `--shots` labelled people -> rows, one for each prompt draw."""
    import numpy
    from tqdm import tqdm
    if a.table == 1:
        cases = [(f"b = {b:g}", b, False, 0.) for b in (-1., -.5, 0., .5, 1.)]
        cases += [("natural, balanced test", None, False, 0.), ("natural, natural test", None, False, None)]
    else:
        cases = [(f"b = {b:g}" + (", counterbalanced" if c else ""), b, c, 0.) for b in (0., .5) for c in (False, True)]
    rows = []
    for seed in tqdm(range(a.seed, a.seed + a.seeds), unit="draw", leave=False):
        for name, b, twice, test_b in cases:
            began, clock = time.perf_counter(), Clock(reader)
            rng = numpy.random.default_rng(seed)
            shots = adult.few_shot(data.train, a.shots, b, rng, twice)
            with clock("evaluation"):
                m = measure(reader, adult.sample(data.test, a.test_rows, test_b, rng), context=shots, intervals=True)
            rows.append({"name": name, "lam": None, "seed": seed, "bpc": b, "counterbalanced": twice, "prompt": shots, **m,
                         "seconds": round(time.perf_counter() - began, 2), "peak_gb": peak_gb(), "phases": clock.report()})
    return rows


# ---------------------------------------------------------------- tables, pictures, results

def label(row):
    """What the row is called in the tables."""
    return row["name"] + (f" lam={row['lam']:g}" if row["name"] == "FairCon" else "")


def summary(rows):
    """Mean and standard deviation over seeds of every number -> {label: {metric: [mean, std]}}."""
    import numpy
    groups, out = {}, {}
    for r in rows:
        groups.setdefault(label(r), []).append(r)
    for name, some in groups.items():
        numbers = [k for k, v in some[0].items() if isinstance(v, float) and k not in ("seconds", "peak_gb", "lam", "bpc")]
        out[name] = {k: [float(numpy.mean([r[k] for r in some])), float(numpy.std([r[k] for r in some], ddof=min(1, len(some) - 1)))]
                      for k in numbers}
    return out


def show(rows, a):
    """Print the table, ours beside the paper's."""
    import numpy
    s = summary(rows)
    columns = [("ACC", "acc"), ("ACC b=" + f"{a.bpc:g}", "acc_bpc"), ("M_dpd", "dpd"), ("M_deo", "deo"), ("gap", "gap"),
               ("flip", "flip_rate"), ("worst gap", "worst_gap"), ("shots gap", "shots_gap")]
    columns = [c for c in columns if any(c[1] in v for v in s.values())]
    cell = (lambda m, d: f"{m:.3f}±{d:.3f}") if a.seeds > 1 else (lambda m, d: f"{m:.3f}")
    wide = 13 if a.seeds > 1 else 10
    print("\n" + f"{'':<25}" + "".join(f"{c[0]:>{wide}}" for c in columns) + "   paper: ACC M_dpd M_deo")
    for name, values in s.items():
        r = next(r for r in rows if label(r) == name)
        key = r["name"] if a.table == 3 else ("b", r["bpc"], *(["counterbalanced"] if r["counterbalanced"] else []))
        paper = PAPER.get(key) if "balanced test" not in name else None
        print(f"{name:<25}" + "".join(f"{cell(*values[c[1]]) if c[1] in values else '-':>{wide}}" for c in columns)
              + ("   " + " ".join(f"{x:g}" for x in paper) if paper else ""))
    trained = [k for k in s if "raw_gap" in s[k]]
    if trained:
        print("\n" + f"{'without SWA':<25}" + "".join(f"{c:>{wide}}" for c in ("ACC", "gap", "flip")) + "   gap on the training rows, round by round")
    for name in trained:
        some = [r for r in rows if label(r) == name]
        rounds = [sum(r["history"][k]["gap"] for r in some) / len(some) for k in range(len(some[0]["history"]))]
        print(f"{name:<25}" + "".join(f"{cell(*s[name][k]):>{wide}}" for k in ("raw_acc", "raw_gap", "raw_flip_rate"))
              + "   " + " ".join(f"{g:.3f}" for g in rounds))
        if some[0]["lam"]:
            failed = [sum(not (.02 < r[p + "positives"] < .98 and r[p + "gap"] <= .05) for r in some) for p in ("raw_", "")]
            print(f"{'':<25}collapsed or gap above .05: {failed[0]} of {len(some)} without SWA, {failed[1]} with")
    attacked = [name for name in s if any("worst" in r for r in rows if label(r) == name)]
    if attacked:
        wide = max(map(len, attacked)) + 2
        print("\n" + f"{'gap under each attack':<27}" + "".join(f"{name:>{wide}}" for name in attacked))
        for kind in dict.fromkeys(k for r in rows for k in r.get("worst", ())):
            gaps = [[r["worst"][kind]["gap"] for r in rows if label(r) == name and kind in r["worst"]] for name in attacked]
            print(f"{kind[:26]:<27}" + "".join(f"{cell(numpy.mean(g), numpy.std(g, ddof=min(1, len(g) - 1))) if g else '-':>{wide}}"
                                               for g in gaps))
    for r in rows:
        if r.get("warning"):
            print(f"WARNING {r['name']}, seed {r['seed']}: {r['warning']}")


def plot(rows, a):
    """Table 1 as a curve, the trade-off over lam, or (with one lam) the gap over the rounds of the game."""
    plt, s = plotting(), summary(rows)
    figure, left = plt.subplots(figsize=(6, 4))
    if a.table == 3 and len(a.lam) < 2:
        for r in (r for r in rows if r["name"] in ("fine-tuned", "FairCon")):
            colour = "C3" if r["name"] == "FairCon" else "C0"
            left.plot([h["gap"] for h in r["history"]], color=colour, label=r["name"] if r["seed"] == a.seed else None, alpha=.6)
        left.set(xlabel="round of the game", ylabel="|| f(x_m) - f(x_f) ||, training rows", yscale="log")
        left.legend()
    else:
        points = [(float(k.split("=")[-1]), v) for k, v in s.items() if "=" in k and "counterbalanced" not in k]
        if a.table == 3:
            points = [(0., s["fine-tuned"])] + points
        right = left.twinx()
        for axis, key, colour, text in ((left, "gap", "C3", "counterfactual gap"), (right, "acc", "C0", "accuracy, balanced test rows")):
            axis.errorbar([p[0] for p in points], [p[1][key][0] for p in points], [p[1][key][1] for p in points], color=colour,
                          marker="o", capsize=3)
            axis.set_ylabel(text, color=colour)
        left.set_xlabel("lam" if a.table == 3 else "b_Pc of the shots")
        if a.table == 3:
            left.set_xscale("symlog", linthresh=.1)
    figure.tight_layout()
    figure.savefig(a.plot, dpi=110)
    print(f"drawn: {a.plot}")


def evaluate_run(a):
    """--eval: load a finished run's adapter and measure it again; raises InputError when a number differs."""
    reader, results = load_run(a.eval)
    config = argparse.Namespace(**results["config"])
    row = [r for r in results["rows"] if r["name"] == "FairCon"][-1]
    _, _, test, _ = draw(adult.load(config.data), config, row["seed"])
    again = measure(reader, test)
    for k, v in again.items():
        print(f"{k:<12} saved {row[k]:.6f}  now {v:.6f}")
    if any(row[k] != v for k, v in again.items()):
        raise InputError(f"the metrics of {a.eval} do not come out again; other data, another model or another machine?")
    print("every saved metric came out again, exactly")


def cost_of(a, shots, seconds=5.):
    """One line of --cost, steps until `seconds` have passed: of phi and of theta, by fours (see `batches`), or (with `shots`) of 48
    people behind a few-shot prompt -> Clock's phases, number of steps, peak GB, GFLOP/s of a matrix product."""
    import faircon
    import lora
    import numpy
    reader, _ = load_model(a.model, a.dtype, a.device)
    data, rng = adult.load(a.data), numpy.random.default_rng(a.seed)
    clock, people = Clock(reader), adult.sample(data.train, 4 * a.batch_size, 0., rng)
    questions, prompt = reader.questions(adult.sample(data.train, 48, 0., rng)), adult.few_shot(data.train, shots or 0, 0., rng)
    lora.inject(reader.model, a.rank, a.alpha)
    game = faircon.Game(reader, people, [], faircon.Options(prompt_length=a.prompt_length, batch_size=a.batch_size, restarts=1, cut=False), a.seed)
    batches = game.batches()

    def step(clock):
        if shots:
            with clock("evaluation"):
                return reader.predict(questions, context=prompt)
        rows = next(batches)
        with lora.merged(reader.model), clock("phi"):
            game.adversary.step([game.questions[i] for i in rows], 0)
        game.pool = [game.adversary.ids(0)]
        with clock("theta"):
            game.model_step(rows, a.lam[0])
    if shots:
        lora.merge(reader.model)
    step(lambda phase: contextlib.nullcontext())  # warms up
    steps, end = 0, time.perf_counter() + seconds
    while steps % (1 if shots else 4) or time.perf_counter() < end:
        steps += 1
        step(clock)
    return clock.report(), steps, peak_gb(), matrix_rate(reader.device, reader.model.dtype)


def cost(a):
    """--cost: how seconds and memory grow. Each line is a process of its own, because a peak of memory never goes down."""
    import concurrent.futures
    import multiprocessing
    lines = [("batch size", "batch_size", v) for v in sorted({1, max(1, a.batch_size // 2), a.batch_size})]
    lines += [("prompt length", "prompt_length", v) for v in (2 * a.prompt_length, 4 * a.prompt_length)]
    print(f"{a.model}: a text is one person as one sex, with gradients; where not varied --batch-size {a.batch_size}, "
          f"--prompt-length {a.prompt_length}")
    print(f"{'':<19}{'phi: texts/s':>14}{'theta: texts/s':>16}{'of matrix rate':>16}{'peak GB':>9}")
    for name, key, value in lines + [("shots", None, v) for v in (4, 16)]:
        b = argparse.Namespace(**{**vars(a), **({key: value} if key else {})})
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            phases, steps, gb, rate = pool.submit(cost_of, b, None if key else value).result()
        if key:
            speed = [n * 2 * b.batch_size * steps / phases[k]["seconds"] for k, n in (("phi", 1), ("theta", 3))]  # theta: three prompts
            text = f"{speed[0]:>14.2f}{speed[1]:>16.2f}{100 * phases['theta']['gflop_per_second'] / rate:>14.0f} %"
        else:
            text = f"{48 * steps / phases['evaluation']['seconds']:>14.2f} people a second, both twins"
        print(f"{name + ' ' + str(value):<19}{text}{gb:>9.2f}", flush=True)


def run(a):
    import numpy
    import torch
    import transformers
    import lora
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if a.batch_size % torch.distributed.get_world_size() or a.rows % a.batch_size:
            raise InputError("with several processes --batch-size must be a multiple of their number, and --rows one of it.")
    torch.manual_seed(a.seed)
    folder = pathlib.Path("runs") / a.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if leader():
            write(folder / "probe", b"")
            (folder / "probe").unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); free it, or change --name or the folder.") from None
    say = print if leader() else lambda *_: None
    data = adult.load(a.data)
    say(f"data: {data.source}, {len(data.train)} train and {len(data.test)} test rows, sha256 {data.sha256['adult.data'][:12]}…")
    a.test_rows = a.test_rows or enough(data.test, a.bpc)
    reader, how = load_model(a.model, a.dtype, a.device)
    rate = matrix_rate(reader.device, reader.model.dtype)
    size = sum(p.numel() for p in reader.model.parameters())
    say(f"model: {a.model}, {size:,} parameters, {how}, matrix products at {rate} GFLOP/s")
    config = {k: v for k, v in vars(a).items() if k not in ("resume", "plot")}
    if a.table == 3:
        wrapped = lora.inject(reader.model, a.rank, a.alpha)
        say(f"LoRA r={a.rank} on {len(wrapped)} projections: {lora.share(reader.model):.3f} % trained; SWA averages exactly these")
        rows = table_3(reader, data, a, folder, config)
    else:
        rows = few_shot_rows(reader, data, a)
    if not leader():
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                "numpy": numpy.__version__, "computed_in": how, "matrix_gflop_per_second": rate}
    results = {"config": config, "versions": versions, "data": {"source": data.source, "sha256": data.sha256,
               "train_rows": len(data.train), "test_rows": len(data.test)}, "rows": rows, "summary": summary(rows)}
    write(folder / "results.json", json.dumps(results, indent=1).encode())
    show(rows, a)
    last = rows[-1]
    if a.table == 3:
        print(f"\nan adversarial prompt of §5, here against {last['name']}: {last['prompt']!r}")
        for phase, p in last["phases"].items():
            print(f"{phase:<11} {p['seconds']:7.1f} s {p['tokens_per_second']:9,} tokens/s {p['gflop_per_second']:8.1f} GFLOP/s "
                  f"({100 * p['gflop_per_second'] / rate:.0f} % of the matrix rate)")
        if last["name"] == "FairCon":
            print(f"adapter: {folder / 'adapter'} (PEFT's format); the adversary: {folder / 'phi.safetensors'}")
    print(f"results: {folder / 'results.json'}")
    if a.plot:
        plot(rows, a)
    (folder / "state.pt").unlink(missing_ok=True)


def main(argv=None):
    """The command. InputError -> one sentence and exit status 1."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    a = parser().parse_args(argv)
    try:
        check(a, {x.split("=")[0] for x in argv})
        if a.paper:
            print("the paper's setting: " + " ".join(f"--{k.replace('_', '-')} {getattr(a, k)}" for k in PAPER_SETTING))
        if a.eval:
            evaluate_run(a)
        elif a.cost:
            cost(a)
        else:
            run(a)
    except InputError as problem:
        sys.exit(f"train.py: {problem}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; the same command with --resume goes on after the last finished round of runs/{a.name}.")
    except OSError as error:
        sys.exit(f"train.py: {error.filename or 'a file'}: {error.strerror}; the finished rounds are kept, --resume goes on.")
    except (RuntimeError, MemoryError) as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit("train.py: out of memory; lower --batch-size (or --shots), use --dtype bfloat16, or a smaller --model.")


if __name__ == "__main__":
    main()
