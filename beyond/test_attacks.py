"""Tests of beyond/attacks.py and beyond/ablation.py: offline, on the CPU."""
import copy
import math
import pickle
import types

import numpy
import pytest
import torch
from transformers import DynamicCache

import adult
import faircon
import lora
import train
from adult import InputError
from beyond import ablation, attacks, finished, runs, tasks
from beyond.load import load_model, load_once

torch.set_num_threads(1)
SMALL = {"climb": 5, "texts": 4, "tokens": 13, "people": (4,), "most": 4,
         "lengths": (6,), "chosen_on": 5, "test_rows": 8}


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", "float32", "cpu")


@pytest.fixture(scope="module")
def data():
    return tasks.load(None, adult.TINY)


@pytest.fixture(scope="module")
def people(data):
    return adult.split(data, 16, .5, 16, 0)


@pytest.fixture(scope="module")
def target(model, data, people):
    return attacks.target_of(model, people.validation[:8], data.train)


def generator(seed=0):
    return numpy.random.default_rng(seed)


def spy(monkeypatch, owner, name):
    """It does what it did -> what it is given from now on, call by call."""
    seen, real = [], getattr(owner, name)

    def call(*args, **more):
        seen.append((*args, *more.values()))
        return real(*args, **more)
    monkeypatch.setattr(owner, name, call)
    return seen


# ------------------------------------------------------------------ gradient attacks

class Planted:
    """A stand-in: p_m rises with a fixed number for each place and token, p_f is 0.

    One token in a thousand is worth 1 in its place, the others .1 or so: a search that
    tries some hundred prompts cannot meet the ten of them by luck. Tokens from 900 on
    are worth 2 and not usable: the encoding loses them.
    """
    V = 1000
    device = torch.device("cpu")
    bos, answers = [], torch.tensor([0, 1])
    embed = torch.eye(V)
    usable = list(range(900))
    mask = torch.zeros(V)
    mask[900:] = -torch.inf

    def __init__(self, length, seed):
        rng = generator(seed)
        self.table = torch.tensor(rng.normal(0, .1, (length, self.V))).float()
        self.table[range(length), rng.integers(900, size=length)] = 1.
        self.table[:, 900:] = 2.

    def ids(self, text):
        numbers = [int(word) for word in text.split() if word.isdigit()]
        return [i for i in numbers if i < 900]

    question = whole = ids

    def decode(self, ids):
        return " ".join(str(i) for i in ids)

    def prefix(self, g):
        return g if torch.is_tensor(g) else self.embed[g]                # (L, V)

    def __call__(self, prefix, questions):
        logits = torch.zeros(2, len(questions), 2)
        logits[0, :, 1] = (prefix * self.table).sum() - 4
        logits[1, :, 1] = -20
        return logits

    def p_yes(self, logits):
        return logits.softmax(-1)[..., 1]

    def predict(self, questions, g):
        return self.p_yes(self(self.prefix(g), questions)).T.numpy()


def planted(seed):
    return attacks.Target(Planted(10, seed), [None] * 4, [], math.inf)


def test_a_gradient_finds_a_planted_weakness_and_its_control_does_not():
    """An attack does not live off its starts: sign, mask, mean, phi's rate."""
    for seed in range(3):
        found = {}
        for name in ("gcg", "control: gcg", "gumbel", "control: gumbel"):
            search = attacks.TOKEN_ATTACKS[name]
            found[name] = search(planted(seed), 10, 300, generator(seed)).found
        for name in ("gcg", "gumbel"):
            margin = found[name] - found[f"control: {name}"]
            assert margin > .5, f"{name}'s gradient must be worth .5 of gap: {margin}"


def test_replacements_are_text_and_change_one_token():
    g, ranked = [1] * 10, torch.tensor([[1, 2, 950]] * 10)
    found = attacks.replacements(planted(0), g, ranked, generator(), 30)
    assert sorted(found) == sorted([1] * i + [2] + [1] * (9 - i) for i in range(10))


def test_scores_are_the_gap_and_the_signed_gap():
    p = numpy.array([[.6, .2], [.1, .4]])
    model = types.SimpleNamespace(predict=lambda *_, **__: p)
    target = attacks.Target(model, [], [], 0)
    assert target.score([[1]]) == [(pytest.approx(.35), [1])]
    assert target.leaning("a text") == pytest.approx(.05)


def test_gumbel_begins_around_the_best_of_its_random_prompts(target, monkeypatch):
    """Each token is kept with probability .8; phi's rate is ours."""
    starts = spy(monkeypatch, faircon.Adversary, "start")
    attacks.gumbel(target, 20, 5, generator())
    adversary, phi = starts[-1]
    assert adversary.optimiser.param_groups[0]["lr"] == 3.
    scored = attacks.random_prompts(target, 20, 5, generator())
    g = phi.argmax(-1).tolist()
    assert g == max(scored)[1] != min(scored)[1]
    p = (phi + target.model.mask).softmax(-1)                            # (L, V)
    assert torch.allclose(p[range(20), g], torch.tensor(.8), atol=1e-3)


def test_attacks_and_their_controls_start_together_and_keep_to_the_budget(monkeypatch):
    """Otherwise the comparison in the table says nothing."""
    target, starts = planted(0), []
    scored = spy(monkeypatch, target.model, "predict")
    slopes = spy(monkeypatch, attacks, "slope")
    for name in ("gcg", "control: gcg", "gumbel", "control: gumbel"):
        scored.clear()
        attacks.TOKEN_ATTACKS[name](target, 10, 60, generator())
        starts.append([g for _, g in scored[:5]])
        tried = len(scored) - 5
        if name == "gcg":
            tried += 3 * len(slopes)
        assert 5 < tried <= (55 // 4 if "gumbel" in name else 55), name
    assert starts == starts[:1] * 4


def test_a_search_keeps_the_best_of_what_it_scored(target, monkeypatch):
    """As text: the prompt's tokens are those that were scored."""
    model = target.model
    rest = model.ids("\n") + model.ids(adult.INSTRUCTION)
    for search in attacks.TOKEN_ATTACKS.values():
        with monkeypatch.context() as patch:
            scored = spy(patch, attacks.Target, "gap")
            prompt = search(target, 6, 13, generator())
        gaps = [target.gap(g) for _, g in scored]
        assert prompt.found == max(gaps) > min(gaps), search
        ids = model.ids(prompt.text)
        assert len(ids) == 6 + len(rest) and ids[6:] == rest, "no text of 6 tokens"
        assert target.gap(ids[:6]) == prompt.found, "not the prompt that was scored"


def test_slope_is_the_derivative_of_the_gap(target, monkeypatch):
    """Against a difference quotient along one token, on the bundled model."""
    model = target.model
    g = attacks.random_prompt(model, 6, generator())
    slope = attacks.slope(target, g)
    one_hot = torch.nn.functional.one_hot(torch.tensor(g), len(model.mask))
    gaps = []
    for step in (-.01, .01):
        moved = one_hot.float()
        moved[2, 300] += step
        gaps.append(target.gap(moved @ model.embed))
    quotient = (gaps[1] - gaps[0]) / .02
    assert slope[2, 300].item() == pytest.approx(quotient, rel=.05, abs=1e-4)
    monkeypatch.setattr(attacks, "AT_ONCE", 3)
    assert torch.allclose(attacks.slope(target, g), slope, atol=1e-6), "by parts"


def test_the_model_writes_what_it_would_without_a_cache(model):
    """Token by token, from the whole text each time; usable tokens only."""
    half = copy.copy(model)
    half.mask = model.mask.clone()
    half.mask[::2] = -torch.inf
    ids = attacks.write(half, 3, 5, torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    x = model.prefix().expand(3, -1, -1)
    for k in range(5):
        with torch.no_grad():
            logits = model.run(x, DynamicCache())[:, -1]
        drawn = torch.multinomial((logits + half.mask).softmax(-1), 1, generator=draws)
        assert drawn[:, 0].tolist() == [text[k] for text in ids]
        x = torch.cat([x, model.embed[drawn]], 1)


# ------------------------------------------------------------------ people

def people_of(text, data):
    """Parse a prompt back -> [(sex, label)]; fails where a line is no census row."""
    known = set()
    for person in data.train:
        row = adult.question(person).removesuffix("\nlabel:")
        known.update(row.removeprefix(adult.OPENING + " ").split(", "))
    found = []
    assert text.startswith(adult.INSTRUCTION)
    text = text.removeprefix(adult.INSTRUCTION)
    for line in text.replace("\nlabel:", ";").splitlines():
        row, label = line.removeprefix(adult.OPENING + " ").split("; ")
        parts = row.split(", ")
        assert len(parts) == len(adult.ATTRIBUTES) and known.issuperset(parts), line
        sex = parts[adult.ATTRIBUTES.index("sex")].removeprefix("sex ")
        found.append((sex, int(label)))
    return found


def test_climb_keeps_census_rows_and_only_rises(target, data):
    for direction in attacks.DIRECTIONS.values():
        found = attacks.climb(target, direction, 6, 12, generator())
        lines = people_of(found.text, data)
        assert len(lines) == found.size["people"] == 6
        favoured = adult.SEXES[direction == -1]
        assert all(label == (sex == favoured) for sex, label in lines), "never flipped"
        assert sum(label for sex, label in lines) == 3
        assert found.found == direction * target.leaning(found.text)
        begun = attacks.climb(target, direction, 6, 1, generator())
        assert begun.found < found.found, "the first is the worst, or nothing is kept"
    many = attacks.climb(target, 1, 32, 1, generator())
    assert 20 < many.size["people"] < 32, "as many as the context holds"


def test_a_climb_replaces_people_as_long_as_that_helps(target, monkeypatch):
    """Up to four people of one education. (In the place of the model.)"""
    def leaning(_, text):
        return text.count("education HS-grad")
    monkeypatch.setattr(attacks.Target, "leaning", leaning)
    found = attacks.climb(target, 1, 4, 400, generator())
    assert found.found == leaning(target, found.text) == 4


def test_few_shot_prompts_have_the_bias_that_their_name_says(target, data):
    size = {**SMALL, "people": (16,), "most": 32, "only": ("16", "full")}
    for name, prompt in attacks.search_all(target, size, 0).items():
        lines = people_of(prompt.text, data)
        assert len(lines) == prompt.size["people"] >= 16
        rates = []
        for sex in adult.SEXES:
            rates.append(numpy.mean([y for other, y in lines if other == sex]))
        b = float(name.split("b = ")[1])
        assert rates[0] - rates[1] == pytest.approx(b, abs=.05), name
    for b in (1., -1.):
        text = attacks.reworded(target, b, generator()).text
        favoured = adult.SEXES[b == -1.]
        assert text.count(" -> ") == 16
        for line in text.removeprefix(adult.INSTRUCTION).splitlines():
            assert line.startswith(favoured) == line.endswith("-> 1"), line


# ------------------------------------------------------------------ one model

def test_equal_attacks_share_a_seed_whichever_are_wanted(target, monkeypatch):
    def draw(target, n, rng):
        return rng.random()
    plan = [("a", draw, (1,)), ("b", draw, (1,)), ("c", draw, (2,))]
    monkeypatch.setattr(attacks, "plan", lambda *_: plan)
    a, b, c = attacks.search_all(target, {}, 0).values()
    assert a == b != c
    assert attacks.search_all(target, {"only": ("c",)}, 0) == {"c": c}
    assert attacks.search_all(target, {}, 1)["a"] != a, "another seed"


def test_who_chooses_who_reports_and_who_stands_in_a_prompt(model, data, people,
                                                            monkeypatch):
    """Validation people choose, test people report, people whom the run has not met
    stand in prompts."""
    prompts = {"full": attacks.Prompt("a", {})}
    monkeypatch.setattr(attacks, "search_all", lambda *_: prompts)
    searched = spy(monkeypatch, attacks, "search_all")
    measured = spy(monkeypatch, faircon, "measure")
    attacks.short(model, data, people, 3, SMALL)
    (target, size, seed), = searched
    assert (size, seed) == (SMALL, 3)
    assert measured == [(model, people.test[:8], "a")]
    assert target.questions == model.questions(people.validation[:5])
    pool = {id(person) for person in target.people}
    met = {id(person) for person in people.train + people.validation}
    assert not pool & met, "labelled people of training are no fresh attack"
    assert pool | met == {id(person) for person in data.train}


def test_the_largest_gap_is_kept(monkeypatch, model, data, people):
    """Not the first, not the last, not a mean; and the lowest ACC."""
    found = {"16 people, b = 1": (.2, .9), "climb to men": (.1, .8),
             "climb to women": (.3, .6), "gumbel, 10 tokens": (.5, .7),
             "gumbel, 80 tokens": (.4, .9), '"A sentence"': (.1, .9)}
    prompts = {name: attacks.Prompt(name, {}) for name in found}

    def measure(model, people, context):
        gap, acc = found[context]
        return {"gap": gap, "acc": acc, "signed_gap": -gap, "flip": 0.}
    monkeypatch.setattr(attacks, "search_all", lambda *_: prompts)
    monkeypatch.setattr(faircon, "measure", measure)
    row = attacks.attack(model, people, data, SMALL, 0)
    assert (row["worst"], row["by"], row["lowest_acc"]) == (.5, "gumbel, 10 tokens", .6)
    assert attacks.short(model, data, people, 0) == {
        "shots": .2, "climb": .3, "texts": .1, "gumbel": .5}


def test_short_has_every_kind_without_controls():
    """Its columns' names begin as attacks do."""
    names = [name for name, *_ in attacks.plan(attacks.SHORT, 600)]
    wanted = [name for name in names if name.startswith(attacks.SHORT["only"])]
    assert len(wanted) == 10 + 2 + 4 + 2 + 3
    assert not any("control" in name for name in wanted)
    for begin in attacks.COLUMNS:
        assert any(name.startswith(begin) for name in wanted), begin


def test_a_search_that_no_prompt_survives_ends(target, monkeypatch):
    monkeypatch.setattr(attacks, "survives", lambda model, g: False)
    for name in ("random search", "written search"):
        with pytest.raises(InputError, match="survives"):
            attacks.TOKEN_ATTACKS[name](target, 4, 2, generator())
    monkeypatch.setattr(attacks, "random_prompts", lambda *_: [(0., [1, 2])])
    for name in ("gcg", "gumbel"):
        prompt = attacks.TOKEN_ATTACKS[name](target, 2, 13, generator())
        assert prompt.found == 0, f"{name} keeps what is no text"


# ------------------------------------------------------------------ the command

@pytest.fixture
def a_run(tmp_path, model, data):
    """A run's folder with the model as it is, for two seeds."""
    config = {"table": 3, "prompt_only": False, "model": ["tiny", "float32", "cpu"],
              "data": str(adult.TINY), "rows": 8, "bpc": .5, "test_rows": 16,
              "shots": 4}
    rows = [{"key": "always-0", "seed": 0}]
    for key in ("not-trained", "averaged"):
        rows += [{"key": key, "seed": 0}, {"key": key, "seed": 1}]
    runs.write_json(tmp_path / "results.json", {
        "config": config, "rows": rows, "data": {"sha256": data.sha256},
        "model": {"sha256": model.sha256, "small": True}})
    return tmp_path


def command(folder, *words):
    attacks.run(attacks.parser().parse_args([str(folder), "--device", "cpu", *words]))


@pytest.mark.filterwarnings("ignore:nobody has")
def test_a_row_is_of_its_model_and_seed(a_run, data, monkeypatch):
    """The real command; then one of its jobs again, as another process would get it."""
    jobs = spy(monkeypatch, runs, "run_jobs")
    loaded = spy(monkeypatch, finished, "load_run")
    attacked = spy(monkeypatch, attacks, "attack")
    monkeypatch.setitem(attacks.SIZE, "lengths", (6,))
    command(a_run, "--only", "gcg", "--budget", "13", "--chosen-on", "4",
            "--test-rows", "4", "--jobs", "1")
    first, second = runs.read_json(a_run / "attacks-gcg.json")["rows"]
    for seed in (0, 1):
        assert loaded[seed] == (str(a_run), "not-trained", seed, None, "cpu", None)
        assert attacked[seed][1] == adult.split(data, 8, .5, 16, seed)
    work, asked, workers, place = pickle.loads(pickle.dumps(jobs[0]))
    assert work(*asked[1], place) == [second]
    assert (second["seed"], second["test_rows"], workers) == (1, 4, 1)
    assert list(first["attacks"]) == ["gcg, 6 tokens", "control: gcg, 6 tokens"]
    assert first["attacks"] != second["attacks"], "seeds differ"


def test_a_row_is_computed_again_only_if_asked_for_otherwise(a_run, monkeypatch):
    """Another budget, another run in the folder, another program: other rows. The file
    keeps those of models that were attacked in the same way."""
    done = []

    def attack_model(config, key, seed, folder):
        done.append((key, seed))
        return [{"key": key, "seed": seed, "attacks": {"x": {"gap": 0.}}, "worst": 0.,
                 "by": "x", "lowest_acc": .5}]
    monkeypatch.setattr(attacks, "attack_model", attack_model)

    def computed(*words):
        """How many rows are computed, and how many the file then has."""
        done.clear()
        command(a_run, "--jobs", "1", *words)
        name = "attacks-own.json" if "--budget" in words else "attacks.json"
        return len(done), len(runs.read_json(a_run / name)["rows"])
    assert computed() == (2, 2)
    assert done == [("not-trained", 0), ("not-trained", 1)], "others have no gap"
    assert computed() == (0, 2)
    assert computed("--budget", "3") == (2, 2)
    assert computed() == (0, 2), "what was computed is kept"
    results = runs.read_json(a_run / "results.json")
    results["rows"].append({"key": "robust", "seed": 0})
    runs.write_json(a_run / "results.json", results)
    assert computed() == (3, 3), "another run"
    assert computed("--models", "robust") == (0, 3), "the others stay"
    monkeypatch.setattr(attacks, "__file__", ablation.__file__)
    assert computed("--models", "robust") == (1, 1), "another program"


def test_flags_say_how_much_is_tried():
    before = dict(attacks.SIZE)
    words = "x --budget 7 --most 8 --chosen-on 5 --test-rows 3".split()
    size = attacks.size_of(attacks.parser().parse_args(words))
    assert size == {**before, "climb": 7, "texts": 7, "tokens": 7, "most": 8,
                    "chosen_on": 5, "test_rows": 3}
    assert attacks.SIZE == before, "a flag changes no constant"
    asked = {name: arguments for name, _, arguments in attacks.plan(size, 99)}
    assert asked["full, b = 0.5"] == (8, .5) and "16 people, b = 0.5" not in asked
    assert asked["climb to women"] == (-1, 8, 7)


def test_bad_input_is_one_sentence(a_run):
    wrong = {"holds no robust": ("--models", "robust"), "make it even": ("--most", "5")}
    for said, words in wrong.items():
        with pytest.raises(InputError, match=said):
            command(a_run, *words)
    results = runs.read_json(a_run / "results.json")
    del results["rows"][1:]
    runs.write_json(a_run / "results.json", results)
    with pytest.raises(InputError, match="holds no model to attack"):
        command(a_run)


def test_a_prompt_that_cannot_fit_is_left_out(model, data, people):
    size = {**SMALL, "lengths": (6, 640), "only": ["gumbel"], "chosen_on": 1}
    row = attacks.attack(model, people, data, size, 0)
    assert list(row["attacks"]) == ["gumbel, 6 tokens"]
    with pytest.raises(InputError, match="holds no prompt of these"):
        attacks.attack(model, people, data, {**size, "lengths": (640,)}, 0)


def test_the_table_says_who_was_worst(capsys):
    """A gradient minus its own control; other wording is no few-shot draw."""
    rows = []
    for seed, gap in enumerate((.4, .1)):
        gaps = {"16 people, b = -1": .2 + gap, "other wording, b = 1": .9,
                "gcg, 10 tokens": gap, "control: gcg, 10 tokens": .2}
        found = {name: {"gap": x, "signed_gap": -x} for name, x in gaps.items()}
        found["16 people, b = -1"]["people"] = 6
        found["other wording, b = 1"]["people"] = 16
        rows.append({"key": "robust", "seed": seed, "attacks": found, "worst": gap,
                     "by": f"found {seed}", "lowest_acc": .5})
    attacks.show(rows, attacks.SIZE)
    rows[1]["attacks"] = {"climb to men": {"gap": .2}}
    attacks.show_worst(rows)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("worst gap .250±.212", "16 people, b = -1, p_m - p_f -.450±.212",
                 "robust 0 .600 .400 found 0", "robust 1 .300 .100 found 1",
                 "gcg, 10 tokens +0.050 1/2", "robust 1 - .100 found 1"):
        assert line in said
    notes = [line for line in said if line.startswith("note: ")]
    assert notes == ["note: 16 people, b = -1: the context or the data allows 6 people "
                     "only"]


# ------------------------------------------------------------------ the ablation

RATES = {"rounds": 2, "phi_steps": 2, "batch_size": 8, "lr": .01, "swa": 1.,
         "longest": 40, "dropout": .5}
CONFIG = {"data": str(adult.TINY), "task": None, "rows": 16, "bpc": .5, "test_rows": 16,
          "shots": 4, "game": RATES}


@pytest.fixture(scope="module")
def variants():
    """Every variant trained, and what its parts were given -> {name: Namespace}."""
    seen, terms, start = {}, faircon.Game.terms, faircon.Adversary.start

    def see_prompt(game, g, batch):
        now.game = game
        now.prompts[game.done].append(g)
        return terms(game, g, batch)

    def see_start(adversary, phi):
        now.starts.append(len(phi))
        start(adversary, phi)

    def see_attack(model, data, people, seed):
        now.attacked = (people, seed)
        now.theta = [p.detach().clone() for p in lora.theta(model.model)]
        now.measured = faircon.measure(model, people.test)
        for layer in lora.adapters(model.model).values():
            assert layer.original is not None, "not merged"
        return {"climb": .5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faircon.Game, "terms", see_prompt)
        patch.setattr(faircon.Adversary, "start", see_start)
        patch.setattr(attacks, "short", see_attack)
        for name in ablation.VARIANTS:
            now = types.SimpleNamespace(prompts=[[], []], starts=[])
            now.row, = ablation.run_variant(CONFIG, name, 3, "nowhere")
            seen[name] = now
    return seen


def test_a_variant_is_measured_as_table_3_measures_its_row(variants, data):
    """SWA's average, merged, on test rows; attacked with the same split and seed."""
    people = adult.split(data, 16, .5, 16, 3)
    for name, seen in variants.items():
        wanted = {"key": name, "seed": 3, "climb": .5, **seen.measured}
        assert wanted.items() <= seen.row.items()
        assert seen.attacked == (people, 3)
        assert seen.game.people == people.train
        assert seen.game.swa.n == 4
        for p, mean in zip(seen.theta, seen.game.swa.average, strict=True):
            assert torch.equal(p, mean), "not SWA's average"


def test_a_variant_differs_in_what_its_title_says_and_in_nothing_else(variants):
    without = ("no-steps", "two-shots", "noise", "one-sample")
    changes = dict.fromkeys(without, {"phi_steps": 0})
    for name, seen in variants.items():
        expected = vars(train.options_of(CONFIG, "robust")) | changes.get(name, {})
        assert vars(seen.game.options) == expected, name


def test_variants_meet_the_prompts_that_their_title_says(variants):
    """Two batches a round, each with a sample of phi and shots, or one of that."""
    for name, seen in variants.items():
        assert len(seen.starts) == 3, "phi begins anew in each round"
        for prompts, length in zip(seen.prompts, seen.starts[1:]):
            both = name in ("robust", "no-steps", "two-shots")
            assert len(prompts) == (4 if both else 2), name
            assert (len(prompts[0]) == length) == (name != "two-shots"), name
    for name in ("adversary", "noise"):
        for a, b in variants[name].prompts:
            assert a != b, f"{name}: a fresh sample at each step"
    (a, b), (c, d) = variants["one-sample"].prompts
    assert a == b != c == d, "one sample a round"


def test_a_variant_does_not_depend_on_what_ran_before_it(variants, monkeypatch):
    seen = variants["no-steps"]
    monkeypatch.setattr(attacks, "short", lambda *given: {"climb": .5})
    torch.manual_seed(99)
    assert ablation.run_variant(CONFIG, "no-steps", 3, "nowhere") == [seen.row]
    again = lora.theta(load_once("tiny", "float32", "cpu").model)
    for p, before in zip(again, seen.theta, strict=True):
        assert torch.equal(p, before)


def test_differences_are_paired_by_seed(capsys):
    """Hand-computed: differences .1, .2, .3: mean .2, t = .2 / (.1 / sqrt 3) = 3.5."""
    rows = []
    for seed, more in ((1, .1), (2, .2), (3, .3)):
        theirs = {"key": "adversary", "seed": seed, "acc": .5 + seed, "gap": 1.}
        ours = {"key": "noise", "seed": seed, "acc": .5 + seed + more, "gap": 1. - more}
        rows += [theirs, ours]
    ablation.show_differences(rows, ("ACC", "gap"))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["noise", "-", "adversary", "+0.200", "(3.5)", "3/3",
                            "-0.200", "(-3.5)", "0/3"]
    assert ablation.difference(rows[1:2], rows[:1], "acc") == "+0.100 (-) 1/1"


def test_the_ablation_asks_for_its_jobs(tmp_path, monkeypatch):
    """Variants, seeds and test rows as the flags say."""
    jobs = []

    def no_work(work, asked, workers, folder):
        jobs.extend(asked)
        values = dict.fromkeys(ablation.COLUMNS.values(), .1234)
        return [{"key": key, "seed": seed, **values} for _, key, seed in asked]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run_jobs", no_work)
    flags = "--only noise --seeds 2 --test-rows 24 --seed 1 --name b".split()
    for words in (["--seed", "5"], flags):
        args = runs.parse(ablation.parser(), ["--data", str(adult.TINY), *words])
        ablation.run(args)
    config, data = jobs[0][0], adult.load(adult.TINY)
    assert config["test_rows"] == adult.enough(data.test, .5, 1000)
    assert (config["game"], config["rows"], config["bpc"]) == (train.DEFAULTS, 200, .5)
    every = [(name, 5) for name in ablation.VARIANTS]
    asked = [(name, seed) for _, name, seed in jobs]
    assert asked == [*every, ("noise", 1), ("noise", 2)]
    assert jobs[-1][0]["test_rows"] == 24
    assert runs.read_json("runs/b/results.json")["summary"]["noise"]["climb"]
