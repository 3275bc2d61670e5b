"""Long commands run beside the tests: pytest takes one core, they take the other."""
import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import adult
from beyond import load, people, tasks

HERE = pathlib.Path(__file__).resolve().parent.parent
LESSONS = ("faircon", "lora", "gumbel", "swa", "adult", "metrics", "beyond.robust",
           "beyond.quantise")
# 16 rows and 4 shots: their b_Pc is exact. 3 rounds: SWA averages the last.
SMALL = ("--data", "data", "--rows", "16", "--test-rows", "16", "--shots", "4",
         "--seed", "3", "--rounds", "3", "--lam", "0.5", "--prompt-length", "12",
         "--longest", "100", "--phi-steps", "2", "--batch-size", "8")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """data/, the first rows of both files, and model/, the bundled model."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    for name in people.SHA256:
        rows = (adult.TINY / name).read_text().splitlines()[:2000]
        (home / "data" / name).write_text("\n".join(rows) + "\n")
    (home / "model").mkdir()
    for path in adult.TINY.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, home / "model")
    return home


@pytest.fixture()
def here(home, tmp_path, monkeypatch):
    """A current folder of one's own, with data/ and model/ in it."""
    for name in ("data", "model"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture()
def own_copy(monkeypatch):
    """A function that makes data/ or model/ here one that may be changed."""
    monkeypatch.setattr(tasks, "read_once", tasks.read_once.__wrapped__)
    monkeypatch.setattr(load, "loaded", {})

    def copy(name):
        original = pathlib.Path(name).resolve()
        pathlib.Path(name).unlink()
        shutil.copytree(original, name)
    return copy


def run_table_3(home):
    """Table 3 by the real command, two jobs, on a terminal that knows ASCII only."""
    return subprocess.run([sys.executable, HERE / "train.py", *SMALL, "--jobs", "2"],
                          cwd=home, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                          capture_output=True, text=True)


def run_lessons(home):
    """Each as a reader runs it, without a cache and without a network."""
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home),
                   "PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8",
                   "https_proxy": "http://127.0.0.1:1"}            # nobody listens
    done = {}
    for name in LESSONS:
        done[name] = subprocess.run([sys.executable, "-m", name], cwd=home,
                                    env=environment, capture_output=True, text=True)
    return done


@pytest.fixture(scope="session", autouse=True)
def beside(request, home):
    """Begin what some test of this session will ask for -> {fixture: its future}."""
    wanted = set()
    for item in request.session.items:
        wanted.update(item.fixturenames)
    with ThreadPoolExecutor(1) as pool:
        begun = {}
        for name, work in {"full": run_table_3, "lessons": run_lessons}.items():
            if name in wanted:
                begun[name] = pool.submit(work, home)
        yield begun


@pytest.fixture(scope="session")
def full(beside, home):
    """-> the folder of Table 3's run, what it printed, what it complained of."""
    done = beside["full"].result()
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "runs/default", done.stdout, done.stderr


@pytest.fixture(scope="session")
def lessons(beside):
    return beside["lessons"].result()
