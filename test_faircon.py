"""Offline, CPU. Every hand-written part against a library or brute force, identities, what must NOT happen, the real command.

Tests that need the published Adult files, GPT-2's tokenizer or peft are skipped, saying so, when these are not there.
"""
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

import adult
import faircon
import gumbel
import lora
import metrics
import swa
import train

HERE = pathlib.Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "adult"
GPT2 = HERE.parent / "shared" / "gpt2_tokenizer"
needs_real = pytest.mark.skipif(not (REAL / "adult.data").exists(), reason="the published Adult files are not there")
DATA = str(REAL) if (REAL / "adult.data").exists() else str(adult.TINY)
SMALL = ["--rows", "20", "--test-rows", "40", "--rounds", "3", "--phi-steps", "2", "--restarts", "2", "--prompt-length", "10", "--attack", "none"]


load_once = functools.lru_cache(adult.load)


@pytest.fixture(scope="module")
def data():
    return load_once(DATA)


@pytest.fixture()
def reader():
    return train.load_model(str(adult.TINY))[0]


def people_of(data, n, bpc=0., seed=0):
    return adult.sample(data.train, n, bpc, numpy.random.default_rng(seed))


def game_of(reader, data, seed=0, **options):
    lora.inject(reader.model, 4, 16, seed=seed)
    o = faircon.Options(**{"rounds": 2, "phi_steps": 2, "restarts": 2, "prompt_length": 10, **options})
    return faircon.Game(reader, people_of(data, 20, .5), people_of(data, 8), o, seed)


# ---------------------------------------------------------------- gumbel.py

@pytest.mark.parametrize("tau", [.5, 1., 2.])
def test_gumbel_softmax_is_the_librarys(tau):
    a, b = (torch.randn(7, 50, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    weight = torch.randn(7, 50)
    torch.manual_seed(3)
    theirs = F.gumbel_softmax(a, tau, hard=True)
    ours = gumbel.gumbel_softmax(b, tau, torch.Generator().manual_seed(3))
    assert torch.equal(theirs, ours), "forward must agree bit for bit"
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-7) and b.grad.abs().sum() > 0


def test_gumbel_sample_is_one_hot_and_follows_the_distribution():
    p = torch.tensor([.6, .3, .1])
    x = gumbel.gumbel_softmax(p.log().expand(20000, 3), 1., torch.Generator().manual_seed(0))
    assert torch.allclose(x.max(-1).values, torch.ones(20000)) and (x.abs() > 1e-6).sum() == 20000
    assert torch.allclose(x.mean(0), p, atol=.015)
    with pytest.raises(ValueError, match="tau"):
        gumbel.gumbel_softmax(p, 0.)


def test_figure_4_averaging_calms_the_end():
    raw, average = gumbel.figure_4(1., 0, steps=400, start=200)
    assert average[-1] < raw[-50:].mean() < raw[0]


# ---------------------------------------------------------------- swa.py

def test_swa_is_the_librarys_average_and_goes_back():
    layer = torch.nn.Linear(3, 2)
    theirs, ours = torch.optim.swa_utils.AveragedModel(layer), swa.SWA(layer.parameters())
    for k in range(5):
        with torch.no_grad():
            layer.weight += torch.randn(2, 3, generator=torch.Generator().manual_seed(k))
        theirs.update_parameters(layer)
        ours.update()
    own = layer.weight.detach().clone()
    with ours.averaged():
        assert torch.allclose(layer.weight, theirs.module.weight, atol=1e-6) and not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)


# ---------------------------------------------------------------- lora.py

def test_lora_is_brute_force_forward_and_backward():
    base = torch.nn.Linear(6, 5)
    m, x = lora.LoRALinear(base, 3, 12.), torch.randn(4, 6)
    assert torch.equal(m(x), base(x)), "B starts at zero: LoRA at the start is the base model"
    torch.nn.init.normal_(m.B)
    A, B = (z.detach().clone().requires_grad_() for z in (m.A, m.B))
    reference = F.linear(x, base.weight + 12 / 3 * B @ A, base.bias)
    assert torch.allclose(m(x), reference, atol=1e-5)
    m(x).pow(2).sum().backward()
    reference.pow(2).sum().backward()
    assert torch.allclose(m.A.grad, A.grad, rtol=1e-3, atol=1e-3) and torch.allclose(m.B.grad, B.grad, rtol=1e-3, atol=1e-3)


def test_merge_then_unmerge_is_the_same_model(reader):
    before = {k: v.clone() for k, v in reader.model.state_dict().items()}
    wrapped, x = lora.inject(reader.model, 4, 16), torch.arange(20)[None]
    assert len(wrapped) == 8
    for m in wrapped:
        torch.nn.init.normal_(m.B, std=.1)
    plain = reader.model(x).logits
    lora.merge(reader.model)
    assert torch.allclose(plain, reader.model(x).logits, atol=1e-3)
    lora.unmerge(reader.model)
    assert all(torch.equal(before[k.replace(".base.", ".")], v) for k, v in reader.model.state_dict().items() if not k.endswith((".A", ".B")))
    assert torch.equal(plain, reader.model(x).logits)
    lora.inject(reader.model, 4, 16)
    assert torch.equal(reader.model.state_dict()["transformer.h.0.attn.attention.q_proj.base.weight"],
                       before["transformer.h.0.attn.attention.q_proj.weight"]), "a second injection begins anew"


@pytest.mark.parametrize("r, share", [(4, .060), (32, .476)])
def test_only_rank_32_is_the_papers_half_percent(r, share):
    config = GPTNeoConfig()  # transformers' default is GPT-Neo-1.3B
    with torch.device("meta"):
        model = GPTNeoForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 1_315_575_808
    lora.inject(model.to("meta"), r, 16)
    assert sum(p.numel() for p in lora.theta(model)) == 196_608 * r
    assert lora.share(model) == pytest.approx(share, abs=.003)


def test_lora_refuses_a_model_without_projections():
    class Bare(torch.nn.Module):
        config = GPTNeoConfig(num_layers=1, attention_types=[[["global"], 1]])
    with pytest.raises(adult.InputError, match="q_proj"):
        lora.inject(Bare())
    with pytest.raises(adult.InputError, match="rank 0"):
        lora.LoRALinear(torch.nn.Linear(2, 2), 0, 1.)


def test_adapter_is_pefts(reader, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for m in lora.inject(reader.model, 4, 16):
        torch.nn.init.normal_(m.B, std=.2)
    lora.save(reader.model, tmp_path, adult.TINY)
    x = torch.arange(30)[None]
    base = AutoModelForCausalLM.from_pretrained(adult.TINY, dtype=torch.float32)
    plain = base(x).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()(x).logits
    ours = reader.model(x).logits
    assert torch.allclose(theirs, ours, atol=1e-5) and (ours - plain).abs().max() > .1
    again = train.load_model(str(adult.TINY))[0]
    lora.load(again.model, tmp_path)
    assert torch.equal(again.model(x).logits, ours)


# ---------------------------------------------------------------- metrics.py

def test_metrics_by_hand():
    s, y = numpy.array([0, 0, 0, 0, 1, 1, 1, 1]), numpy.array([1, 1, 0, 0, 1, 1, 0, 0])
    yhat = numpy.array([1, 1, 1, 0, 1, 0, 0, 0])
    assert metrics.dpd(yhat, s) == .75 - .25
    assert metrics.deo(yhat, y, s) == (1 - .5) + (.5 - 0), "Eq. (2) is a sum, not a maximum"
    p = numpy.array([[.9, .4], [.2, .6], [.3, .3], [.1, .4]])
    r = metrics.evaluate(p, [1, 1, 0, 0], [0, 1, 0, 1])
    assert r["gap"] == pytest.approx(.3) and r["gap_signed"] == pytest.approx(-.05) and r["flip_rate"] == .5 and r["acc"] == 1
    assert r["soft_acc"] == pytest.approx((.9 + .4 + .2 + .6 + .7 + .7 + .9 + .6) / 8)
    assert r["soft_dpd"] == pytest.approx(.05) and r["soft_deo"] == pytest.approx(.15)


def test_empty_group_is_undefined_not_fair():
    with pytest.warns(UserWarning, match="nobody"):
        assert math.isnan(metrics.dpd(numpy.array([1, 0]), numpy.array([0, 0])))


def test_bootstrap_keeps_twins_together():
    rng = numpy.random.default_rng(0)
    p = rng.random((300, 1)).repeat(2, 1)  # no twin differs: no resampling of whole people can make a gap
    y, s = rng.integers(2, size=300), rng.integers(2, size=300)
    low, high = metrics.bootstrap(p, y, s, 50)["gap"]
    assert low == high == 0
    low, high = metrics.bootstrap(p, y, s, 200)["acc"]
    assert low < metrics.evaluate(p, y, s)["acc"] < high


# ---------------------------------------------------------------- adult.py

@needs_real
def test_the_papers_base_rates_come_from_a_label_bug():
    for released, b, ratio in ((False, .1945, 3.18), (True, .1312, 5.23)):
        people = [p for name in adult.SHA256 for p in adult.read(REAL / name, released)]
        assert [round(v, k) for v, k in zip(adult.base_rates(people), (4, 2))] == [b, ratio]


def test_cells_and_samples_are_exact(data):
    assert adult.cells(200, .5) == {(0, 1): 75, (0, 0): 25, (1, 1): 25, (1, 0): 75}
    people = people_of(data, 200, .5)
    assert adult.base_rates(people) == (.5, 1.) and len(set(map(id, people))) == 200
    with pytest.warns(UserWarning, match="not exact"):
        adult.cells(16, .3)


def test_test_rows_never_come_from_training_rows(data):
    train_rows, test_rows = set(map(id, data.train)), set(map(id, data.test))
    fit, validation, test, test_bpc = train.draw(data, train.parser().parse_args(["--test-rows", "100"]), 0)
    assert not set(map(id, fit)) & set(map(id, validation)) and {id(p) for p in fit + validation} <= train_rows
    assert {id(p) for p in test + test_bpc} <= test_rows


def test_twins_differ_in_sex_alone_and_hold_no_answer(data):
    for p in data.test[:50]:
        m, f = adult.twins(p)
        assert m.replace("sex Male", "sex Female") == f and adult.text(p) == adult.twins(p)[p.s] and m.endswith("label:")
        assert adult.text(p) == adult.text(p._replace(y=1 - p.y)), "the text must not know the label"


def test_counterbalanced_shots_have_no_bias(data):
    prompt = adult.few_shot(data.train, 16, .5, numpy.random.default_rng(0), counterbalance=True)
    lines = re.findall(r"sex (\w+),.*\nlabel: (\d)", prompt)
    rate = {s: numpy.mean([int(y) for t, y in lines if t == s]) for s in adult.SEXES}
    assert len(lines) == 16 and rate["Male"] == rate["Female"]


# ---------------------------------------------------------------- f_theta

def plain(reader, g, person, embeds=None):
    """The whole text of each twin in one ordinary forward pass: what Reader must equal."""
    out = []
    for x in adult.twins(person):
        ids = torch.tensor(reader.ids(("\n" if g is not None or embeds is not None else "") + adult.INSTRUCTION + x))
        rows = reader.model.get_input_embeddings()(torch.cat([torch.tensor(g), ids]) if g is not None else ids)
        out.append(reader.model(inputs_embeds=torch.cat([embeds, rows])[None] if embeds is not None else rows[None]).logits[0, -1])
    return torch.stack(out)


def test_shared_computation_equals_plain_forward_in_value_and_gradient(reader, data):
    for m in lora.inject(reader.model, 4, 16):
        torch.nn.init.normal_(m.B, std=.05)
    people, theta = people_of(data, 8), lora.theta(reader.model)
    onehot = F.one_hot(torch.arange(5), len(reader.embed)).float().requires_grad_()
    ours = reader(reader.prefix(onehot), reader.questions(people))
    mine = torch.autograd.grad(faircon.gap(ours), [onehot, *theta])
    embeds = onehot @ reader.embed
    theirs = torch.stack([plain(reader, None, p, embeds) for p in people], 1)
    assert torch.allclose(ours, theirs, atol=1e-4)
    reference = torch.autograd.grad(faircon.gap(theirs), [onehot, *theta])
    for a, b in zip(mine, reference):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), "a cached path with another gradient trains another model"


def test_few_shot_cache_equals_plain_forward(reader, data):
    shots = adult.few_shot(data.train, 16, .5, numpy.random.default_rng(0))
    people = people_of(data, 4)
    p, _ = reader.predict(reader.questions(people), context=shots)
    for person, row in zip(people, p):
        for k, x in enumerate(adult.twins(person)):
            q = reader.model(torch.tensor([reader.ids(shots + x)])).logits[0, -1].softmax(-1)[reader.answers]
            assert (q[1] / q.sum()).item() == pytest.approx(row[k], abs=1e-5)


def test_tokens_are_counted_as_the_model_reads_them(reader, data):
    read, hook = [], reader.model.transformer.h[0].register_forward_hook(lambda m, x, y: read.append(x[0].shape[0] * x[0].shape[1]))
    question = reader.questions(people_of(data, 2)[:1])  # one person: both twins of one length, nothing padded
    for call in (lambda: reader(reader.prefix([5, 6]), question), lambda: reader.predict(question), lambda: reader.write(3, 4, None)):
        reader.tokens = reader.flop = 0
        read.clear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        assert reader.tokens == sum(read) and reader.flop == pytest.approx(products, rel=.02)  # biases and norms are counted, too
    hook.remove()


def test_write_samples_what_the_plain_forward_says(reader):
    ours = reader.write(2, 6, torch.Generator().manual_seed(3))
    generator, texts = torch.Generator().manual_seed(3), torch.empty(2, 0, dtype=torch.long)
    start = torch.tensor([reader.ids(adult.INSTRUCTION)] * 2)
    for _ in range(6):
        logits = reader.model(torch.cat([start, texts], 1)).logits[:, -1] + reader.mask
        texts = torch.cat([texts, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    assert ours == texts.tolist()


def test_gap_is_the_mean_of_unsquared_norms():
    z = torch.randn(2, 4, 9)
    p = z.softmax(-1)
    by_hand = sum(math.sqrt(((p[0, i] - p[1, i]) ** 2).sum().item()) for i in range(4)) / 4
    assert faircon.gap(z).item() == pytest.approx(by_hand, abs=1e-4)
    y = p[..., :2] / p[..., :2].sum(-1, keepdim=True)
    assert faircon.gap(torch.cat([y.log(), torch.full((2, 4, 7), -50.)], -1)).item() >= math.sqrt(2) * (y[0] - y[1])[:, 1].abs().mean() - 1e-3


def test_task_reads_the_twin_that_is_the_person(data):
    people, z, answers = people_of(data, 8), torch.randn(2, 8, 9), torch.tensor([3, 5])
    by_hand = numpy.mean([-z[p.s, i].log_softmax(-1)[answers[p.y]].item() for i, p in enumerate(people)])
    assert faircon.task(z, people, answers).item() == pytest.approx(by_hand, abs=1e-5)
    other = z.clone()
    other[[1 - p.s for p in people], range(8)] += torch.randn(8, 9)
    assert faircon.task(other, people, answers).item() == pytest.approx(by_hand, abs=1e-5)
    assert faircon.task(other, people, answers, both=True) != faircon.task(z, people, answers, both=True)


# ---------------------------------------------------------------- the game

def test_adversary_raises_the_gap_and_touches_phi_alone(reader, data):
    seen = []
    for seed in range(3):  # some first draws are lucky
        game = game_of(reader, data, seed, phi_lr=1.)
        theta, phi = [p.detach().clone() for p in game.theta], game.adversary.phi[0].detach().clone()
        seen.append([game.adversary.step(game.questions, 0) for _ in range(45)])
    seen = numpy.mean(seen, 0)
    assert seen[-20:].mean() > 1.2 * seen[:10].mean(), "phi maximises the gap"
    assert all(p.grad is None and torch.equal(p, w) and p.requires_grad for p, w in zip(game.theta, theta))
    assert not torch.equal(phi, game.adversary.phi[0])


def test_adversary_begins_around_a_text(reader, data):
    adversary, text = game_of(reader, data).adversary, reader.usable[:10]
    adversary.renew(adversary.around([text, text]))
    kept = numpy.mean([a == b for _ in range(200) for a, b in zip(adversary.ids(1), text)])
    assert kept == pytest.approx(14 / 15, abs=.03)


def test_a_step_moves_its_own_restart_alone(reader, data):
    game = game_of(reader, data)
    before = [p.detach().clone() for p in game.adversary.phi]
    for restart in (0, 1, 1):
        game.adversary.step(game.questions, restart)
        now, before = before, [p.detach().clone() for p in game.adversary.phi]
        assert [torch.equal(a, b) for a, b in zip(now, before)] == [restart == 1, restart == 0], "Adam's momentum moves nobody else"


def test_batches_are_passes_and_of_like_length(reader, data):
    game = game_of(reader, data, batch_size=3)
    batches = list(itertools.islice(game.batches(), 14))
    assert all(sorted(itertools.chain(*some)) == list(range(20)) for some in (batches[:7], batches[7:])) and batches[:7] != batches[7:]
    lengths = [len(game.questions[i][0]) for i in itertools.chain(*batches[:4])]
    assert lengths == sorted(lengths)


def test_the_attack_leaves_the_model_as_it_was(reader, data):
    game = game_of(reader, data)
    for p in game.theta:
        torch.nn.init.normal_(p, std=.1)
    base, seen, step = reader.model.state_dict(), [], game.adversary.step
    before = {k: v.clone() for k, v in base.items()}
    reader.model.train()
    game.adversary.step = lambda *x: seen.append((reader.model.training, [m.original is None for m in lora.adapters(reader.model)])) or step(*x)
    game.round(theta=False)
    assert len(seen) == 4 and not any(training or any(apart) for training, apart in seen), "phi attacks the merged model, without dropout"
    assert reader.model.training and all(torch.equal(before[k], v) for k, v in reader.model.state_dict().items())


def test_past_prompts_come_in_all_lengths(reader, data):
    game = game_of(reader, data)
    game.pool = [reader.usable[:10]]
    past = [game.prompts()[2] for _ in range(200)]
    assert {len(g) for g in past} == set(range(1, 11)) and all(g == reader.usable[:10][-len(g):] for g in past)


def test_other_sign_is_equation_4(reader, data):
    game = game_of(reader, data, sign=-1, phi_lr=1.)
    seen = [game.adversary.step(game.questions, 0) for _ in range(60)]
    assert numpy.mean(seen[-20:]) < .9 * numpy.mean(seen[:10]), "Eq. (4) minimises the gap"


def test_model_step_lowers_the_gap_and_leaves_the_base_alone(reader, data):
    game = game_of(reader, data, lam=3., warm_up=-1.)
    base = {k: v.clone() for k, v in reader.model.state_dict().items() if not k.endswith((".A", ".B"))}
    game.pool = [reader.usable[:10]]
    seen = [game.model_step(range(20), 3.)[1] for _ in range(15)]
    assert numpy.mean(seen[-3:]) < numpy.mean(seen[:3])
    assert all(torch.equal(base[k], v) for k, v in reader.model.state_dict().items() if k in base), "only LoRA may change"


def test_model_step_descends_on_equation_3(reader, data, monkeypatch):
    """The prompts' gradients, one backward pass each, add up to that of mean task + lam * THREE * mean gap."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    game = game_of(reader, data)
    game.prompts, game.optimiser.step = lambda: [None, reader.usable[:10]], lambda: None
    for lam in (0., 2.):
        t, d = (sum(x) / 2 for x in zip(*(game.loss(range(10), g) for g in game.prompts())))
        reference = torch.autograd.grad(t + lam * faircon.THREE * d, game.theta)
        assert game.model_step(range(10), lam) == pytest.approx([t.item(), d.item()], abs=1e-6)
        assert all(torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5) for p, g in zip(game.theta, reference)) and game.theta[1].grad.norm() > 1e-3


def test_a_loss_that_is_not_finite_stops_the_run(reader, data):
    game = game_of(reader, data, prompts="none")
    game.theta[0].data[:] = float("nan")
    with pytest.raises(adult.InputError, match="round 1"):
        game.model_step(range(4), 0.)


@pytest.mark.parametrize("starts", ["written", "noise"])
def test_state_and_restore_go_on_bit_for_bit(data, starts):
    ends = []
    for cut in (False, True):
        game = game_of(train.load_model(str(adult.TINY))[0], data, rounds=2, starts=starts)
        game.round()
        if cut:
            saved = game.state()
            game = game_of(train.load_model(str(adult.TINY))[0], data, rounds=2, starts=starts)
            game.restore(saved)
        game.round()
        ends.append([p.detach().clone() for p in game.theta] + game.swa.average + game.adversary.phi)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_attacks_beat_search_at_equal_budget(reader, data):
    lora.inject(reader.model, 8, 16)
    game = faircon.Game(reader, people_of(data, 60, .5), people_of(data, 8),
                        faircon.Options(lam=0., prompts="none", rounds=4, swa=0., lr=3e-3), 0)
    for _ in range(4):
        game.round()
    lora.merge(reader.model)
    questions = reader.questions(people_of(data, 8, seed=5))
    best = {f.__name__: numpy.mean([f(reader, questions, 10, 160, numpy.random.default_rng(k))[0] for k in range(draws)])
            for f, draws in ((faircon.random_search, 5), (faircon.written_search, 2), (faircon.gumbel_attack, 2), (faircon.gcg, 5))}
    assert best["gcg"] > max(best["random_search"], best["written_search"]), best
    assert best["gumbel_attack"] > best["written_search"], best


# ---------------------------------------------------------------- tiny/

def test_embedded_model_learns_in_context(reader, data):
    signed = {}
    for b in (1., 0., -1.):
        r = [metrics.evaluate(reader.predict(reader.questions(some), context=adult.few_shot(data.train, 16, b, rng))[0],
                              [p.y for p in some], [p.s for p in some])
             for rng in map(numpy.random.default_rng, range(3)) for some in [adult.sample(data.test, 40, 0., rng)]]
        signed[b] = numpy.mean([x["gap_signed"] for x in r])
    assert signed[1.] > .4 and signed[-1.] < -.4 and abs(signed[0.]) < .2, signed
    p, mass = reader.predict(reader.questions(adult.sample(data.test, 200, 0., numpy.random.default_rng(0))))
    assert mass > .95


def test_embedded_tokenizer_loses_nothing(data):
    tokenizer = AutoTokenizer.from_pretrained(adult.TINY)
    for p in data.train + data.test:
        assert tokenizer.decode(tokenizer.encode(adult.text(p) + adult.answer(p))) == adult.text(p) + adult.answer(p)
    assert all(len(tokenizer.encode(w)) == 1 for w in (" 0", " 1", " Male", " Female"))
    odd = "naïve café — 東京 🙂\t  two  spaces\n\x00, label: person ,sex"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's tokenizer is not there")
def test_gpt2_tokenizer_answers_and_context_limit(data):
    from transformers import GPT2Tokenizer
    tokenizer = GPT2Tokenizer(vocab=str(GPT2 / "vocab.json"), merges=str(GPT2 / "merges.txt"))
    model = GPTNeoForCausalLM(GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                                           max_position_embeddings=128)).eval()
    reader = faircon.Reader(model, tokenizer)
    assert reader.answers.tolist() == [657, 352]
    person = data.test[0]
    ours = reader(reader.prefix([5, 6, 7]), reader.questions([person]))[:, 0]
    assert torch.allclose(ours, plain(reader, [5, 6, 7], person), atol=1e-5)
    with pytest.raises(adult.InputError, match="context"):
        reader.predict(reader.questions([person]), context=adult.few_shot(data.train, 16, 0., numpy.random.default_rng(0)))


def test_the_twin_is_adults_but_copies_nobody():
    twin = adult.load(adult.TINY)
    assert "SYNTHETIC" in twin.source and (len(twin.train), len(twin.test)) == (8000, 4000)
    assert abs(adult.base_rates(twin.train)[0] - .1963) < .01 and abs(adult.base_rates(twin.test)[0] - .1911) < .01
    for p in twin.train + twin.test:
        row = dict(zip(adult.COLUMNS, p.values))
        assert row["relationship"] not in ("Husband", "Wife") or row["sex"] == ("Male" if row["relationship"] == "Husband" else "Female")


@needs_real
def test_the_twin_coincides_with_real_rows_no_more_than_chance(data):
    def shape(people):
        return [p.values[:2] + p.values[3:] + (p.y,) for p in people]
    real, twin = set(shape(data.train)), adult.load(adult.TINY)
    chance = numpy.mean([r in real for r in shape(data.test)])
    assert numpy.mean([r in real for r in shape(twin.train + twin.test)]) <= chance


# ---------------------------------------------------------------- the command

def command(*words, cwd, ok=True, launcher=(sys.executable,)):
    done = subprocess.run([*launcher, str(HERE / "train.py"), *words], cwd=cwd, capture_output=True, text=True, timeout=170)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def without_timings(results):
    timing = ("seconds", "tokens_per_second", "peak_gb", "phases", "versions", "name")
    if isinstance(results, dict):
        return {k: without_timings(v) for k, v in results.items() if k not in timing}
    return [without_timings(v) for v in results] if isinstance(results, list) else results


def test_the_real_command(tmp_path):
    out = command("--data", DATA, *SMALL[:-1], "quick", cwd=tmp_path).stdout
    results = json.loads((tmp_path / "runs/default/results.json").read_text())
    assert {"config", "versions", "data", "rows", "summary"} <= set(results)
    names = [r["name"] for r in results["rows"]]
    assert names == ["constant", "frozen", "fine-tuned", "both twins (CDA)", "FairCon"]
    for row in results["rows"]:
        assert {"lam", "seed", "acc", "acc_bpc", "dpd", "deo", "gap", "gap_signed", "flip_rate", "ci", "prompt", "seconds",
                "tokens_per_second", "peak_gb"} <= set(row)
        assert row["ci"]["acc"][0] <= row["acc"] <= row["ci"]["acc"][1]
    assert "gcg 10" in results["rows"][-1]["worst"] and "63 0.183 0.142" in out and "adversarial prompt" in out
    assert not list((tmp_path / "runs").rglob("*.part"))
    assert "exactly" in command("--eval", "runs/default", cwd=tmp_path).stdout


def test_tables_1_and_2_and_equation_4(tmp_path):
    common = ["--data", DATA, "--test-rows", "20"]
    with ThreadPoolExecutor(2) as pool:
        prompt_only = pool.submit(command, *common, *SMALL, "--prompt-only", cwd=tmp_path)
        tables = pool.map(lambda t: command(*common, "--table", t, "--shots", "4", "--name", t, cwd=tmp_path).stdout, "12")
    lines = {re.split(r"  +", line)[0]: line for out in tables for line in out.splitlines()}
    for name, paper in (("b = 0", "75.5"), ("b = 0.5", "70.5"), ("b = 1", "68.5"), ("natural, natural test", "85"),
                        ("b = 0, counterbalanced", "81.5")):
        assert paper in lines[name].split("   ")[-1], "the paper's figures must stand beside their own row"
    assert "frozen, fair prompt" in prompt_only.result().stdout


@pytest.mark.parametrize("shots", [None, 4])
def test_cost_counts_what_it_times(shots):
    a = train.parser().parse_args(["--data", DATA, "--batch-size", "2", "--prompt-length", "5"])
    phases, steps, gb, rate = train.cost_of(a, shots, seconds=.2)
    assert set(phases) == ({"evaluation"} if shots else {"phi", "theta"}) and steps and gb > .1 and rate > 1
    assert all(p["seconds"] > 0 and p["tokens_per_second"] > 0 and p["gflop_per_second"] < rate for p in phases.values())


def child(folder, words):
    os.chdir(folder)
    sys.stderr = sys.stdout = open(os.devnull, "w")
    train.main(words)


def test_killed_at_20_moments_ends_as_if_never_killed(tmp_path):
    """SIGKILL at random moments: no half-written file, no lost round, nothing twice, the same JSON."""
    context, rng = multiprocessing.get_context("forkserver"), numpy.random.default_rng(0)
    context.set_forkserver_preload(["torch", "transformers", "train", "faircon", "test_faircon"])
    words = ["--data", str(tmp_path), *SMALL, "--rounds", "8"]
    for name in adult.SHA256:  # few rows: reading the data must not take all the time
        lines = (pathlib.Path(DATA) / name).read_text().splitlines()
        (tmp_path / name).write_text("\n".join(lines[:3000]) + "\n")

    def start(folder, *more):
        folder.mkdir(exist_ok=True)
        p = context.Process(target=child, args=(str(folder), words + list(more)))
        p.start()
        return p
    whole = start(tmp_path / "whole")
    began = time.time()
    whole.join()
    wall, kills, folder = time.time() - began, 0, tmp_path / "cut"
    state, reference = folder / "runs/default/state.pt", json.loads((tmp_path / "whole/runs/default/results.json").read_text())
    progress = (0, 0)
    while kills < 20:
        p = start(folder, *(["--resume"] if state.exists() else []))
        p.join(float(rng.uniform(.2, .8)) * min(wall, .8))
        if p.exitcode is not None:
            assert p.exitcode == 0
            shutil.rmtree(folder)  # it finished before the blow: begin another
            progress = (0, 0)
            continue
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        kills += 1
        if state.exists():
            saved = torch.load(state, weights_only=False)
            now = (len(saved["rows"]), saved["game"]["done"] if saved["game"] else 0)
            assert now >= progress, "a finished round was lost"
            progress = now
    p = start(folder, *(["--resume"] if state.exists() else []))
    p.join()
    assert p.exitcode == 0
    assert without_timings(json.loads((folder / "runs/default/results.json").read_text())) == without_timings(reference)


def test_two_processes_equal_one(tmp_path):
    words = ["--data", DATA, "--rows", "20", "--test-rows", "40", "--rounds", "1", "--phi-steps", "2", "--attack", "none"]
    launchers = {"one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: command(*words, "--name", name, cwd=tmp_path, launcher=launchers[name]), launchers))
    from safetensors.torch import load_file
    ends = [load_file(tmp_path / "runs" / name / "adapter/adapter_model.safetensors") for name in launchers]
    assert max((ends[0][k] - ends[1][k]).abs().max().item() for k in ends[0]) < 1e-5


# ---------------------------------------------------------------- bad input

def broken_data(folder, kind):
    good = (pathlib.Path(DATA) / "adult.data").read_text().splitlines()[:40]
    rows = {"empty": "", "truncated": "\n".join(good)[:-30], "html": "<html><body>404, not found</body></html>\n",
            "columns": "\n".join(",".join(r.split(",")[:14]) for r in good), "header": "age,workclass\n" + "\n".join(good),
            "label": "\n".join(r.replace("<=50K", "poor") for r in good), "sex": "\n".join(r.replace(" Male", " M") for r in good),
            "few": "\n".join(good), "order": "\n".join(", ".join(r.split(", ")[::-1]) for r in good)}
    folder.mkdir()
    for name in adult.SHA256:
        (folder / name).write_text(rows.get(kind, "\n".join(good)))
    if kind == "encoding":
        (folder / "adult.data").write_bytes("39, Größe".encode("utf-16"))
    if kind == "one missing":
        (folder / "adult.test").unlink()
    if kind == "a folder":
        (folder / "adult.data").unlink()
        (folder / "adult.data").mkdir()
    return ["--data", str(folder)]


def broken_model(folder, kind):
    shutil.copytree(adult.TINY, folder, ignore=shutil.ignore_patterns("adult.*", "*.py", "*.state"))
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "truncated weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100_000])
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "not a causal LM":
        from transformers import ViTConfig, ViTModel
        ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)).save_pretrained(folder)
    elif kind == "no q_proj":
        from transformers import GPT2Config, GPT2LMHeadModel
        GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    elif kind == "other weights":
        from safetensors.torch import save_file
        save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "answers of several tokens":
        text = json.loads((folder / "tokenizer.json").read_text())
        text["model"]["merges"], text["model"]["vocab"] = [], {k: v for k, v in text["model"]["vocab"].items() if len(k) == 1}
        (folder / "tokenizer.json").write_text(json.dumps(text))
    return ["--data", DATA, "--model", str(folder)]


def file_where_a_folder_belongs(t):
    (t / "runs").write_text("")
    return []


def damaged_state(t):
    (t / "runs/default").mkdir(parents=True)
    (t / "runs/default/state.pt").write_bytes(b"no")
    return ["--resume"]


def other_state(t):
    (t / "runs/default").mkdir(parents=True)
    torch.save({"config": {"bpc": .1}, "rows": [], "game": None}, t / "runs/default/state.pt")
    return ["--resume"]


def wrong_adapter(t):
    (t / "r/adapter").mkdir(parents=True)
    (t / "r/results.json").write_text(json.dumps({"config": {"model": str(adult.TINY), "dtype": "float32", "device": "cpu"},
                                                       "rows": [{"name": "FairCon"}]}))
    return ["--eval", "r"]


def no_faircon(t):
    wrong_adapter(t)
    (t / "r/results.json").write_text((t / "r/results.json").read_text().replace("FairCon", "fine-tuned"))
    return ["--eval", "r"]


def bad_checksum(t):
    cache = t / "cache" / "faircon"
    broken_data(t / "d", "few")
    cache.parent.mkdir()
    shutil.copytree(t / "d", cache)
    return ["--data-from-cache"]


OPTION = [("--bpc 1.5", "bpc|b_Pc"), ("--bpc -1.01", "b_Pc"), ("--bpc nan", "b_Pc"), ("--lam -1", "lam"), ("--lam nan", "lam"),
          ("--lam 1 inf", "lam"), ("--rank 0", "rank"), ("--rank -3", "rank"), ("--tau 0", "tau"), ("--tau -1", "tau"), ("--tau nan", "tau"),
          ("--rows 0", "rows"), ("--rows 7", "even"), ("--rows 100000", "fewer rows"), ("--test-rows 2", "test-rows"),
          ("--test-rows 90000", "fewer rows"), ("--batch-size 0", "batch-size"), ("--rounds 0", "rounds"), ("--lr 0", "lr"),
          ("--lr nan", "lr"), ("--swa 2", "swa"), ("--warm-up 2", "warm-up"), ("--dropout 1", "dropout"), ("--seeds 0", "seeds"), ("--seed -1", "seed"),
          ("--prompt-length 0", "prompt-length"), ("--prompt-length 5000", "context"), ("--table 1 --shots 60", "context"),
          ("--table 4", "invalid choice"), ("--bcp 0.5", "did you mean --bpc"), ("--lamda 1", "did you mean --lam"), ("--rows x", "invalid int"),
          ("--device cuda:9", "device"), ("--device tpu", "device"), ("--dtype int8", "invalid choice"), ("--name ../x", "name"),
          ("--plot x.doc", "ending"), ("--plot no/where.png", "folder"), ("--eval nowhere", "results.json"), ("--resume", "no interrupted run"),
          ("--model nowhere", "not a model directory"), ("--data nowhere", "does not exist")]
FOLDERS = [(broken_data, k, w) for k, w in (("empty", "no rows"), ("truncated", "columns"), ("html", "columns"), ("columns", "columns"),
           ("header", "columns"), ("label", "label"), ("sex", "sex"), ("few", "needed"), ("encoding", "UTF-8"), ("one missing", "does not exist"),
           ("a folder", "cannot be read"), ("order", "order"))]
FOLDERS += [(broken_model, k, w) for k, w in (("no weights", "loaded"), ("truncated weights", "loaded"), ("no tokenizer", "loaded|tokens"),
            ("broken config", "loaded"), ("no config", "config.json"), ("not a causal LM", "loaded"), ("no q_proj", "q_proj"),
            ("other weights", "lacks weights"), ("answers of several tokens", "single tokens"))]
MADE = [(file_where_a_folder_belongs, "written"), (damaged_state, "damaged"), (other_state, "another --"), (wrong_adapter, "no adapter"), (no_faircon, "no FairCon model"),
        (bad_checksum, "checksums")]


@pytest.mark.parametrize("case", OPTION + FOLDERS + MADE, ids=lambda c: c[0] if isinstance(c[0], str) else f"{c[0].__name__} {c[1]}")
def test_bad_input_is_one_clear_sentence(case, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adult, "load", load_once)  # seventy times the same files
    if isinstance(case[0], str):
        words = case[0].split() + ([] if "--data" in case[0] else ["--data", DATA])
    else:
        words = case[0](tmp_path, *case[1:-1]) if len(case) == 2 else case[0](tmp_path / "given", case[1])
        if "--data-from-cache" in words:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            words = []
        elif "--data" not in words:
            words += ["--data", DATA]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
        warnings.simplefilter("ignore")
        train.main(words)
    captured = capfd.readouterr()
    message = str(stopped.value) if stopped.value.code not in (1, 2) else captured.err.strip().splitlines()[-1]
    assert stopped.value.code != 0 and message.startswith("train.py: ") and "\n" not in message.strip(), message
    assert re.search(case[-1], message) and "Traceback" not in captured.err, message
    assert not list(tmp_path.rglob("*.part"))
    assert not list((tmp_path / "runs").glob("*/results.json"))


def test_help_is_fast_and_explains_every_flag():
    began = time.time()
    out = subprocess.run([sys.executable, str(HERE / "train.py"), "--help"], capture_output=True, text=True).stdout
    assert time.time() - began < 1.5 and "paper" in out and "b_Pc" in out
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import train; assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- README

def test_readme_names_only_what_exists():
    readme = (HERE / "README.md").read_text()
    names = re.findall(r"`(adult|faircon|gumbel|lora|metrics|swa|train)\.py:([\w.]+)`", readme)
    assert len(names) >= 12
    for module, name in names:
        thing = globals()[module]
        for part in name.split("."):
            assert hasattr(thing, part), f"README names {module}.py:{name}, which does not exist"
            thing = getattr(thing, part)


def test_every_equation_is_found_by_grep():
    code = "".join(p.read_text() for p in HERE.glob("*.py") if p.name != "test_faircon.py")
    assert all(f"Eq. ({k})" in code for k in (1, 2, 3, 4))
