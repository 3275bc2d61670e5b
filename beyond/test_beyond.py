"""The command, run folders, kills, wrong input, and the fast model: offline, CPU.

Most tests call train.main in this process; what only a process of its own can show
(signals, pipes, kills, several processes) is shown in one.
"""
import argparse
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import adult
import faircon
import lora
import train
from adult import InputError
from beyond import ablation, attacks, cost, fast, options, report, runs
from beyond.conftest import LESSONS, SMALL

HERE = adult.TINY.parent
QUICK = [*SMALL, "--quick", "--model", "model", "--jobs", "1", "--name", "default"]
ALL = ["always-0", "not-trained", "fine-tuned", "cda", "paper", "faircon"]
TRAINED = ALL[2:]


# ------------------------------------------------------------------ what tests share

@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What the command changes in its process is put back."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture()
def here(home, tmp_path, monkeypatch):
    """A current folder of one's own, with data/ and model/ in it."""
    for name in ("data", "model"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_copy(name):
    """Make data/ or model/ of the current folder one that may be changed."""
    original = pathlib.Path(name).resolve()
    pathlib.Path(name).unlink()
    shutil.copytree(original, name)
    train.load_data_once.cache_clear()
    train.load_once.cache_clear()


@pytest.fixture()
def forget():
    """Nothing that a changed data/ or model/ left in memory reaches the next test."""
    yield
    train.load_data_once.cache_clear()
    train.load_once.cache_clear()


def in_folder(folder, work):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return work()
    finally:
        os.chdir(before)


def results_of(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


@pytest.fixture(scope="session")
def quick(home):
    """--quick, never interrupted -> its results."""
    in_folder(home, lambda: train.main([*QUICK, "--name", "quick"]))
    return results_of(home / "runs/quick")


@pytest.fixture(scope="session")
def interrupted(home):
    """--quick, stopped by Ctrl-C in faircon's third round -> its folder."""
    play = faircon.Game.round

    def stop(game):
        if game.done == 2:
            raise KeyboardInterrupt
        return play(game)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faircon.Game, "round", stop)
        with pytest.raises(SystemExit, match="--resume goes on"):
            in_folder(home, lambda: train.main([*QUICK, "--name", "cut"]))
    assert (home / "runs/cut/faircon-0/state.pt").exists()
    return home / "runs/cut"


def refused(words, match):
    """The command exits with one sentence that says `match`."""
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    message = str(stopped.value)
    assert message.startswith("train.py: ") and "\n" not in message, message
    assert re.search(match, message), message


# ------------------------------------------------------------------ the fast model

def loaded(r=4):
    """The fast and the plain model, with an adapter that does something."""
    model, _ = fast.load_model(adult.TINY)
    generator = torch.Generator().manual_seed(0)
    for layer in lora.inject(model.model, r):
        torch.nn.init.normal_(layer.B, std=.05, generator=generator)
    return model, faircon.LanguageModel(model.model, model.tokenizer)


def people_of(n):
    """Some people; every third comes from a country with a longer name than Adult's."""
    rng = numpy.random.default_rng(0)
    people = adult.sample(train.load_data_once(str(adult.TINY)).test, n, 0., rng)
    for k in range(0, n, 3):
        values = [*people[k].values[:-1], "Saint Vincent and the Grenadines"]
        people[k] = people[k]._replace(values=tuple(values))
    return people


@pytest.mark.parametrize("length", [5, 300])
def test_fast_equals_plain_in_value_and_gradient(length):
    """A cached path with another gradient trains another model.

    300 tokens: GPT-Neo's local layers look back 256, beyond the prompt's end.
    """
    model, plain = loaded()
    people = people_of(8)
    questions = model.questions(people)
    assert len({len(x_m) for x_m, x_f in questions}) > 1, "unequal: some are padded"
    ids = torch.arange(length) % len(model.usable)
    results = []
    for f in (model, plain):
        g = torch.nn.functional.one_hot(torch.tensor(model.usable)[ids], len(f.embed))
        g = g.float().requires_grad_()
        logits = f(f.prefix(g), questions)
        loss = (faircon.distance(logits, f.answers)
                + faircon.task(logits, people, f.answers))
        gradients = torch.autograd.grad(loss, [g, *lora.theta(f.model)])
        results.append((logits, gradients))
    (ours, mine), (theirs, reference) = results
    assert torch.allclose(ours, theirs, atol=1e-4), "the same function"
    for a, b in zip(mine, reference):
        assert b.abs().max() > 0
        apart = (a - b).abs().max() / b.abs().max()
        assert apart <= 5e-5, f"{apart:.1e} of the gradient; rounding alone is 1e-5"


def test_fast_equals_plain_without_a_prompt_and_behind_shots(monkeypatch):
    model, plain = loaded()
    data, rng = train.load_data_once(str(adult.TINY)), numpy.random.default_rng(0)
    shots = adult.few_shot(data.train, 16, .5, rng)
    questions = model.questions(people_of(8))
    for context in (adult.INSTRUCTION, shots):
        whole = model.predict(questions, context=context)
        theirs = plain.predict(questions, context=context)
        assert abs(whole - theirs).max() < 1e-5, "people in their order, same numbers"
        some = model.predict(questions, context=context, batch=3)
        assert abs(whole - some).max() < 1e-5, "batches change nothing"
    monkeypatch.setattr(fast, "CACHE_NUMBERS", 1)
    one = model.predict(questions[:2], context=shots)
    assert abs(one - whole[:2]).max() < 1e-5, "little memory: one at a time"


def test_fast_writes_what_the_plain_model_writes():
    model, plain = loaded()
    texts = []
    for f in (model, plain):
        f.mask[model.usable[::2]] = -torch.inf
        texts.append(f.write(2, 20, torch.Generator().manual_seed(3)))
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    written = set(texts[0][0] + texts[0][1])
    assert written <= set(model.usable[1::2]), "what is masked is never written"


def test_a_prefix_read_once_answers_twice_the_same():
    """A forward pass alters its cache: the cache that is kept must be a copy."""
    model, _ = loaded()
    prefix, rest = model.share(model.prefix(), model.questions(people_of(4)))
    cache = model.read(prefix)
    with torch.no_grad():
        first, second = model.answer(cache, rest), model.answer(cache, rest)
    assert torch.equal(first, second)


def test_check_refuses_a_model_that_is_read_wrongly(monkeypatch):
    model, _ = fast.load_model(adult.TINY)
    fast.check(model)
    right = fast.FastModel.logits
    monkeypatch.setattr(fast.FastModel, "logits", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(InputError, match="differs from one forward pass"):
        fast.check(model)
    monkeypatch.setattr(type(model), "read", lambda self, x: x.nothing)
    with pytest.raises(InputError, match="cannot be read through"):
        fast.check(model)


def test_dtype_and_device_are_chosen_with_a_reason():
    assert fast.choose_dtype("bfloat16", "cpu", True) == ("bfloat16", "as asked")
    assert fast.choose_dtype("auto", "cpu", True)[0] == "float32"
    with pytest.raises(InputError, match="not available"):
        fast.choose_device("cuda:99")


# ------------------------------------------------------------------ Table 3, whole

def test_table_3_holds_every_model_and_its_numbers(full):
    folder, out, err = full
    results = results_of(folder)
    assert {"config", "versions", "data", "model", "rows", "summary"} <= set(results)
    assert [row["key"] for row in results["rows"]] == ALL, "in the table's order"
    for row in results["rows"]:
        assert {"seed", "flip", "acc_bpc", "shots", "positives"} <= set(row)
        for name, (low, high) in row["intervals"].items():
            assert low <= row[name] <= high or name in ("dpd", "deo"), name
        assert results["summary"][row["key"]]["gap"] == [row["gap"], 0.]
    assert results["rows"][0]["acc"] == .5 and results["rows"][0]["gap"] == 0
    assert err == "", "no warning, no note"


def test_acc_new_leaves_out_what_stands_in_adult_data(full, home, monkeypatch):
    monkeypatch.chdir(home)
    model, row, results = runs.load_run("runs/default")
    data = runs.load_data(results)
    config = results["config"]
    people = adult.split(data, 24, .5, config["test_rows"], 0)
    seen = {adult.text(p) for p in data.train}
    new = [p for p in people.test if adult.text(p) not in seen]
    assert 0 < len(new), "the synthetic twin has questions of its own"
    assert row["acc_new"] == faircon.measure(model, new)["acc"]


def test_table_3_is_printed_with_the_papers_figures_in_their_rows(full):
    _, out, _ = full
    lines = out.splitlines()
    by_title = {line[:24].strip(): line for line in lines}
    assert by_title["fine-tuned"].endswith(" 63.0 .183 .142")
    assert by_title["FairCon, as the paper"].endswith(" 51.0 .136 .081")
    for title in ('always "0"', "not trained", "both twins (CDA)", "FairCon"):
        assert re.search(r" \.\d{3}$", by_title[title]), "no figure of the paper's here"
    assert "note:" not in out
    assert not re.search(r"[^\x20-\x7e\n]", out), "no control character, no bar"


def test_a_line_is_one_write(monkeypatch):
    """Else two jobs' lines run into each other where stdout is not buffered."""
    written = []
    stdout = types.SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    runs.say("a line")
    monkeypatch.undo()
    assert [text for text in written if text] == ["a line\n"]


def test_no_line_is_wider_than_88_columns(full):
    wide = [line for line in full[1].splitlines() if len(line) > 88]
    assert not wide, "half a laptop screen stands beside the paper"


def test_everything_trained_is_saved_and_nothing_half_written(full):
    folder, _, _ = full
    for key in TRAINED:
        assert (folder / f"{key}-0/adapter/adapter_model.safetensors").exists()
    prompts = json.loads((folder / "faircon-0/prompts.json").read_text())
    assert len(prompts) == faircon.Options.adversaries
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("state.pt"))


def test_swas_average_is_measured_and_saved(full, home):
    """The third round's weights are averaged: the table must show that average."""
    folder, _, _ = full
    rows = {row["key"]: row for row in results_of(folder)["rows"]}
    for key in TRAINED:
        row = rows[key]
        assert row["swa_weights"] > 0
        assert row["gap"] != row["without_swa"]["gap"], "the last weights are another"
        model, _, _ = runs.load_run(folder, key)
        data = adult.load(home / "data")
        people = adult.split(data, 24, .5, 24, 0)
        again = faircon.measure(model, people.test)
        for name, value in again.items():
            assert row[name] == value, "the adapter saved is the model measured"


def test_each_model_is_trained_with_its_own_options(full):
    rows = {row["key"]: row for row in results_of(full[0])["rows"]}
    paper = {**rows["paper"]["options"], "rank": rows["paper"]["rank"],
             "alpha": rows["paper"]["alpha"]}
    for name, value in train.PAPER.items():
        assert paper[name] == value, "as in the paper, whatever the user asks of ours"
    ours = rows["faircon"]["options"]
    assert (ours["lam"], ours["prompt_length"], ours["phi_steps"]) == (1., 12, 2)
    for key in ("fine-tuned", "cda"):
        options = rows[key]["options"]
        assert (options["lam"], options["adversaries"]) == (0., 0)
        assert not options["labelled"], "the task alone"
    whole = rows["fine-tuned"]["options"]["batch_size"]
    assert rows["cda"]["options"]["batch_size"] == 2 * whole, "as many steps"
    assert len(rows["cda"]["history"]) == 3


class Seen(Exception):
    pass


@pytest.mark.parametrize("key", TRAINED)
def test_train_rows_are_played_with_and_cda_has_both_twins(key, here, monkeypatch):
    """No test row is trained on; CDA has each row once as a man, once as a woman."""
    def game(model, people, options, seed, sign=1):
        raise Seen(people, lora.theta(model.model)[0], seed)
    monkeypatch.setattr(faircon, "Game", game)
    config = {"prompt_only": False, "paper": False, "model": "tiny", "dtype": "auto",
              "device": "auto", "game": {}, "data": "data", "rows": 24, "bpc": .5,
              "test_rows": 24}
    with pytest.raises(Seen) as seen:
        train.train_model(config, key, 5, "runs/x")
    people, A, seed = seen.value.args
    model, _ = train.load_once("tiny", "auto", "auto")
    lora.inject(model.model, len(A), seed=5)
    assert seed == 5 and torch.equal(lora.theta(model.model)[0], A), "one seed for all"
    rows = adult.split(train.load_data_once("data"), 24, .5, 24, 5)
    if key == "cda":
        assert people[24:] == [adult.flipped(p) for p in people[:24]]
    assert people[:24] == rows.train and len(people) == (48 if key == "cda" else 24)
    assert not {id(p) for p in people} & {id(p) for p in rows.test + rows.validation}


def test_a_finished_run_gives_its_numbers_again(full, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["runs", "runs/default"])
    runs.main()
    assert "every saved number of every model came out again" in capsys.readouterr().out
    shutil.copytree("runs/default", "elsewhere")
    results = results_of("elsewhere")
    results["config"]["device"] = "cuda"
    results["rows"][-1]["gap"] += 1e-9
    (home / "elsewhere/results.json").write_text(json.dumps(results))
    runs.load_run("elsewhere")                 # made on a GPU, read where there is none
    monkeypatch.setattr(sys, "argv", ["runs", "elsewhere", "--data", "data"])
    with pytest.raises(InputError, match="1 models do not give the saved numbers"):
        runs.main()
    shutil.rmtree("elsewhere")


def test_one_job_and_two_give_the_same_numbers(full, here):
    """What two workers made is made again by one process, in other company.

    paper's folder, the longest to train, is kept.
    """
    shutil.copytree(full[0], "runs/default")
    for path in pathlib.Path("runs/default").iterdir():
        if path.is_dir() and path.name != "paper-0":
            shutil.rmtree(path)
    (here / "runs/default/results.json").unlink()
    train.main([*SMALL, "--jobs", "1", "--resume"])
    assert results_of("runs/default") == results_of(full[0])


# ------------------------------------------------------------------ other commands

def table_lines(words, capsys):
    train.main(words)
    out = capsys.readouterr().out
    for line in out.splitlines():
        assert len(line) <= 88, line
    return {re.split("   +", line)[0]: line for line in out.splitlines()}


@pytest.mark.parametrize("table, rows", [
    ("1", {"b = 0": "75.5 .0049 .0083", "b = 0.5": "70.5 .0411 .0429",
           "b = 1": "68.5 .094 .102", "b = -1": None,
           "natural, natural test rows": "85.0 .008 .018",
           "natural, balanced test rows": None}),
    ("2", {"b = 0": "75.5 .0049 .0083", "b = 0.5": "70.5 .0411 .0429",
           "b = 0, counterbalanced": "81.5 .0028 .0082",
           "b = 0.5, counterbalanced": None})])
def test_tables_1_and_2_have_the_papers_figures(table, rows, here, capsys):
    words = ["--data", "data", "--table", table, "--test-rows", "40"]
    lines = table_lines(words, capsys)
    for title, printed in rows.items():
        end = f" {printed}" if printed else ""
        assert re.search(r"\.\d{3}" + f"( *{end})?$", lines[title]), lines[title]
        assert lines[title].endswith(end)
    keys = [row["key"] for row in results_of(f"runs/table{table}")["rows"]]
    assert [title for title in lines if title in keys] == keys, "in the table's order"


def test_equation_4_chooses_its_prompt_on_validation_rows(here, capsys, monkeypatch):
    seen, measure = [], faircon.measure

    def watch(model, people, *more):
        seen.append([id(p) for p in people])
        return measure(model, people, *more)
    monkeypatch.setattr(faircon, "measure", watch)
    words = [*SMALL, "--prompt-only", "--rounds", "1", "--jobs", "1"]
    lines = table_lines(words, capsys)
    rows = {row["key"]: row for row in results_of("runs/prompt_only")["rows"]}
    assert list(rows) == list(train.EQUATION_4) and "fair prompt, Eq. (4)" in lines
    people = adult.split(train.load_data_once("data"), 24, .5, 24, 0)
    validation = [id(p) for p in people.validation]
    assert seen.count(validation) == 15, "3 adversaries, 5 samples of each"
    test = {id(p) for p in people.test}
    assert seen.index(validation) == 0 and not test & set(validation)
    assert rows["fair-prompt"]["prompt"] and not rows["fair-prompt"]["trained"]


def test_paper_prints_its_options_and_trains_with_them(here, capsys, monkeypatch):
    for name, value in {"rounds": 2, "phi_steps": 1}.items():      # a tenth of the time
        monkeypatch.setitem(train.PAPER, name, value)
    words = ["--data", "data", "--rows", "24", "--test-rows", "24", "--shots", "4",
             "--paper", "--jobs", "1"]
    train.main(words)
    out = capsys.readouterr().out
    assert re.search(r'prompt.length\W+10\b', out) and re.search(r'rank\W+32\b', out)
    assert re.search(r'renew\W+False', out) and "r = 32" in out
    keys = [row["key"] for row in results_of("runs/paper")["rows"]]
    assert keys == ["always-0", "not-trained", "fine-tuned", "paper"]
    assert all(len(line) <= 88 for line in out.splitlines())


def test_lam_0_bf16_dropout_and_a_relative_folder(here):
    """lam 0: the task alone, behind the same prompts."""
    words = [*QUICK, "--lam", "0", "--dtype", "bfloat16", "--set", "dropout=.1",
             "--rounds", "3"]
    train.main(words)
    results = results_of("runs/default")
    assert [row["key"] for row in results["rows"]] == [
        "always-0", "not-trained", "fine-tuned", "faircon"]
    assert results["rows"][2]["options"]["dropout"] == .1
    assert results["rows"][3]["options"]["lam"] == 0
    assert "bfloat16" in results["model"]["computed in"]
    model, row, _ = runs.load_run("runs/default", "fine-tuned")
    data = runs.load_data(results)
    people = adult.split(data, 24, .5, 24, 0)
    assert faircon.measure(model, people.test)["gap"] == row["gap"]


# ------------------------------------------------------------------ resume

def test_quick_holds_what_it_says(quick):
    assert [row["key"] for row in quick["rows"]] == [
        "always-0", "not-trained", "fine-tuned", "faircon"]


def test_resume_ends_as_if_never_interrupted(interrupted, quick, here, monkeypatch):
    """And plays no finished round twice."""
    shutil.copytree(interrupted, "runs/cut")
    played, play = [], faircon.Game.round
    monkeypatch.setattr(
        faircon.Game, "round", lambda game: played.append(game.done) or play(game))
    train.main([*QUICK, "--name", "cut", "--resume"])
    assert results_of("runs/cut") == quick
    assert played == [2, 0, 1, 2], "faircon's third round, then fine-tuned's three"


def test_stopped_between_the_last_round_and_its_row(quick, here, monkeypatch):
    """The state of the last round holds all that the row says, the prompt too."""
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save", stop)
        with pytest.raises(SystemExit):
            train.main(QUICK)
    played, play = [], faircon.Game.round
    monkeypatch.setattr(
        faircon.Game, "round", lambda game: played.append(game.done) or play(game))
    train.main([*QUICK, "--resume"])
    assert played == [0, 1, 2], "fine-tuned's rounds; faircon's were all done"
    ours, theirs = results_of("runs/default")["rows"][-1], quick["rows"][-1]
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
    assert results_of("runs/default") == quick


@pytest.mark.parametrize("what, words", [
    ("data adult.data", []), ("model sha256", []), ("config game lam", ["--lam", "2"]),
    ("config seed", ["--seed", "1"]), ("config game tau", ["--set", "tau=2"]),
    ("config table", ["--table", "1"]), ("versions numpy", [])])
def test_resume_after_a_change_is_refused_by_name(what, words, interrupted, here,
                                                  forget, monkeypatch):
    shutil.copytree(interrupted, "runs/cut")
    state = pathlib.Path("runs/cut/faircon-0/state.pt")
    before = state.read_bytes()
    if what == "data adult.data":
        own_copy("data")
        text = pathlib.Path("data/adult.data").read_text()
        pathlib.Path("data/adult.data").write_text(text.replace("<=50K", ">50K", 1))
    elif what == "model sha256":
        own_copy("model")
        tensors = load_file("model/model.safetensors")
        first = sorted(tensors)[0]
        tensors[first].view(-1)[0] += 1e-3
        save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    elif what == "versions numpy":
        monkeypatch.setattr(numpy, "__version__", "1.0")
    refused([*QUICK, "--name", "cut", "--resume", *words], f"another {what} ")
    assert state.read_bytes() == before, "the state is left alone"
    assert not pathlib.Path("runs/cut/results.json").exists()


def test_nothing_is_lost_by_a_new_run_of_an_old_name(interrupted, full, here):
    shutil.copytree(interrupted, "runs/cut")
    before = sorted(pathlib.Path("runs/cut").rglob("*"))
    for words in (QUICK, ["--data", "data", "--table", "1", "--test-rows", "8"]):
        refused([*words, "--name", "cut"], "interrupted run")
    assert sorted(pathlib.Path("runs/cut").rglob("*")) == before
    shutil.copytree(full[0], "runs/old")
    (here / "runs/old/attacks.json").write_text("{}")
    (here / "runs/old/notes.txt").write_text("mine")
    table_2 = ["--data", "data", "--table", "2", "--test-rows", "8", "--name", "old"]
    train.main(table_2)
    left = {path.name for path in pathlib.Path("runs/old").iterdir()}
    assert left == {"lock", "run.json", "results.json", "notes.txt", "table2-0"}, \
        "a finished run is replaced, all of it, and nothing else"
    assert results_of("runs/old")["config"]["table"] == 2
    train.main([*table_2, "--resume"])                    # finished: only prints again


def test_two_runs_of_one_name(here):
    with runs.open_run("one", {}, False):
        refused([*QUICK, "--name", "one"], "another process is writing")
    with runs.open_run("one", {}, False):
        pass


def test_leftovers_of_a_killed_process_are_cleared(here):
    for name in ("results.json.7.part", "faircon-0/rows.json.7.part"):
        runs.write(here / "runs/one" / name, b"half")
    with runs.open_run("one", {}, False):
        assert not list(here.rglob("*.part"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    runs.write_json(tmp_path / "a.json", {"old": 1})

    def full_disk(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        runs.write_json(tmp_path / "a.json", {"new": 2})
    assert runs.read_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_state_is_data_and_its_faults_are_told_apart(here, monkeypatch):
    assert runs.load_state(here) is None
    torch.save(Planted(), here / "state.pt")
    with pytest.raises(InputError, match="damaged"):
        runs.load_state(here)
    assert not (here / "planted").exists(), "opening a state must run no code"
    runs.save_state(here, {"game": {"theta": [torch.ones(3)]}})
    whole = (here / "state.pt").read_bytes()
    for content in (b"", b"no", whole[:-40]):
        (here / "state.pt").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            runs.load_state(here)

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(torch, "load", locked)
    with pytest.raises(InputError, match="cannot be read.*Permission denied"):
        runs.load_state(here)


# ------------------------------------------------------------------ kills, signals

FORK = multiprocessing.get_context("forkserver")


def child(folder, words, environment=()):
    """The command in a forked process of its own, silent."""
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout = sys.stderr = open("output", "a")
    train.main(words)


def begin(folder, words, environment=()):
    """A process that has imported everything begins in milliseconds."""
    FORK.set_forkserver_preload(["torch", "transformers", "beyond.test_beyond"])
    process = FORK.Process(target=child, args=(str(folder), words, environment))
    process.start()
    return process


def progress(folder):
    """Finished models and rounds in a run's folder."""
    rounds = 0
    for path in folder.glob("*/state.pt"):
        rounds += runs.load_state(path.parent)["game"]["done"]
    return len(list(folder.glob("*/rows.json"))), rounds


def test_killed_at_ten_moments_ends_as_if_never_killed(here, quick):
    """SIGKILL: no half-written file, no lost round, nothing twice, the same JSON.

    The first run is let go on until a round is done, then each has some time more.
    """
    begin(here, ["--help"]).join()                         # the imports, once for all
    rng, kills = numpy.random.default_rng(0), 0
    folder, best, finished = here / "runs/default", (0, 0), False
    began, seconds = time.time(), 60.
    while kills < 10 or not finished:
        if finished:                              # before the last blow: begin another
            shutil.rmtree(folder)
            best, finished = (0, 0), False
        resume = ["--resume"] if best > (0, 0) else []
        process = begin(here, QUICK + resume)
        if kills == 0:
            while not list(folder.glob("*/state.pt")) and process.exitcode is None:
                time.sleep(.01)
            seconds = time.time() - began
        else:
            process.join(seconds * rng.uniform(.1, .6) if kills < 10 else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, (here / "output").read_text()[-500:]
            finished = True
        now = progress(folder) if folder.exists() else (0, 0)
        assert now >= best, "a finished round was lost"
        best = now
    assert results_of(folder) == quick
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("state.pt"))


def free_port():
    with socket.socket() as some:
        some.bind(("localhost", 0))
        return some.getsockname()[1]


def test_two_processes_equal_one(here):
    """What torchrun sets in the environment; each takes half of every batch."""
    words = [*SMALL, "--quick", "--rows", "20", "--bpc", "0.6", "--test-rows", "20",
             "--rounds", "3"]
    train.main([*words, "--name", "one", "--jobs", "1"])
    port, processes = str(free_port()), []
    for rank in "01":
        processes.append(begin(here, [*words, "--name", "two"], {
            "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank,
            "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}))
    for process in processes:
        process.join()
        assert process.exitcode == 0, (here / "output").read_text()[-500:]
    for key in ("fine-tuned", "faircon"):
        file = f"{key}-0/adapter/adapter_model.safetensors"
        one, two = load_file(f"runs/one/{file}"), load_file(f"runs/two/{file}")
        for name in one:
            apart = (one[name] - two[name]).abs().max()
            assert apart < 1e-4, "the whole batch's mean; rounding alone is 2e-5"
            assert one[name].abs().max() > 0
    assert len(results_of("runs/two")["rows"]) == 4


# The command's own signal handling and workers; the work is to sleep.
SLEEP = """
import os, sys, time
sys.path.insert(0, {here!r})
import train
from beyond.runs import run_jobs
train.run = lambda args: run_jobs(time.sleep, [(30,), (30,)], 2)
print(os.getpid(), flush=True)
train.main([])
"""


def children(pid):
    """The processes that `pid` began, and those that they began."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True,
                            text=True).stdout
    found = []
    for line in listed.splitlines():
        own, parent, command = line.split(None, 2)
        if int(parent) == pid:
            found.append((int(own), command))
    return found


def asleep(nohup):
    """SLEEP with both workers at work -> the process, its workers."""
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_IGN if nohup else signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEP.format(here=str(HERE))], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=prepare)
    process.stdout.readline()
    workers = []
    while len(workers) < 2 and process.poll() is None:
        time.sleep(.1)
        workers = [pid for pid, command in children(process.pid)
                   if "spawn_main" in command]
    return process, workers


def gone(pids, seconds=10):
    """Do all these processes end in time?"""
    end = time.time() + seconds
    while time.time() < end:
        alive = [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]
        if not alive:
            return True
        time.sleep(.1)
    return False


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="Linux")


@needs_proc
@pytest.mark.parametrize("how", ["ctrl-c", "terminated", "terminated behind nohup",
                                 "a worker killed", "killed"])
def test_however_it_ends_no_worker_stays(how):
    """Ctrl-C goes to the whole group, at any moment; others to the parent alone."""
    process, workers = asleep("nohup" in how)
    if how == "ctrl-c":
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        assert not gone(workers, .5), "workers leave Ctrl-C to their parent"
        os.killpg(process.pid, signal.SIGINT)
    elif how == "a worker killed":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert gone(workers), "a worker stays and keeps a core busy"
    said = "ended from outside" if "worker" in how else "interrupted"
    if how != "killed":
        assert process.returncode == 1 and "train.py: " in err
        assert said in err and "--resume" in err and "Traceback" not in err, err


def test_workers_speak_as_the_command_does(monkeypatch):
    """A worker's warning is a note; that b_Pc is not exact has been said already."""
    code = ("import warnings; from beyond.runs import run_jobs\n"
            "run_jobs(warnings.warn, [('b_Pc = .3 is not exact with 4 people',),"
            " ('nobody has s=0',)], 2)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                          text=True)
    assert done.stderr == "note: nobody has s=0\n"


def test_a_reader_that_leaves_gets_no_traceback(full, here):
    """train.py | head -1"""
    shutil.copytree(full[0], "runs/default")
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *SMALL, "--jobs", "1", "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("data ")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() != 0 and err == "", err


# ------------------------------------------------------------------ wrong input

def broken_data(kind):
    """data/ with a fault, as it comes from a half download or an editor."""
    good = (adult.TINY / "adult.data").read_text().splitlines()[:40]
    text = {
        "empty": "", "truncated": "\n".join(good)[:-30],
        "html": "<html><body>404, not found</body></html>\n",
        "columns": "\n".join(row.rsplit(",", 1)[0] for row in good),
        "header": "age,workclass\n" + "\n".join(good),
        "label": "\n".join(good).replace("<=50K", "poor"),
        "sex": "\n".join(good).replace(" Male", " M"),
        "order": "\n".join(", ".join(row.split(", ")[::-1]) for row in good)}
    folder = pathlib.Path("faulty")
    folder.mkdir()
    for name in adult.SHA256:
        (folder / name).write_text(text.get(kind, "\n".join(good)))
    if kind == "encoding":
        (folder / "adult.data").write_bytes("39, Größe".encode("utf-16"))
    if kind in ("one missing", "a folder"):
        (folder / "adult.data").unlink()
    if kind == "a folder":
        (folder / "adult.data").mkdir()
    return "--data faulty"


def broken_model(kind):
    """model/ with a fault."""
    own_copy("model")
    model = pathlib.Path("model")
    weights, tokenizer = model / "model.safetensors", model / "tokenizer.json"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "other weights":
        save_file({"nothing": torch.zeros(1)}, weights, metadata={"format": "pt"})
    elif kind == "no tokenizer":
        tokenizer.unlink()
    elif kind == "broken config":
        (model / "config.json").write_text("{")
    elif kind == "no config":
        (model / "config.json").unlink()
    elif kind == "answers of several tokens":
        text = json.loads(tokenizer.read_text())
        vocabulary = text["model"]["vocab"]
        text["model"]["vocab"] = {k: v for k, v in vocabulary.items() if len(k) == 1}
        text["model"]["merges"] = []
        tokenizer.write_text(json.dumps(text))
    elif kind == "NaN weights":
        tensors = load_file(weights)
        tensors[sorted(tensors)[0]][:] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    return "--model model"


def broken_folder(kind):
    """runs/ with a fault."""
    if kind == "a file":
        pathlib.Path("runs").write_text("")
        return ""
    runs.write("runs/default/run.json", "{}" if kind == "other" else "no JSON")
    return "--resume"


# One wrong option each -> what the sentence says.
OPTIONS = {
    "--bpc 1.5": "bpc", "--bpc -1.01": "bpc", "--bpc nan": "bpc", "--lam -1": "lam",
    "--lam nan": "lam", "--lam inf": "lam", "--rank 0": "rank", "--rank -3": "rank",
    "--rows 0": "rows", "--rows 7": "even", "--rows 100000": "fewer rows",
    "--rows x": "invalid int", "--rows 1e3": "invalid int",
    "--test-rows 2": "test-rows",
    "--test-rows 90000": "fewer rows", "--rounds 0": "rounds", "--seeds 0": "seeds",
    "--seed -1": "seed", "--seed 99999999999999999999": "seed",
    "--prompt-length 0": "prompt-length", "--prompt-length 5000": "context",
    "--table 1 --shots 60": "context", "--table 4": "invalid choice",
    "--shots 1": "shots", "--jobs 0": "jobs", "--name ../x": "name",
    "--name ..": "name", "--name a/b": "name", "--name /": "name",
    "--device cuda:9": "device", "--device tpu": "device", "--dtype int8": "invalid",
    "--resume": "no interrupted run", "--bcp 0.5": "did you mean --bpc",
    "--lamda 1": "did you mean --lam", "--quik": "did you mean --quick",
    "--entirely-else": "see --help", "surplus": "unknown",
    "--set tau": "FIELD=VALUE", "--set tua=1": "fields: .*tau", "--set tau=0": "lies",
    "--set tau=nan": "lies", "--set tau=-1": "lies", "--set batch_size=0": "lies",
    "--set lr=0": "lies", "--set lr=nan": "lies", "--set swa=2": "lies",
    "--set dropout=1": "lies", "--set renew=here": "renew",
    "--set labelled=maybe": "labelled", "--set phi_lr=": "phi_lr", "--set": "expected",
    "--attack none": "beyond.attacks", "--eval runs/x": "beyond.runs",
    "--cost": "beyond.cost", "--plot x.png": "beyond.report", "--ablation":
    "beyond.ablation", "--tau 1": "--set tau=VALUE", "--phi-lr 1": "--set phi_lr=VALUE",
    "--batch-size=4": "--set batch_size=VALUE", "--data nowhere": "does not exist",
    "--data data/adult.data": "is a file", "--model nowhere": "not a model directory",
    "--model ./mo": "not a model directory", "--model data/mo": "not a model directory",
    "--set lr=1e9": "finite|NaN", "--prompt-only --set adversaries=0": "adversar",
    "--quick --paper": "exclude", "--prompt-only --quick": "exclude",
    "--table 1 --paper": "of Table 3", "--table 2 --prompt-only": "of Table 3"}
FAULTS = {
    (broken_data, "empty"): "no rows", (broken_data, "truncated"): "columns",
    (broken_data, "html"): "columns", (broken_data, "columns"): "columns",
    (broken_data, "header"): "header", (broken_data, "label"): "label",
    (broken_data, "sex"): "sex", (broken_data, "few"): "needed",
    (broken_data, "encoding"): "UTF-8", (broken_data, "one missing"): "does not exist",
    (broken_data, "a folder"): "cannot be read", (broken_data, "order"): "order",
    (broken_model, "no weights"): "loaded",
    (broken_model, "truncated weights"): "loaded",
    (broken_model, "no tokenizer"): "loaded|tokens",
    (broken_model, "broken config"): "loaded",
    (broken_model, "no config"): "config.json",
    (broken_model, "other weights"): "lacks",
    (broken_model, "answers of several tokens"): "tokens",
    (broken_model, "NaN weights"): "differs|NaN|finite",
    (broken_folder, "a file"): "written", (broken_folder, "other"): "another ",
    (broken_folder, "no JSON"): "not JSON"}


@pytest.mark.parametrize("case", [*OPTIONS, *FAULTS], ids=str)
def test_wrong_input_is_one_clear_sentence(case, here, forget, capfd):
    words, match = case, OPTIONS.get(case) or FAULTS[case]
    if isinstance(case, tuple):
        words = case[0](case[1])
    before = ["--data", "data", "--rows", "24", "--test-rows", "24", "--jobs", "1"]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
        warnings.simplefilter("ignore")
        train.main([*before, *words.split()])
    err = capfd.readouterr().err.strip()
    message = stopped.value.code if isinstance(stopped.value.code, str) else err
    assert stopped.value.code != 0 and message.startswith("train.py: "), message
    assert "\n" not in message and "Traceback" not in err, message
    assert re.search(match, message), message
    assert not list(here.rglob("*.part")) and not list(here.rglob("results.json"))


def test_shots_beyond_the_context_are_refused_before_training(here, monkeypatch):
    """Not after half an hour, when the first model is measured behind them."""
    monkeypatch.setattr(train, "train_model", lambda *_: pytest.fail("work was begun"))
    refused(["--data", "data", "--shots", "200", "--jobs", "1"], "context|shots")
    refused(["--data", "data", "--shots", "3", "--jobs", "1"], "even")


@pytest.mark.parametrize("kind, match", [
    ("no model", "holds no faircon"), ("no rows", "has no rows"),
    ("a row", "without key"), ("sha256", "no model sha256"),
    ("list", "holds no dict"), ("rank", "no adapter"), ("use_dora", "use_dora"),
    ("alpha_pattern", "alpha_pattern"), ("no adapter", "no adapter"),
    ("base", "not the model")])
def test_a_run_of_somebody_else_is_one_sentence(kind, match, full, here):
    shutil.copytree(full[0], "theirs")
    path = pathlib.Path("theirs/results.json")
    results = results_of("theirs")
    adapter = pathlib.Path("theirs/faircon-0/adapter")
    if kind == "no model":
        results["rows"] = results["rows"][:-1]
    elif kind == "no rows":
        results["rows"] = "none"
    elif kind == "a row":
        results["rows"][0] = 5
    elif kind == "sha256":
        del results["model"]["sha256"]
    elif kind == "list":
        results = []
    elif kind == "no adapter":
        shutil.rmtree(adapter)
    elif kind == "base":
        results["model"]["sha256"] = "0"
    path.write_text(json.dumps(results))
    if kind in ("rank", "use_dora", "alpha_pattern"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        wrong = {"rank": {"r": "many"}, "use_dora": {"use_dora": True},
                 "alpha_pattern": {"alpha_pattern": {"h.0": 3}}}
        config.update(wrong[kind])
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=match):
        runs.load_run("theirs")


def test_another_seed_or_other_data_is_refused(full, here, forget):
    with pytest.raises(InputError, match="no faircon of seed 5; it holds .*faircon"):
        runs.load_run(full[0], seed=5)
    own_copy("data")
    text = pathlib.Path("data/adult.test").read_text()
    pathlib.Path("data/adult.test").write_text(text.replace(" 40,", " 41,", 1))
    with pytest.raises(InputError, match="another sha256"):
        runs.load_data(results_of(full[0]))


# ------------------------------------------------------------------ help, width

def test_help_is_fast_and_explains_every_flag():
    began = time.time()
    done = subprocess.run([sys.executable, HERE / "train.py", "--help"],
                          capture_output=True, text=True)
    assert time.time() - began < 1.5 or os.getloadavg()[0] > os.cpu_count()
    assert "b_Pc" in done.stdout and "paper" in done.stdout
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'}"
    code = ("import sys, train; train.parser(); "
            f"assert not {heavy} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
    for action in train.parser()._actions:
        assert action.help, f"{action.option_strings} is not explained"


def test_the_spread_over_seeds_is_the_samples():
    """n - 1, or two seeds would look calmer than they are."""
    rows = [{"key": "a", "gap": 1.}, {"key": "a", "gap": 3.}, {"key": "b", "gap": 5.}]
    found = report.summary(rows)
    assert found["a"]["gap"] == [2., pytest.approx(2 ** .5)]
    assert found["b"]["gap"] == [5., 0.]


def test_what_has_no_effect_is_said():
    """Fields that a kind of run never reads."""
    for words, idle in {
            "--table 1 --lam 2 --set tau=2": ["lam", "tau"], "--lam 2": [],
            "--prompt-only --lam 2 --set tau=2 swa=.1": ["lam", "swa"]}.items():
        args = train.parser().parse_args(words.split())
        assert options.idle_fields(args) == idle


def test_a_number_loses_the_0_in_front_alone():
    cells = {.5: ".500", -.25: "-.250", 10.: "10.000", 20.05: "20.050", 1.: "1.000"}
    for x, text in cells.items():
        assert report.decimals(x) == text


def test_each_kind_of_run_has_a_folder_of_its_own():
    """The table of one must not take the place of another's."""
    names = {"": "default", "--table 1": "table1", "--table 2": "table2",
             "--prompt-only": "prompt_only", "--paper": "paper", "--quick": "quick"}
    for words, name in names.items():
        assert train.default_name(train.parser().parse_args(words.split())) == name


def test_what_is_set_by_a_user_exists():
    """--set and the flags name fields of faircon.Options, and all of them."""
    fields = set(faircon.Options.__dataclass_fields__) | {"rank", "alpha"}
    assert set(options.GAME) == fields
    assert set(train.PAPER) <= fields


# ------------------------------------------------------------------ cost, report

TINY = argparse.Namespace(model=str(adult.TINY), dtype="auto", device="auto", rank=4,
                          data=str(adult.TINY))


def test_cost_is_positive_and_below_the_hardware():
    steps = cost.cost_of_steps(TINY, 2, 5, seconds=.1)
    shots = cost.cost_of_shots(TINY, 4, seconds=.1)
    for name, value in {**steps, **shots}.items():
        assert value > 0, name
    assert steps["gb"] < 64


def test_every_number_and_every_picture(full, quick, here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "table", str(full[0])])
    report.main()
    out = capsys.readouterr().out
    for key in ALL:
        assert key[:13] in out
    assert "shots" in out and "flip" in out
    row = results_of(full[0])["rows"][-1]
    ours = out[out.index("\nfaircon\n"):]
    for name, value in (("gap", row["gap"]), ("alpha", 16.),
                        ("without SWA, gap", row["without_swa"]["gap"])):
        each = report.decimals(value, 4)
        assert re.search(rf"^    {name} .* {re.escape(each)}$", ours, re.M), name
    with pytest.raises(InputError, match="needs a run"):
        monkeypatch.setattr(sys, "argv", ["report", "rounds"])
        report.main()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = results_of(full[0])
    for k, row in enumerate(results["rows"]):
        row["budget"] = {"for men": [[1, 0, .1], [4, 0, .2 + k]]}
    values = {**results["summary"]["faircon"], "climb": [.1, .01], "gumbel": [.2, .01]}
    results["summary"] = {"b = -1": values, "b = 1": values, "lam-0": values,
                          "lam-1": values}
    for name in ("results", "attacks-full"):
        runs.write_json(f"made/{name}.json", results)
    for what in ("figure2", "table1", "rounds", "lam", "budget"):
        monkeypatch.setattr(sys, "argv", ["report", what, "made", "--out", "a.png"])
        report.main()
        assert pathlib.Path("a.png").read_bytes().startswith(b"\x89PNG"), what
        pathlib.Path("a.png").unlink()
    assert "4 prompts: gap .200\n" in capsys.readouterr().out, "the budget's curve"
    monkeypatch.setattr(sys, "argv", ["report", "figure2", "--out", "no/where.png"])
    with pytest.raises(InputError, match="cannot be drawn"):
        report.main()


def test_ablation_trains_the_game_that_a_variant_names(here, monkeypatch):
    """Each variant is its own game: its class, its options, its attributes."""
    monkeypatch.setattr(attacks, "short", lambda *_: {"climb": 0.}, raising=False)
    games, begin_game = [], faircon.Game.__init__

    def watch(game, *more):
        begin_game(game, *more)
        games.append(game)
    monkeypatch.setattr(faircon.Game, "__init__", watch)
    small = {"rounds": 1, "phi_steps": 1, "prompt_length": 8, "batch_size": 50}
    variants = {"written": ["texts", "Written", small],
                "no-sex": ["sex left out", "Game",
                           {**small, "adversaries": 0, "labelled": False}]}
    config = {"data": str(adult.TINY), "test_rows": 24, "variants": variants}
    rows = []
    for name in variants:
        rows += ablation.run_variant(config, name, 0, "runs/ablation")
    assert [type(game).__name__ for game in games] == ["Written", "Game"]
    assert rows[1]["gap"] == 0, "without sex in the text, twins are one text"
    assert rows[0]["gap"] > 0 and rows[0]["climb"] == 0.
    assert ablation.run_variant(config, "no-sex", 0, "runs/ablation") == rows[1:], \
        "what is done is not done again"
    for _, game, changed in ablation.VARIANTS.values():
        assert set(changed) <= set(faircon.Options.__dataclass_fields__)


def test_ablation_takes_as_many_test_rows_as_there_are(here, monkeypatch):
    jobs = []

    def no_work(work, asked, workers):
        jobs.extend(asked)
        return [[{"key": "no-sex", "seed": 0, "changed": "", "gap": 0.}]]
    monkeypatch.setattr(runs, "run_jobs", no_work)
    for more in ([], ["--test-rows", "24"]):
        words = ["ablation", "--data", str(adult.TINY), "--only", "no-sex", *more]
        monkeypatch.setattr(sys, "argv", words)
        ablation.main()
    assert len(jobs) == 2
    data = adult.load(adult.TINY)
    for (config, *_), rows in zip(jobs, (options.enough(data.test, .5, 1000), 24)):
        assert config["test_rows"] == rows
        adult.split(data, 200, .5, rows, 0)                      # no InputError


# ------------------------------------------------------------------ the lessons

@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_ends_in_an_exercise(lessons, name):
    done = lessons[name]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "now try" in done.stdout.strip().splitlines()[-1]
    assert "Warning" not in done.stderr, done.stderr
