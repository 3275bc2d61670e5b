"""The lessons' tests, in the paper's order. Offline, on a CPU, in about a minute.

    equals a reference    a library, or the definition by brute force; gradients too
    identities            what must be exactly so, or must not change at all
    the other way         what must NOT happen: a leak, a moved weight, a silent NaN

A test's name is a claim, its message what a failure means. Skipped, saying so, where
they are missing: the published Adult files, GPT-2's tokenizer, peft.

    pytest -q test_faircon.py
"""
import ast
import copy
import dataclasses
import errno
import hashlib
import http.client
import io
import json
import math
import pathlib
import re
import socket

import numpy
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import adult
import faircon
import gumbel
import lora
import metrics
import swa
from adult import InputError
from beyond import runs

HERE = pathlib.Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "adult"
GPT2 = HERE.parent / "shared" / "gpt2_tokenizer"
LESSONS = ("faircon", "lora", "gumbel", "swa", "adult", "metrics")      # slowest first
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
USUAL = dataclasses.asdict(faircon.Options())
SMALL = {
    **USUAL,
    "rounds": 2,
    "batch_size": 4,
    "prompt_length": 6,
    "adversaries": 2,
    "phi_steps": 2,
    "phi_lr": .3,
    "labelled": False,
    "renew": False,
}
needs_real = pytest.mark.skipif(not (REAL / "adult.data").exists(),
                                reason="the published Adult files are not there")
needs_gpt2 = pytest.mark.skipif(not (GPT2 / "vocab.json").exists(),
                                reason="GPT-2's tokenizer is not there")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # small tensors: threads would only wait
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return adult.load(adult.TINY)


@pytest.fixture(scope="module")
def loaded():
    network = AutoModelForCausalLM.from_pretrained(adult.TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(adult.TINY)
    return faircon.LanguageModel(network.eval(), tokenizer)


@pytest.fixture()
def model(loaded):
    """The embedded model, without adapters before and after."""
    lora.remove(loaded.model)
    yield loaded
    lora.remove(loaded.model)


def people_of(data, n, bpc=0., seed=0):
    rng = numpy.random.default_rng(seed)
    return adult.sample(data.train, n, bpc, rng)


def game_of(model, people, seed=0, **given):
    """A tiny game on fresh adapters."""
    options = faircon.Options(**{**SMALL, **given})
    lora.inject(model.model, 4, 16., options.dropout, seed)
    return faircon.Game(model, people, options, seed)


def encode(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


def alike(ours, reference):
    """Equal but for rounding."""
    return torch.allclose(ours, reference, atol=1e-4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shake(parameters, std=.1):
    """Random weights: where B = 0, LoRA hides every mistake."""
    generator = seeded(7)
    for p in parameters:
        p.data.normal_(std=std, generator=generator)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def same(some, others):
    """Bit for bit."""
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def close(ours, reference, share=1e-3):
    """Equal up to a thousandth of the largest number, which is not 0."""
    largest = reference.abs().max()
    furthest = (ours - reference).abs().max()
    return bool(largest > 0) and bool(furthest < share * largest)


def spy(monkeypatch, thing, name, see):
    """Show `see` each call of a method, its result last, for one test."""
    method = getattr(thing, name)

    def seen(*given):
        result = method(*given)
        see(*given, result)
        return result
    monkeypatch.setattr(thing, name, seen)


# ------------------------------------------------------------------ 1.1 Fairness

def test_metrics_by_hand():
    p = [[.9, .4], [.2, .6], [.3, .3], [.8, .6], [.1, .4], [.6, .3]]
    y = [1, 1, 0, 0, 0, 1]
    s = [0, 1, 0, 1, 1, 0]                             # so yhat is 1, 1, 0, 1, 0, 1
    by_hand = {
        "acc": 5 / 6,
        "dpd": 2 / 3 - 2 / 3,
        "deo": .5 + 0.,
        "positives": 4 / 6,
        "gap": (.5 + .4 + 0 + .2 + .3 + .3) / 6,
        "flip": 3 / 6,
        "signed_gap": (.5 - .4 + 0 + .2 - .3 + .3) / 6,
    }
    assert metrics.evaluate(p, y, s) == pytest.approx(by_hand)


@pytest.mark.parametrize("favoured", [0, 1])
def test_deo_is_a_sum_and_dpd_has_no_sign(favoured):
    s = numpy.array([0, 0, 0, 0, 1, 1, 1, 1])
    y = numpy.array([1, 1, 0, 0, 1, 1, 0, 0])
    yhat = numpy.array([1, 1, 1, 0, 1, 0, 0, 0])
    s = abs(s - favoured)
    assert metrics.dpd(yhat, s) == .75 - .25
    deo = (1 - .5) + (.5 - 0)
    assert metrics.deo(yhat, y, s) == deo, "Eq. (2) is neither a maximum nor a mean"


def test_nothing_measured_is_not_fair():
    nobody = numpy.zeros(3, int)
    with pytest.warns(UserWarning, match="nobody has s=1"):
        dpd = metrics.dpd(nobody, nobody)
    assert math.isnan(dpd)
    y = numpy.array([0, 0, 1])
    s = numpy.array([0, 1, 1])
    with pytest.warns(UserWarning, match="nobody has s=0, y=1"):
        deo = metrics.deo(nobody, y, s)
    assert math.isnan(deo)
    p = [[.5, math.nan], [.1, .2]]
    with pytest.warns(UserWarning, match="NaN"):
        found = metrics.evaluate(p, [0, 1], [0, 1])
    assert all(map(math.isnan, found.values())), "NaN would pass for always answering 0"


def test_bootstrap_draws_a_person_with_their_twin():
    rng = numpy.random.default_rng(0)
    p = rng.random((200, 1)).repeat(2, 1)                        # no twin differs
    y = rng.integers(2, size=200)
    s = rng.integers(2, size=200)
    intervals = metrics.bootstrap(p, y, s, 50)
    assert intervals["gap"] == [0, 0]
    low, high = intervals["acc"]
    assert low < metrics.evaluate(p, y, s)["acc"] < high


# ------------------------------------------------------------------ 2 Data

@needs_real
@pytest.mark.parametrize("as_released, b, ratio", [(True, .1312, 5.23),
                                                   (False, .1945, 3.18)])
def test_the_papers_base_rates_come_from_a_label_bug(as_released, b, ratio):
    people = adult.read(REAL / "adult.data")
    test = adult.read(REAL / "adult.test")
    if as_released:
        test = [p._replace(y=0) for p in test]
    people += test
    found_b, found_ratio = adult.base_rates(people)
    found = (len(people), round(found_b, 4), round(found_ratio, 2))
    assert found == (48842, b, ratio)


def test_cells_and_samples_are_exact(data):
    wanted = {(0, 1): 75, (0, 0): 25, (1, 1): 25, (1, 0): 75}
    people = people_of(data, 200, .5)
    cells = [(p.s, p.y) for p in people]
    found = {cell: cells.count(cell) for cell in wanted}
    assert adult.cells(200, .5) == wanted
    assert found == wanted
    assert adult.base_rates(people) == (.5, 1.)
    assert len(set(map(id, people))) == 200, "somebody was drawn twice"
    with pytest.warns(UserWarning, match="b_Pc = 0.25 is used"):
        adult.cells(16, .3)
    refused = [
        (200, 1.1, "impossible"),
        (7, 0., "even"),
        (99_992, 0., "fewer rows"),
        (99_992, None, "fewer"),
    ]
    for n, bpc, why in refused:
        with pytest.raises(InputError, match=why):
            people_of(data, n, bpc)


def test_split_measures_nobody_it_has_seen(data):
    people = adult.split(data, 80, .5, 40, seed=3)
    train = set(map(id, data.train))
    test = set(map(id, data.test))
    chosen = set(map(id, people.train + people.validation))
    measured = set(map(id, people.test + people.test_bpc))
    assert chosen <= train, "adult.test is for the reported numbers"
    assert len(chosen) == 80 + 100, "a validation row is a training row"
    assert measured <= test
    rates = [adult.base_rates(some)[0] for some in people]
    assert rates == [.5, 0., 0., .5]
    assert people == adult.split(data, 80, .5, 40, seed=3)
    other = adult.split(data, 80, .5, 40, seed=4)
    assert people.train != other.train


def test_twins_differ_in_sex_alone_and_hold_no_answer(data):
    for person in data.test[:200]:
        x_m, x_f = adult.twins(person)
        assert x_m.count("sex Male") == 1
        assert x_m.endswith("\nlabel:")
        assert x_m.replace("sex Male", "sex Female") == x_f
        own = (x_m, x_f)[person.s]
        assert adult.text(person) == own, "not the person's own sex"
        other = person._replace(y=1 - person.y)
        assert adult.text(person) == adult.text(other), "the text knows the answer"
        assert adult.answer(person) != adult.answer(other)
        assert "Husband" not in x_m, "relationship is sex"
        assert "Wife" not in x_m, "relationship is sex"


@pytest.mark.parametrize("counterbalance, b", [(True, 0.), (False, .5)])
def test_few_shot_prompts_have_their_bias(data, counterbalance, b):
    rng = numpy.random.default_rng(0)
    prompt = adult.few_shot(data.train, 16, .5, rng, counterbalance)
    shots = re.findall(r"sex (\w+),[^\n]*\nlabel: ([01])\n", prompt)
    men = [int(y) for sex, y in shots if sex == "Male"]
    women = [int(y) for sex, y in shots if sex == "Female"]
    assert prompt.startswith(adult.INSTRUCTION)
    assert len(men) == len(women) == 8
    assert numpy.mean(men) - numpy.mean(women) == b
    as_men = prompt.replace("sex Female", "sex Male")
    lines = as_men.splitlines()[1:]
    in_pairs = all(lines.count(line) % 2 == 0 for line in lines)
    assert counterbalance == in_pairs


ROW = ("39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, "
       "Not-in-family, White, Male, 2174, 0, 40, United-States, >50K.\n")


def test_reading_forgives_what_is_harmless(tmp_path):
    path = tmp_path / "bom"
    poor = ROW.replace(">50K.", "<=50K")
    content = "|1x3 Cross validator\n" + ROW + "\n" + poor
    path.write_text(content, encoding="utf-8-sig")
    labels = [p.y for p in adult.read(path)]
    assert labels == [1, 0], "the full stop of adult.test is no label"


@pytest.mark.parametrize("content, why", [
    (ROW.replace(" White", " "), "line 2: an empty cell"),
    (ROW.replace(" White", ' "White'), "quote"),
    (ROW.replace(" White,", ""), "line 2: 14 columns"),
    (ROW.replace(" Male", " M"), "column order"),
    (ROW.replace(" >50K.", " yes"), "column order"),
    ("age" + ROW[2:], "a header"),
])
def test_reading_refuses_what_is_not_adult(content, why, tmp_path):
    path = tmp_path / "adult.csv"
    path.write_text(ROW + content)
    with pytest.raises(InputError, match=why):
        adult.read(path)
    with pytest.raises(InputError, match="is a file"):
        adult.load(path)
    with pytest.raises(InputError, match="not exist"):
        adult.load(tmp_path)


@pytest.fixture()
def uci(monkeypatch, tmp_path):
    """UCI sends tiny/'s files and the cache is empty -> (what was fetched, cache)."""
    asked = []
    cache = tmp_path / "cache"

    def fetch(url):
        asked.append(url)
        name = url.split("/")[-1]
        return (adult.TINY / name).read_bytes()
    for name in adult.SHA256:
        content = fetch(name)
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(adult.SHA256, name, digest)
    asked.clear()
    monkeypatch.setattr(adult, "fetch", fetch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return asked, cache / "faircon"


def test_a_download_is_checked_and_kept(uci, monkeypatch):
    asked, cache = uci
    for _ in range(2):
        found = adult.load()
        assert found.source == "UCI Adult"
        assert found.sha256 == adult.SHA256
        assert len(found.train) == 8000
        assert len(found.test) == 4000
    once = [adult.UCI + name for name in adult.SHA256]
    assert asked == once, "kept, yet fetched"
    kept = cache / "adult.data"
    kept.write_bytes(b"damaged")
    with pytest.raises(InputError, match="do not have UCI's checksums"):
        adult.load()
    kept.unlink()
    monkeypatch.setitem(adult.SHA256, "adult.test", "0" * 64)
    with pytest.raises(InputError, match="sent has a wrong checksum"):
        adult.load()


def test_a_download_cut_in_the_middle_leaves_nothing(uci, monkeypatch):
    _, cache = uci
    fetch = adult.fetch

    def cut(url):
        if url.endswith("test"):
            raise http.client.IncompleteRead(b"39, Sta", 1000)
        return fetch(url)
    monkeypatch.setattr(adult, "fetch", cut)
    source = adult.load().source
    assert re.search("SYNTHETIC.*IncompleteRead", source)
    left = list(cache.glob("*"))
    assert not left, "the next run would take it for the data"


def test_what_cannot_be_kept_is_used_all_the_same(uci, monkeypatch):
    """A full disk, then a place where no folder can be made."""
    _, cache = uci

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, "no space left")
    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    found = adult.load()
    assert re.match(r"UCI Adult \(not kept: .* no space left", found.source)
    assert len(found.train) == 8000
    assert not list(cache.glob("*"))
    no_folder = adult.TINY / "adult.data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_folder))
    found = adult.load()
    assert "not kept" in found.source
    assert len(found.train) == 8000


@pytest.mark.parametrize("has_home", [True, False])
def test_behind_a_proxy_only_the_proxy_is_asked(monkeypatch, tmp_path, has_home):
    """Looking UCI up oneself takes minutes there. The true reason must be named."""
    looked_up = set()
    look_up = socket.getaddrinfo

    def watched(host, *more, **named):
        looked_up.add(host)
        return look_up(host, *more, **named)

    def homeless():
        raise RuntimeError("Could not determine home directory.")
    for name in PROXIES:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("https_proxy", closed_port())
    monkeypatch.setattr(socket, "getaddrinfo", watched)
    if has_home:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(pathlib.Path, "home", homeless)
    source = adult.load().source
    assert re.search("SYNTHETIC.*Connection refused", source)
    assert looked_up == {"127.0.0.1"}, "something went around the proxy"


def closed_port():
    """An address on this machine where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        _, port = closed.getsockname()
        return f"http://127.0.0.1:{port}"


# ------------------------------------------------------------------ 3.1 f_theta

def by_brute_force(model, before, person):
    """Logits (2, V) of each twin's whole text, token ids through the front door."""
    found = []
    for x in adult.twins(person):
        question = encode(model, x + " 0")[:-1]
        ids = torch.tensor([before + question])
        logits = model.model(input_ids=ids).logits
        found.append(logits[0, -1])
    return torch.stack(found)


@torch.no_grad()
def test_f_theta_is_the_models_answer_to_the_whole_text(model, data):
    """Texts of different lengths in one batch: padding must change nobody's answer."""
    people = people_of(data, 8)
    for k in (4, 5, 6, 7):                     # a longer country than any of Adult's
        values = [*people[k].values[:-1], "Saint Vincent and the Grenadines"]
        people[k] = people[k]._replace(values=tuple(values))
    questions = model.questions(people)
    assert len(questions[0][0]) < len(questions[-1][0])
    rng = numpy.random.default_rng(0)
    shots = adult.few_shot(data.train, 4, 1., rng)
    g = model.usable[5:12]
    instruction = encode(model, adult.INSTRUCTION)
    newline = encode(model, "\n")
    cases = [
        (model.prefix(), instruction),
        (model.prefix(g), g + newline + instruction),
        (model.prefix(context=shots), encode(model, shots)),
    ]
    for prefix, before in cases:
        logits = model(prefix, questions)
        for i, person in enumerate(people):
            whole = by_brute_force(model, before, person)
            assert alike(logits[:, i], whole)
    p = logits.softmax(-1)[..., model.answers]                           # (2, B, 2)
    no, yes = p.unbind(-1)                                               # (2, B)
    predicted = model.predict(questions, context=shots, batch=4)         # (B, 2)
    predicted = torch.tensor(predicted).float()
    assert alike(predicted.T, yes / (yes + no))


def test_a_prompt_of_one_hot_rows_has_the_right_gradient(model, data):
    """One text at a time, unpadded: phi must follow the model's own gradient."""
    people = people_of(data, 4)
    text = model.usable[:5]
    one_hot = F.one_hot(torch.tensor(text), len(model.embed))
    one_hot = one_hot.float().requires_grad_()
    logits = model(model.prefix(one_hot), model.questions(people))
    total = logits.log_softmax(-1)[..., 9].sum()
    ours, = torch.autograd.grad(total, one_hot)
    g = model.embed[text].detach().requires_grad_()
    total = 0.
    for person in people:
        for x in adult.twins(person):
            ids = encode(model, "\n" + adult.INSTRUCTION + x)
            embeds = torch.cat([g, model.embed[ids]])
            logits = model.model(inputs_embeds=embeds[None]).logits
            total = total + logits[0, -1].log_softmax(-1)[9]
    by_hand, = torch.autograd.grad(total, g)                             # (5, D)
    assert close(ours, by_hand @ model.embed.T)


def test_write_samples_what_a_plain_forward_says(model):
    ours = model.write(2, 6, seeded(3))
    generator = seeded(3)
    instruction = encode(model, adult.INSTRUCTION)
    ids = torch.tensor([instruction] * 2)
    for _ in range(6):
        logits = model.model(input_ids=ids).logits[:, -1]
        p = (logits + model.mask).softmax(-1)
        token = torch.multinomial(p, 1, generator=generator)
        ids = torch.cat([ids, token], 1)
    assert ours == ids[:, -6:].tolist()


def test_usable_tokens_are_text(model):
    for i in model.usable:
        again = encode(model, model.decode([i]))
        assert again == [i], "this prompt cannot be typed"
    allowed = (model.mask == 0).nonzero()
    allowed = allowed.flatten().tolist()
    assert allowed == model.usable
    assert len(allowed) > 500


def test_a_broken_model_gives_no_numbers(model, data):
    network = copy.deepcopy(model.model)
    weight = network.transformer.h[0].mlp.c_fc.weight
    weight.data[0, 0] = math.nan
    broken = faircon.LanguageModel(network, model.tokenizer)
    questions = broken.questions(people_of(data, 4))
    with pytest.raises(InputError, match="NaN"):
        broken.predict(questions)


def splitting_tokenizer():
    """tiny/'s, but " 0" is " ", "0" (as in Llama's), and "!" begins every text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    path = adult.TINY / "tokenizer.json"
    described = json.loads(path.read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    number = described["model"]["vocab"]["!"]
    bos = {"id": "!", "ids": [number], "tokens": ["!"]}
    first = {"SpecialToken": {"id": "!", "type_id": 0}}
    template = described["post_processor"]
    template["special_tokens"] = {"!": bos}
    template["single"].insert(0, first)
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def test_a_tokenizer_that_splits_digits_and_begins_texts(model, data):
    other = faircon.LanguageModel(model.model, splitting_tokenizer())
    assert other.decode(other.answers.tolist()) == "01"
    people = people_of(data, 4)
    questions = other.questions(people)
    ends = set()
    for x_m, x_f in questions:
        ends |= {x_m[-1], x_f[-1]}
    assert other.decode(list(ends)) == " ", "the space belongs to the question"
    bos = encode(other, "!")
    newline = encode(other, "\n")
    instruction = encode(other, adult.INSTRUCTION)
    cases = [
        (faircon.CLEAN, bos),
        ([5], [*bos, 5, *newline]),
    ]
    for g, before in cases:
        logits = other(other.prefix(g), questions)
        for i, person in enumerate(people):
            whole = by_brute_force(other, before + instruction, person)
            assert alike(logits[:, i], whole)


@needs_gpt2
def test_gpt2_tokenizer_answers_and_context_limit(data):
    from transformers import GPT2Tokenizer, GPTNeoConfig, GPTNeoForCausalLM
    vocabulary = str(GPT2 / "vocab.json")
    merges = str(GPT2 / "merges.txt")
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges)
    config = GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2,
                          attention_types=[[["global", "local"], 1]],
                          max_position_embeddings=128)
    network = GPTNeoForCausalLM(config).eval()
    model = faircon.LanguageModel(network, tokenizer)
    assert model.answers.tolist() == [657, 352]
    assert len(model.usable) > 45_000
    person = data.test[0]
    questions = model.questions([person])
    before = [5, 6] + encode(model, "\n" + adult.INSTRUCTION)
    whole = by_brute_force(model, before, person)
    logits = model(model.prefix([5, 6]), questions)
    assert alike(logits[:, 0], whole)
    with pytest.raises(InputError, match="context"):
        model.predict(questions, [5] * 128)


# ------------------------------------------------------------------ 3.1 Eq. (3)

def test_distance_is_the_mean_of_unsquared_norms():
    logits = torch.randn(2, 4, 9, generator=seeded(0))
    men, women = logits.softmax(-1).tolist()
    norms = [math.dist(p_m, p_f) for p_m, p_f in zip(men, women)]
    answers = torch.tensor([3, 5])
    found = faircon.distance(logits, answers, log_odds=False).item()
    assert found == pytest.approx(sum(norms) / 4, abs=1e-5)


def test_distance_of_log_odds_bounds_the_gap():
    answers = torch.tensor([3, 5])
    for scale in (.1, 1., 9.):
        logits = scale * torch.randn(2, 4, 9, generator=seeded(0))
        p = logits.softmax(-1).double()[..., answers]                    # (2, 4, 2)
        odds = (p[..., 1] / p[..., 0]).log()
        found = faircon.distance(logits, answers).item()
        assert found == pytest.approx((odds[0] - odds[1]).abs().mean().item(), abs=1e-4)
        p_yes = p[..., 1] / p.sum(-1)                # as LanguageModel.p_yes has it
        assert (p_yes[0] - p_yes[1]).abs().mean() <= found / 4 + 1e-6


@pytest.mark.parametrize("log_odds", [True, False])
def test_distance_has_a_slope_where_twins_agree(log_odds):
    twins = torch.randn(1, 4, 9, generator=seeded(0)).expand(2, -1, -1).clone()
    twins.requires_grad_()
    distance = faircon.distance(twins, torch.tensor([3, 5]), log_odds)
    distance.backward()
    assert distance < 2e-4
    assert twins.grad.isfinite().all()


def test_task_reads_the_twin_that_is_the_person(data):
    people = people_of(data, 8)
    answers = torch.tensor([3, 5])
    logits = torch.randn(2, 8, 9, generator=seeded(0))
    by_hand = []
    for i, person in enumerate(people):
        p = logits[person.s, i].softmax(-1)
        answer = answers[person.y]
        by_hand.append(-math.log(p[answer]))
    found = faircon.task(logits, people, answers).item()
    assert found == pytest.approx(numpy.mean(by_hand), abs=1e-5)
    other_twins = [1 - p.s for p in people]
    logits[other_twins, range(8)] += 9 * torch.rand(8, 9)
    again = faircon.task(logits, people, answers).item()
    assert again == found, "the other twin has no label"


# ------------------------------------------------------------------ 3.2 Gumbel

@pytest.mark.parametrize("tau", [.5, 1., 2.])
def test_gumbel_softmax_is_the_librarys(tau):
    generator = seeded(1)
    logits = torch.randn(7, 50, generator=generator)
    weight = torch.randn(7, 50, generator=generator)
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    torch.manual_seed(3)
    sample = gumbel.gumbel_softmax(ours, tau)
    torch.manual_seed(3)                                     # the same noise
    reference = F.gumbel_softmax(theirs, tau, hard=True)
    assert torch.equal(sample, reference), "the forward pass must agree bit for bit"
    (sample * weight).sum().backward()
    (reference * weight).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)
    assert ours.grad.norm() > .1


def test_a_sample_is_one_token_and_follows_the_distribution():
    """20,000 draws: the margin of 1.5 % is four standard deviations."""
    p = torch.tensor([.6, .3, .1])
    logits = p.log().expand(20_000, 3)
    x = gumbel.gumbel_softmax(logits, 1., seeded(0))
    tokens = x.argmax(-1)
    share = tokens.bincount() / 20_000
    assert (share - p).abs().max() < .015
    one_hot = F.one_hot(tokens, 3)
    assert (x - one_hot).abs().max() < 1e-6, "a mixture of tokens is no prompt"
    for tau in (0., -1., math.nan):
        with pytest.raises(ValueError, match="tau"):
            gumbel.gumbel_softmax(p, tau)


# ------------------------------------------------------------------ phi, Eq. (3), (4)

def next_scores(adversary):
    """phi + Gumbel noise (L, V) of the adversary's next sample."""
    generator = torch.Generator()
    generator.set_state(adversary.generator.get_state())
    phi = adversary.phi.detach()
    noise = torch.empty(phi.shape).exponential_(generator=generator)
    return phi + adversary.model.mask - noise.log()


def upward(adversary, questions):
    """d unfairness / d phi by hand: the softmax's derivative times the prompt's."""
    model = adversary.model
    tau = adversary.options.tau
    scores = next_scores(adversary)                                      # (L, V)
    sample = F.one_hot(scores.argmax(-1), scores.shape[1])
    sample = sample.float().requires_grad_()
    logits = model(model.prefix(sample), questions)
    f_m, f_f = outputs(model, logits, adversary.options.log_odds)        # (B, K)
    unfair = (f_m - f_f).norm(dim=-1).mean()
    slope, = torch.autograd.grad(unfair, sample)
    sigma = (scores / tau).softmax(-1)
    mean = (sigma * slope).sum(-1, keepdim=True)
    return sigma * (slope - mean) / tau


@pytest.mark.parametrize("sign, log_odds", [(1, True), (-1, True), (1, False)])
def test_phi_steps_up_eq_3_or_down_eq_4_and_moves_alone(model, data, sign, log_odds):
    """sign +1 is the argmax of Eq. (3), -1 the min of Eq. (4)."""
    game = game_of(model, people_of(data, 4), tau=.7, log_odds=log_odds)
    shake(game.theta)
    adversary = faircon.Adversary(model, game.options, game.generator, sign)
    weights = copies(model.model.state_dict().values())
    phi = adversary.phi.detach().clone()
    up = upward(adversary, game.questions)
    assert 0 < adversary.step(game.questions) < math.sqrt(2)
    gradient = adversary.phi.grad
    assert close(-sign * gradient, up, .01), "not the unfairness's gradient"
    moved = adversary.phi.detach() - phi
    steep = up.abs() > .01 * up.abs().max()
    wanted = sign * game.options.phi_lr * up.sign()
    assert torch.allclose(moved[steep], wanted[steep], rtol=1e-3), "the wrong way"
    for p in model.model.parameters():
        assert p.grad is None, "theta is frozen"
    assert same(model.model.state_dict().values(), weights)


class Planted(faircon.LanguageModel):
    """Token 0 makes it favour men, token 1 women, smoothly; six more do nothing."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.answers = torch.tensor([0, 1])
        self.usable = list(range(8))
        self.mask = torch.zeros(8)
        self.embed = torch.zeros(8, 1)                                   # (V, 1)
        self.embed[0] = 1.
        self.embed[1] = -1.

    def prefix(self, g, **_):
        return g @ self.embed                                            # (L, 1)

    def __call__(self, prefix, questions):
        lean = 3 * prefix.mean()
        yes = torch.stack([lean, -lean])[:, None]
        yes = yes.expand(2, len(questions))
        no = torch.zeros_like(yes)
        return torch.stack([no, yes], -1)                                # (2, B, 2)


@pytest.mark.parametrize("sign, low, high", [(1, .8, 1.1), (-1, -.15, .15)])
def test_many_steps_find_what_is_planted(sign, low, high):
    """From a prompt that leans to men by .3; over 40 seeds all ends lie within .02."""
    options = faircon.Options(prompt_length=20, phi_lr=.3)
    adversary = faircon.Adversary(Planted(), options, seeded(0), sign)
    phi = torch.zeros(20, 8)
    phi[:, 0] = 1.5
    adversary.start(phi)
    for _ in range(100):
        adversary.step([0])
    p = adversary.phi.softmax(-1)
    lean = (p @ adversary.model.embed).mean().item()
    assert low < lean < high


def test_both_twins_see_the_same_sample(model, data):
    """Else the distance would be between two prompts, not two sexes."""
    game = game_of(model, people_of(data, 4))
    for twins in game.questions:
        twins[1] = twins[0]
    unfair = game.adversaries[0].step(game.questions)
    assert unfair < 2e-4
    _, distance = game.theta_step(range(4))
    assert distance < 2e-4


def test_phi_attacks_the_merged_model_without_dropout(model, data, monkeypatch):
    game = game_of(model, people_of(data, 8), dropout=.5)
    seen = []
    shake(game.theta)
    layers = lora.adapters(model.model).values()
    x = torch.arange(9)[None]
    base = copies(layer.base.weight for layer in layers)

    def see(*_):
        for layer in layers:
            assert layer.original is not None, "not merged"
        seen.append(model.model(x).logits)
    for adversary in game.adversaries:
        spy(monkeypatch, adversary, "step", see)
    game.round()
    assert len(seen) == 4, "theta or dropout moved"
    assert same(seen, seen[:1] * 4), "theta or dropout moved"
    for layer in layers:
        assert layer.original is None, "still merged"
    now = [layer.base.weight for layer in layers]
    assert same(now, base)


@pytest.mark.parametrize("renew", [False, True])
def test_phi_goes_on_or_begins_anew_at_a_length_of_its_own(model, data, renew):
    game = game_of(model, people_of(data, 8), renew=renew, prompt_length=60)
    sizes = set()
    steps = []
    moved = []
    for _ in range(6):
        before = game.adversaries[0].phi.detach().clone()
        game.phi_half()
        adversary = game.adversaries[0]
        adam = adversary.optimiser.state_dict()["state"][0]
        steps.append(adam["step"].item())
        sizes.add(len(adversary.phi))
        if len(before) == len(adversary.phi):
            furthest = (adversary.phi - before).abs().max()
            moved.append(furthest.item())
    if renew:
        assert steps == [2] * 6, "Adam must begin anew"
        assert len(sizes) > 3
        assert max(sizes) <= 60
    else:
        assert steps == [2, 4, 6, 8, 10, 12], "forgotten"
        assert sizes == {60}, "forgotten"
        assert max(moved) < 3 * game.options.phi_lr, "phi goes on where it was"


def test_lengths_are_any_number_and_any_order_of_magnitude(model, data):
    """400 draws; expected above 280: 30.5 %, below 24: 27 %. Margins: over 4 sigma."""
    game = game_of(model, people_of(data, 4), prompt_length=560)
    draws = [game.some_length() for _ in range(400)]
    lengths = numpy.array(draws)
    assert lengths.min() >= 1
    assert lengths.max() <= 560
    long = (lengths > 280).mean()
    short = (lengths < 24).mean()
    assert abs(long - .305) < .1
    assert short > .15


def test_rows_are_training_rows_whose_labels_all_favour_one_sex(model, data):
    """b_Pc of every prompt is 1 or -1; they end with a whole row; both occur."""
    people = people_of(data, 8)
    game = game_of(model, people, labelled=True, prompt_length=300)
    seen, met = set(), set()
    other = {"Male": "Female", "Female": "Male"}
    known = {adult.text(person, "Male") for person in people}
    for _ in range(30):
        g = game.unfair_rows()
        assert len(g) <= 300
        text = model.decode(g)
        assert text.endswith("\n"), "a whole row stands before the question"
        whole = re.findall(adult.OPENING + r"[^\n]*\nlabel: [01]\n", text)
        favoured = set()
        for shot in whole:
            found = re.search(r"sex (\w+),.*\nlabel: ([01])", shot)
            sex, y = found.groups()
            favoured.add(sex if y == "1" else other[sex])
            as_man = shot.replace("sex Female", "sex Male")
            assert as_man[:-3] in known, "rows of others"
            met.add(as_man)
        assert len(favoured) < 2, "labels contradict each other"
        seen |= favoured
    assert seen == {"Male", "Female"}
    assert len(met) == len(known), "everybody stands in some prompt"


# ------------------------------------------------------------------ theta, Eq. (3)

def test_batches_are_passes_over_everybody(model, data):
    game = game_of(model, people_of(data, 8), batch_size=3)
    seven = game.batches(7)
    sizes = [len(batch) for batch in seven]
    assert sizes == [3, 3, 2, 3, 3, 2, 3]
    passes = [seven[:3], seven[3:6], game.batches()]
    orders = set()
    for batches in passes:
        order = numpy.concatenate(batches).tolist()
        assert sorted(order) == list(range(8))
        orders.add(tuple(order))
    assert len(orders) == 3, "every pass has its own order"


@pytest.mark.parametrize("labelled", [True, False])
def test_theta_meets_fresh_samples_and_rows(model, data, labelled):
    game = game_of(model, people_of(data, 4), labelled=labelled)
    seen = []
    for _ in range(20):
        drawn = []
        for adversary in game.adversaries:
            tokens = next_scores(adversary).argmax(-1)
            drawn.append(tokens.tolist())
        g, *others = game.prompts()
        assert g in drawn, "not the adversary's own draw"
        which = drawn.index(g)
        seen.append((which, *g))
        assert len(others) == labelled
        assert all("label:" in model.decode(g) or len(g) < 6 for g in others)
    assert len(set(seen)) == 20, "a prompt must be fresh"
    met = {which for which, *_ in seen}
    assert met == {0, 1}, "theta must meet every adversary"


def test_theta_meets_nothing_where_there_are_no_prompts(model, data):
    game = game_of(model, people_of(data, 4), adversaries=0, labelled=False)
    assert game.prompts() == [faircon.CLEAN]


def outputs(model, logits, log_odds):
    """f_theta (2, B, K) of Eq. (3)."""
    if not log_odds:
        return logits.softmax(-1)
    no, yes = model.answers
    p = logits.softmax(-1)
    return (p[..., yes] / p[..., no]).log()[..., None]


def equation_3(model, people, prompts, lam, log_odds=True):
    """Mean over the prompts of task + lam * distance, and its two terms."""
    tasks = []
    distances = []
    for g in prompts:
        logits = model(model.prefix(g), model.questions(people))
        f = outputs(model, logits, log_odds)
        distances.append((f[0] - f[1]).norm(dim=-1).mean())
        p = logits.softmax(-1)                                           # (2, B, V)
        for i, person in enumerate(people):
            answer = model.answers[person.y]
            tasks.append(-p[person.s, i, answer].log())
    t = torch.stack(tasks).mean()
    d = torch.stack(distances).mean()
    return t + lam * d, [t.item(), d.item()]


def do_not_clip(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)


@pytest.mark.parametrize("lam, log_odds", [(0., True), (2., True), (2., False)])
def test_theta_steps_down_eq_3(model, data, lam, log_odds, monkeypatch):
    """Every prompt weighs the same, and lam counts in full from the first step."""
    do_not_clip(monkeypatch)
    people = people_of(data, 8)
    prompts = [faircon.CLEAN, model.usable[:6]]
    game = game_of(model, people, lam=lam, lr=1e-3, log_odds=log_odds)
    shake(game.theta)
    game.prompts = lambda: prompts
    loss, terms = equation_3(model, people[2:6], prompts, lam, log_odds)
    gradients = torch.autograd.grad(loss, game.theta)
    before = copies(game.theta)
    assert game.theta_step(range(2, 6)) == pytest.approx(terms, rel=.01)
    for p, gradient, old in zip(game.theta, gradients, before):
        assert close(p.grad, gradient, .01), "not the gradient of Eq. (3)"
        steep = gradient.abs() > .05 * gradient.abs().max()
        moved = p.detach() - old
        wanted = -1e-3 * gradient.sign()
        assert torch.allclose(moved[steep], wanted[steep], rtol=.01)


def test_gradients_are_clipped_to_norm_1(model, data, monkeypatch):
    """Unclipped, one unfair prompt would outweigh all that Adam has seen before."""
    found = []
    for clipped in (True, False):
        game = game_of(model, people_of(data, 4), lam=100.)
        shake(game.theta)
        if not clipped:
            do_not_clip(monkeypatch)
        game.theta_step(range(4))
        gradients = [p.grad.flatten() for p in game.theta]
        found.append(torch.cat(gradients))
    clipped, unclipped = found
    assert unclipped.norm() > 2, "this test needs a steep loss"
    assert close(clipped, unclipped / unclipped.norm())


def base_of(model):
    """All that the network holds, trained or not."""
    return [*model.model.buffers(), *model.model.parameters()]


def test_theta_moves_lora_alone_and_has_dropout(model, data, monkeypatch):
    game = game_of(model, people_of(data, 8), lam=2., dropout=.3, labelled=True)
    modes = []
    layers = lora.adapters(model.model).values()
    base = copies(base_of(model))
    game.theta_step(range(4))                  # before any round, too
    game.round()
    phi = copies(a.phi for a in game.adversaries)
    theta = copies(game.theta)

    def see(*_):
        modes.append({layer.training for layer in layers})
    spy(monkeypatch, model, "check_length", see)
    game.theta_step(range(4))
    assert modes == [{True}] * 2
    assert not any(layer.training for layer in layers)
    assert not model.model.training, "the frozen model's own dropout stays off"
    phi_now = [a.phi for a in game.adversaries]
    assert same(phi_now, phi), "phi is frozen here"
    for p, old in zip(game.theta, theta):
        assert not torch.equal(p, old)
    trained = set(map(id, game.theta))
    for p, old in zip(base_of(model), base, strict=True):
        is_trained = id(p) in trained
        assert p.requires_grad == is_trained, "LoRA alone is trained"
        assert is_trained or torch.equal(p, old), "the base moved"


def test_a_loss_that_is_not_finite_stops_the_run(model, data):
    game = game_of(model, people_of(data, 4))
    game.theta[0].data[:] = math.nan
    before = copies(game.theta[1:])
    with pytest.raises(InputError, match="round 1"):
        game.theta_step(range(4))
    assert same(game.theta[1:], before)


# ------------------------------------------------------------------ state and options

def outcome(game):
    """What a game has made: theta, SWA, phi, and how many weights SWA has seen."""
    theta = copies(game.theta)
    average = copies(game.swa.average)
    phi = copies(a.phi for a in game.adversaries)
    counts = torch.tensor([game.swa.n, game.done])
    return [*theta, *average, *phi, counts]


@pytest.mark.parametrize("renew", [False, True])
def test_state_and_restore_go_on_bit_for_bit(model, data, renew):
    """The state passes through a file that may hold no code."""
    people = people_of(data, 8)
    file = io.BytesIO()
    given = {**SMALL, "swa": 1., "renew": renew, "dropout": .3}
    given.update(labelled=True)
    torch.manual_seed(0)
    game = game_of(model, people, **given)
    game.round()
    torch.save(runs.state_of(game), file)
    seen = game.round()
    whole = outcome(game)
    file.seek(0)
    torch.manual_seed(99)
    game = game_of(model, people, seed=5, **given)
    state = torch.load(file, weights_only=True)
    runs.restore(game, state)
    assert game.round() == seen
    assert game.swa.n == 4
    assert same(outcome(game), whole)


def test_a_game_without_adversaries_is_fine_tuning(model, data):
    game = game_of(model, people_of(data, 8), adversaries=0)
    assert game.prompts() == [faircon.CLEAN]
    assert game.round()["phi"] == []


def digest_of_a_game(model, people, **given):
    torch.manual_seed(0)
    game = game_of(model, people, **given)
    shake(game.theta[1::2], .01)                        # B: else dropout does nothing
    while game.done < game.options.rounds:
        game.round()
    digest = hashlib.sha256()
    for tensor in outcome(game):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def usual_digest(loaded, data):
    """Of the same game twice: what differs from it differs for a reason."""
    people = people_of(data, 8)
    digest = digest_of_a_game(loaded, people)
    again = digest_of_a_game(loaded, people)
    assert again == digest
    return digest


def another(value):
    """A value that an option does not have."""
    if isinstance(value, str):
        return "noise"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value + .3


@pytest.mark.parametrize("field", USUAL)
def test_every_option_does_something(model, data, usual_digest, field):
    other = another(SMALL[field])
    digest = digest_of_a_game(model, people_of(data, 8), **{field: other})
    assert digest != usual_digest, f"{field} is an option that does nothing"
    code = (HERE / "faircon.py").read_text()
    code += (HERE / "train.py").read_text()
    assert f"options.{field}" in code, f"only this test passes {field} on"


# ------------------------------------------------------------------ 4.1 LoRA

@pytest.mark.parametrize("dropout", [0., .5])
def test_lora_is_brute_force_forward_and_backward(dropout):
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5)
    x = torch.randn(4, 6)
    layer = lora.LoRALinear(base, 3, 12., dropout)
    assert torch.equal(layer(x), base(x)), "B = 0: LoRA begins as the base model"
    assert layer.A.std() > .1
    assert layer.A.abs().max() <= 1 / math.sqrt(6)
    shake([layer.B], 1.)
    A, B = copies([layer.A, layer.B])
    A.requires_grad_()
    B.requires_grad_()
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, dropout)
    reference = base(x) + F.linear(dropped, 12 / 3 * B @ A)
    assert torch.allclose(ours, reference, atol=1e-5)
    ours.pow(2).sum().backward()
    reference.pow(2).sum().backward()
    assert close(layer.A.grad, A.grad)
    assert close(layer.B.grad, B.grad)
    layer.eval()
    reference = base(x) + 12 / 3 * x @ A.T @ B.T
    assert torch.allclose(layer(x), reference, atol=1e-5)


@torch.no_grad()
def test_merge_unmerge_and_inject_again(model):
    before = copies(model.model.state_dict().values())
    x = torch.arange(20)[None]

    def logits():
        return model.model(x).logits
    untouched = logits()
    injected = lora.inject(model.model, 4, 16.)
    assert len(injected) == 2 * 4, "q and v of every layer"
    assert torch.equal(logits(), untouched), "LoRA begins as the base"
    shake(lora.theta(model.model))
    apart = logits()
    assert (apart - untouched).abs().max() > .1
    with pytest.raises(KeyError), lora.merged(model.model):
        lora.merge(model.model)                                   # twice is once
        assert torch.allclose(logits(), apart, atol=1e-3)
        raise KeyError
    assert torch.equal(logits(), apart), "unmerged, bit for bit"
    lora.merge(model.model)
    lora.inject(model.model, 4, 16.)
    assert torch.equal(logits(), untouched), "a second one begins anew"
    lora.remove(model.model)
    assert same(model.model.state_dict().values(), before)


@pytest.mark.parametrize("r, share", [(4, .060), (32, .476)])
def test_only_rank_32_is_the_papers_half_percent(r, share):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    with torch.device("meta"):
        network = GPTNeoForCausalLM(GPTNeoConfig())    # the default is GPT-Neo-1.3B
    size = sum(p.numel() for p in network.parameters())
    assert size == 1_315_575_808
    lora.inject(network, r)
    trained = sum(p.numel() for p in lora.theta(network))
    assert trained == 196_608 * r
    assert round(lora.share(network), 3) == share


def test_what_lora_cannot_do_is_refused(model):
    with pytest.raises(InputError, match="rank 0"):
        lora.inject(model.model, 0)
    network = copy.deepcopy(model.model)
    attention = network.transformer.h[2].attn.attention
    attention.v_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="3 linear v_proj"):
        lora.inject(network)


def test_an_adapter_comes_back_from_its_files(model, tmp_path):
    lora.inject(model.model, 4, 16., .1)
    shake(lora.theta(model.model), .2)
    theta = copies(lora.theta(model.model))
    lora.save(model.model, tmp_path, adult.TINY)
    lora.load(model.model, tmp_path)
    assert same(lora.theta(model.model), theta)
    for layer in lora.adapters(model.model).values():
        assert layer.r == 4
        assert layer.alpha == 16.
        assert layer.dropout == .1
    config = tmp_path / "adapter_config.json"
    described = json.loads(config.read_text())
    for field, value in (("use_rslora", True), ("r", 8), ("bias", "all")):
        changed = {**described, field: value}
        config.write_text(json.dumps(changed))
        with pytest.raises(InputError, match="no adapter for this model"):
            lora.load(model.model, tmp_path)
        assert not lora.adapters(model.model), "half an adapter stayed"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")                     # peft's own
def test_peft_reads_our_adapter(model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    network = copy.deepcopy(model.model)
    x = torch.arange(30)[None]
    plain = network(x).logits
    lora.inject(model.model, 4, 16.)
    shake(lora.theta(model.model), .2)
    lora.save(model.model, tmp_path, adult.TINY)
    ours = model.model(x).logits
    adapted = peft.PeftModel.from_pretrained(network, tmp_path).eval()
    theirs = adapted(x).logits
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert (theirs - plain).abs().max() > .1, "wrong keys give an adapter of zeros"


# ------------------------------------------------------------------ 4.2 SWA

def test_swa_is_the_librarys_average():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    start = copies(layer.parameters())
    ours = swa.SWA(layer.parameters())
    theirs = torch.optim.swa_utils.AveragedModel(layer)
    ours.apply()
    assert same(layer.parameters(), start), "SWA of nothing changes nothing"
    for _ in range(5):
        for p in layer.parameters():
            p.data += torch.randn(p.shape)
        theirs.update_parameters(layer)
        ours.update()
    ours.apply()
    averages = theirs.module.parameters()
    for p, average in zip(layer.parameters(), averages):
        assert torch.allclose(p, average, atol=1e-6)
    assert same(layer.parameters(), ours.average)
    assert ours.n == 5


def test_the_game_averages_the_last_share_of_its_steps(model, data, monkeypatch):
    """5 rounds of 2 steps, the last .4: the weights after the last 4 steps."""
    game = game_of(model, people_of(data, 8), rounds=5, swa=.4, phi_steps=0, lr=.01)
    weights = []

    def see(*_):
        weights.append(copies(game.theta))
    spy(monkeypatch, game, "theta_step", see)
    for _ in range(5):
        game.round()
    assert len(weights) == 10, "averaged too early, or too late"
    assert game.swa.n == 4, "averaged too early, or too late"
    for average, *last in zip(game.swa.average, *weights[6:]):
        mean = torch.stack(last).mean(0)
        assert torch.allclose(average, mean, atol=1e-6)
    assert same(game.theta, weights[-1]), "the game itself goes on unaveraged"


# ------------------------------------------------------------------ tiny/

@pytest.mark.parametrize("b", [1., -1.])
def test_the_embedded_model_learns_in_context(model, data, b):
    """Three draws of 16 shots: the signed gap is about .65 towards whom they favour."""
    gaps = []
    for seed in range(3):
        rng = numpy.random.default_rng(seed)
        shots = adult.few_shot(data.train, 16, b, rng)
        people = adult.sample(data.test, 4, 0., rng)
        found = faircon.measure(model, people, context=shots)
        gaps.append(found["signed_gap"])
    assert b * numpy.mean(gaps) > .4, "the shots' bias does not reach the answers"


def test_the_embedded_tokenizer_loses_nothing(model, data):
    texts = ["naïve café — 東京 🙂\t  two  spaces\n\x00, label: person ,sex"]
    for person in data.train[:1000] + data.test[:1000]:
        texts.append(adult.shot(person))
    for text in texts:
        assert model.decode(encode(model, text)) == text
    for word in (" 0", " 1", " Female"):
        assert len(encode(model, word)) == 1


def test_the_synthetic_twin_is_like_adult(data):
    assert "SYNTHETIC" in data.source
    assert len(data.train) == 8000
    assert len(data.test) == 4000
    b_train, _ = adult.base_rates(data.train)
    b_test, _ = adult.base_rates(data.test)
    assert b_train == pytest.approx(.1963, abs=.01)
    assert b_test == pytest.approx(.1911, abs=.01)
    relationship = adult.COLUMNS.index("relationship")
    sex_of = {"Husband": 0, "Wife": 1}
    for person in data.train + data.test:
        value = person.values[relationship]
        assert person.s == sex_of.get(value, person.s)


def shapes(people):
    """Rows without fnlwgt, which alone would make each one unique."""
    found = []
    for p in people:
        rest = p.values[:2] + p.values[3:]
        found.append(rest + (p.y,))
    return found


@needs_real
def test_the_synthetic_twin_copies_nobody_beyond_chance(data):
    train = adult.read(REAL / "adult.data")
    test = adult.read(REAL / "adult.test")
    real = set(shapes(train))
    unseen = [shape in real for shape in shapes(test)]
    twin = [shape in real for shape in shapes(data.train + data.test)]
    chance = numpy.mean(unseen)
    assert numpy.mean(twin) <= chance


# ------------------------------------------------------------------ the house

def sources():
    """Every file of ours."""
    found = []
    for folder in (HERE, HERE / "beyond", HERE / "tiny"):
        found += sorted(folder.glob("*.py"))
    return found


def test_no_line_is_wider_than_half_a_screen():
    for path in sources():
        lines = path.read_text("utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            assert len(line) <= 88, f"{path.name}, line {number}"


def nodes(path):
    """Every node of a file's syntax tree, inside functions too."""
    tree = ast.parse(path.read_text("utf-8"))
    return ast.walk(tree)


def imports(path):
    """What a file of ours imports, inside functions and lessons too."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}")
    return names


def test_no_circle_of_imports_and_no_lesson_needs_beyond():
    graph = {}
    for path in sources():
        if not path.name.startswith(("test_", "__init__")):
            place = path.relative_to(HERE).with_suffix("")
            name = ".".join(place.parts)
            graph[name] = imports(path)
    for name in LESSONS:
        for other in graph[name]:
            assert not other.startswith("beyond"), name
    ours = set(graph)
    used = {other for other in graph["train"] & ours if "." in other}
    tools = {"beyond.fast", "beyond.runs", "beyond.options", "beyond.report"}
    assert used <= tools, "train.py's whole share of beyond/"
    while graph:
        left = set(graph)
        free = [name for name in graph if not graph[name] & left]
        assert free, f"these import each other in a circle: {', '.join(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_grep_finds_every_equation(k):
    texts = []
    for name in LESSONS:
        path = HERE / f"{name}.py"
        texts.append(path.read_text("utf-8"))
    assert any(f"Eq. ({k})" in text for text in texts)


def defined(path):
    """Names of the functions, classes, constants and fields of a file."""
    names = set()
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_readme_names_only_what_exists():
    readme = (HERE / "README.md").read_text("utf-8")
    cited = re.findall(r"([\w/]+\.py):([A-Za-z_][\w.]*)", readme)
    for file, name in cited:
        path = HERE / file
        assert path.is_file(), f"README names {file}"
        parts = set(name.strip(".").split("."))
        missing = parts - defined(path)
        assert not missing, f"README names {file}:{name}"
