"""The command, its tables' numbers, run folders, kills, wrong input: offline, on a CPU.

Most tests call train.main in this process; what only a process of its own can show
(signals, pipes, kills, several processes) is shown in one.
"""
import csv
import dataclasses
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save

import adult
import faircon
import lora
import metrics
import train
from adult import InputError
from beyond import (attacks, cost, finished, load, pictures, quantise, report, runs,
                    tasks)
from beyond.conftest import LESSONS, SMALL
from beyond.robust import FollowingGame, FreshGame, RobustGame, RobustOptions
from swa import SWA

HERE = adult.TINY.parent
USUAL = [key for key in train.MODELS if key not in train.EXTRA]
# Two models, with all that a resumed run must have kept: phi, SWA, dropout's draws.
TWO = [*SMALL, "--models", "fine-tuned", "faircon", "--dropout", "0.1", "--swa", "1",
       "--model", "model", "--jobs", "1"]


# ------------------------------------------------------------------ what tests share

@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What the command changes in its process is put back."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def command(folder, words):
    """train.main in a folder, one job -> its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*words, "--jobs", "1"])
    return results_of(folder / "runs" / words[-1])


def results_of(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


def is_a_sentence(message, program, match):
    """What a command that fails says."""
    assert str(message).startswith(f"{program}: ") and "\n" not in message, message
    assert re.search(match, message), message


def refused(words, match):
    """The command exits with one sentence that says `match`."""
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    is_a_sentence(stopped.value.code, "train.py", match)


# ------------------------------------------------------------------ watching a command

WATCHED = {
    train: ("train_model", "few_shot_rows", "prompt_rows"),
    adult: ("split", "few_shot", "sample"),
    faircon.LanguageModel: ("questions", "predict"),
    faircon.Game: ("__init__", "theta_step"), faircon.Adversary: ("step",),
    SWA: ("update", "apply"), lora: ("save",)}


def noted(function, calls):
    """The same function, which adds what it is given, and what it gives, to `calls`."""
    signature = inspect.signature(function)

    def call(*args, **more):
        given = signature.bind(*args, **more)
        given.apply_defaults()
        note = types.SimpleNamespace(name=function.__name__, given=given.arguments)
        if note.name == "predict":
            note.adapters = len(lora.adapters(note.given["self"].model))
        calls.append(note)
        note.gave = function(*args, **more)
        return note.gave
    return call


def watch(folder, words):
    """-> the command's results, calls before the first job, {(key, seed): its calls}"""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in WATCHED.items():
            for name in names:
                patch.setattr(owner, name, noted(getattr(owner, name), calls))
        results = command(folder, words)
    first, jobs = [], {}
    now = first
    for call in calls:
        if call.name in WATCHED[train]:
            now = jobs[call.given["key"], call.given["seed"]] = []
        now.append(call)
    return results, first, jobs


def named(calls, name):
    return [call for call in calls if call.name == name]


def asked(calls):
    """Predictions: of which people, given what prompt and context, and the answers."""
    found = []
    for call in named(calls, "predict"):
        for other in named(calls, "questions"):
            if other.gave is call.given["questions"]:
                people = other.given["people"]
        context = call.given["context"]
        context = adult.INSTRUCTION if context is None else context
        if len(people) > 1:                           # one: a model is tried at loading
            found.append((people, call.given["g"], context, call.gave))
    return found


def numbers(people, p):
    return metrics.evaluate(p, [x.y for x in people], [x.s for x in people])


@pytest.fixture(scope="session")
def table_3(home):
    """Table 3 in this process -> its results, calls before the jobs, each job's."""
    return watch(home, [*SMALL, "--models", "all", "--name", "watched"])


@pytest.fixture(params=train.MODELS)
def job(request, table_3):
    """Each model of Table 3 -> its key, its row, its calls, its people."""
    results, _, jobs = table_3
    row, = [row for row in results["rows"] if row["key"] == request.param]
    calls = jobs[request.param, 3]
    return request.param, row, calls, named(calls, "split")[0].gave


# ------------------------------------------------------------------ Table 3: numbers

def answers(key, calls, people, context=adult.INSTRUCTION):
    """P(y=1) of these people as a row means it: what was answered last."""
    if key == "always-0":
        return numpy.zeros((len(people), 2))
    found = []
    for other, g, given, p in asked(calls):
        if other == people and given == context and g is faircon.NO_PROMPT:
            found.append(p)
    assert found, f"{key}: the model was never asked about these people"
    if key == "averaged":
        return found[-1].mean(1, keepdims=True).repeat(2, 1)
    return found[-1]


def test_every_number_of_a_row_is_of_the_people_it_names(job, home):
    """Balanced test rows; others for ACC at b_Pc alone; validation rows for nothing.

    shots: people of adult.data at b_Pc = 1 and -1, the larger gap. follows: people who
    are all 1 against all 0, everybody asked as their own sex.
    """
    key, row, calls, people = job
    data, *given = named(calls, "split")[0].given.values()
    assert given == [16, .5, 16, 3], "rows, b_Pc, test rows, seed"
    p = answers(key, calls, people.test)
    wanted, gaps, means = numbers(people.test, p), {}, {}
    biased = answers(key, calls, people.test_bpc)
    wanted["acc_bpc"] = numbers(people.test_bpc, biased)["acc"]
    for call in named(calls, "few_shot"):
        if call.given["bpc"] is None:                                     # follows
            continue
        assert call.given["people"] is data.train, "shots are no test rows"
        assert call.given["shots"] == 4 and not call.given["counterbalance"]
        given_shots = answers(key, calls, people.test, call.gave)
        gaps[call.given["bpc"]] = numbers(people.test, given_shots)["gap"]
    known = {id(person) for person in data.train}
    for call in named(calls, "sample"):
        if call.given["bpc"] is None:
            assert {id(person) for person in call.gave} <= known and len(call.gave) == 4
            label, = {person.y for person in call.gave}
            shots = adult.INSTRUCTION + "".join(map(adult.shot, call.gave))
            own = answers(key, calls, people.test, shots)
            means[label] = numpy.mean([own[i, x.s] for i, x in enumerate(people.test)])
    wanted["averaged"] = numbers(people.test, p.mean(1, keepdims=True).repeat(2, 1))
    assert wanted["averaged"]["gap"] == 0
    wanted["shots"] = max(gaps[1], gaps[-1])
    assert wanted.items() <= row.items()
    assert (key in attacks.ATTACKED) == (row["shots"] > 0), "the others have no gap"
    assert row["follows"] == pytest.approx(means[1] - means[0], abs=1e-12)
    header, *lines = (home / f"runs/watched/{key}-3/people.csv").read_text().split()
    table = numpy.loadtxt(lines, delimiter=",")
    assert header == "s,y,p_m,p_f"
    assert numpy.allclose(table, [[x.s, x.y, *pair] for x, pair in zip(people.test, p)])


HOW = {  # the game, an adversary, lam, people in a batch, both twins
    "fine-tuned": (faircon.Game, False, 0., 8, False),
    "cda": (faircon.Game, False, 0., 16, True),
    "faircon": (faircon.Game, True, .5, 8, False),
    "shots": (RobustGame, False, .5, 8, False),
    "cda-shots": (RobustGame, False, 0., 16, True),
    "robust": (RobustGame, True, .5, 8, False),
    "distance": (faircon.Game, False, .5, 8, False),
    "fine-tuned-no-sex": (faircon.Game, False, 0., 8, False),
    "fresh": (FreshGame, True, .5, 8, False),
    "fine-tuned-shots": (RobustGame, False, 0., 8, False),
    "following": (FollowingGame, True, .5, 8, False)}


def test_a_row_is_trained_as_its_name_says_and_no_other_way(job):
    """On training rows; every row with the same rates and as many steps."""
    key, row, calls, people = job
    games, steps = named(calls, "__init__"), named(calls, "theta_step")
    if key not in HOW:
        assert not games and not steps
        assert not any(call.adapters for call in named(calls, "predict"))
        return
    kind, adversary, lam, batch, both = HOW[key]
    game, = [call.given for call in games]
    assert type(game["self"]) is kind and game["adversary"] is adversary
    assert game["seed"] == 3 and len(steps) == 6, "three rounds of two batches"
    for x_m, x_f in game["self"].questions:
        assert (x_m != x_f) == train.MODELS[key].sex, "trained on another text"
    twins = [adult.flipped(person) for person in people.train]
    assert game["people"] == people.train + twins * both
    wanted = {**train.DEFAULTS, "rounds": 3, "phi_steps": 2, "prompt_length": 12,
              "lam": lam, "batch_size": batch}
    options = faircon.Options(**wanted)
    if issubclass(kind, FreshGame):
        options = RobustOptions(**wanted, longest=100)
    assert game["options"] == options and row["options"] == dataclasses.asdict(options)
    signs = [call.given["sign"] for call in named(calls, "step")]
    assert signs == [1] * 6 * adversary, "phi goes up the distance in training"


def test_the_average_is_measured_and_saved_and_the_last_weights_before(job):
    """SWA's average is applied once: after `without_swa`, before everything else."""
    key, row, calls, people = job
    if key not in HOW:
        return
    order, predicted = [], iter(asked(calls))
    for call in calls:
        if call.name in ("update", "apply", "save"):
            order.append(call.name)
        elif call.name == "predict":
            assert call.adapters == 8, "not the model that was trained"
            some, _, _, p = next(predicted)
            order.append((some, numbers(some, p)))
    rounds = [now for now in order[:-9] if now != "update"]
    for record, (some, now) in zip(row["history"], rounds, strict=True):
        assert some == people.validation, "rounds are watched on other rows"
        assert (record["acc"], record["gap"]) == (now["acc"], now["gap"])
    assert order.count("update") == row["swa_weights"] == 2, "the third round's steps"
    last, *saved, measured = order[-9:-5]             # five more predictions follow
    assert last == (people.test, row["without_swa"]) and saved == ["apply", "save"]
    assert measured[0] == people.test and measured[1]["gap"] == row["gap"]
    gaps = [now["gap"] for now in (*row["history"], row["without_swa"], row)]
    if train.MODELS[key].sex:
        assert gaps[-1] != gaps[-2], "the average is another model"
    else:
        assert set(gaps) == {0}, "asked about sex"


def test_one_job_and_two_give_the_same_numbers(table_3, full):
    rows = table_3[0]["rows"]
    assert [row["key"] for row in rows] == list(train.MODELS)
    usual = [row for row in rows if row["key"] in USUAL]
    assert usual == results_of(full[0])["rows"]


def test_two_seeds_are_two_splits_and_the_second_begins_anew(here, capsys):
    """An adapter that a job left must not reach a model that is not trained."""
    results, _, jobs = watch(here, [*SMALL, "--models", "fine-tuned", "not-trained",
                                    "--rounds", "1", "--swa", "0", "--seeds", "2",
                                    "--name", "two"])
    order = [("not-trained", 3), ("fine-tuned", 3), ("not-trained", 4),
             ("fine-tuned", 4)]
    assert [(row["key"], row["seed"]) for row in results["rows"]] == order == list(jobs)
    for (key, seed), calls in jobs.items():
        games = named(calls, "__init__")
        assert len(games) == (key == "fine-tuned")
        for call in named(calls, "split") + games:
            assert call.given["seed"] == seed
    assert not any(call.adapters for call in named(jobs["not-trained", 4], "predict"))
    gaps = [row["gap"] for row in results["rows"][::2]]
    assert results["summary"]["not-trained"]["gap"] == report.mean_and_spread(gaps)
    said = capsys.readouterr().out
    assert "note: fine-tuned, seed 4: without SWA" in said


# ------------------------------------------------------------------ Table 3: printed

def test_table_3_is_printed_with_the_papers_figures_below_their_rows(full):
    folder, out, err = full
    lines = [line.split() for line in out.splitlines()]
    below = {"fine-tuned": "paper, not comparable 63.0 .183 .142",
             "faircon": "paper, not comparable 51.0 .136 .081",
             "always-0": "constant: (nearly) everybody gets the same answer"}
    for row in results_of(folder)["rows"]:
        key, words = row["key"], train.MODELS[row["key"]].title.split()
        for name in ("acc", "dpd", "deo", "gap", "shots", "follows"):
            words.append(report.decimals(row[name]))
        after = lines[lines.index(words) + 1]
        assert key not in below or after == below[key].split()
    assert err == "", "no warning, no note"
    assert max(map(len, out.splitlines())) <= 88, "half a screen"


def test_the_untrained_model_is_shown(capsys):
    model, test = load.load_model("tiny"), adult.load(adult.TINY).test
    people = adult.sample(test, 40, 0., numpy.random.default_rng(0))
    report.show_untrained(model, people)
    said = capsys.readouterr().out
    now = numbers(people, model.predict(model.questions(people)))
    adult.show(adult.twins(people[0])[0], "    ")
    assert capsys.readouterr().out in said
    assert f"ACC {now['acc']:.2f}, gap {now['gap']:.3f}, answers 1 to " in said
    assert "two answers have 1.00 of the probability" in said


def test_a_finished_run_gives_its_numbers_again(full, here, capsys):
    """The adapter saved is the model measured, and a changed number is noticed."""
    finished.main([str(full[0])])
    said = f"these numbers of {len(USUAL)} models came out again"
    assert said in capsys.readouterr().out
    finished.main([str(full[0]), "--models", "cda"])
    assert "of 1 models came out again" in capsys.readouterr().out
    assert not list(full[0].rglob("*.part")) + list(full[0].rglob("state.pt"))
    shutil.copytree(full[0], "elsewhere")
    results = results_of("elsewhere")
    results["config"]["model"][2] = "cuda"     # made on a GPU, read where there is none
    results["rows"] = results["rows"][-2:]
    results["rows"][0]["gap"] += 1e-9
    runs.write_json("elsewhere/results.json", results)
    with pytest.raises(InputError, match="1 models do not give the saved numbers"):
        finished.main(["elsewhere", "--data", "data"])


def ask_about(some):
    """mine.csv in the current folder: a header, an index, and labels for women only."""
    lines = [",".join(["", *adult.COLUMNS, "label"])]
    for i, person in enumerate(some):
        lines.append(",".join([str(i), *person.values, str(person.y) * person.s]))
    runs.write("mine.csv", "\n".join(lines))


@pytest.mark.parametrize("key", ["robust", "fine-tuned", "averaged"])
def test_a_finished_run_is_asked_about_other_people(key, full, here, capsys):
    some = adult.load("data").train[:25]
    ask_about(some)
    shutil.copytree(full[0], "theirs")
    finished.main(["predict", "theirs", "mine.csv", "--key", key, "--seed", "3"])
    model, _, _ = finished.load_run(full[0], key)
    p = train.answers_of(model, key, some)
    answers = pathlib.Path(f"theirs/{key}-3/mine-answers.csv").read_text()
    header, *lines = answers.split()
    assert header == "s,y,p_m,p_f"
    for person, line, pair in zip(some, lines, p, strict=True):
        s, y, *answered = line.split(",")
        assert (s, y) == (str(person.s), str(person.y) * person.s)
        assert numpy.allclose([float(x) for x in answered], pair)
    _, *shown, last = capsys.readouterr().out.splitlines()
    assert len(shown) == 20 and f"{key}, seed 3; all 25" in last
    who = f"{adult.SEXES[some[0].s]}, {some[0].values[0]}, "
    assert re.match(rf" +1 +{p[0, 0]:.3f} +{p[0, 1]:.3f}   {who}", shown[0])


@pytest.mark.parametrize("words, match", {
    "RUN nothing.csv": "nothing.csv cannot be read .No such file",
    "RUN wrong.csv": "wrong.csv, line 27: age cannot be 'x'",
    "RUN mine.csv --key nobody": "holds no nobody; it holds always-0, not-trained",
    "RUN mine.csv --seed 5": "holds no robust of seed 5",
    "RUN mine.csv --out ./mine.csv": "mine.csv holds the people; give another --out",
    "RUN mine.csv --out .": "Is a directory",
    "table1 mine.csv --key always-0": "table1 holds no models",
}.items())
def test_asking_wrongly_is_one_sentence_and_no_file(words, match, full, here):
    ask_about(adult.load("data").train[:25])
    text = pathlib.Path("mine.csv").read_text()
    runs.write("wrong.csv", text + "\n" + ",".join(["1", "x"] + ["?"] * 14))
    results = results_of(full[0])
    results["config"]["table"] = 1
    runs.write_json("table1/results.json", results)
    before = set(here.rglob("*")) | set(full[0].rglob("*"))
    with pytest.raises(SystemExit) as stopped, runs.one_sentence("beyond.finished"):
        finished.main(["predict", *words.replace("RUN", str(full[0])).split()])
    is_a_sentence(stopped.value.code, "beyond.finished", match)
    assert set(here.rglob("*")) | set(full[0].rglob("*")) == before
    assert pathlib.Path("mine.csv").read_text() == text


# ------------------------------------------------------------------ other tables

@pytest.mark.parametrize("table, count, printed", [("1", 7, 4), ("2", 4, 3)])
def test_tables_1_and_2_are_what_their_titles_say(table, count, printed, here, capsys):
    """Shots of adult.data, people of adult.test; each seed draws anew."""
    words = ["--data", "data", "--table", table, "--test-rows", "40", "--shots", "16",
             "--seed", "3", "--seeds", "2", "--name", "some"]
    results, _, jobs = watch(here, words)
    titles = list(results["summary"])
    assert len(titles) == count
    rows = iter(results["rows"])
    for (_, seed), calls in jobs.items():
        shots, drawn = named(calls, "few_shot"), named(calls, "sample")
        drawn = [call for call in drawn if call.given["n"] == 40]
        for k, title in enumerate(titles):
            given, row = shots[k].given, next(rows)
            first, _, rest = title.partition(", ")
            b = None if first == "natural" else float(first.removeprefix("b = "))
            data = tasks.data_of(None, "data")
            assert given["people"] is data.train and given["shots"] == 16
            assert given["bpc"] == b
            assert given["counterbalance"] == (rest == "counterbalanced")
            assert drawn[k].given["people"] is data.test
            assert drawn[k].given["bpc"] == (None if rest[:7] == "natural" else 0)
            people, g, context, p = asked(calls)[k]
            assert people is drawn[k].gave and g is None and context is shots[k].gave
            said = {"key": title, "seed": seed, "prompt": context}
            assert row == {**said, **numbers(people, p)}
    out = capsys.readouterr().out
    assert out.count(report.PAPER) == printed
    assert "likeliest" not in out, "no phi has learned these prompts"
    assert "adapter" not in out, "nothing was trained"
    lines = re.findall("^(?:b = |natural).*", out, re.M)
    for line, title in zip(lines, titles, strict=True):
        mean, spread = results["summary"][title]["gap"]
        assert spread > 0 and line.startswith(f"{title} ")
        assert line.endswith(" " + report.cell([mean, spread], 2)) and len(line) <= 88


def test_equation_4_keeps_the_least_unfair_prompt_on_validation_rows(here, capsys):
    """phi goes down the distance, on training rows; theta is never trained."""
    results, _, jobs = watch(here, [*SMALL, "--prompt-only", "--name", "prompt"])
    calls = jobs["prompts", 3]
    split, = named(calls, "split")
    people, (_, *given) = split.gave, split.given.values()
    assert given == [16, .5, 16, 3], "rows, b_Pc, test rows, seed"
    control, game = [call.given for call in named(calls, "__init__")]
    for each in (control, game):
        assert each["people"] == people.train and each["seed"] == 3
        assert each["options"].prompt_length == 12
    assert control["options"].phi_steps == 0 and not named(calls, "theta_step")
    steps = [call.given for call in named(calls, "step")]
    assert [step["sign"] for step in steps] == [-1] * 6, "3 rounds of 2 steps"
    for step in steps:
        assert all(some in game["self"].questions for some in step["questions"])
    gaps, measured = [], []
    for some, g, context, p in asked(calls):
        assert context == adult.INSTRUCTION
        if some == people.validation:
            gaps.append((numbers(some, p)["gap"], g))
        else:
            assert some == people.test
            measured.append((g, numbers(some, p)))
    assert len(gaps) == 15 + 15 and len(measured) == 4
    none, random, best, fair = [g for g, _ in measured]
    assert none is None and len(random) == 12
    assert best == min(gaps[:15])[1] and fair == min(gaps[15:])[1]
    assert set(random) <= set(game["model"].usable), "text, as any prompt"
    keys = ("no prompt", "a random prompt", "the best of 15 random ones",
            "fair prompt, Eq. (4)")
    for row, key, (g, found) in zip(results["rows"], keys, measured, strict=True):
        prompt = game["model"].decode(g) if g else ""
        assert row == {"key": key, "seed": 3, "prompt": prompt, **found}
    assert f"phi's likeliest prompt, {keys[3]}:" in capsys.readouterr().out


# ------------------------------------------------------------------ flags and options

class Stop(Exception):
    pass


FLAGS = {  # what the user says: the run's folder, its jobs, how many at once, the game
    "": ("default", USUAL, 5, train.DEFAULTS),
    "--paper": ("paper", USUAL, 5, {}),
    "--paper --lr 1 --rank 4 --jobs 2": ("paper", USUAL, 2, {"lr": 1., "rank": 4}),
    "--rounds 7 --models robust cda": (
        "default", ["cda", "robust"], 2, {**train.DEFAULTS, "rounds": 7}),
    "--lam 2 --tau 0.5 --name x": (
        "x", USUAL, 5, {**train.DEFAULTS, "lam": 2., "tau": .5}),
    "--table 1": ("table1", ["table1"], 1, train.DEFAULTS),
    "--table 2": ("table2", ["table2"], 1, train.DEFAULTS),
    "--prompt-only --longest 5000": ("prompt_only", ["prompts"], 1,
                                     {**train.DEFAULTS, "longest": 5000})}


@pytest.mark.parametrize("words", FLAGS)
def test_flags_become_jobs(words, here, monkeypatch, capsys):
    """One core a job; but a large model is alone, or it would not fit in memory."""
    def stop(*given):
        raise Stop(*given)
    model = load.load_once("tiny", "auto", "cpu")
    monkeypatch.setattr(train, "load_once", lambda *_: model)
    monkeypatch.setattr(report, "show_untrained", lambda *_: None)
    monkeypatch.setattr(runs, "run_jobs", stop)
    monkeypatch.setattr(runs, "cores", lambda: 5)
    folder, keys, at_once, game = FLAGS[words]
    for small in (True, False):
        monkeypatch.setattr(model, "small", small)
        with pytest.raises(Stop) as stopped:
            train.main(["--data", "data", *words.split()])
        work, jobs, workers, place = stopped.value.args
        assert workers == (at_once if small or "--jobs" in words else 1)
    assert place.name == folder and [job[1:] for job in jobs] == [(k, 0) for k in keys]
    share = "0.809 %" if "--rank" in words else "6.123 %"
    assert f"8 projections, {share} of the" in capsys.readouterr().out
    works = {"table1": train.few_shot_rows, "table2": train.few_shot_rows,
             "prompts": train.prompt_rows}
    assert work is works.get(keys[0], train.train_model)
    config = jobs[0][0]
    enough = adult.enough(tasks.data_of(None, "data").test, .5, 1000)
    assert config["game"] == game and config["test_rows"] == enough > 100


def test_enough_is_the_most_that_can_be_drawn():
    test = adult.load(adult.TINY).test
    rich_women = [p for p in test if p.s == 1 and p.y == 1]
    others = [p for p in test if p not in rich_women]
    people = others + rich_women[:10]
    assert adult.enough(people, .5, 400) == 40, "balanced, a quarter are rich women"
    assert adult.enough(people, -1., 400) == 16, "at b = -1, half of them are"
    assert adult.enough(people, .5, 24) == 24


def test_a_rows_own_options_are_its_own():
    """Where the user says nothing: what one row changes, no other has."""
    lams = {key: train.options_of({"game": {}}, key).lam for key in HOW}
    assert lams.pop("following") == .3
    assert lams == {key: 1. if HOW[key][2] else 0. for key in lams}


# ------------------------------------------------------------------ run folders, resume

@pytest.fixture(scope="session")
def never(home):
    """TWO, never interrupted -> its results."""
    return command(home, [*TWO, "--name", "never"])


@pytest.fixture(scope="session")
def interrupted(home):
    """TWO, stopped by Ctrl-C in faircon's third round -> its folder."""
    half = faircon.Game.theta_turn

    def stop(game):
        if game.done == 2 and game.adversary:
            raise KeyboardInterrupt
        return half(game)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faircon.Game, "theta_turn", stop)
        with pytest.raises(SystemExit, match="--resume NAME goes on"):
            command(home, [*TWO, "--name", "cut"])
    return home / "runs/cut"


def test_resume_ends_as_if_never_interrupted(interrupted, never, here, monkeypatch):
    """With the flags of its beginning, no round twice; stopped once more on the way."""
    shutil.copytree(interrupted, "runs/cut")
    played, half = [], faircon.Game.theta_turn
    monkeypatch.setattr(faircon.Game, "theta_turn",
                        lambda game: played.append(game.done) or half(game))

    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:             # after the last round, before its
        patch.setattr(lora, "save", stop)            # row is written
        with pytest.raises(SystemExit):
            train.main(["--resume", "cut"])
    monkeypatch.setattr(runs, "cores", lambda: 7)
    for later in ({}, {"cpu": "AVX9"}):              # finished: it only prints again
        theirs = {**runs.versions(), **later}
        monkeypatch.setattr(runs, "versions", lambda now=theirs: now)
        train.main(["--resume", "cut"])
        assert results_of("runs/cut") == never
    assert played == [2], "all other rounds were kept"


@pytest.mark.parametrize("part, name", [("data", "adult.data"), ("model", "sha256"),
                                        ("config", "bpc")])
def test_resume_after_a_change_is_refused_by_name(part, name, interrupted, here):
    shutil.copytree(interrupted, "runs/cut")
    state = pathlib.Path("runs/cut/faircon-3/state.pt")
    before, run = state.read_bytes(), runs.read_json("runs/cut/run.json")
    run[part][name] = "another"
    runs.write_json("runs/cut/run.json", run)
    said = "another data " if part == "data" else f"another {part} {name} "
    refused(["--resume", "cut", "--jobs", "1"], said)
    refused(["--resume", "cut", "--lam=2"], "leave out --lam")
    assert state.read_bytes() == before, "the state is left alone"
    assert not pathlib.Path("runs/cut/results.json").exists()


def test_a_run_goes_on_on_another_machine(interrupted, never, here, monkeypatch,
                                          capsys):
    """With its dtype, whatever "auto" means there; what differs is said."""
    shutil.copytree(interrupted, "runs/cut")
    run = runs.read_json("runs/cut/run.json")
    run["versions"]["cpu"], run["model"]["computed in"] = "AVX9", "on a GPU"
    run["config"]["model"][2] = "cuda"
    runs.write_json("runs/cut/run.json", run)
    choose, loads, really = load.choose_dtype, [], load.load_model
    monkeypatch.setattr(load, "choose_dtype", lambda dtype, *more: (
        ("bfloat16", "this machine") if dtype == "auto" else choose(dtype, *more)))
    monkeypatch.setattr(load, "load_model",
                        lambda *asked: loads.append(asked) or really(*asked))
    monkeypatch.setattr(load, "loaded", {})
    train.main(["--resume", "cut", "--device", "cpu", "--data", "data/"])
    said = capsys.readouterr().out
    for note in ("versions cpu was AVX9", "computed in was on a GPU and is now"):
        assert note in said
    assert loads == [("model", "float32", "cpu", False)], "once, in the run's dtype"
    assert results_of("runs/cut")["rows"] == never["rows"]


def test_a_finished_run_stays_and_an_interrupted_one(interrupted, full, here, capsys):
    shutil.copytree(full[0], "runs/old")
    shutil.copytree(interrupted, "runs/cut")
    before = {path: path.read_bytes() for path in here.rglob("runs/**/*.*")}
    words = ["--data", "data", "--table", "2", "--test-rows", "8", "--name"]
    refused([*words, "cut"], "interrupted run; .*--resume cut")
    for name in ("old-2", "old-3"):
        train.main([*words, "old"])
        assert f"this one is runs/{name}" in capsys.readouterr().out
        assert results_of(f"runs/{name}")["config"]["table"] == 2
    for path, content in before.items():
        assert path.read_bytes() == content, path
    shutil.copytree(interrupted, "runs/old-4")
    refused([*words, "old"], "runs/old-4 holds .*--resume old-4")


def test_a_folder_is_one_process_own_and_cleared_of_what_was_half_written(here):
    args = types.SimpleNamespace(name="one", resume=None, argv=[])
    runs.write("runs/one/faircon-0/rows.json.7.part", "half")
    for _ in range(2):
        with runs.open_run(args, {}):
            assert not list(here.rglob("*.part"))
            refused([*TWO, "--name", "one"], "another process is writing")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    runs.write_json(tmp_path / "a.json", {"old": [1, float("nan"), (float("inf"),)]})

    def full_disk(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        runs.write_json(tmp_path / "a.json", {"new": 2})
    assert runs.read_json(tmp_path / "a.json") == {"old": [1, None, [None]]}, "no NaN"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_state_is_data_and_a_damaged_one_is_told(interrupted, here):
    path = here / "state.pt"
    assert runs.load_state(None, here) == [], "there is none yet"
    torch.save(Planted(), path)
    whole = (interrupted / "faircon-3/state.pt").read_bytes()
    for content in (path.read_bytes(), b"", b"no", whole[:-40]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            runs.load_state(None, here)
    assert not (here / "planted").exists(), "opening a state must run no code"


# ------------------------------------------------------------------ kills, signals

FORK = multiprocessing.get_context("forkserver")


def killed(folder, words, moment):
    """The command, silent; SIGKILL before one of its files is renamed or removed."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("output", "a")
    moments = itertools.count()

    def hook(event, args):
        if event in ("os.rename", "os.remove") and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    train.main(words)


def test_killed_again_and_again_ends_as_if_never_killed(here, never):
    """Between a file's temporary name and its own, and around it: the same JSON."""
    FORK.set_forkserver_preload(["torch", "transformers", "beyond.test_beyond"])
    for kills in range(20):
        words = ["--resume", "default"] if kills else TWO
        process = FORK.Process(target=killed, args=(str(here), words, 5 + kills % 4))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        said = (here / "output").read_text()[-500:]
        assert process.exitcode == -signal.SIGKILL, said
    assert kills > 3 and results_of("runs/default") == never
    assert not [*here.rglob("*.part"), *here.rglob("state.pt")]


# The command's own signal handling and workers; the work is to warn and to sleep.
SLEEPER = """
import os, sys, time, warnings
import tqdm
from beyond import runs

def work(config, key, seed, folder):
    warnings.warn(key)
    tqdm.tqdm([], disable=None)                            # a bar's lock is no leftover
    runs.say(os.getpid())
    time.sleep(seed)
    return []

if __name__ == "__main__":
    with runs.one_sentence("train.py"):
        seconds = int(sys.argv[1])
        jobs = [(None, "nobody has s=0", seconds),
                (None, "b_Pc = .3 is not exact", seconds)]
        runs.run_jobs(work, jobs, 2, "made")
"""


def sleeper(folder, seconds, interrupts=signal.SIG_DFL):
    """SLEEPER as a process of its own."""
    (folder / "sleeper.py").write_text(SLEEPER)
    return subprocess.Popen(
        [sys.executable, "sleeper.py", str(seconds)], cwd=folder, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts))


def gone(pids, seconds=10):
    """Do all these processes end in time?"""
    end = time.time() + seconds
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
        if time.time() > end:
            return False
        time.sleep(.05)
    return True


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="Linux")
@pytest.mark.parametrize("how", ["ctrl-c", "terminated behind nohup",
                                 "a worker killed", "killed"])
def test_however_it_ends_no_worker_stays(how, tmp_path):
    """Ctrl-C goes to the whole group, at any moment; others to the parent alone."""
    ignored = signal.SIG_IGN if "nohup" in how else signal.SIG_DFL
    process = sleeper(tmp_path, 90, ignored)         # longer than the timeout below
    workers = [int(process.stdout.readline()) for _ in range(2)]
    if how == "ctrl-c":
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        assert not gone(workers, .5), "workers leave Ctrl-C to their parent"
        os.killpg(process.pid, signal.SIGINT)
    elif how == "a worker killed":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert gone(workers), "a worker stays and keeps a core busy"
    said = "ended from outside" if "worker" in how else "interrupted"
    if how != "killed":
        assert process.returncode == 1 and "train.py: " in err
        assert said in err and "--resume" in err and "Traceback" not in err, err
        assert "resource_tracker" not in err, err


def test_a_run_may_begin_in_a_thread(here):
    words = ["--data", "data", "--table", "2", "--test-rows", "8", "--seeds", "2",
             "--jobs", "2", "--name", "thread"]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.main, words).result()
    assert len(results_of("runs/thread")["rows"]) == 8


def test_a_reader_that_leaves_gets_no_traceback(tmp_path):
    """train.py | head -1. Of two warnings that of b_Pc has been said already."""
    process = sleeper(tmp_path, 1)
    assert process.stdout.readline().strip().isdigit()
    process.stdout.close()
    assert process.stderr.read() == "note: nobody has s=0\n" and process.wait() == 1


# ------------------------------------------------------------------ wrong input

# One wrong option each -> what the sentence says.
OPTIONS = {
    "--bpc 1.5": "b_Pc", "--bpc nan": "b_Pc", "--lam nan": "lam", "--rows 0": "rows",
    "--rows 7": "even", "--rows 100000": "fewer rows", "--test-rows 2": "4 or more",
    "--test-rows 90000": "fewer rows", "--seed -1": "seed",
    "--seed 99999999999999999999": "seed", "--prompt-length 5000": "context",
    "--longest 5000": "context", "--shots 200": "context|shots", "--shots 3": "even",
    "--table 1 --shots 64": "context", "--table 1 --shots 4": "multiple of 8",
    "--table 2 --shots 6": "even number", "--prompt-only --models robust": "Table 3",
    "--table 1 --lam 2": "train nothing", "--prompt-only --paper": "not allowed",
    "--table 1 --paper": "not allowed", "--name ../x": "folder name",
    "--name=": "folder name", "--resume nothing": "nothing/run.json cannot be read",
    "--device cuda:9": "device", "--device tpu": "device", "--mod tiny": "--mod tiny",
    "--lr 1e9": "finite|NaN", "--models nobody": "invalid",
    "--data nowhere": "neither a folder nor", "--data model": "adult.data cannot be",
    "--model nowhere": "no config.json", "--model data/mo": "no config.json",
    "--model a.gguf": "does not exist"}


@pytest.mark.parametrize("words", OPTIONS)
def test_a_wrong_option_is_one_sentence(words, here, monkeypatch):
    """Before any work is begun, but where only training can tell."""
    if words != "--lr 1e9":
        monkeypatch.setattr(train, "train_model", lambda *_: pytest.fail("work began"))
    usual = [] if "--resume" in words else [*SMALL[:6], "--jobs", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused([*usual, *words.split()], OPTIONS[words])
    assert not [*here.rglob("*.part"), *here.rglob("results.json")]


TENSORS = load_file(adult.TINY / "model.safetensors")


def weights(tensors):
    return save(tensors, {"format": "pt"})


def config(**fields):
    """The bundled model's config.json with other fields."""
    file = adult.TINY / "config.json"
    return json.dumps({**runs.read_json(file), **fields}).encode()


FILES = [  # a file here with something else in it -> what the sentence says
    ("runs", b"", "runs/default: Not a directory"),
    ("runs/default/run.json", b"{}", "argv"),
    ("runs/default/run.json", b"[]", "no dict"),
    ("runs/default/run.json", b"no JSON", "not JSON"),
    ("model/tokenizer.json", b"", "loaded|tokens"),
    ("model/model.safetensors", weights(TENSORS)[:100_000], "loaded"),
    ("model/model.safetensors", weights({"nothing": torch.zeros(1)}), "lacks"),
    ("model/model.safetensors",
     weights({name: w * torch.nan for name, w in TENSORS.items()}), "NaN"),
    ("model/adapter_config.json", b"{}", "merge it"),
    ("model/config.json", config(quantization_config={
        "quant_method": "bitsandbytes", "load_in_8bit": True}),
     "quantised .bitsandbytes."),
    ("model/config.json", config(
        model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "loaded")]


@pytest.mark.parametrize("file, content, match", FILES, ids=[x[2] for x in FILES])
def test_a_wrong_file_is_one_sentence(file, content, match, here, own_copy,
                                      monkeypatch):
    """And no code of a model's folder is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    own_copy("model")
    runs.write("model/mine.py", "import os; os.mkdir('planted')")
    runs.write(file, content)
    usual = [*SMALL[:6], "--jobs", "1", "--model", "model"]
    refused(["--resume", "default"] if "run.json" in file else usual, match)
    assert not pathlib.Path("planted").exists()


THEIRS = [  # a text in results.json, another in its place -> what the sentence says
    ('"rows": [', '"rows": 5, "x": [', "no rows"),
    ('"seed": 3', '"seed": "3"', "no rows"), ('"key": "', '"key": "../', "the key"),
    ('"acc": ', '"acc": "high", "x": ', "no numbers .*acc"),
    ('"config": {', '"config": [], "x": {', "no config"),
    ('"model": [', '"model": [5, ', "no config"),
    ('"model": {', '"model": {}, "x": {', "no model")]


@pytest.mark.parametrize("old, new, match", THEIRS)
def test_a_run_of_somebody_else_is_one_sentence(old, new, match, full, here):
    """A key ends up in a path: what is no row's name is never read or written."""
    text = (full[0] / "results.json").read_text()
    assert old in text
    runs.write("theirs/results.json", text.replace(old, new))
    with pytest.raises(InputError, match=match):
        finished.main(["theirs"])


def test_other_files_are_refused(full, here, own_copy):
    results = results_of(full[0])
    own_copy("data")
    own_copy("model")
    assert finished.load_run(full[0], model_path="model")[1] == results["rows"][-1]
    tensors = load_file("model/model.safetensors")
    tensors[min(tensors)].view(-1)[0] += 1e-3
    runs.write("model/model.safetensors", weights(tensors))
    with pytest.raises(InputError, match="not the model of"):
        finished.load_run(full[0], model_path="model")
    file = pathlib.Path("data/adult.test")
    file.write_text(file.read_text().replace(" 40,", " 41,", 1))
    with pytest.raises(InputError, match="another sha256"):
        finished.load_data(results)


# ------------------------------------------------------------------ models

SIZES = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 640, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}


def random_model(kind, directory, **more):
    """A model with random weights and the bundled tokenizer, saved -> directory."""
    family = re.sub("For.*|LMHead.*", "", kind)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    getattr(transformers, kind)(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(adult.TINY / name, directory)
    return directory


@pytest.mark.parametrize("kind, more, match", [
    ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "0 linear q_proj"),
    ("MambaForCausalLM", {"state_size": 4}, "cannot be read|q_proj"),
    ("T5ForConditionalGeneration",
     {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
     "encoder-decoder")])
def test_what_cannot_be_trained_is_refused(kind, more, match, tmp_path):
    with pytest.raises(InputError, match=match):
        lora.inject(load.load_model(random_model(kind, tmp_path, **more)).model)


@pytest.mark.parametrize("kind, window", [("default", 640), ("dynamic", 320),
                                          ("longrope", 320)])
def test_a_context_ends_where_rotary_scaling_switches(kind, window, tmp_path):
    """What was read before the switch would stay as it was."""
    scaling = {"rope_type": kind, "rope_theta": 1e4}
    if kind != "default":
        scaling.update(factor=2., short_factor=[1.] * 4, long_factor=[2.] * 4,
                       original_max_position_embeddings=320)
    base = random_model("LlamaForCausalLM", tmp_path, rope_parameters=scaling)
    assert load.load_model(base).window == window
    if kind == "longrope":                     # in its place of an older config.json
        older = json.loads((base / "config.json").read_text())
        moved = older["rope_parameters"].pop("original_max_position_embeddings")
        older["original_max_position_embeddings"] = moved
        (base / "config.json").write_text(json.dumps(older))
        assert load.load_model(base).window == window
    config = types.SimpleNamespace(rope_parameters={"a kind of layer": scaling},
                                   max_position_embeddings=640)
    assert min(640, load.switching_at(config)) == window


def test_auto_is_resolved_once(here, monkeypatch, capsys):
    """A run in bf16 is measured in bf16 where "auto" means another dtype."""
    choose = load.choose_dtype
    assert choose("auto", "cpu", True)[0] == "float32"
    monkeypatch.setattr(load, "choose_dtype", lambda dtype, *more: (
        ("bfloat16", "a GPU") if dtype == "auto" else choose(dtype, *more)))
    load.loaded.clear()
    command(here, [*SMALL, "--models", "fine-tuned", "--rounds", "1", "--name", "bf16"])
    monkeypatch.setattr(load, "choose_dtype", choose)
    finished.main(["runs/bf16"])                     # raises if a number is another
    finished.main(["runs/bf16", "--dtype", "float32"])
    measured, mean = capsys.readouterr().out.splitlines()[-2:]
    assert mean.split()[:2] == ["fine-tuned", "mean"]
    assert not measured.endswith("0.0e+00"), "another dtype, other digits"
    model, _, _ = finished.load_run("runs/bf16", "fine-tuned")
    assert model.computed_in == "bfloat16" and model.dtype == torch.bfloat16
    assert "1 thread)" in model.how, "a small model's numbers depend on the cores"
    load.loaded.clear()
    first = load.load_once("model", "auto", "cpu")
    assert load.load_once("model", "float32", "cpu") is first, "not loaded twice"


def test_the_hash_of_a_gguf_file_is_of_this_file(tmp_path):
    """Others beside it, of other roundings of the model, do not count."""
    tokenizer = types.SimpleNamespace(get_vocab=dict)
    (tmp_path / "a.gguf").write_bytes(b"a")
    alone = load.sha256(tmp_path, tokenizer, "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"b")
    assert load.sha256(tmp_path, tokenizer, "a.gguf") == alone
    assert load.sha256(tmp_path, tokenizer, "b.gguf") != alone


# ------------------------------------------------------------------ few bits

@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rounding_is_what_its_formula_says(bits):
    """Weight by weight. The last group is short, and one is all 0."""
    W = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    W[2, :32] = 0.
    few = quantise.rounded(W, bits)
    most = 2 ** (bits - 1) - 1
    for i in range(3):
        for begin in range(0, 70, 32):
            group = W[i, begin:begin + 32].tolist()
            scale = max(map(abs, group)) / most
            wanted = [scale * round(w / scale) if scale else 0 for w in group]
            assert few[i, begin:begin + 32].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", quantise.FORMATS)
def test_rounded_weights_are_those_of_the_blocks_and_come_back(name):
    """The very same tensors, also after an error; embeddings stay throughout."""
    model = load.load_model("tiny").model
    lora.inject(model, 4)
    before = {n: p.data for n, p in model.named_parameters()}
    copies = {n: p.clone() for n, p in before.items()}
    with pytest.raises(KeyboardInterrupt), quantise.quantised(model, name):
        inside = {n: p.data for n, p in model.named_parameters()}
        raise KeyboardInterrupt
    changed = {n for n in before if not torch.equal(inside[n], copies[n])}
    blocks = {n for n in before if re.search(r"h\..*(proj|fc|base)\.weight", n)}
    assert changed == (set() if name == "float32" else blocks) and len(blocks) == 24
    for n in changed:
        wanted = copies[n].bfloat16().float()
        if name != "bf16":
            wanted = quantise.rounded(copies[n], int(name[-1]))
        assert torch.equal(inside[n], wanted)
    for n, p in model.named_parameters():
        assert p.data.data_ptr() == before[n].data_ptr() and torch.equal(p, copies[n])


def few_bits(*words):
    """The command on a copy of the run, `few` -> {(key, format): its row}"""
    quantise.main(["few", *words])
    rows = runs.read_json("few/quantise.json")["rows"]
    return {(row["key"], row["format"]): row for row in rows}


def test_a_run_is_measured_in_every_format(table_3, here, home, monkeypatch, capsys):
    """float32 gives the run's own numbers; the table has every other's."""
    keys = ["always-0", "averaged", "robust"]
    small = {"people": (2,), "most": 2, "climb": 2, "texts": 2, "lengths": (4,)}
    monkeypatch.setattr(quantise, "ATTACKS", {**quantise.ATTACKS, **small})
    shutil.copytree(home / "runs/watched", "few")
    found = few_bits("--attacks", "--models", *keys)
    assert list(found) == [(key, name) for key in keys for name in quantise.FORMATS]
    saved = {row["key"]: row for row in table_3[0]["rows"]}
    for key in keys:
        for number in (*finished.SHOWN, "seed", "shots"):
            assert found[key, "float32"][number] == saved[key][number], (key, number)
    for name in quantise.FORMATS:
        assert "worst" not in found["averaged", name], "the gap is 0 given any prompt"
        assert found["averaged", name]["gap"] == found["averaged", name]["shots"] == 0.
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for title, number in quantise.TITLES.items():
        numbers = [found["robust", name][number] for name in quantise.FORMATS]
        assert number == "acc" or len(set(numbers)) == 5, "each is another model"
        assert ["robust", *title.split(), *map(report.decimals, numbers)] in printed
    with pytest.raises(InputError, match="few holds no robots; it holds .*robust"):
        few_bits("--models", "robots")


def test_fewer_rows_of_a_run_in_bf16(table_3, here, home):
    """The first of the run's rows; float32 is float32, whatever the run was in."""
    shutil.copytree(home / "runs/watched", "few")
    results = results_of("few")
    results["config"]["model"][1] = "bfloat16"
    runs.write_json("few/results.json", results)
    found = few_bits("--models", "fine-tuned", "--test-rows", "8")
    _, *lines = pathlib.Path("few/fine-tuned-3/people.csv").read_text().split()
    p = numpy.loadtxt(lines[:8], delimiter=",")[:, 2:]
    gap = abs(p[:, 0] - p[:, 1]).mean()
    assert found["fine-tuned", "float32"]["gap"] == pytest.approx(gap, abs=1e-8)


# ------------------------------------------------------------------ report, lessons

def test_the_spread_over_seeds_is_the_samples():
    """n - 1, or two seeds would look calmer than they are; a missing number is none."""
    rows = [{"key": "a", "gap": 1.}, {"key": "a", "gap": 3.}, {"key": "b", "gap": 5.}]
    found = report.summary(rows)
    assert found["a"]["gap"] == [2., pytest.approx(2 ** .5)]
    assert found["b"]["gap"] == [5., 0.]
    assert "gap" not in report.summary([*rows, {"key": "b", "gap": None}])["b"]


def test_numbers_are_short():
    """A number loses the 0 in front, and no other."""
    cells = [report.decimals(x) for x in (.5, -.25, 10., 20.05)]
    assert cells == [".500", "-.250", "10.000", "20.050"]
    assert [report.clock(x) for x in (9.4, 75)] == ["0:09", "1:15"]


def test_every_number_and_every_picture(full, here, monkeypatch, capsys):
    results = results_of(full[0])
    row, values = results["rows"][-1], results["summary"]["robust"]
    results["summary"] = {"b = -1": values, "b = 1": values}
    runs.write_json("made/results.json", results)
    worst = {"key": "robust", "seed": row["seed"], "worst": .1, "lowest_acc": .5}
    other = {"key": "robust", "seed": 99, "worst": .2, "lowest_acc": .6}
    runs.write_json("made/attacks.json", {"rows": [worst, other]})
    report.main(["made", "--out", "made.csv"])
    with open("made.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["key"] for line in lines] == [x["key"] for x in results["rows"]]
    assert lines[0]["without SWA, gap"] == ""
    wanted = {"gap": row["gap"], "without SWA, gap": row["without_swa"]["gap"],
              "twins averaged, acc": row["averaged"]["acc"],
              "phi's last step": numpy.mean([x["phi"][1] for x in row["history"][1:]]),
              "worst gap, attacks": .1, "lowest ACC, attacks": .5}
    report.main(["made"])
    ours = capsys.readouterr().out.partition("\nrobust\n")[2]
    for name, value in wanted.items():
        assert float(lines[-1][name]) == value
        each = re.escape(report.decimals(value, 4))
        assert re.search(rf"^    {name} .* {each}$", ours, re.M), name
    with pytest.raises(InputError, match="needs a run"):
        pictures.main(["rounds"])
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for what in ("figure2", "table1", "rounds", "curve", "compare"):
        pictures.main([what, "made", "--out", f"{what}.png"])
        assert pathlib.Path(f"{what}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be drawn"):
        pictures.main(["figure2", "--out", "no/where.png"])


def test_the_cost_is_of_the_same_answers(monkeypatch, capsys):
    """Both ways give the same logits; texts a second: two a person, each step 1 s."""
    def once(step, *seconds):
        step()
        return types.SimpleNamespace(mean=1., times=[1.])
    monkeypatch.setattr(cost, "timed", once)
    monkeypatch.setattr(cost, "alone", lambda work, *given: work(*given))
    cost.main(["--data", str(adult.TINY), "--batch-size", "3", "--prompt-length", "5"])
    lines = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines == [["straight", "1", "5", "2.00", "2.00"],
                     ["faircon", "1", "5", "2.00", "2.00"],
                     ["faircon", "3", "5", "6.00", "6.00"]]
    model = load.load_model("tiny")
    some = model.questions(adult.load(adult.TINY).test[:3])
    prefix = model.prefix([5, 6, 7])
    ours = model(prefix, some)
    model.__class__ = cost.Straight
    torch.testing.assert_close(model(prefix, some), ours, atol=1e-4, rtol=1e-4)


EXERCISES = {  # what a lesson ends in: the line to change, and what it becomes
    "adult": ("take relationship out of LEFT_OUT", '"marital status", "relationship")',
              '"marital status")'),
    "metrics": ("halve X for women", "x + model_uses_s * (.5 - asked_as)",
                "x * (1 - model_uses_s * asked_as / 2)"),
    "gumbel": ("lr=1. in figure_4", "lr=.1)", "lr=1.)"),
    "swa": ("start=0", "start=200", "start=0"),
    "lora": ("LoRA on k_proj too (TARGETS)", '("q_proj", "v_proj")',
             '("q_proj", "k_proj", "v_proj")'),
    "faircon": ("lam = 0.1 in `lesson`", '(1., "Eq. (3)")', '(.1, "Eq. (3)")'),
    "beyond.robust": ("longest=20", "longest=200", "longest=20"),
    "beyond.quantise": ("group=8 in `lesson`", "bits, group=32)\n        error",
                        "bits, group=8)\n        error")}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_ends_in_an_exercise(lessons, name, monkeypatch, capsys):
    """The exercise changes the numbers; adult.py's lets an assertion fail."""
    done, (exercise, old, new) = lessons[name], EXERCISES[name]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert f"now try: {exercise}" in " ".join(done.stdout.splitlines()[-2:])
    path = HERE / f"{name.replace('.', '/')}.py"
    text = path.read_text()
    assert text.count(old) == 1, f"{name} has no such line: {old}"
    lesson = types.ModuleType(name)
    lesson.__file__ = str(path)
    exec(compile(text.replace(old, new), path, "exec"), vars(lesson))
    monkeypatch.setattr(sys, "argv", [name, str(adult.TINY)])
    try:
        lesson.lesson()
    except AssertionError as error:
        assert name == "adult" and "questions give sex away" in str(error)
    else:
        assert name != "adult" and capsys.readouterr().out != done.stdout
