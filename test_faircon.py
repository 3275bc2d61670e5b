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
SMALL = {**USUAL, "rounds": 2, "batch_size": 4, "prompt_length": 6, "adversaries": 2,
         "phi_steps": 2, "phi_lr": .3, "around": False, "rows": False, "renew": False,
         "samples": 1}
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
    return adult.sample(data.train, n, bpc, numpy.random.default_rng(seed))


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


def shake(parameters, std=.1):
    """Random weights: where B = 0, LoRA hides every mistake."""
    generator = torch.Generator().manual_seed(7)
    for p in parameters:
        p.data.normal_(std=std, generator=generator)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def same(some, others):
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def close(ours, reference, share=1e-3):
    """Equal up to a thousandth of the largest number, which is not 0."""
    largest = reference.abs().max()
    return bool(largest > 0) and bool((ours - reference).abs().max() < share * largest)


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
    y, s = [1, 1, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0]      # so yhat is 1, 1, 0, 1, 0, 1
    by_hand = {"acc": 5 / 6, "dpd": 2 / 3 - 2 / 3, "deo": .5 + 0., "positives": 4 / 6,
               "gap": (.5 + .4 + 0 + .2 + .3 + .3) / 6, "flip": 3 / 6,
               "signed_gap": (.5 - .4 + 0 + .2 - .3 + .3) / 6}
    assert metrics.evaluate(p, y, s) == pytest.approx(by_hand)


@pytest.mark.parametrize("favoured", [0, 1])
def test_deo_is_a_sum_and_dpd_has_no_sign(favoured):
    s, y = numpy.array([0, 0, 0, 0, 1, 1, 1, 1]), numpy.array([1, 1, 0, 0, 1, 1, 0, 0])
    s, yhat = abs(s - favoured), numpy.array([1, 1, 1, 0, 1, 0, 0, 0])
    assert metrics.dpd(yhat, s) == .75 - .25
    deo = (1 - .5) + (.5 - 0)
    assert metrics.deo(yhat, y, s) == deo, "Eq. (2) is neither a maximum nor a mean"


def test_nothing_measured_is_not_fair():
    nobody = numpy.zeros(3, int)
    with pytest.warns(UserWarning, match="nobody has s=1"):
        assert math.isnan(metrics.dpd(nobody, nobody))
    with pytest.warns(UserWarning, match="nobody has s=0, y=1"):
        y, s = numpy.array([0, 0, 1]), numpy.array([0, 1, 1])
        assert math.isnan(metrics.deo(nobody, y, s))
    with pytest.warns(UserWarning, match="NaN"):
        found = metrics.evaluate([[.5, math.nan], [.1, .2]], [0, 1], [0, 1])
    assert all(map(math.isnan, found.values())), "NaN would pass for always answering 0"


def test_bootstrap_draws_a_person_with_their_twin():
    rng = numpy.random.default_rng(0)
    p = rng.random((200, 1)).repeat(2, 1)                        # no twin differs
    y, s = rng.integers(2, size=200), rng.integers(2, size=200)
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
    people += [p._replace(y=0) for p in test] if as_released else test
    found = adult.base_rates(people)
    assert (len(people), round(found[0], 4), round(found[1], 2)) == (48842, b, ratio)


def test_cells_and_samples_are_exact(data):
    wanted = {(0, 1): 75, (0, 0): 25, (1, 1): 25, (1, 0): 75}
    people = people_of(data, 200, .5)
    found = [(p.s, p.y) for p in people]
    assert adult.cells(200, .5) == wanted
    assert {cell: found.count(cell) for cell in wanted} == wanted
    assert adult.base_rates(people) == (.5, 1.)
    assert len(set(map(id, people))) == 200, "somebody was drawn twice"
    with pytest.warns(UserWarning, match="b_Pc = 0.25 is used"):
        adult.cells(16, .3)
    for n, bpc, why in ((200, 1.1, "impossible"), (7, 0., "even"),
                        (99_992, 0., "fewer rows"), (99_992, None, "fewer")):
        with pytest.raises(InputError, match=why):
            people_of(data, n, bpc)


def test_split_measures_nobody_it_has_seen(data):
    people = adult.split(data, 80, .5, 40, seed=3)
    chosen = set(map(id, people.train + people.validation))
    assert chosen <= set(map(id, data.train)), "adult.test is for the reported numbers"
    assert len(chosen) == 80 + 100, "a validation row is a training row"
    assert set(map(id, people.test + people.test_bpc)) <= set(map(id, data.test))
    assert [adult.base_rates(some)[0] for some in people] == [.5, 0., 0., .5]
    assert people == adult.split(data, 80, .5, 40, seed=3)
    assert people.train != adult.split(data, 80, .5, 40, seed=4).train


def test_twins_differ_in_sex_alone_and_hold_no_answer(data):
    for person in data.test[:200]:
        x_m, x_f = adult.twins(person)
        assert x_m.count("sex Male") == 1 and x_m.endswith("\nlabel:")
        assert x_m.replace("sex Male", "sex Female") == x_f
        assert adult.text(person) == (x_m, x_f)[person.s], "not the person's own sex"
        other = person._replace(y=1 - person.y)
        assert adult.text(person) == adult.text(other), "the text knows the answer"
        assert adult.answer(person) != adult.answer(other)
        assert "Husband" not in x_m and "Wife" not in x_m, "relationship is sex"


@pytest.mark.parametrize("counterbalance, b", [(True, 0.), (False, .5)])
def test_few_shot_prompts_have_their_bias(data, counterbalance, b):
    rng = numpy.random.default_rng(0)
    prompt = adult.few_shot(data.train, 16, .5, rng, counterbalance)
    shots = re.findall(r"sex (\w+),[^\n]*\nlabel: ([01])\n", prompt)
    men = [int(y) for sex, y in shots if sex == "Male"]
    women = [int(y) for sex, y in shots if sex == "Female"]
    assert prompt.startswith(adult.INSTRUCTION) and len(men) == len(women) == 8
    assert numpy.mean(men) - numpy.mean(women) == b
    lines = prompt.replace("sex Female", "sex Male").splitlines()[1:]
    assert counterbalance == all(lines.count(line) % 2 == 0 for line in lines)


ROW = ("39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, "
       "Not-in-family, White, Male, 2174, 0, 40, United-States, >50K.\n")


def test_reading_forgives_what_is_harmless(tmp_path):
    content = "|1x3 Cross validator\n" + ROW + "\n" + ROW.replace(">50K.", "<=50K")
    (tmp_path / "bom").write_text(content, encoding="utf-8-sig")
    people = adult.read(tmp_path / "bom")
    assert [p.y for p in people] == [1, 0], "the full stop of adult.test is no label"


@pytest.mark.parametrize("content, why", [
    (ROW.replace(" White", " "), "line 2: an empty cell"),
    (ROW.replace(" White", ' "White'), "quote"),
    (ROW.replace(" White,", ""), "line 2: 14 columns"),
    (ROW.replace(" Male", " M"), "column order"),
    (ROW.replace(" >50K.", " yes"), "column order"), ("age" + ROW[2:], "a header")])
def test_reading_refuses_what_is_not_adult(content, why, tmp_path):
    (tmp_path / "adult.csv").write_text(ROW + content)
    with pytest.raises(InputError, match=why):
        adult.read(tmp_path / "adult.csv")
    for wrong, why in ((tmp_path / "adult.csv", "is a file"), (tmp_path, "not exist")):
        with pytest.raises(InputError, match=why):
            adult.load(wrong)


@pytest.fixture()
def uci(monkeypatch, tmp_path):
    """UCI sends tiny/'s files and the cache is empty -> (what was fetched, cache)."""
    asked = []

    def fetch(url):
        asked.append(url)
        return (adult.TINY / url.split("/")[-1]).read_bytes()
    for name in adult.SHA256:
        digest = hashlib.sha256(fetch(name)).hexdigest()
        monkeypatch.setitem(adult.SHA256, name, digest)
    asked.clear()
    monkeypatch.setattr(adult, "fetch", fetch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked, tmp_path / "cache" / "faircon"


def test_a_download_is_checked_and_kept(uci, monkeypatch):
    asked, cache = uci
    for _ in range(2):
        found = adult.load()
        assert found.source == "UCI Adult" and found.sha256 == adult.SHA256
        assert (len(found.train), len(found.test)) == (8000, 4000)
    assert asked == [adult.UCI + name for name in adult.SHA256], "kept, yet fetched"
    (cache / "adult.data").write_bytes(b"damaged")
    with pytest.raises(InputError, match="do not have UCI's checksums"):
        adult.load()
    (cache / "adult.data").unlink()
    monkeypatch.setitem(adult.SHA256, "adult.test", "0" * 64)
    with pytest.raises(InputError, match="sent has a wrong checksum"):
        adult.load()


def test_a_download_cut_in_the_middle_leaves_nothing(uci, monkeypatch):
    fetch = adult.fetch

    def cut(url):
        if url.endswith("test"):
            raise http.client.IncompleteRead(b"39, Sta", 1000)
        return fetch(url)
    monkeypatch.setattr(adult, "fetch", cut)
    assert re.search("SYNTHETIC.*IncompleteRead", adult.load().source)
    assert not list(uci[1].glob("*")), "the next run would take it for the data"


def test_what_cannot_be_kept_is_used_all_the_same(uci, monkeypatch):
    """A full disk, then a place where no folder can be made."""
    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, "no space left")
    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    found = adult.load()
    assert re.match(r"UCI Adult \(not kept: .* no space left", found.source)
    assert len(found.train) == 8000 and not list(uci[1].glob("*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(adult.TINY / "adult.data"))
    found = adult.load()
    assert "not kept" in found.source and len(found.train) == 8000


@pytest.mark.parametrize("has_home", [True, False])
def test_behind_a_proxy_only_the_proxy_is_asked(monkeypatch, tmp_path, has_home):
    """Looking UCI up oneself takes minutes there. The true reason must be named."""
    looked_up, look_up = set(), socket.getaddrinfo

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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path) if has_home else "")
    if not has_home:
        monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert re.search("SYNTHETIC.*Connection refused", adult.load().source)
    assert looked_up == {"127.0.0.1"}, "something went around the proxy"


def closed_port():
    """An address on this machine where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


# ------------------------------------------------------------------ 3.1 f_theta

def by_brute_force(model, before, person):
    """Logits (2, V) of each twin's whole text, token ids through the front door."""
    found = []
    for x in adult.twins(person):
        ids = torch.tensor([before + encode(model, x + " 0")[:-1]])
        found.append(model.model(input_ids=ids).logits[0, -1])
    return torch.stack(found)


@torch.no_grad()
def test_f_theta_is_the_models_answer_to_the_whole_text(model, data):
    """Texts of different lengths in one batch: padding must change nobody's answer."""
    people = people_of(data, 80)
    people.sort(key=lambda p: len(encode(model, adult.text(p))))
    people = people[:3] + people[-3:]
    questions = model.questions(people)
    assert len(questions[0][0]) < len(questions[-1][0])
    shots = adult.few_shot(data.train, 4, 1., numpy.random.default_rng(0))
    g, instruction = model.usable[5:12], encode(model, adult.INSTRUCTION)
    newline = encode(model, "\n")
    line, around = g + newline, g[:3] + newline + instruction + g[3:] + newline
    cases = [(model.prefix(), instruction), (model.prefix(g), line + instruction),
             (model.prefix(g, after=1.), instruction + line),
             (model.prefix(g, after=.5), around),
             (model.prefix(context=shots), encode(model, shots))]
    for prefix, before in cases:
        logits = model(prefix, questions)
        for i, person in enumerate(people):
            assert alike(logits[:, i], by_brute_force(model, before, person))
    no, yes = logits.softmax(-1)[..., model.answers].unbind(-1)          # (2, B)
    p = torch.tensor(model.predict(questions, context=shots, batch=4))   # (B, 2)
    assert alike(p.T.float(), yes / (yes + no))


def test_a_prompt_of_one_hot_rows_has_the_right_gradient(model, data):
    """One text at a time, unpadded: phi must follow the model's own gradient."""
    people, text = people_of(data, 4), model.usable[:5]
    one_hot = F.one_hot(torch.tensor(text), len(model.embed)).float().requires_grad_()
    logits = model(model.prefix(one_hot), model.questions(people))
    ours, = torch.autograd.grad(logits.log_softmax(-1)[..., 9].sum(), one_hot)
    g, total = model.embed[text].detach().requires_grad_(), 0.
    for x in sum(map(adult.twins, people), []):
        ids = encode(model, "\n" + adult.INSTRUCTION + x)
        embeds = torch.cat([g, model.embed[ids]])[None]
        logits = model.model(inputs_embeds=embeds).logits
        total = total + logits[0, -1].log_softmax(-1)[9]
    by_hand, = torch.autograd.grad(total, g)                             # (5, D)
    assert close(ours, by_hand @ model.embed.T)


def test_write_samples_what_a_plain_forward_says(model):
    ours = model.write(2, 6, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([encode(model, adult.INSTRUCTION)] * 2)
    for _ in range(6):
        p = (model.model(input_ids=ids).logits[:, -1] + model.mask).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    assert ours == ids[:, -6:].tolist()


def test_usable_tokens_are_text(model):
    for i in model.usable:
        assert encode(model, model.decode([i])) == [i], "this prompt cannot be typed"
    allowed = (model.mask == 0).nonzero().flatten().tolist()
    assert allowed == model.usable and len(allowed) > 500


def test_a_broken_model_gives_no_numbers(model, data):
    network = copy.deepcopy(model.model)
    network.transformer.h[0].mlp.c_fc.weight.data[0, 0] = math.nan
    broken = faircon.LanguageModel(network, model.tokenizer)
    with pytest.raises(InputError, match="NaN"):
        broken.predict(broken.questions(people_of(data, 4)))


def splitting_tokenizer():
    """tiny/'s, but " 0" is " ", "0" (as in Llama's), and "!" begins every text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    described = json.loads((adult.TINY / "tokenizer.json").read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    bos = {"id": "!", "ids": [described["model"]["vocab"]["!"]], "tokens": ["!"]}
    template = described["post_processor"]
    template["special_tokens"] = {"!": bos}
    template["single"].insert(0, {"SpecialToken": {"id": "!", "type_id": 0}})
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def test_a_tokenizer_that_splits_digits_and_begins_texts(model, data):
    other = faircon.LanguageModel(model.model, splitting_tokenizer())
    assert other.decode(other.answers.tolist()) == "01"
    people = people_of(data, 4)
    questions = other.questions(people)
    ends = {twins[s][-1] for twins in questions for s in (0, 1)}
    assert other.decode(list(ends)) == " ", "the space belongs to the question"
    bos = encode(other, "!")
    for g, before in ((faircon.CLEAN, bos), ([5], [*bos, 5, *encode(other, "\n")])):
        logits = other(other.prefix(g), questions)
        before = before + encode(other, adult.INSTRUCTION)
        for i, person in enumerate(people):
            whole = by_brute_force(other, before, person)
            assert alike(logits[:, i], whole)


@needs_gpt2
def test_gpt2_tokenizer_answers_and_context_limit(data):
    from transformers import GPT2Tokenizer, GPTNeoConfig, GPTNeoForCausalLM
    vocabulary, merges = str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt")
    config = GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2,
                          attention_types=[[["global", "local"], 1]],
                          max_position_embeddings=128)
    model = faircon.LanguageModel(GPTNeoForCausalLM(config).eval(),
                                  GPT2Tokenizer(vocab=vocabulary, merges=merges))
    assert model.answers.tolist() == [657, 352] and len(model.usable) > 45_000
    questions = model.questions(data.test[:1])
    before = [5, 6] + encode(model, "\n" + adult.INSTRUCTION)
    whole = by_brute_force(model, before, data.test[0])
    assert alike(model(model.prefix([5, 6]), questions)[:, 0], whole)
    with pytest.raises(InputError, match="context"):
        model.predict(questions, [5] * 128)


# ------------------------------------------------------------------ 3.1 Eq. (3)

def test_distance_is_the_mean_of_unsquared_norms():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1).tolist()
    norms = [math.dist(p_m, p_f) for p_m, p_f in zip(*p)]
    assert faircon.distance(logits).item() == pytest.approx(sum(norms) / 4, abs=1e-5)
    twins = logits[:1].expand(2, -1, -1).clone().requires_grad_()
    distance = faircon.distance(twins)
    distance.backward()
    assert distance < 2e-4 and twins.grad.isfinite().all(), "no slope where twins agree"


def test_task_reads_the_twin_that_is_the_person(data):
    people, answers = people_of(data, 8), torch.tensor([3, 5])
    logits = torch.randn(2, 8, 9, generator=torch.Generator().manual_seed(0))
    by_hand = []
    for i, person in enumerate(people):
        p = logits[person.s, i].softmax(-1)
        by_hand.append(-math.log(p[answers[person.y]]))
    found = faircon.task(logits, people, answers).item()
    assert found == pytest.approx(numpy.mean(by_hand), abs=1e-5)
    logits[[1 - p.s for p in people], range(8)] += 9 * torch.rand(8, 9)
    again = faircon.task(logits, people, answers).item()
    assert again == found, "the other twin has no label"


# ------------------------------------------------------------------ 3.2 Gumbel

@pytest.mark.parametrize("tau", [.5, 1., 2.])
def test_gumbel_softmax_is_the_librarys(tau):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 50, generator=generator)
    weight = torch.randn(7, 50, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.manual_seed(3)
    sample = gumbel.gumbel_softmax(ours, tau)
    torch.manual_seed(3)                                     # the same noise
    reference = F.gumbel_softmax(theirs, tau, hard=True)
    assert torch.equal(sample, reference), "the forward pass must agree bit for bit"
    (sample * weight).sum().backward()
    (reference * weight).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7) and ours.grad.norm() > .1


def test_a_sample_is_one_token_and_follows_the_distribution():
    """20,000 draws: the margin of 1.5 % is four standard deviations."""
    p = torch.tensor([.6, .3, .1])
    generator = torch.Generator().manual_seed(0)
    x = gumbel.gumbel_softmax(p.log().expand(20_000, 3), 1., generator)
    assert x.argmax(-1).bincount().div(20_000).sub(p).abs().max() < .015
    one_hot = F.one_hot(x.argmax(-1), 3)
    assert (x - one_hot).abs().max() < 1e-6, "a mixture of tokens is no prompt"
    for tau in (0., -1., math.nan):
        with pytest.raises(ValueError, match="tau"):
            gumbel.gumbel_softmax(p, tau)


# ------------------------------------------------------------------ phi, Eq. (3), (4)

def next_scores(adversary):
    """phi + Gumbel noise (L, V) of the adversary's next sample."""
    generator = torch.Generator()
    generator.set_state(adversary.generator.get_state())
    noise = torch.empty(adversary.phi.shape).exponential_(generator=generator)
    return adversary.phi.detach() + adversary.model.mask - noise.log()


def upward(adversary, questions):
    """d unfairness / d phi by hand: the softmax's derivative times the prompt's."""
    model, tau = adversary.model, adversary.options.tau
    scores = next_scores(adversary)                                      # (L, V)
    sample = F.one_hot(scores.argmax(-1), scores.shape[1]).float().requires_grad_()
    p = model(model.prefix(sample), questions).softmax(-1)               # (2, B, V)
    unfair = (p[0] - p[1]).norm(dim=-1).mean()
    slope, = torch.autograd.grad(unfair, sample)
    sigma = (scores / tau).softmax(-1)
    return sigma * (slope - (sigma * slope).sum(-1, keepdim=True)) / tau


@pytest.mark.parametrize("sign", [1, -1])
def test_phi_steps_up_eq_3_or_down_eq_4_and_moves_alone(model, data, sign):
    """sign +1 is the argmax of Eq. (3), -1 the min of Eq. (4)."""
    game = game_of(model, people_of(data, 4), tau=.7)
    shake(game.theta)
    adversary = faircon.Adversary(model, game.options, game.generator, sign)
    weights = copies(model.model.state_dict().values())
    phi, up = adversary.phi.detach().clone(), upward(adversary, game.questions)
    assert 0 < adversary.step(game.questions) < math.sqrt(2)
    assert close(-sign * adversary.phi.grad, up, .01), "not the unfairness's gradient"
    moved, steep = adversary.phi.detach() - phi, up.abs() > .01 * up.abs().max()
    wanted = sign * game.options.phi_lr * up.sign()
    assert torch.allclose(moved[steep], wanted[steep], rtol=1e-3), "the wrong way"
    assert all(p.grad is None for p in model.model.parameters()), "theta is frozen"
    assert same(model.model.state_dict().values(), weights)


class Planted(faircon.LanguageModel):
    """Token 0 makes it favour men, token 1 women, smoothly; six more do nothing."""

    def __init__(self):
        self.device, self.answers = torch.device("cpu"), torch.tensor([0, 1])
        self.usable, self.mask = list(range(8)), torch.zeros(8)
        self.embed = torch.tensor([1., -1., 0., 0., 0., 0., 0., 0.])[:, None]  # (V, 1)

    def prefix(self, g, **_):
        return g @ self.embed                                            # (L, 1)

    def __call__(self, prefix, questions):
        lean = 3 * prefix.mean()
        yes = torch.stack([lean, -lean])[:, None].expand(2, len(questions))
        return torch.stack([torch.zeros_like(yes), yes], -1)             # (2, B, 2)


@pytest.mark.parametrize("sign, low, high", [(1, .8, 1.1), (-1, -.15, .15)])
def test_many_steps_find_what_is_planted(sign, low, high):
    """From a prompt that leans to men by .3; over 40 seeds all ends lie within .02."""
    options = faircon.Options(prompt_length=20, phi_lr=.3)
    generator, phi = torch.Generator().manual_seed(0), torch.zeros(20, 8)
    adversary = faircon.Adversary(Planted(), options, generator, sign)
    phi[:, 0] = 1.5
    adversary.start(phi)
    for _ in range(100):
        adversary.step([0])
    lean = (adversary.phi.softmax(-1) @ adversary.model.embed).mean().item()
    assert low < lean < high


def test_both_twins_see_the_same_sample(model, data):
    """Else the distance would be between two prompts, not two sexes."""
    game = game_of(model, people_of(data, 4))
    for twins in game.questions:
        twins[1] = twins[0]
    assert game.adversaries[0].step(game.questions) < 2e-4
    assert game.theta_step(range(4))[1] < 2e-4


def test_phi_attacks_the_merged_model_without_dropout(model, data, monkeypatch):
    game, seen = game_of(model, people_of(data, 8), dropout=.5), []
    shake(game.theta)
    layers, x = lora.adapters(model.model).values(), torch.arange(9)[None]
    base = copies(layer.base.weight for layer in layers)

    def see(*_):
        assert all(layer.original is not None for layer in layers), "not merged"
        seen.append(model.model(x).logits)
    for adversary in game.adversaries:
        spy(monkeypatch, adversary, "step", see)
    game.round()
    assert len(seen) == 4 and same(seen, seen[:1] * 4), "theta or dropout moved"
    assert all(layer.original is None for layer in layers), "still merged"
    assert same([layer.base.weight for layer in layers], base)


@pytest.mark.parametrize("renew", [False, True])
def test_phi_goes_on_or_begins_anew_at_a_length_of_its_own(model, data, renew):
    game = game_of(model, people_of(data, 8), renew=renew, prompt_length=200)
    sizes, steps, moved = set(), [], []
    for _ in range(6):
        before = game.adversaries[0].phi.detach().clone()
        game.phi_half()
        adversary = game.adversaries[0]
        steps.append(adversary.optimiser.state_dict()["state"][0]["step"].item())
        sizes.add(len(adversary.phi))
        if len(before) == len(adversary.phi):
            moved.append((adversary.phi - before).abs().max().item())
    if renew:
        assert steps == [2] * 6, "Adam must begin anew"
        assert len(sizes) > 3 and max(sizes) <= 200
    else:
        assert steps == [2, 4, 6, 8, 10, 12] and sizes == {200}, "forgotten"
        assert max(moved) < 3 * game.options.phi_lr, "phi goes on where it was"


def test_lengths_are_any_number_and_any_order_of_magnitude(model, data):
    """400 draws: 50 % above 280, less 4.5 % that the other half has; 5 % is 4 sigma."""
    game = game_of(model, people_of(data, 4), prompt_length=560)
    lengths = numpy.array([game.some_length() for _ in range(400)])
    assert lengths.min() >= 1 and lengths.max() <= 560
    assert abs((lengths > 280).mean() - .305) < .1 and (lengths < 24).mean() > .15


def test_rows_are_training_rows_whose_labels_all_favour_one_sex(model, data):
    """b_Pc of every prompt is 1 or -1; they end with a whole row; both occur."""
    people = people_of(data, 8)
    game, seen = game_of(model, people, rows=True, prompt_length=300), set()
    known = {adult.text(person, "Male") for person in people}
    for _ in range(30):
        g = game.unfair_rows()
        assert len(g) <= 300
        text = model.decode(g)
        assert text.endswith("\n"), "a whole row stands before the question"
        whole = re.findall(adult.OPENING + r"[^\n]*\nlabel: [01]\n", text)
        favoured = set()
        for shot in whole:
            sex, y = re.search(r"sex (\w+),.*\nlabel: ([01])", shot).groups()
            favoured.add(sex if y == "1" else {"Male": "Female"}.get(sex, "Male"))
            as_man = shot[:-3].replace("sex Female", "sex Male")
            assert as_man in known, "rows of others"
        assert len(favoured) < 2, "labels contradict each other"
        seen |= favoured
    assert seen == {"Male", "Female"}


# ------------------------------------------------------------------ theta, Eq. (3)

def test_batches_are_passes_over_everybody(model, data):
    game = game_of(model, people_of(data, 8), batch_size=3)
    seven = game.batches(7)
    assert [len(batch) for batch in seven] == [3, 3, 2, 3, 3, 2, 3]
    orders = [numpy.concatenate(some).tolist() for some in (seven[:3], seven[3:6])]
    orders.append(numpy.concatenate(game.batches()).tolist())
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(map(tuple, orders))) == 3, "every pass has its own order"


@pytest.mark.parametrize("clean, rows", [(True, False), (False, True), (True, True)])
def test_theta_meets_fresh_samples_rows_and_nothing(model, data, clean, rows):
    game, seen = game_of(model, people_of(data, 4), clean=clean, rows=rows), []
    for _ in range(20):
        drawn = [next_scores(a).argmax(-1).tolist() for a in game.adversaries]
        prompts = game.prompts()
        if clean:
            assert prompts.pop(0) == faircon.CLEAN
        g = prompts.pop(0)
        assert g in drawn, "not the adversary's own draw"
        seen.append((drawn.index(g), *g))
        assert len(prompts) == rows
        game.options.samples = 3
        assert len(game.prompts()) == 3 + clean + rows
        game.options.samples = 1
    assert len(set(seen)) == 20, "a prompt must be fresh"
    assert {which for which, *_ in seen} == {0, 1}, "theta must meet every adversary"


def equation_3(model, people, prompts, lam):
    """Mean over the prompts of task + lam * distance, and its two terms."""
    tasks, distances = [], []
    for g in prompts:
        p = model(model.prefix(g), model.questions(people)).softmax(-1)
        distances.append((p[0] - p[1]).norm(dim=-1).mean())
        for i, person in enumerate(people):
            tasks.append(-p[person.s, i, model.answers[person.y]].log())
    t, d = torch.stack(tasks).mean(), torch.stack(distances).mean()
    return t + lam * d, [t.item(), d.item()]


@pytest.mark.parametrize("lam", [0., 2.])
def test_theta_steps_down_eq_3(model, data, lam, monkeypatch):
    """Every prompt weighs the same, and lam counts in full from the first step."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    people, prompts = people_of(data, 8), [faircon.CLEAN, model.usable[:6]]
    game = game_of(model, people, lam=lam, lr=1e-3)
    shake(game.theta)
    game.prompts = lambda: prompts
    loss, terms = equation_3(model, people[2:6], prompts, lam)
    gradients, before = torch.autograd.grad(loss, game.theta), copies(game.theta)
    assert game.theta_step(range(2, 6)) == pytest.approx(terms, rel=.01)
    for p, gradient, old in zip(game.theta, gradients, before):
        assert close(p.grad, gradient, .01), "not the gradient of Eq. (3)"
        steep = gradient.abs() > .05 * gradient.abs().max()
        moved = (p.detach() - old)[steep]
        assert torch.allclose(moved, -1e-3 * gradient[steep].sign(), rtol=.01)


def test_gradients_are_clipped_to_norm_1(model, data, monkeypatch):
    """Unclipped, one unfair prompt would outweigh all that Adam has seen before."""
    found = []
    for clipped in (True, False):
        game = game_of(model, people_of(data, 4), lam=100.)
        shake(game.theta)
        if not clipped:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
        game.theta_step(range(4))
        found.append(torch.cat([p.grad.flatten() for p in game.theta]))
    assert found[1].norm() > 2, "this test needs a steep loss"
    assert close(found[0], found[1] / found[1].norm())


def test_theta_moves_lora_alone_and_has_dropout(model, data, monkeypatch):
    game, modes = game_of(model, people_of(data, 8), lam=2., dropout=.3), []
    layers = lora.adapters(model.model).values()
    base = copies([*model.model.buffers(), *model.model.parameters()])
    game.theta_step(range(4))                  # before any round, too
    game.round()
    phi, theta = copies(a.phi for a in game.adversaries), copies(game.theta)
    spy(monkeypatch, model, "check_length",
        lambda *_: modes.append({layer.training for layer in layers}))
    game.theta_step(range(4))
    assert modes == [{True}] * 2 and not any(layer.training for layer in layers)
    assert not model.model.training, "the frozen model's own dropout stays off"
    assert same([a.phi for a in game.adversaries], phi), "phi is frozen here"
    assert not any(torch.equal(p, old) for p, old in zip(game.theta, theta))
    everything = [*model.model.buffers(), *model.model.parameters()]
    trained = set(map(id, game.theta))
    for p, old in zip(everything, base, strict=True):
        assert p.requires_grad == (id(p) in trained), "LoRA alone is trained"
        assert id(p) in trained or torch.equal(p, old), "the base moved"


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
    phi = copies(a.phi for a in game.adversaries)
    counts = torch.tensor([game.swa.n, game.done])
    return [*copies(game.theta), *copies(game.swa.average), *phi, counts]


@pytest.mark.parametrize("renew", [False, True])
def test_state_and_restore_go_on_bit_for_bit(model, data, renew):
    """The state passes through a file that may hold no code."""
    people, file = people_of(data, 8), io.BytesIO()
    given = {**SMALL, "swa": 1., "renew": renew, "dropout": .3}
    given.update(around=True, rows=True)
    torch.manual_seed(0)
    game = game_of(model, people, **given)
    game.round()
    torch.save(runs.state_of(game), file)
    seen, whole = game.round(), outcome(game)
    file.seek(0)
    torch.manual_seed(99)
    game = game_of(model, people, seed=5, **given)
    runs.restore(game, torch.load(file, weights_only=True))
    assert game.round() == seen and game.swa.n == 4
    assert same(outcome(game), whole)


def test_a_game_without_adversaries_is_fine_tuning(model, data):
    game = game_of(model, people_of(data, 8), adversaries=0)
    assert game.prompts() == [faircon.CLEAN] and game.round()["phi"] == []


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
    digest = digest_of_a_game(loaded, people_of(data, 8))
    assert digest_of_a_game(loaded, people_of(data, 8)) == digest
    return digest


@pytest.mark.parametrize("field", USUAL)
def test_every_option_does_something(model, data, usual_digest, field):
    value = SMALL[field]
    other = {str: "noise", bool: not value}.get(type(value))
    if other is None:
        other = value + (1 if isinstance(value, int) else .3)
    digest = digest_of_a_game(model, people_of(data, 8), **{field: other})
    assert digest != usual_digest, f"{field} is an option that does nothing"
    code = (HERE / "faircon.py").read_text() + (HERE / "train.py").read_text()
    assert f"options.{field}" in code, f"only this test passes {field} on"


# ------------------------------------------------------------------ 4.1 LoRA

@pytest.mark.parametrize("dropout", [0., .5])
def test_lora_is_brute_force_forward_and_backward(dropout):
    torch.manual_seed(0)
    base, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    layer = lora.LoRALinear(base, 3, 12., dropout)
    assert torch.equal(layer(x), base(x)), "B = 0: LoRA begins as the base model"
    assert .1 < layer.A.std() and layer.A.abs().max() <= 1 / math.sqrt(6)
    shake([layer.B], 1.)
    A, B = (factor.requires_grad_() for factor in copies([layer.A, layer.B]))
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    reference = base(x) + F.linear(F.dropout(x, dropout), 12 / 3 * B @ A)
    assert torch.allclose(ours, reference, atol=1e-5)
    ours.pow(2).sum().backward()
    reference.pow(2).sum().backward()
    assert close(layer.A.grad, A.grad) and close(layer.B.grad, B.grad)
    layer.eval()
    assert torch.allclose(layer(x), base(x) + 12 / 3 * x @ A.T @ B.T, atol=1e-5)


@torch.no_grad()
def test_merge_unmerge_and_inject_again(model):
    before, x = copies(model.model.state_dict().values()), torch.arange(20)[None]
    untouched = model.model(x).logits
    assert len(lora.inject(model.model, 4, 16.)) == 2 * 4, "q and v of every layer"
    assert torch.equal(model.model(x).logits, untouched), "LoRA begins as the base"
    shake(lora.theta(model.model))
    apart = model.model(x).logits
    assert (apart - untouched).abs().max() > .1
    with pytest.raises(KeyError), lora.merged(model.model):
        lora.merge(model.model)                                   # twice is once
        assert torch.allclose(model.model(x).logits, apart, atol=1e-3)
        raise KeyError
    assert torch.equal(model.model(x).logits, apart), "unmerged, bit for bit"
    lora.merge(model.model)
    lora.inject(model.model, 4, 16.)
    assert torch.equal(model.model(x).logits, untouched), "a second one begins anew"
    lora.remove(model.model)
    assert same(model.model.state_dict().values(), before)


@pytest.mark.parametrize("r, share", [(4, .060), (32, .476)])
def test_only_rank_32_is_the_papers_half_percent(r, share):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    with torch.device("meta"):
        network = GPTNeoForCausalLM(GPTNeoConfig())    # the default is GPT-Neo-1.3B
    assert sum(p.numel() for p in network.parameters()) == 1_315_575_808
    lora.inject(network, r)
    assert sum(p.numel() for p in lora.theta(network)) == 196_608 * r
    assert round(lora.share(network), 3) == share


def test_what_lora_cannot_do_is_refused(model):
    with pytest.raises(InputError, match="rank 0"):
        lora.inject(model.model, 0)
    network = copy.deepcopy(model.model)
    network.transformer.h[2].attn.attention.v_proj = torch.nn.Identity()
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
        assert (layer.r, layer.alpha, layer.dropout) == (4, 16., .1)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, value in (("use_rslora", True), ("r", 8), ("bias", "all")):
        changed = json.dumps({**described, field: value})
        (tmp_path / "adapter_config.json").write_text(changed)
        with pytest.raises(InputError, match="no adapter for this model"):
            lora.load(model.model, tmp_path)
        assert not lora.adapters(model.model), "half an adapter stayed"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")                     # peft's own
def test_peft_reads_our_adapter(model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    network, x = copy.deepcopy(model.model), torch.arange(30)[None]
    plain = network(x).logits
    lora.inject(model.model, 4, 16.)
    shake(lora.theta(model.model), .2)
    lora.save(model.model, tmp_path, adult.TINY)
    theirs = peft.PeftModel.from_pretrained(network, tmp_path).eval()(x).logits
    assert torch.allclose(theirs, model.model(x).logits, atol=1e-4)
    assert (theirs - plain).abs().max() > .1, "wrong keys give an adapter of zeros"


# ------------------------------------------------------------------ 4.2 SWA

def test_swa_is_the_librarys_average():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    start, ours = copies(layer.parameters()), swa.SWA(layer.parameters())
    theirs = torch.optim.swa_utils.AveragedModel(layer)
    ours.apply()
    assert same(layer.parameters(), start), "SWA of nothing changes nothing"
    for _ in range(5):
        for p in layer.parameters():
            p.data += torch.randn(p.shape)
        theirs.update_parameters(layer)
        ours.update()
    ours.apply()
    for p, average in zip(layer.parameters(), theirs.module.parameters()):
        assert torch.allclose(p, average, atol=1e-6)
    assert same(layer.parameters(), ours.average) and ours.n == 5


def test_the_game_averages_the_last_share_of_its_steps(model, data, monkeypatch):
    """5 rounds of 2 steps, the last .4: the weights after the last 4 steps."""
    game = game_of(model, people_of(data, 8), rounds=5, swa=.4, phi_steps=0, lr=.01)
    weights = []
    spy(monkeypatch, game, "theta_step", lambda *_: weights.append(copies(game.theta)))
    for _ in range(5):
        game.round()
    assert (len(weights), game.swa.n) == (10, 4), "averaged too early, or too late"
    for average, *last in zip(game.swa.average, *weights[6:]):
        assert torch.allclose(average, torch.stack(last).mean(0), atol=1e-6)
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
        gaps.append(faircon.measure(model, people, context=shots)["signed_gap"])
    assert b * numpy.mean(gaps) > .4, "the shots' bias does not reach the answers"


def test_the_embedded_tokenizer_loses_nothing(model, data):
    texts = ["naïve café — 東京 🙂\t  two  spaces\n\x00, label: person ,sex"]
    texts += map(adult.shot, data.train[:1000] + data.test[:1000])
    for text in texts:
        assert model.decode(encode(model, text)) == text
    assert all(len(encode(model, word)) == 1 for word in (" 0", " 1", " Female"))


def test_the_synthetic_twin_is_like_adult(data):
    assert "SYNTHETIC" in data.source
    assert (len(data.train), len(data.test)) == (8000, 4000)
    assert adult.base_rates(data.train)[0] == pytest.approx(.1963, abs=.01)
    assert adult.base_rates(data.test)[0] == pytest.approx(.1911, abs=.01)
    relationship = adult.COLUMNS.index("relationship")
    for person in data.train + data.test:
        implied = {"Husband": 0, "Wife": 1}.get(person.values[relationship], person.s)
        assert person.s == implied


def shapes(people):
    """Rows without fnlwgt, which alone would make each one unique."""
    return [p.values[:2] + p.values[3:] + (p.y,) for p in people]


@needs_real
def test_the_synthetic_twin_copies_nobody_beyond_chance(data):
    real = set(shapes(adult.read(REAL / "adult.data")))
    unseen = shapes(adult.read(REAL / "adult.test"))
    chance = numpy.mean([shape in real for shape in unseen])
    twin = shapes(data.train + data.test)
    assert numpy.mean([shape in real for shape in twin]) <= chance


# ------------------------------------------------------------------ the house

def sources():
    """Every file of ours."""
    folders = (HERE, HERE / "beyond", HERE / "tiny")
    return sum((sorted(folder.glob("*.py")) for folder in folders), [])


def test_no_line_is_wider_than_half_a_screen():
    for path in sources():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert len(line) <= 88, f"{path.name}, line {number}"


def imports(path):
    """What a file of ours imports, inside functions and lessons too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_circle_of_imports_and_no_lesson_needs_beyond():
    graph = {}
    for path in sources():
        if not path.name.startswith(("test_", "__init__")):
            name = ".".join(path.relative_to(HERE).with_suffix("").parts)
            graph[name] = imports(path)
    for name in LESSONS:
        assert not any(other.startswith("beyond") for other in graph[name]), name
    used = {other for other in graph["train"] if "." in other} & set(graph)
    tools = {"beyond.fast", "beyond.runs", "beyond.options", "beyond.report"}
    assert used <= tools, "train.py's whole share of beyond/"
    while graph:
        free = [name for name in graph if not graph[name] & set(graph)]
        assert free, f"these import each other in a circle: {', '.join(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_grep_finds_every_equation(k):
    texts = [(HERE / f"{name}.py").read_text("utf-8") for name in LESSONS]
    assert any(f"Eq. ({k})" in text for text in texts)


def defined(path):
    """Names of the functions, classes, constants and fields of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_readme_names_only_what_exists():
    readme = (HERE / "README.md").read_text("utf-8")
    for file, name in re.findall(r"([\w/]+\.py):([A-Za-z_][\w.]*)", readme):
        assert (HERE / file).is_file(), f"README names {file}"
        missing = set(name.strip(".").split(".")) - defined(HERE / file)
        assert not missing, f"README names {file}:{name}"
