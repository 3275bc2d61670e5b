"""NOT IN THE PAPER: a run's folder, several processes, what every command shares.

    runs/NAME/run.json           the flags, and what the run depends on: options; data,
                                 model by hash; versions
    runs/NAME/MODEL-SEED/        rows.json, adapter/ (PEFT's format), people.csv (its
                                 answers about each test row); state.pt in training
    runs/NAME/results.json       every row, once all are there

Every file is written to a temporary name and renamed. The folder is the state of the
run: what is in it is not computed again.
"""
import argparse
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import platform
import signal
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import numpy
from filelock import FileLock, Timeout

from adult import InputError

FORMAT = 4                    # raised when older runs can no longer be resumed


# ------------------------------------------------------------------ a command

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help.")


def count(text):
    """An argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is impossible: at least 1")
    return int(text)


def seed(text):
    if not 0 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is impossible: 0 to 2**63 - 1")
    return int(text)


def folder_name(text):
    if pathlib.PurePath(text).name != text or text in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain folder name")
    return text


BESIDE_RESUME = ("--resume", "--jobs", "--device", "--data", "--model", "--task")


def parse(parser, argv):
    """The command's flags; --resume NAME takes those of the run of this name.

    Beside it those of BESIDE_RESUME only: a run may go on on another machine. The dtype
    is what "auto" was where it began.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    args.argv, name = argv, args.resume
    if name is None:
        return args
    for flag in argv:
        if flag.startswith("-") and flag.split("=")[0] not in BESIDE_RESUME:
            raise InputError(f"--resume takes the flags that {name} was started with; "
                             f"leave out {flag}, or begin another run.")
    path = pathlib.Path("runs") / name / "run.json"
    run = read_json(path)
    if not fits(run, {"argv": [str], "config": dict}):
        raise InputError(f"{path} has no argv and config: not this program's.")
    began, model = run["argv"], run["config"].get("model")        # ablation: no model
    dtype = ["--dtype", model[1]] if model else []
    args = parser.parse_args([*began, *dtype, *argv])            # the last one counts
    args.argv = began
    return args


@contextmanager
def one_sentence(program):
    """Whatever goes wrong inside with the input is one sentence, exit status 1."""
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    on_signal(signal.SIGTERM, signal.default_int_handler)             # as Ctrl-C does
    try:
        yield
    except InputError as problem:
        sys.exit(f"{program}: {problem}")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: interrupted; what is finished is kept, and --resume "
                 "NAME goes on (attacks: the same command).")
    except BrokenPipeError:                                                 # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        path = error.filename2 or error.filename or "a file"    # 2: a new name
        sys.exit(f"{program}: {path}: {error.strerror or error}; what is finished is "
                 "kept (train.py: --resume NAME goes on).")
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        sys.exit(f"{program}: out of memory; lower --jobs, --batch-size or --shots, or "
                 "use --dtype bfloat16 or a smaller --model.")


def on_signal(number, handler):
    """signal.signal, which only the main thread may call -> the handler before."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)


def say(text):
    """Print a line. One write: jobs share the terminal."""
    print(f"{text}\n", end="", flush=True)


# ------------------------------------------------------------------ files

def write(path, content):
    """Bytes or text to a temporary name, flushed, renamed: whole or not there."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{path.name}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """JSON has no NaN: null in its place."""
    value = json.loads(json.dumps(value), parse_constant=lambda nan: None)
    write(path, json.dumps(value, indent=1))


def read_json(path, kind=dict, give="the folder of a run, such as runs/default"):
    """A JSON file that holds a `kind`; InputError otherwise."""
    try:
        value = json.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); "
                         f"give {give}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, or damaged ({error}); "
                         f"give {give}.") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} holds no {kind.__name__}; give {give}.")
    return value


def fits(value, shape):
    """Whether a value of JSON has the fields of `shape`, of its kinds."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value.get(name), inner) for name, inner in shape.items())
    if isinstance(shape, list):                          # [kind]: any number of them
        return isinstance(value, list) and all(fits(x, shape[0]) for x in value)
    return isinstance(value, shape)


def write_people(path, people, p):
    """What was answered about each person: s, y (or nothing), p_m and p_f (N, 2)."""
    lines = ["s,y,p_m,p_f"]
    for person, (p_m, p_f) in zip(people, p):
        y = "" if person.y is None else person.y
        lines.append(f"{person.s},{y},{p_m:.9g},{p_f:.9g}")
    write(path, "\n".join(lines) + "\n")


def versions():
    """What computes: another version, or CPU, may give other last digits."""
    import torch
    import transformers
    return {"torch": torch.__version__, "numpy": numpy.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cpu": torch.backends.cpu.get_cpu_capability()}


# ------------------------------------------------------------------ a run's folder

@contextmanager
def open_run(args, depends_on):
    """Lock a folder for one run -> the folder. InputError if it is taken.

    args: name, resume, argv. depends_on: JSON that a resumed run must share, compared
    entry by entry. A finished run of the same name is left alone: another is chosen.
    """
    folder = pathlib.Path("runs") / (args.resume or free(args.name))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            begin(folder, args, depends_on)
            yield folder
    except Timeout:
        raise InputError(f"another process is writing {folder}; wait for it, or give "
                         "another --name.") from None


def begin(folder, args, depends_on):
    """Note what a new run depends on, compare it when one goes on."""
    if args.resume:
        compare(folder, depends_on)
    elif list(folder.glob("*/rows.json")) + list(folder.glob("*/state.pt")):
        raise InputError(f"{folder} holds an interrupted run; go on with it (--resume "
                         f"{folder.name}) or give another --name.")
    else:
        write_json(folder / "run.json", {"argv": args.argv, **depends_on})
    for part in folder.rglob("*.part"):              # of a process that was killed
        part.unlink()


def finish(folder, results):
    """Write results.json once: what a finished run says of itself stays."""
    if not (folder / "results.json").exists():
        write_json(folder / "results.json", results)


def free(name):
    """NAME, or NAME-2, NAME-3 ... where a finished run has it."""
    other, k = name, 1
    while (pathlib.Path("runs") / other / "results.json").exists():
        k += 1
        other = f"{name}-{k}"
    if other != name:
        say(f"note: runs/{name} holds a finished run, which stays; this one is "
            f"runs/{other}")
    return other


def compare(folder, depends_on):
    """InputError, naming it, if what an interrupted run depends on has changed.

    Another machine (its versions, its processor) is reported, not refused; model and
    data are compared by their sha256, and the dtype is the run's.
    """
    now, saved = [flatten({**run, "data": list(run.get("data", {}).values())})
                  for run in (depends_on, read_json(folder / "run.json"))]
    saved.setdefault("config chat", False)                       # older runs: no field
    for name in now:
        was = saved.get(name)
        moved = name in ("config model", "config data", "config task")
        if moved or now[name] == was:
            continue
        if name == "model computed in" or name.startswith("versions "):
            say(f"note: {name} was {was} and is now {now[name]}; last digits may "
                "differ")
        else:
            raise InputError(f"the run in {folder} was started with another {name} "
                             f"({was!s:.40}, now {now[name]!s:.40}); use the same, or "
                             "begin another run.")


def flatten(value, prefix=""):
    """{"a": {"b": 1}} -> {"a b": 1}"""
    if not isinstance(value, dict):
        return {prefix.strip(): value}
    flat = {}
    for name, inner in value.items():
        flat.update(flatten(inner, f"{prefix} {name}"))
    return flat


# ------------------------------------------------------------------ a game's state

def save_state(game, history, folder):
    """What a resumed game needs to go on bit for bit: data only, no code in it."""
    import torch
    state = {"done": game.done, "history": history,
             "theta": [p.detach() for p in game.theta],
             "optimiser": game.optimiser.state_dict(),
             "swa": (game.swa.average, game.swa.n),
             "rng": game.rng.bit_generator.state,
             "generator": game.generator.get_state(), "torch": torch.get_rng_state(),
             "cuda": torch.cuda.get_rng_state_all()}
    if game.adversary:
        state["phi"] = game.adversary.phi.detach()
        state["phi_optimiser"] = game.adversary.optimiser.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(folder / "state.pt", buffer.getvalue())


def load_state(game, folder):
    """Let a fresh game go on where a state was saved -> its history, [] without one.

    Opening the file runs no code. Raises InputError.
    """
    import torch
    path = folder / "state.pt"
    if not path.exists():
        return []
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        raise InputError(f"{path} is damaged; delete it, and --resume begins that "
                         "model again.") from None
    for p, saved in zip(game.theta, state["theta"], strict=True):
        p.data.copy_(saved)
    game.optimiser.load_state_dict(state["optimiser"])
    if game.adversary:
        game.adversary.start(state["phi"])
        game.adversary.optimiser.load_state_dict(state["phi_optimiser"])
    average, game.swa.n = state["swa"]
    game.swa.average = [a.to(game.model.device) for a in average]
    game.rng.bit_generator.state = state["rng"]
    game.generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.device_count() == len(state.get("cuda", ())):   # older runs: no cuda
        torch.cuda.set_rng_state_all(state.get("cuda", ()))
    game.done = state["done"]
    return state["history"]


# ------------------------------------------------------------------ several processes

def run_jobs(work, jobs, workers, folder):
    """work(config, key, seed, folder) for every job -> the rows of all, in their order.

    Rows that are there are not computed again. Workers: processes (1: this one); the
    last job begins first, since a table's later models take longer. However this ends
    (an error, Ctrl-C, SIGTERM, a killed worker), no worker stays.
    """
    if workers == 1:
        done = [do(work, job, folder) for job in jobs]
    else:
        done = in_processes(work, jobs, workers, folder)
    return sum(done, [])


def do(work, job, folder):
    """A job's rows, from its folder if they are there."""
    config, key, seed = job
    place = pathlib.Path(folder) / f"{key}-{seed}"
    if not (place / "rows.json").exists():
        write_json(place / "rows.json", work(config, key, seed, folder))
    (place / "state.pt").unlink(missing_ok=True)
    return read_json(place / "rows.json", list)


def in_processes(work, jobs, workers, folder):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, begin_worker) as pool:
        try:
            futures = submit(pool, work, jobs[::-1], folder)
            return [future.result() for future in futures[::-1]]
        except BaseException as problem:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(problem, BrokenProcessPool):
                raise InputError(
                    "a worker was ended from outside (out of memory?), or could not "
                    "begin (a script that calls this needs `if __name__ == "
                    "'__main__':`); what is finished is kept: --resume NAME goes on, "
                    "--jobs 1 needs less memory.") from None
            raise


def submit(pool, work, jobs, folder):
    """Begins the workers, too. They inherit that Ctrl-C is ignored here."""
    before = on_signal(signal.SIGINT, signal.SIG_IGN)
    try:
        futures = [pool.submit(do, work, job, folder) for job in jobs]
        # A pool looks at which workers it has when it is given work, and only then
        # begins one more: without this the death of the last may go unnoticed.
        pool.submit(int)
        return futures
    finally:
        on_signal(signal.SIGINT, before)


def begin_worker():
    """A worker leaves Ctrl-C to its parent, and ends whenever and however that does.

    The parent has said already that b_Pc is not exact. tqdm's own lock is a semaphore,
    which a worker that is ended leaves behind.
    """
    from tqdm import tqdm
    tqdm.set_lock(threading.RLock())
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    warnings.filterwarnings("ignore", "b_Pc = .* is not exact")
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
