"""NOT IN THE PAPER: a run's folder, several processes, reading a finished run.

    runs/NAME/run.json           what the run depends on: options; data, model by hash
    runs/NAME/MODEL-SEED/        rows.json, adapter/ (PEFT's format), prompts.json;
                                 state.pt while the model is being trained
    runs/NAME/results.json       every row, once all are there

Every file is written to a temporary name and renamed. The folder is the state of the
run: what is in it is not computed again, and nothing that was computed is lost.

    python -m beyond.runs runs/NAME     # measure a finished run's models again
"""
import argparse
import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import warnings
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from adult import TINY, InputError, load, split

FORMAT = 2                    # raised when a run of before could not be gone on with
SHOWN = ("acc", "dpd", "deo", "gap", "flip")


# ------------------------------------------------------------------ files

def write(path, content):
    """Bytes or text to a temporary name, flushed, renamed: whole or not there."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    write(path, json.dumps(value, indent=1))


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`; InputError otherwise."""
    try:
        value = json.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the folder "
                         "of a finished run, such as runs/default.") from None
    except ValueError:
        raise InputError(f"{path} is not JSON; it is not a file of this program, or it "
                         "was damaged: run again under another --name.") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} holds no {kind.__name__}; it is not this program's.")
    return value


def model_hash(model):
    """sha256 over a LanguageModel's weights, without LoRA's, and vocabulary."""
    import torch
    digest, base = hashlib.sha256(), {}
    for name, tensor in model.model.state_dict().items():
        if not name.endswith((".A", ".B")):
            base[name.replace("_proj.base.", "_proj.")] = tensor
    for name, tensor in sorted(base.items()):
        tensor = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    digest.update(json.dumps(model.tokenizer.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()


def versions():
    """What computes: another version may give other last digits."""
    import platform
    import numpy
    import torch
    import transformers
    return {"torch": torch.__version__, "numpy": numpy.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version()}


# ------------------------------------------------------------------ a run's folder

@contextmanager
def open_run(name, depends_on, resume):
    """Lock runs/NAME for one run -> its folder. InputError if it is not to be had.

    depends_on: JSON that a resumed run must share, compared entry by entry.
    """
    folder = pathlib.Path("runs") / name
    if not leads():                      # torchrun: one of its processes has the lock
        sys.modules["torch"].distributed.barrier()
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")
    except OSError as error:
        raise cannot_write(folder, error) from None
    with lock:
        if not locked(lock):
            raise InputError(f"another process is writing {folder}; wait for it, or "
                             "give another --name.")
        if resume:
            compare(folder, depends_on)
        else:
            clear(folder)
        try:
            write(folder / "probe" / "file", b"")    # a folder in it can be made, too
            shutil.rmtree(folder / "probe")
            write_json(folder / "run.json", depends_on)
        except OSError as error:
            raise cannot_write(folder, error) from None
        for part in folder.rglob("*.part"):          # of a process that was killed
            part.unlink(missing_ok=True)
        if joined():
            sys.modules["torch"].distributed.barrier()       # the others may begin
        yield folder


def cannot_write(folder, error):
    return InputError(f"{folder} cannot be written ({error.strerror}); free it, or "
                      "change --name or the current folder.")


def locked(file):
    """Take the lock on a file, until it is closed or the process ends -> success."""
    try:
        import fcntl
    except ImportError:                                          # Windows
        import msvcrt
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear(folder):
    """Make room for a new run; InputError if an interrupted one would be lost."""
    done = sorted(folder.glob("*/rows.json")) + sorted(folder.glob("*/state.pt"))
    if done and not (folder / "results.json").exists():
        raise InputError(f"{folder} holds an interrupted run; go on with it "
                         "(--resume), give another --name, or delete that folder.")
    for path in [folder / "results.json", *folder.glob("attacks*.json")]:
        path.unlink(missing_ok=True)
    for path in done:
        path.unlink(missing_ok=True)     # first: half a folder must not count as done
    for path in done:
        shutil.rmtree(path.parent, ignore_errors=True)


def compare(folder, depends_on):
    """InputError, naming it, if what an interrupted run depends on has changed."""
    if not (folder / "run.json").exists():
        raise InputError(f"there is no interrupted run in {folder}; "
                         "leave out --resume.")
    saved = read_json(folder / "run.json")
    flat, flat_saved = flatten(depends_on), flatten(saved)
    for name in {**flat, **flat_saved}:
        if flat.get(name) != flat_saved.get(name):
            raise InputError(
                f"the run in {folder} was started with another {name} "
                f"({str(flat_saved.get(name))[:40]}, now {str(flat.get(name))[:40]}); "
                "use the same, or another --name.")


def flatten(value, prefix=""):
    """{"a": {"b": 1}} -> {"a b": 1}"""
    if not isinstance(value, dict):
        return {prefix.strip(): value}
    flat = {}
    for name, inner in value.items():
        flat.update(flatten(inner, f"{prefix} {name}"))
    return flat


def state_of(game):
    """What a resumed game needs to go on bit for bit: tensors, numbers, strings.

    Live ones: save them before the game goes on.
    """
    import torch
    adversaries = []
    if game.adversary:
        adversaries.append({"phi": game.adversary.phi.detach(),
                            "optimiser": game.adversary.optimiser.state_dict()})
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"done": game.done, "theta": [p.detach() for p in game.theta],
            "optimiser": game.optimiser.state_dict(), "adversaries": adversaries,
            "swa": (game.swa.average, game.swa.n),
            "rng": game.rng.bit_generator.state, "cuda": cuda,
            "generator": game.generator.get_state(), "torch": torch.get_rng_state()}


def restore(game, state):
    """Let a fresh game go on where `state` was taken."""
    import torch
    for p, saved in zip(game.theta, state["theta"]):
        p.data.copy_(saved)
    game.optimiser.load_state_dict(state["optimiser"])
    for saved in state["adversaries"]:
        game.adversary.start(saved["phi"])
        game.adversary.optimiser.load_state_dict(saved["optimiser"])
    game.done = state["done"]
    average, game.swa.n = state["swa"]
    game.swa.average = [a.to(game.model.device) for a in average]
    game.rng.bit_generator.state = state["rng"]
    game.generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(folder, state):
    """A game's state: data alone, no code in it."""
    import io
    import torch
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(folder / "state.pt", buffer.getvalue())


def load_state(folder):
    """A game's state, or None. Opening it runs no code. InputError."""
    import pickle
    import torch
    path = folder / "state.pt"
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give yourself the "
                         "right to read it.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        raise InputError(f"{path} is damaged; delete it, and --resume begins that "
                         "model again.") from None


# ------------------------------------------------------------------ several processes

def run_jobs(work, jobs, workers):
    """work(*job) for every job, in `workers` processes (1: in this one) -> results.

    However this ends (an error, Ctrl-C, SIGTERM, a killed worker), no worker stays.
    """
    if workers == 1:
        return [work(*job) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, begin_worker) as pool:
        try:
            with deaf():
                futures = [pool.submit(work, *job) for job in jobs]
            return [future.result() for future in futures]
        except BaseException as problem:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(problem, BrokenProcessPool):
                raise InputError("a worker was ended from outside (out of memory?); "
                                 "all finished rounds are kept: --resume goes on, "
                                 "--jobs 1 needs less memory.") from None
            raise


@contextmanager
def deaf():
    """Inside, Ctrl-C waits; a process that is begun here never hears it."""
    if not hasattr(signal, "pthread_sigmask"):                   # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker():
    """A worker leaves Ctrl-C to its parent, and ends whenever and however that does.

    The parent has said already that b_Pc is not exact.
    """
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    warnings.filterwarnings("ignore", "b_Pc = .* is not exact")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def cores():
    """How many processes this one may use at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- torchrun: several processes for one large model

def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_processes():
    """Meet torchrun's other processes -> how many there are; 1 without torchrun."""
    if not under_torchrun():
        return 1
    import torch
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_world_size()


def joined():
    torch = sys.modules.get("torch")                 # not loaded: nothing is joined
    return bool(torch and torch.distributed.is_available()
                and torch.distributed.is_initialized())


def rank_of_process():
    """Which of them this is: torch says, not the shell. 0 is the one that writes."""
    return sys.modules["torch"].distributed.get_rank() if joined() else 0


def leads():
    return rank_of_process() == 0


def say(text):
    """Print a line, in the process that leads. One write: jobs share the terminal."""
    if leads():
        print(f"{text}\n", end="", flush=True)


# ------------------------------------------------------------------ a finished run

def load_run(folder, model="faircon", seed=None, model_path=None, device="auto"):
    """A model of a finished run, adapter merged -> (FastModel, its row, the run).

    model_path: where the base model is now, if not where it was. InputError.
    """
    import lora
    from beyond.fast import load_model
    folder = pathlib.Path(folder)
    results = read_json(folder / "results.json")
    row = find_row(results, folder, model, seed)
    config = results["config"]
    base = model_path or here(config["model"])
    loaded, _ = load_model(base, config["dtype"], device)
    if model_hash(loaded) != results["model"]["sha256"]:
        raise InputError(f"{base} is not the model of {folder} (another sha256); give "
                         "the one it was made with.")
    if row["trained"]:
        lora.load(loaded.model, folder / f"{model}-{row['seed']}" / "adapter")
        lora.merge(loaded.model)
    return loaded, row, results


def find_row(results, folder, model, seed):
    """The row of one model and seed (None: the first), its fields checked."""
    rows = results.get("rows")
    fields = {"config": dict, "model": dict, "data": dict, "rows": list}
    for name, kind in fields.items():
        if not isinstance(results.get(name), kind):
            raise InputError(f"{folder}/results.json has no {name}; it is not a file "
                             "of this program, or of an older one: run again.")
    needed = {"config": ("model", "dtype", "data", "rows", "bpc", "test_rows"),
              "model": ("sha256",), "data": ("sha256",)}
    for part, names in needed.items():
        for name in names:
            if name not in results[part]:
                raise InputError(f"{folder}/results.json has no {part} {name}; "
                                 "run again.")
    for row in rows:
        if not isinstance(row, dict) or not {"key", "seed"} <= set(row):
            raise InputError(f"{folder}/results.json has a row without key and seed; "
                             "it is not a file of this program.")
        if row["key"] == model and seed in (None, row["seed"]) and "trained" in row:
            return row
    keys = sorted({str(row["key"]) for row in rows})
    which = model if seed is None else f"{model} of seed {seed}"
    raise InputError(f"{folder} holds no {which}; it holds {', '.join(keys)}.")


def here(path):
    """A path as saved; the embedded model and data of this clone for "tiny"."""
    return TINY if path == "tiny" else path


def load_data(results, data=None):
    """The data of a run -> adult.Adult; InputError if it is another."""
    given = data or results["config"]["data"]
    loaded = load(here(given) if given else None)
    if loaded.sha256 != results["data"]["sha256"]:
        raise InputError(f"the data ({loaded.source}) is not the run's "
                         f"({results['data'].get('source')}): another sha256; give the "
                         "run's files with --data DIR.")
    return loaded


def largest_change(again, row):
    """Between two measurements; NaN is equal to NaN alone, anything else inf away."""
    largest = 0.
    for name, value in again.items():
        saved = row.get(name)
        if saved != value and not (saved != saved and value != value):
            known = isinstance(saved, float) and abs(saved - value) < math.inf
            largest = max(largest, abs(saved - value) if known else math.inf)
    return largest


def main():
    parser = argparse.ArgumentParser(description="Measure the models of a finished run "
                                     "again, on its own test rows.")
    parser.add_argument("run", help="the run's folder, such as runs/default")
    parser.add_argument("--data", metavar="DIR", help="where its data is now")
    parser.add_argument("--model", metavar="DIR", help="where its base model is now")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    import faircon
    results = read_json(pathlib.Path(args.run) / "results.json")
    find_row(results, args.run, "not-trained", None)
    data = load_data(results, args.data)
    config, different = results["config"], 0
    print(f"{'model':<16} seed   " + "  ".join(f"{name:>9}" for name in SHOWN)
          + "   largest change")
    for row in results["rows"]:
        if row["key"] == "always-0":
            continue
        model, row, _ = load_run(args.run, row["key"], row["seed"], device=args.device,
                                 model_path=args.model)
        people = split(data, config["rows"], config["bpc"], config["test_rows"],
                       row["seed"])
        again = faircon.measure(model, people.test, row.get("g"))
        change = largest_change(again, row)
        different += change != 0
        print(f"{row['key']:<16} {row['seed']:<6} "
              + "  ".join(f"{again[name]:9.4f}" for name in SHOWN) + f"   {change:.1e}")
    if different:
        raise InputError(f"{different} models do not give the saved numbers exactly: "
                         "another machine or library, if the changes are small.")
    print("every saved number of every model came out again, exactly (no prompt; "
          "`python -m beyond.attacks` repeats attacks)")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"beyond.runs: {problem}")
