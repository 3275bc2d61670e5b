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
import faircon
from adult import InputError
from beyond import attacks, runs
from beyond.fast import FastModel, load_model

HERE = pathlib.Path(__file__).resolve().parent.parent
SMALL = {
    "climb": 5,
    "tokens": 4,
    "draws": 2,
    "test_rows": 8,
    "lengths": (6,),
    "climbs": [("behind", "few", 4), ("half", "few", 4)],
}


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
    bos = []
    context = math.inf
    device = torch.device("cpu")
    answers = torch.tensor([0, 1])

    def __init__(self, length, seed):
        rng = generator(seed)
        table = rng.normal(0, .1, (length, self.V))
        best = rng.integers(self.V, size=length)
        table[range(length), best] = 1.
        self.table = torch.tensor(table).float()
        self.embed = torch.eye(self.V)
        self.mask = torch.zeros(self.V)
        self.usable = list(range(self.V))

    def ids(self, text):
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)

    def prefix(self, g):
        if torch.is_tensor(g):
            return g                                                     # (L, V)
        return self.embed[g]

    def __call__(self, prefix, questions):
        logits = torch.full((2, len(questions), self.V), -30.)
        logits[..., 0] = 0.
        worth = (prefix * self.table).sum()
        logits[0, :, 1] = worth - 4
        logits[1, :, 1] = -20
        return logits

    def p_yes(self, logits):
        p = logits[..., :2].softmax(-1)
        return p[..., 1]

    def predict(self, questions, g):
        logits = self(self.prefix(g), questions)
        return self.p_yes(logits).T.numpy()


def planted(seed):
    return attacks.Target(Planted(10, seed), [None] * 4, [], {}, math.inf)


def test_gcg_finds_a_planted_weakness_and_its_controls_do_not():
    """Guards against a gradient attack that lives off its starts: sign, mask, mean.

    The former one was no better than the same search with a random gradient.
    """
    for seed in range(3):
        stand_in = planted(seed)
        found = {}
        for search in (attacks.gcg, attacks.random_gcg, attacks.random_search):
            result = search(stand_in, 10, 300, generator(seed))
            found[search.__name__] = result.found
        control = max(found["random_gcg"], found["random_search"])
        margin = found["gcg"] - control
        assert margin > .5, f"the gradient must be worth .5 of gap, got {found}"


def test_gumbel_finds_a_planted_weakness_and_its_control_does_not():
    """The former one sampled no better than phi as it began."""
    for seed in range(3):
        stand_in = planted(seed)
        found = []
        for search in (attacks.gumbel, attacks.gumbel_no_step):
            result = search(stand_in, 10, 300, generator(seed))
            found.append(result.found)
        margin = found[0] - found[1]
        assert margin > .5, f"phi's steps are worth .5 of gap: {found}"


def test_gumbel_begins_around_its_start(target):
    """Each token kept with probability .8, the others alike."""
    model = target.model
    g = model.usable[:50]
    logits = attacks.around(model, g) + model.mask
    p = logits.softmax(-1)
    kept = p[range(50), g]
    assert torch.allclose(kept, torch.tensor(.8), atol=1e-3)
    assert (p[:, model.usable] > 0).all()


def test_attacks_and_their_controls_start_together_and_spend_alike(monkeypatch):
    """Otherwise the comparison in the table says nothing."""
    stand_in = planted(0)
    predict = stand_in.model.predict
    scored = []

    def counted(questions, g):
        scored.append(g)
        return predict(questions, g)
    monkeypatch.setattr(stand_in.model, "predict", counted)
    starts = []
    spent = []
    both = (attacks.gcg, attacks.random_gcg, attacks.gumbel, attacks.gumbel_no_step)
    for search in both:
        scored.clear()
        result = search(stand_in, 10, 60, generator())
        starts.append(result.start)
        spent.append(len(scored))
    assert len(set(starts)) == 1, starts
    assert max(spent) <= 60, f"more prompts scored than the budget: {spent}"


def test_slope_is_the_derivative_of_the_gap(target):
    """Against a difference quotient along one token, on the embedded model."""
    model = target.model
    g = attacks.random_prompt(model, 6, generator())
    slope = attacks.true_slope(target, g, None)
    one_hot = torch.nn.functional.one_hot(torch.tensor(g), len(model.mask))
    gaps = []
    for step in (-.01, .01):
        moved = one_hot.float()
        moved[2, 300] += step
        with torch.no_grad():
            logits = model(model.prefix(moved), target.questions)
        p_m, p_f = model.p_yes(logits)
        gap = (p_m - p_f).abs().mean()
        gaps.append(gap.item())
    quotient = (gaps[1] - gaps[0]) / .02
    found = slope[2, 300].item()
    assert found == pytest.approx(quotient, rel=.05, abs=1e-4)


# ------------------------------------------------------------------ people

def people_of(text, data):
    """Parse a prompt back -> [(values, label)]; fails where a line is no census row."""
    known = {}
    for column, name in enumerate(adult.COLUMNS):
        known[name] = {person.values[column] for person in data.train}
    found = []
    text = text.replace(adult.INSTRUCTION, "")
    text = text.replace("\nlabel:", ";")
    for line in text.splitlines():
        shot = line.removeprefix(adult.OPENING + " ")
        row, label = shot.split("; ")
        assert label in ("0", "1"), line
        values = {}
        parts = row.split(", ")
        for name, part in zip(adult.ATTRIBUTES, parts, strict=True):
            assert part.startswith(name + " "), part
            value = part.removeprefix(name + " ")
            assert value in known[name], f"{part!r} is in no census row"
            values[name] = value
        found.append((values, int(label)))
    return found


@pytest.mark.parametrize("place", attacks.PLACES)
def test_climb_keeps_census_rows_and_only_rises(target, data, place):
    for direction in attacks.DIRECTIONS.values():
        found = attacks.climb(target, direction, 6, place, 12, generator())
        lines = people_of(found.text, data)
        assert len(lines) == found.size["people"] == 6
        favoured = "Male" if direction == 1 else "Female"
        men = 0
        for values, label in lines:
            sex = values["sex"]
            assert label == (sex == favoured), "labels must not flip"
            men += sex == "Male"
        assert men == 3
        spent = [n for n, _, _ in found.path]
        rising = [value for _, value, _ in found.path]
        rising.insert(0, found.start)
        assert rising == sorted(rising)
        assert rising[-1] == found.found
        assert direction * target.leaning(found.text) == found.found
        assert spent == [2, 4, 12]


def test_a_move_changes_one_thing(target):
    people = adult.sample(target.people, 6, 1., generator())
    rng = generator(1)
    for _ in range(200):
        others = attacks.move(people, target.pool, rng)
        changed = [i for i in range(6) if others[i] != people[i]]
        assert len(changed) < 3
        if len(changed) == 2:
            i, j = changed
            assert others[i] == people[j], "places swapped"
            assert others[j] == people[i], "places swapped"
        else:
            before = [(p.s, p.y) for p in people]
            after = [(p.s, p.y) for p in others]
            assert after == before, "a move changed a sex or a label"


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
        for question in questions:
            assert question not in self.forbidden, "chosen on a test row"

    def predict(self, questions, *where, **more):
        self.look(questions)
        return super().predict(questions, *where, **more)

    def __call__(self, prefix, questions):
        self.look(questions)
        return super().__call__(prefix, questions)


def test_prompts_are_chosen_without_test_rows_and_are_text(model, data, people):
    """Every attack; a test row is known by an age that no census row has."""
    test = []
    for person in people.test:
        values = ("101", *person.values[1:])
        test.append(person._replace(values=values))
    spy = copy.copy(model)
    spy.__class__ = Spy
    spy.forbidden = model.questions(test)
    target = attacks.target_of(spy, people.validation[:4], data.train)
    found = attacks.search_all(target, SMALL, 0)
    with pytest.raises(AssertionError, match="chosen on a test row"):
        attacks.report(spy, found["gcg, 6 tokens"], test)
    rest = model.ids("\n") + model.ids(adult.INSTRUCTION)
    for name, prompts in found.items():
        draws = 2 if " b = " in name else 1
        assert len(prompts) == draws, name
        first = prompts[0]
        assert "age 101" not in first.text
        if name.endswith(" 6 tokens"):
            ids = model.ids(first.text)
            assert len(ids) == 6 + len(rest), "no text of 6 tokens"
            assert ids[6:] == rest, "no text of 6 tokens"
            again = target.gap(ids[:6])
            assert again == first.found, "not the prompt that was scored"


def test_worst_gap_counts_every_few_shot_draw(model, data, people, monkeypatch):
    size = {**SMALL, "climbs": [], "lengths": ()}
    accuracies, measure = [], faircon.measure

    def watch(*asked, **more):
        found = measure(*asked, **more)
        accuracies.append(found["acc"])
        return found
    monkeypatch.setattr(faircon, "measure", watch)
    row = attacks.attack(model, people, data, size, 0)
    draws = []
    means = []
    for name, entry in row["attacks"].items():
        if " b = " in name:
            draws += entry["draws"]
            means.append(entry["gap"])
    assert len(draws) == 24
    assert row["worst"] == max(draws), "this model's worst is a few-shot prompt"
    assert row["worst"] > max(means), "draws, not their mean"
    assert row["test_rows"] == 8
    assert row["lowest_acc"] == min(accuracies) < max(accuracies)
    entries = row["attacks"].values()
    assert any(entry["lowest_acc"] < entry["acc"] for entry in entries), "of draws"


def test_prompts_are_made_of_people_whom_the_run_has_not_met(model, data, people,
                                                             monkeypatch):
    pools = []
    monkeypatch.setattr(attacks, "search_all", lambda target, *_: pools.append(
        target.people) or {"none": [attacks.Prompt(adult.INSTRUCTION, {})]})
    attacks.attack(model, people, data, SMALL, 0)
    pool = {id(person) for person in pools[0]}
    met = {id(person) for person in people.train + people.validation}
    assert not pool & met, "labelled people of training are no fresh attack"
    assert len(pool) == len(data.train) - len(met)


def test_gumbel_starts_from_the_best_of_its_random_prompts(target, monkeypatch):
    phis = []
    start = faircon.Adversary.start

    def see(adversary, phi):
        phis.append(phi.clone())
        start(adversary, phi)
    monkeypatch.setattr(faircon.Adversary, "start", see)
    prompt = attacks.gumbel(target, 5, 12, generator())
    g = phis[-1].argmax(-1).tolist()
    assert target.gap(g) == prompt.start


def test_a_search_that_no_prompt_survives_ends(target, monkeypatch):
    monkeypatch.setattr(attacks, "survives", lambda model, g: False)
    for search in attacks.TOKEN_ATTACKS.values():
        with pytest.raises(InputError, match="survives"):
            search(target, 4, 2, generator())


# ------------------------------------------------------------------ the command

def finished_run(folder, model, data):
    """A run's results.json with the model as it is, for two seeds."""
    config = {
        "table": 3,
        "prompt_only": False,
        "model": "tiny",
        "dtype": "float32",
        "data": "tiny",
        "rows": 8,
        "bpc": .5,
        "test_rows": 8,
    }
    row = {"key": "not-trained", "trained": False, "g": None}
    rows = [
        {**row, "key": "always-0", "seed": 0},
        {**row, "seed": 0},
        {**row, "seed": 1},
    ]
    results = {
        "config": config,
        "model": {"sha256": runs.model_hash(model)},
        "data": {"source": "tiny", "sha256": data.sha256},
        "rows": rows,
    }
    runs.write_json(folder / "results.json", results)
    return folder


def asked(kind):
    size = {
        **SMALL,
        "climb": 2,
        "tokens": 2,
        "draws": 1,
        "lengths": [6],                                      # lists, as in JSON
        "climbs": [["behind", "few", 4]],
        "only": "g",                                         # gcg, gumbel, controls
    }
    return {
        "kind": kind,
        "size": size,
        "data": None,
        "model_path": None,
        "device": "cpu",
    }


def test_what_a_gradient_is_worth_is_the_difference_to_its_own_control(capsys):
    rows = []
    for seed, gap in enumerate((.4, .1)):
        entries = {"gcg, 10 tokens": gap, "gcg, random gradient, 10 tokens": .2,
                   "gumbel, 10 tokens": .5, "gumbel, no step, 10 tokens": .1}
        found = {name: {"gap": value} for name, value in entries.items()}
        rows.append({"key": "faircon", "seed": seed, "attacks": found})
    attacks.show_controls(rows)
    heading, gcg, gumbel = capsys.readouterr().out.strip().splitlines()
    assert gcg.split() == ["gcg,", "10", "tokens", "+0.050", "1/2"]
    assert gumbel.split() == ["gumbel,", "10", "tokens", "+0.400", "2/2"]


def test_only_some_attacks_are_what_they_are_among_all(target):
    size = {**attacks.QUICK, "climb": 3, "tokens": 3, "lengths": (4,)}
    every = attacks.search_all(target, size, 0)
    some = attacks.search_all(target, {**size, "only": "climb"}, 0)
    climbs = [name for name in every if name.startswith("climb")]
    assert list(some) == climbs
    for name in some:
        assert every[name] == some[name]


def test_results_do_not_depend_on_jobs_and_are_kept(tmp_path, model, data):
    folder = finished_run(tmp_path, model, data)
    rows = {}
    for workers in (1, 2):
        wanted = asked(str(workers))
        jobs = [(str(folder), "not-trained", seed, wanted) for seed in (0, 1)]
        rows[workers] = runs.run_jobs(attacks.attack_model, jobs, workers)
    assert rows[1] == rows[2]
    first, second = rows[2]
    assert first["attacks"] != second["attacks"], "seeds differ"
    file = folder / "not-trained-1" / "attacks-2.json"
    saved = runs.read_json(file)
    assert saved["row"] == second
    kept = {**saved, "row": "kept"}
    runs.write_json(file, kept)
    again = attacks.attack_model(str(folder), "not-trained", 1, asked("2"))
    assert again == "kept", "a finished model was attacked again"


def test_the_table_fits_and_ends_in_the_worst(capsys):
    entry = {"gap": .1234, "signed_gap": -.1, "draws": [.1, .2]}
    names = [name for name, *_ in attacks.plan(attacks.FULL, 600)]
    row = {
        "worst": .2,
        "lowest_acc": .5,
        "attacks": dict.fromkeys(names, entry),
    }
    rows = []
    for key in ("not-trained", "fine-tuned", "cda", "paper", "faircon", "sixth"):
        for seed in (0, 1):
            rows.append({**row, "key": key, "seed": seed})
    attacks.show(rows)
    print(attacks.LEGEND.format(draws=3))
    out = capsys.readouterr().out
    lines = out.splitlines()
    widest = max(lines, key=len)
    assert len(widest) <= 88, widest
    worst = [line for line in lines if line.startswith("worst gap")]
    assert len(worst) >= 2
    assert "-.100±.000" in out


def test_nothing_that_fits_is_one_sentence(model, data, people):
    size = {**SMALL, "lengths": (640,), "only": "gumbel"}
    with pytest.raises(InputError, match="context"):
        attacks.attack(model, people, data, size, 0)


def test_bad_input_is_one_sentence(tmp_path, model, data):
    finished_run(tmp_path, model, data)
    results = runs.read_json(tmp_path / "results.json")
    table_1 = {**results["config"], "table": 1}
    wrong = {
        "cannot be read": None,
        "holds no model": {},
        "has no config": {"rows": results["rows"]},
        "is not a run of Table 3": {**results, "config": table_1},
    }
    for said, content in wrong.items():
        folder = tmp_path / said.replace(" ", "-")
        if content is not None:
            runs.write_json(folder / "results.json", content)
        args = attacks.parser().parse_args([str(folder)])
        with pytest.raises(InputError, match=said) as problem:
            attacks.run(args)
        assert "\n" not in str(problem.value)
    words = [str(tmp_path), "--models", "nobody"]
    args = attacks.parser().parse_args(words)
    with pytest.raises(InputError, match="holds no nobody"):
        attacks.run(args)


def test_the_command_ends_with_status_1_and_a_sentence(tmp_path):
    nothing = str(tmp_path / "nothing")
    command = [sys.executable, "-m", "beyond.attacks", nothing]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("beyond.attacks: ")
    assert done.stderr.count("\n") == 1
