"""Tests of beyond/attacks.py: offline, on the CPU, no test that luck can fail."""
import copy
import math
import pathlib
import subprocess
import sys

import numpy
import pytest
import torch

import adult
from adult import InputError
from beyond import attacks, runs
from beyond.fast import FastModel, load_model

HERE = pathlib.Path(__file__).resolve().parent.parent
SMALL = {"climb": 5, "tokens": 4, "draws": 2, "test_rows": 8, "lengths": (6,),
         "climbs": [("behind", "few", 4), ("half", "few", 4)]}


@pytest.fixture(scope="module")
def model():
    return load_model(adult.TINY, "float32", "cpu")[0]


@pytest.fixture(scope="module")
def data():
    return adult.load(adult.TINY)


@pytest.fixture(scope="module")
def people(data):
    return adult.split(data, 16, .5, 16, 0)


@pytest.fixture(scope="module")
def target(model, data, people):
    return attacks.target_of(model, people.validation[:8], data.train)


def generator(seed=0):
    return numpy.random.default_rng(seed)


# ------------------------------------------------------------------ gradient attacks

class Planted:
    """A stand-in: p_m rises with a fixed number for each place and token, p_f is 0.

    One token in a thousand is worth 1 in its place, the others .1 or so: a search that
    tries some hundred prompts cannot meet the ten of them by luck.
    """
    V = 1000
    bos, context, device = [], math.inf, torch.device("cpu")

    def __init__(self, length, seed):
        rng = generator(seed)
        table = rng.normal(0, .1, (length, self.V))
        table[range(length), rng.integers(self.V, size=length)] = 1.
        self.table = torch.tensor(table).float()
        self.embed = torch.eye(self.V)
        self.mask = torch.zeros(self.V)
        self.usable = list(range(self.V))

    def ids(self, text):
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)

    def prefix(self, g, after=0.):
        return g if torch.is_tensor(g) else self.embed[g]                    # (L, V)

    def __call__(self, prefix, questions):
        logits = torch.full((2, len(questions), self.V), -30.)
        logits[..., 0] = 0.
        logits[0, :, 1] = (prefix * self.table).sum() - 4
        logits[1, :, 1] = -20
        return logits

    def p_yes(self, logits):
        return logits[..., :2].softmax(-1)[..., 1]

    def predict(self, questions, g):
        return self.p_yes(self(self.prefix(g), questions)).T.numpy()


def test_gcg_finds_a_planted_weakness_and_its_controls_do_not():
    """Guards against a gradient attack that lives off its starts: sign, mask, mean.

    The former one was no better than the same search with a random gradient.
    """
    for seed in range(3):
        stand_in = attacks.Target(Planted(10, seed), [None] * 4, [], {}, math.inf)
        found = {}
        for search in (attacks.gcg, attacks.random_gcg, attacks.random_search):
            found[search.__name__] = search(stand_in, 10, 300, generator(seed)).found
        control = max(found["random_gcg"], found["random_search"])
        margin = found["gcg"] - control
        assert margin > .5, f"the gradient must be worth .5 of gap, got {found}"


def test_gumbel_finds_a_planted_weakness_and_its_control_does_not():
    """The former one sampled no better than phi as it began."""
    for seed in range(3):
        stand_in = attacks.Target(Planted(10, seed), [None] * 4, [], {}, math.inf)
        found = []
        for search in (attacks.gumbel, attacks.gumbel_no_step):
            found.append(search(stand_in, 10, 300, generator(seed)).found)
        assert found[0] - found[1] > .5, f"phi's steps are worth .5 of gap: {found}"


def test_gumbel_begins_around_its_start(target):
    """Each token kept with probability .8, the others alike."""
    g, model = target.model.usable[:50], target.model
    p = (attacks.around(model, g) + model.mask).softmax(-1)
    assert torch.allclose(p[range(50), g], torch.tensor(.8), atol=1e-3)
    assert (p[:, model.usable] > 0).all()


def test_attacks_and_their_controls_start_together_and_spend_alike(monkeypatch):
    """Otherwise the comparison in the table says nothing."""
    stand_in = attacks.Target(Planted(10, 0), [None] * 4, [], {}, math.inf)
    starts, spent = [], []
    both = (attacks.gcg, attacks.random_gcg, attacks.gumbel, attacks.gumbel_no_step)
    for search in both:
        count = []
        monkeypatch.setattr(stand_in.model, "predict", lambda questions, g: (
            count.append(1), Planted.predict(stand_in.model, questions, g))[1],
            raising=False)
        starts.append(search(stand_in, 10, 60, generator()).start)
        spent.append(len(count))
    assert len(set(starts)) == 1, starts
    assert max(spent) <= 60, f"more prompts scored than the budget: {spent}"


def test_slope_is_the_derivative_of_the_gap(target):
    """Against a difference quotient along one token, on the embedded model."""
    model = target.model
    g = attacks.random_prompt(model, 6, generator())
    slope = attacks.true_slope(target, g, None)
    one_hot = torch.nn.functional.one_hot(torch.tensor(g), len(model.mask)).float()
    gaps = []
    for step in (-.01, .01):
        moved = one_hot.clone()
        moved[2, 300] += step
        with torch.no_grad():
            p = model.p_yes(model(model.prefix(moved), target.questions))
        gaps.append((p[0] - p[1]).abs().mean().item())
    quotient = (gaps[1] - gaps[0]) / .02
    assert slope[2, 300].item() == pytest.approx(quotient, rel=.05, abs=1e-4)


# ------------------------------------------------------------------ people

def people_of(text, data):
    """Parse a prompt back -> [(values, label)]; fails where a line is no census row."""
    known = {}
    for column, name in enumerate(adult.COLUMNS):
        known[name] = {person.values[column] for person in data.train}
    found = []
    text = text.replace(adult.INSTRUCTION, "").replace("\nlabel:", ";")
    for line in text.splitlines():
        row, label = line.removeprefix(adult.OPENING + " ").split("; ")
        assert label in ("0", "1"), line
        values = {}
        for name, part in zip(adult.ATTRIBUTES, row.split(", "), strict=True):
            assert part.startswith(name + " "), part
            values[name] = part.removeprefix(name + " ")
            assert values[name] in known[name], f"{part!r} is in no census row"
        found.append((values, int(label)))
    return found


@pytest.mark.parametrize("place", attacks.PLACES)
def test_climb_keeps_census_rows_and_only_rises(target, data, place):
    for direction in attacks.DIRECTIONS.values():
        found = attacks.climb(target, direction, 6, place, 12, generator())
        lines = people_of(found.text, data)
        assert len(lines) == found.size["people"] == 6
        for values, label in lines:
            man = values["sex"] == "Male"
            assert label == (man if direction == 1 else not man), "labels must not flip"
        assert sum(values["sex"] == "Male" for values, _ in lines) == 3
        rising = [found.start] + [value for _, value, _ in found.path]
        assert rising == sorted(rising) and rising[-1] == found.found
        assert direction * target.leaning(found.text) == found.found
        assert [n for n, _, _ in found.path] == [2, 4, 12]


def test_a_move_changes_one_thing(target):
    people = adult.sample(target.people, 6, 1., generator())
    rng = generator(1)
    for _ in range(200):
        others = attacks.move(people, target.pool, rng)
        changed = [i for i in range(6) if others[i] != people[i]]
        assert len(changed) < 3
        if len(changed) == 2:
            i, j = changed
            assert others[i] == people[j] and others[j] == people[i], "places swapped"
        else:
            kept = [(p.s, p.y) for p in others] == [(p.s, p.y) for p in people]
            assert kept, "a move changed a sex or a label"


def test_both_directions_have_their_sign_and_fill_the_context(target):
    """On the embedded model, which follows the bias of what stands in front."""
    for direction in attacks.DIRECTIONS.values():
        found = attacks.climb(target, direction, 32, "behind", 2, generator())
        assert found.size["people"] > 20, "the context holds more people than that"
        assert found.found > .2, f"direction {direction} leans the wrong way"
        assert target.fits(found.text)


# ------------------------------------------------------------------ chosen on what

class Spy(FastModel):
    """The model, failing when a search asks it about a test row."""
    forbidden = []

    def look(self, questions):
        assert not any(q in self.forbidden for q in questions), "chosen on a test row"

    def predict(self, questions, *where, **more):
        self.look(questions)
        return super().predict(questions, *where, **more)

    def __call__(self, prefix, questions):
        self.look(questions)
        return super().__call__(prefix, questions)


def test_prompts_are_chosen_without_test_rows_and_are_text(model, data, people):
    """Every attack; a test row is known by an age that no census row has."""
    test = [p._replace(values=("101", *p.values[1:])) for p in people.test]
    spy = copy.copy(model)
    spy.__class__ = Spy
    spy.forbidden = model.questions(test)
    target = attacks.target_of(spy, people.validation[:4], data.train)
    found = attacks.search_all(target, SMALL, 0)
    with pytest.raises(AssertionError, match="chosen on a test row"):
        attacks.report(spy, found["gcg, 6 tokens"], test)
    rest = model.ids("\n") + model.ids(adult.INSTRUCTION)
    for name, prompts in found.items():
        assert len(prompts) == (2 if " b = " in name else 1), name
        assert "age 101" not in prompts[0].text
        if name.endswith(" 6 tokens"):
            ids = model.ids(prompts[0].text)
            assert len(ids) == 6 + len(rest) and ids[6:] == rest, "no text of 6 tokens"
            again = target.gap(ids[:6])
            assert again == prompts[0].found, "not the prompt that was scored"


def test_worst_gap_counts_every_few_shot_draw(model, data, people):
    size = {**SMALL, "climbs": [], "lengths": ()}
    row = attacks.attack(model, people, data, size, 0)
    few = [e for name, e in row["attacks"].items() if " b = " in name]
    draws = [gap for entry in few for gap in entry["draws"]]
    assert len(draws) == 24
    assert row["worst"] == max(draws), "this model's worst is a few-shot prompt"
    assert row["worst"] > max(entry["gap"] for entry in few), "draws, not their mean"
    assert row["test_rows"] == 8


def test_a_search_that_no_prompt_survives_ends(target, monkeypatch):
    monkeypatch.setattr(attacks, "survives", lambda model, g: False)
    for search in attacks.TOKEN_ATTACKS.values():
        with pytest.raises(InputError, match="survives"):
            search(target, 4, 2, generator())


# ------------------------------------------------------------------ the command

def finished_run(folder, model, data):
    """A run's results.json with the model as it is, for two seeds."""
    config = {"table": 3, "prompt_only": False, "model": "tiny", "dtype": "float32",
              "data": "tiny", "rows": 8, "bpc": .5, "test_rows": 8}
    row = {"key": "not-trained", "trained": False, "g": None}
    runs.write_json(folder / "results.json", {
        "config": config, "model": {"sha256": runs.model_hash(model)},
        "data": {"source": "tiny", "sha256": data.sha256},
        "rows": [{**row, "key": "always-0", "seed": 0}, {**row, "seed": 0},
                 {**row, "seed": 1}]})
    return folder


def asked(kind):
    size = {**SMALL, "climb": 2, "tokens": 2, "draws": 1, "lengths": [6],
            "climbs": [["behind", "few", 4]]}                # lists, as in JSON
    return {"kind": kind, "size": size, "data": None, "model_path": None,
            "device": "cpu"}


def test_only_some_attacks_are_what_they_are_among_all(target):
    size = {**attacks.QUICK, "climb": 3, "tokens": 3, "lengths": (4,)}
    every = attacks.search_all(target, size, 0)
    some = attacks.search_all(target, {**size, "only": "climb"}, 0)
    assert list(some) == [name for name in every if name.startswith("climb")]
    assert all(every[name] == some[name] for name in some)


def test_results_do_not_depend_on_jobs_and_are_kept(tmp_path, model, data):
    folder = finished_run(tmp_path, model, data)
    rows = {}
    for workers in (1, 2):
        jobs = [(str(folder), "not-trained", seed, asked(str(workers)))
                for seed in (0, 1)]
        rows[workers] = runs.run_jobs(attacks.attack_model, jobs, workers)
    assert rows[1] == rows[2]
    assert rows[1][0]["attacks"] != rows[1][1]["attacks"], "seeds differ"
    saved = runs.read_json(folder / "not-trained-1" / "attacks-2.json")
    assert saved["row"] == rows[2][1]
    kept = {**saved, "row": "kept"}
    runs.write_json(folder / "not-trained-1" / "attacks-2.json", kept)
    again = attacks.attack_model(str(folder), "not-trained", 1, asked("2"))
    assert again == "kept", "a finished model was attacked again"


def test_the_table_fits_and_ends_in_the_worst(capsys):
    entry = {"gap": .1234, "signed_gap": -.1, "draws": [.1, .2]}
    rows = []
    for key in ("not-trained", "fine-tuned", "cda", "paper", "faircon", "sixth"):
        for seed in (0, 1):
            names = [name for name, *_ in attacks.plan(attacks.FULL, 600)]
            rows.append({"key": key, "seed": seed, "worst": .2, "lowest_acc": .5,
                         "attacks": dict.fromkeys(names, entry)})
    attacks.show(rows)
    print(attacks.LEGEND.format(draws=3))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 88, max(lines, key=len)
    assert sum(line.startswith("worst gap") for line in lines) >= 2
    assert any("-.100±.000" in line for line in lines)


def test_bad_input_is_one_sentence(tmp_path, model, data):
    finished_run(tmp_path, model, data)
    results = runs.read_json(tmp_path / "results.json")
    wrong = {
        "cannot be read": None, "holds no model": {}, "has no config": {
            "rows": results["rows"]},
        "is not a run of Table 3": {**results, "config": {**results["config"],
                                                          "table": 1}}}
    for said, content in wrong.items():
        folder = tmp_path / said.replace(" ", "-")
        if content is not None:
            runs.write_json(folder / "results.json", content)
        with pytest.raises(InputError, match=said) as problem:
            attacks.run(attacks.parser().parse_args([str(folder)]))
        assert "\n" not in str(problem.value)
    with pytest.raises(InputError, match="holds no nobody"):
        attacks.run(attacks.parser().parse_args([str(tmp_path), "--models", "nobody"]))


def test_the_command_ends_with_status_1_and_a_sentence(tmp_path):
    command = [sys.executable, "-m", "beyond.attacks", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("beyond.attacks: ") and done.stderr.count("\n") == 1
