"""The lessons' tests, in the paper's order. Offline, on a CPU, in about a minute.

    equals a reference    a library, or the definition by brute force; gradients too
    identities            what must be exactly so, or must not change at all
    the other way         what must NOT happen: a leak, a moved weight, a silent NaN

A test's name is a claim, its message what a failure means. Skipped, saying so, where
they are missing: the published Adult files, GPT-2's tokenizer, peft.

    pytest -q test_faircon.py
"""
import copy
import dataclasses
import json
import math
import os
import pathlib
import re

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers

import adult
import faircon
import gumbel
import lora
import metrics
import swa
from adult import InputError
from beyond.robust import FollowingGame, RobustGame, RobustOptions
from faircon import NO_PROMPT, Game, LanguageModel

torch.set_num_threads(1)                        # small tensors: threads would only wait
HERE = pathlib.Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "adult"
GPT2 = HERE.parent / "shared" / "gpt2_tokenizer"
SMALL = {"rounds": 2, "batch_size": 4, "prompt_length": 6, "phi_steps": 2, "phi_lr": .3,
         "rank": 4}
needs_real = pytest.mark.skipif(not (REAL / "adult.data").exists(),
                                reason="the published Adult files are not there")
needs_gpt2 = pytest.mark.skipif(not (GPT2 / "vocab.json").exists(),
                                reason="GPT-2's tokenizer is not there")


# ------------------------------------------------------------------ what tests share

@pytest.fixture(scope="module")
def data():
    return adult.load(adult.TINY)


@pytest.fixture(scope="module")
def loaded():
    network = transformers.AutoModelForCausalLM.from_pretrained(adult.TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adult.TINY)
    return LanguageModel(network.eval(), tokenizer)


@pytest.fixture()
def model(loaded):
    """The bundled model, without adapters before and after."""
    lora.remove(loaded.model)
    yield loaded
    lora.remove(loaded.model)


def people_of(data, n, bpc=0.):
    """Training rows; one has a longer country than any of Adult's: texts are padded."""
    people = adult.sample(data.train, n, bpc, numpy.random.default_rng(0))
    values = [*people[1].values[:-1], "Saint Vincent and the Grenadines"]
    people[1] = people[1]._replace(values=tuple(values))
    return people


def game_of(model, people, kind=Game, seed=0, adversary=True, **given):
    """A tiny game on fresh adapters."""
    options = RobustOptions(**{**SMALL, **given})
    return kind(model, people, options, seed, adversary)


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


def close(ours, reference, share=1e-4):
    """Equal up to a share of the largest number, which is not 0."""
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
    """Four men answer 1, 0, 1, 1 and three women 1, 1, 0; then they change places."""
    p = [[.9, .4], [.3, .3], [.8, .6], [.6, .3], [.2, .6], [.1, .6], [.6, .3]]
    y = [1, 0, 0, 1, 1, 0, 1]
    s = [0, 0, 0, 0, 1, 1, 1]
    by_hand = {
        "acc": 4 / 7,
        "dpd": 3 / 4 - 2 / 3,
        "deo": (1 / 1 - 1 / 2) + (2 / 2 - 1 / 2),
        "positives": 5 / 7,
        "gap": (.5 + 0 + .2 + .3 + .4 + .5 + .3) / 7,
        "flip": 5 / 7,
        "signed_gap": (.5 + 0 + .2 + .3 - .4 - .5 + .3) / 7,
    }
    assert metrics.evaluate(p, y, s) == pytest.approx(by_hand)
    by_hand["signed_gap"] *= -1
    swapped = [[p_f, p_m] for p_m, p_f in p]
    assert metrics.evaluate(swapped, y, [1 - k for k in s]) == pytest.approx(by_hand)


def test_nothing_measured_is_not_fair():
    nobody = numpy.zeros(3, int)
    with pytest.warns(UserWarning, match="nobody has s=1"):
        assert math.isnan(metrics.dpd(nobody, nobody))
    y = numpy.array([0, 0, 1])
    s = numpy.array([0, 1, 1])
    with pytest.warns(UserWarning, match="nobody has s=0, y=1"):
        assert math.isnan(metrics.deo(nobody, y, s))
    p = [[.5, math.nan], [.1, .2]]
    with pytest.warns(UserWarning, match="NaN"):
        found = metrics.evaluate(p, [0, 1], [0, 1])
    assert all(map(math.isnan, found.values())), "NaN would pass for always answering 0"


# ------------------------------------------------------------------ 2 Data

@needs_real
def test_the_papers_base_rates_come_from_a_label_bug():
    train = adult.read(REAL / "adult.data")
    test = adult.read(REAL / "adult.test")
    as_released = [p._replace(y=0) for p in test]
    for some, b, ratio in ((as_released, .1312, 5.23), (test, .1945, 3.18)):
        found_b, found_ratio = adult.b_pc_and_ratio(train + some)
        assert round(found_b, 4) == b
        assert round(found_ratio, 2) == ratio


def test_cells_and_samples_are_exact(data):
    wanted = {(0, 1): 75, (0, 0): 25, (1, 1): 25, (1, 0): 75}
    people = people_of(data, 200, .5)
    cells = [(p.s, p.y) for p in people]
    found = {cell: cells.count(cell) for cell in wanted}
    assert adult.cells(200, .5) == wanted
    assert found == wanted
    assert cells[:75].count((0, 1)) < 50, "people come in random order"
    assert len(set(map(id, people))) == 200, "somebody was drawn twice"
    with pytest.warns(UserWarning, match="b_Pc = 0.25 is used"):
        adult.cells(16, .3)
    refused = [
        (200, 1.1, "impossible"),
        (7, 0., "even"),
        (99_992, 0., "with sex Male and label 1"),
        (99_992, None, "fewer rows"),
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
    rates = [adult.b_pc_and_ratio(some)[0] for some in people]
    assert rates == [.5, 0., 0., .5]
    assert people == adult.split(data, 80, .5, 40, seed=3)
    assert people.train != adult.split(data, 80, .5, 40, seed=4).train


def test_twins_differ_in_sex_alone_and_hold_no_answer(data):
    for person in data.test[:200]:
        x_m, x_f = adult.twins(person)
        assert x_m.count("sex Male") == 1
        assert x_m.endswith("\nlabel:")
        assert x_m.replace("sex Male", "sex Female") == x_f
        own = (x_m, x_f)[person.s]
        assert adult.question(person) == own, "not the person's own sex"
        other = person._replace(y=1 - person.y)
        assert adult.question(other) == own, "the text knows the answer"
        assert adult.shot(person) == f"{own} {person.y}\n"
        assert adult.question(person, attributes=[]) == f"{adult.OPENING} \nlabel:"
        assert adult.question(adult.flipped(person)) == (x_f, x_m)[person.s]


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
    assert lines[:16] != lines[16:], "twins come in random order"


ROW = ("39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, "
       "Not-in-family, White, Male, 2174, 0, 40, United-States, >50K.\n")


def test_rows_are_read_as_uci_writes_them(tmp_path):
    path = tmp_path / "adult.data"
    for label, y in ((">50K.", 1), (">50K", 1), ("<=50K.", 0), ("<=50K", 0)):
        path.write_text("|1x3 Cross validator\n" + ROW.replace(">50K.", label))
        person, = adult.read(path)
        assert person.y == y, "x5.23 comes from here"
        assert person.values == tuple(ROW.split(", ")[:14])
    refused = {
        "\n" + ROW.replace(" White,", ""): "line 2 is not a row as UCI writes it",
        "\n" + ROW.replace("Male", "M"): "line 2 is not a row as UCI writes it",
        "\n" + ROW.replace(">50K", "50K"): "line 2 is not a row as UCI writes it",
        "|1x3 Cross validator\n": "holds no rows",
        "\udcff": "adult.data cannot be read .not UTF-8",
    }
    for content, why in refused.items():
        path.write_text(content, errors="surrogateescape")
        with pytest.raises(InputError, match=why):
            adult.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="adult.data cannot be read .No such file"):
        adult.load(tmp_path)


# ------------------------------------------------------------------ 3.1 f_theta

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
NARROW = {**GROUPED, "head_dim": 8}
FAMILIES = {
    "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 32,
               "attention_types": [[["global", "local"], 1]]},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "OPT": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Phi": GROUPED,
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 32},
    "Qwen3": NARROW,
    "Gemma2": {**NARROW, "sliding_window": 32},             # embeddings times sqrt(D)
    "Granite": {**GROUPED, "logits_scaling": 4., "embedding_multiplier": 3.},
    "Cohere": GROUPED,                                      # logits times .0625
}


def tokenizer_with(change):
    """The bundled tokenizer, its description changed."""
    from tokenizers import Tokenizer
    path = adult.TINY / "tokenizer.json"
    described = json.loads(path.read_text("utf-8"))
    change(described)
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def like_llamas(described):
    """" 0" is two tokens, a space and a digit, and "!" begins every text."""
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    number = described["model"]["vocab"]["!"]
    template = described["post_processor"]
    template["special_tokens"] = {"!": {"id": "!", "ids": [number], "tokens": ["!"]}}
    template["single"].insert(0, {"SpecialToken": {"id": "!", "type_id": 0}})


def random_model(family, dtype=torch.float32, **given):
    """A tiny model with random weights, and LoRA whose B is not zero."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    kind = getattr(transformers, f"{family}Config")
    config = kind(vocab_size=1024, **ids, **FAMILIES[family], **given)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(p for p in network.parameters() if p.dim() > 1)
    network.to(dtype)
    lora.inject(network, 2)
    shake(lora.theta(network))
    return LanguageModel(network, tokenizer_with(like_llamas))


def one_forward_pass_each(model, before, text, people):
    """Logits (2, B, V) of whole texts as token ids, and the texts' embeddings."""
    caught = []

    def catch(module, inputs, output):
        caught.append(output.detach().requires_grad_())
        return caught[-1]
    hook = model.model.get_input_embeddings().register_forward_hook(catch)
    logits = []
    for person in people:
        for x in adult.twins(person):
            ids = before + model.ids(text + x + " 0")[:-1]
            found = model.model(input_ids=torch.tensor([ids])).logits
            logits.append(found[0, -1])
    hook.remove()
    logits = torch.stack(logits).view(len(people), 2, -1)
    return logits.transpose(0, 1), caught


@pytest.mark.parametrize("family", FAMILIES)
def test_f_theta_is_one_forward_pass_over_each_whole_text(family, data):
    """Whatever is read once, for everybody or for twins; padding changes nobody."""
    model = random_model(family)
    people = people_of(data, 4)
    questions = model.questions(people)
    g = model.usable[:40]                                   # longer than every window
    phi = model.embed[g].detach().requires_grad_()
    ours = model(model.prefix(phi), questions)
    text = "\n" + adult.INSTRUCTION
    whole, embeddings = one_forward_pass_each(model, model.bos + g, text, people)
    assert close(ours, whole), "another function"

    weight = torch.randn(ours.shape, generator=seeded(1))
    theta = lora.theta(model.model)
    of_phi, *of_theta = torch.autograd.grad((ours * weight).sum(), [phi, *theta])
    loss = (whole * weight).sum()
    by_hand = torch.autograd.grad(loss, embeddings, retain_graph=True)
    by_hand = sum(each[0, 1:41] for each in by_hand)        # behind BOS
    assert close(of_phi, by_hand), "phi would climb something else"
    for found, wanted in zip(of_theta, torch.autograd.grad(loss, theta)):
        assert close(found, wanted), "theta would descend something else"

    whole, _ = one_forward_pass_each(model, model.bos, adult.INSTRUCTION, people)
    assert close(model(model.prefix(NO_PROMPT), questions), whole)
    own = [[questions[i][p.s]] for i, p in enumerate(people)]
    alone, = model(model.prefix(), own)                                  # K = 1
    both = [whole[p.s, i] for i, p in enumerate(people)]
    assert close(alone, torch.stack(both)), "one text a person is another"


def test_what_twins_share_is_read_once(model, data, monkeypatch):
    questions = model.questions(people_of(data, 4))
    sizes = []
    spy(monkeypatch, model, "run", lambda x, *_: sizes.append(x.shape[:2]))
    model(model.prefix(), questions)
    in_common = min(len(os.path.commonprefix(twins)) for twins in questions)
    longest = max(len(x_m) for x_m, _ in questions)
    wanted = [(1, len(model.prefix())), (4, in_common), (8, longest - in_common)]
    assert sizes == wanted, "the same number, but not by the shortest way"


@torch.no_grad()
def test_predict_in_batches_is_predict_at_once(model, data, monkeypatch):
    people = people_of(data, 6, 1 / 3)[:5]
    questions = model.questions(people)
    shots = adult.few_shot(data.train, 4, 1., numpy.random.default_rng(0))
    whole, _ = one_forward_pass_each(model, [], shots, people)
    wanted = whole[..., model.answers].softmax(-1)[..., 1].T
    sizes = []
    spy(monkeypatch, model, "logits", lambda *seen: sizes.append(len(seen[1])))
    for at_once in (8192, 2 * len(model.ids(shots)), 1):
        monkeypatch.setattr(faircon, "AT_ONCE", at_once)
        found = model.predict(questions, context=shots)
        assert numpy.allclose(found, wanted.numpy(), atol=1e-4)
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1], "AT_ONCE bounds the memory"


def test_too_long_is_one_sentence(model, data, monkeypatch):
    questions = model.questions(people_of(data, 4))
    prefix = model.prefix([5, 6])
    longest = len(prefix) + max(len(x_m) for x_m, _ in questions)
    assert model.window == model.model.config.max_position_embeddings
    monkeypatch.setattr(model, "window", longest)
    model(prefix, questions)
    monkeypatch.setattr(model, "window", longest - 1)
    with pytest.raises(InputError, match=f"are {longest} tokens"):
        model(prefix, questions)


@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_model_answers_in_float32(data, tied):
    """In bf16 logits of 20 come in steps of .125, and gaps of .001 are reported."""
    model = random_model("Llama", torch.bfloat16, tie_word_embeddings=tied)
    network = model.model
    again = LanguageModel(network, model.tokenizer)             # harmless a second time
    questions = model.questions(people_of(data, 4))
    logits = model(model.prefix([5, 6]), questions)
    assert torch.equal(logits, again(again.prefix([5, 6]), questions))
    assert not torch.equal(logits, logits.bfloat16().float()), "rounded to bf16"
    x = model.embed[torch.arange(30)[None]].bfloat16()
    logits = model.run(x, transformers.DynamicCache())
    hidden = network.base_model(inputs_embeds=x).last_hidden_state[:, -1:]
    assert hidden.dtype == torch.bfloat16, "the blocks are to stay in bf16"
    wanted = hidden.float() @ network.lm_head.weight.float().T
    assert close(logits, wanted, 1e-5)
    record, = game_of(model, people_of(data, 4), rounds=1).play()
    assert record["distance"] > 0, "it cannot be played with"


@pytest.mark.parametrize("why, change", [
    ("splits a prompt", {"type": "Prepend", "prepend": "x"}),
    ("no single", {"type": "Replace", "pattern": {"String": " 1"}, "content": ""}),
    ("no single", {"type": "Replace", "pattern": {"String": " 1"}, "content": " 0"}),
    ("token 1013 .* has 1013 embeddings", None),
])
def test_a_tokenizer_that_cannot_ask_is_refused(model, why, change):
    network = copy.deepcopy(model.model)
    if change is None:
        network.resize_token_embeddings(1013)
    other = tokenizer_with(lambda described: described.update(normalizer=change))
    with pytest.raises(InputError, match=why):
        LanguageModel(network, other)


def test_usable_tokens_are_text(model):
    """And none is special, even where it is known as an added token only."""
    for i in model.usable:
        again = model.ids(model.decode([i]))
        assert again == [i], "this prompt cannot be typed"
    allowed = (model.mask == 0).nonzero()
    assert allowed.flatten().tolist() == model.usable
    assert model.mask.min() == -math.inf
    assert len(allowed) > 500
    other = tokenizer_with(lambda described: described["added_tokens"][-1].update(
        special=True))
    assert LanguageModel(model.model, other).usable == model.usable[:-1]


@needs_gpt2
def test_gpt2s_tokenizer_answers():
    vocabulary = str(GPT2 / "vocab.json")
    merges = str(GPT2 / "merges.txt")
    tokenizer = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    config = transformers.GPTNeoConfig(**FAMILIES["GPTNeo"])
    network = transformers.GPTNeoForCausalLM(config).eval()
    model = LanguageModel(network, tokenizer)
    assert model.answers.tolist() == [657, 352]
    assert len(model.usable) > 45_000
    for i in model.usable:
        assert "\ufffd" not in model.decode([i]), "half a letter cannot be typed"


# ------------------------------------------------------------------ 3.1 the distance

@pytest.mark.parametrize("scale", [.1, 1., 9.])
def test_distance_is_the_mean_difference_of_log_odds(scale):
    """And at least four times the gap, which it is to close."""
    answers = torch.tensor([3, 5])
    logits = scale * torch.randn(2, 4, 9, generator=seeded(0))
    p = logits.softmax(-1).double()[..., answers]                        # (2, 4, 2)
    odds = (p[..., 1] / p[..., 0]).log()
    wanted = (odds[0] - odds[1]).abs().mean().item()
    found = faircon.distance(logits, answers).item()
    assert found == pytest.approx(wanted, abs=1e-4), "not the mean of unsquared norms"
    p_yes = p[..., 1] / p.sum(-1)                    # as LanguageModel.p_yes has it
    gap = (p_yes[0] - p_yes[1]).abs().mean()
    assert gap <= found / 4 + 1e-6


def test_distance_has_a_slope_where_twins_agree():
    twins = torch.randn(1, 4, 9, generator=seeded(0)).expand(2, -1, -1).clone()
    twins.requires_grad_()
    distance = faircon.distance(twins, torch.tensor([3, 5]))
    distance.backward()
    assert distance < 2e-4
    assert twins.grad.isfinite().all()


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


@pytest.mark.parametrize("tau", [0., -1., math.nan])
def test_a_temperature_is_positive(tau):
    with pytest.raises(ValueError, match="tau"):
        gumbel.gumbel_softmax(torch.zeros(3), tau)


def test_sample_embeddings_is_a_sample_times_the_embeddings():
    generator = seeded(1)
    logits = torch.randn(70, 50, generator=generator)
    E = torch.randn(50, 6, generator=generator)
    weight = torch.randn(70, 6, generator=generator)
    noise = gumbel.gumbel_noise((70, 50), generator)
    noise[:, 40:] = -math.inf                                # tokens that are no text
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    ids, embeddings = gumbel.sample_embeddings(ours, E, .7, noise.clone())
    sample = gumbel.gumbel_softmax(theirs, .7, noise=noise)
    assert torch.equal(ids, sample.argmax(-1))
    assert torch.allclose(embeddings, E[ids], atol=1e-6)
    assert ids.max() < 40
    (embeddings * weight).sum().backward()
    (sample @ E * weight).sum().backward()
    assert close(ours.grad, theirs.grad, 1e-5)
    assert not ours.grad[:, 40:].any()


# ------------------------------------------------------------------ phi, Eq. (3), (4)

def next_sample(adversary, phi):
    """What the adversary samples next, one-hot (L, V), differentiable in phi."""
    generator = torch.Generator()
    generator.set_state(adversary.generator.get_state())
    noise = gumbel.gumbel_noise(phi.shape, generator) + adversary.model.mask
    return gumbel.gumbel_softmax(phi, adversary.options.tau, noise=noise)


def log_odds(model, logits):
    """f_theta (2, B)."""
    no, yes = model.answers
    p = logits.softmax(-1)
    return (p[..., yes] / p[..., no]).log()


def upward(adversary, questions):
    """The distance of the next sample, the same for both twins, and its slope."""
    model = adversary.model
    phi = adversary.phi.detach().clone().requires_grad_()
    sample = next_sample(adversary, phi)
    logits = model(model.prefix(sample @ model.embed), questions)
    f_m, f_f = log_odds(model, logits)                                   # (B,)
    distance = (f_m - f_f).abs().mean()
    slope, = torch.autograd.grad(distance, phi)
    return distance.item(), slope


@pytest.mark.parametrize("given, sign", [((), 1), ((-1,), -1)])
def test_phi_steps_up_eq_3_or_down_eq_4_and_moves_alone(model, data, given, sign):
    """sign +1 is the argmax of Eq. (3), -1 the min of Eq. (4)."""
    game = game_of(model, people_of(data, 4), tau=.7)
    shake(game.theta)
    adversary = game.adversary
    weights = copies(model.model.state_dict().values())
    phi = adversary.phi.detach().clone()
    distance, up = upward(adversary, game.questions)
    assert adversary.step(game.questions, *given) == pytest.approx(distance, rel=.01)
    gradient = adversary.phi.grad
    assert close(-sign * gradient, up, .01), "not the distance's gradient"
    moved = adversary.phi.detach() - phi
    steep = up.abs() > .01 * up.abs().max()
    wanted = sign * game.options.phi_lr * up.sign()
    assert torch.allclose(moved[steep], wanted[steep], rtol=1e-3), "the wrong way"
    for p in model.model.parameters():
        assert p.grad is None, "theta is frozen"
    assert same(model.model.state_dict().values(), weights)


def test_phi_attacks_the_merged_model_without_dropout(model, data, monkeypatch):
    game = game_of(model, people_of(data, 8), dropout=.5, phi_steps=3)
    shake(game.theta)
    layers = lora.adapters(model.model).values()
    x = torch.arange(9)[None]
    seen = []

    def see(questions, _):
        assert len(questions) == 4, "not a batch"
        for layer in layers:
            assert layer.original is not None, "not merged"
        seen.append(model.model(x).logits)
    spy(monkeypatch, game.adversary, "step", see)
    game.phi_turn()
    assert len(seen) == 3
    assert same(seen, seen[:1] * 3), "theta or dropout moved"
    for layer in layers:
        assert layer.original is None, "still merged"


def test_phi_begins_as_noise_and_its_tokens_are_text(model, data):
    adversary = game_of(model, people_of(data, 8), prompt_length=30).adversary
    assert adversary.phi.shape == (30, 1024)
    assert abs(adversary.phi.std() - 1) < .05
    adversary.phi.data[:, model.mask < 0] = 99.
    assert set(adversary.likeliest_ids()) <= set(model.usable)


@pytest.mark.parametrize("kind, wanted", [(Game, [2, 4, 6]), (RobustGame, [2, 2, 2])])
def test_phi_goes_on_over_the_rounds_or_begins_anew(model, data, kind, wanted):
    """In RobustGame anew, at a length of its own."""
    game = game_of(model, people_of(data, 8), kind, longest=60)
    steps = []
    lengths = set()
    for _ in range(3):
        before = game.adversary.phi.detach().clone()
        game.phi_turn()
        phi = game.adversary.phi.detach()
        lengths.add(len(phi))
        adam = game.adversary.optimiser.state_dict()["state"][0]
        steps.append(adam["step"].item())
        goes_on = before.shape == phi.shape and (phi - before).abs().max() < 1
        assert goes_on == (kind is Game)
    assert steps == wanted, "Adam's steps"
    assert len(lengths) == (1 if kind is Game else 3)
    assert max(lengths) <= 60


# ------------------------------------------------------------------ theta, Eq. (3)

def equation_3(model, people, prompts, lam):
    """Mean over the prompts of task + lam * distance, and its two terms."""
    tasks = []
    distances = []
    for g in prompts:
        logits = model(model.prefix(g), model.questions(people))
        f_m, f_f = log_odds(model, logits)
        distances.append((f_m - f_f).abs().mean())
        p = logits.softmax(-1)                                           # (2, B, V)
        for i, person in enumerate(people):
            answer = model.answers[person.y]
            tasks.append(-p[person.s, i, answer].log())
    t = torch.stack(tasks).mean()
    d = torch.stack(distances).mean()
    return t + lam * d, {"task": t.item(), "distance": d.item()}


@pytest.mark.parametrize("lam", [0., 2.])
def test_theta_steps_down_eq_3(model, data, lam, monkeypatch):
    """Every prompt weighs the same; with lam = 0 only a person's own text is read."""
    people = people_of(data, 8)[2:6]
    prompts = [NO_PROMPT, model.usable[:6]]
    game = game_of(model, people, lam=lam, lr=1e-3, dropout=0.)
    shake(game.theta, .04)
    loss, terms = equation_3(model, people, prompts, lam)
    gradients = torch.autograd.grad(loss, game.theta)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert (norm > 1) == (lam > 0), "one of both is to be clipped to norm 1"
    before = copies(game.theta)
    frozen = [*model.model.buffers(), game.adversary.phi]
    frozen += [layer.base.weight for layer in lora.adapters(model.model).values()]
    as_it_was = copies(frozen)
    questions = game.questions
    if lam == 0:
        del terms["distance"]
        questions = [[x[p.s]] for x, p in zip(questions, people)]
    read = []
    game.prompts = lambda: prompts
    spy(monkeypatch, model, "logits", lambda *seen: read.append(seen[1]))
    for p in game.theta:
        p.grad = torch.ones_like(p)                 # left over, and to be forgotten
    assert game.theta_step(range(4)) == pytest.approx(terms, rel=.01)
    assert read == [questions] * 2
    for p, gradient, old in zip(game.theta, gradients, before):
        clipped = gradient / max(1., norm)
        assert close(p.grad, clipped, .01), "not the gradient of Eq. (3)"
        steep = gradient.abs() > .05 * gradient.abs().max()
        moved = p.detach() - old
        wanted = -1e-3 * gradient.sign()
        assert torch.allclose(moved[steep], wanted[steep], rtol=.01)
    assert same(frozen, as_it_was), "phi and the base are frozen here"


def test_theta_alone_has_dropout(model, data, monkeypatch):
    game = game_of(model, people_of(data, 8), dropout=.3)
    layers = lora.adapters(model.model).values()
    modes = []

    def see(*_):
        modes.append({layer.training for layer in layers})
        modes.append({model.model.training})
    spy(monkeypatch, model, "check_length", see)
    game.theta_step(range(4))
    assert modes == [{True}, {False}], "the frozen model's own dropout stays off"
    assert not any(layer.training for layer in layers)


def test_a_loss_that_is_not_finite_stops_the_run(model, data):
    game = game_of(model, people_of(data, 4))
    game.theta[0].data[:] = math.nan
    before = copies(game.theta[1:])
    with pytest.raises(InputError, match="round 1"):
        game.theta_step(range(4))
    assert same(game.theta[1:], before)


# ------------------------------------------------------------------ 3.1 the game

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


def test_a_seed_governs_everything(model, data):
    begun = []
    for seed in (3, 3, 4):
        game = game_of(model, people_of(data, 8), seed=seed)
        order = numpy.concatenate(game.batches())
        begun.append(copies([game.adversary.phi, game.theta[0], torch.tensor(order)]))
    assert same(begun[0], begun[1])
    for some, other in zip(begun[0], begun[2]):
        assert not torch.equal(some, other)


@pytest.mark.parametrize("kind", [Game, RobustGame])
@pytest.mark.parametrize("adversary", [True, False])
def test_theta_meets_fresh_prompts(model, data, kind, adversary, monkeypatch):
    """A sample of the adversary, if there is one. In RobustGame biased shots, too."""
    game = game_of(model, people_of(data, 4), kind, adversary=adversary, rounds=1)
    monkeypatch.setattr(RobustGame, "biased_shots", lambda game: [5, 6])
    for _ in range(2):
        wanted = []
        if adversary:
            sample = next_sample(game.adversary, game.adversary.phi)
            wanted.append(sample.argmax(-1).tolist())
        if kind is RobustGame:
            wanted.append([5, 6])
        assert game.prompts() == wanted
    record, = game.play()
    assert ("phi" in record) == adversary


def test_a_round_is_phis_turn_and_then_a_pass_of_theta(model, data, monkeypatch):
    game = game_of(model, people_of(data, 8), rounds=3, phi_steps=2)
    turns = []
    phi = []
    tasks = []
    spy(monkeypatch, game.adversary, "step", lambda *seen: phi.append(seen[-1]))
    spy(monkeypatch, game, "theta_step", lambda *seen: tasks.append(seen[-1]["task"]))
    spy(monkeypatch, game, "theta_step", lambda *seen: turns.append(len(phi)))
    game.done = 1                                   # resumed: two rounds are left
    records = list(game.play())
    assert [record["round"] for record in records] == [2, 3]
    assert turns == [2, 2, 4, 4], "phi takes its steps, then theta"
    assert [record["phi"] for record in records] == [phi[:2], phi[2:]]
    means = [numpy.mean(tasks[:2]), numpy.mean(tasks[2:])]
    assert [record["task"] for record in records] == pytest.approx(means)
    assert game.done == 3


def played(model, people, kind, **given):
    """What a game has made: theta, SWA, phi, and how many weights SWA has seen."""
    torch.manual_seed(0)
    game = game_of(model, people, kind, **given)
    shake(game.theta[1::2], .01)                        # B: else dropout does nothing
    list(game.play())
    count = torch.tensor(game.swa.n)
    return copies([*game.theta, *game.swa.average, game.adversary.phi, count])


DEFAULTS = {**dataclasses.asdict(RobustOptions()), **SMALL, "swa": .7}
IMPOSSIBLE = {
    "lam": -1., "rounds": 0, "batch_size": 0, "lr": 0., "rank": 0, "alpha": 0.,
    "dropout": 1., "prompt_length": 0, "phi_steps": -1, "phi_lr": 0., "tau": 0.,
    "swa": 1.1, "longest": 0}


@pytest.mark.parametrize("kind, names", [(Game, list(DEFAULTS)[:-1]),
                                         (RobustGame, ["longest"])])
def test_every_option_does_something(model, data, kind, names):
    people = people_of(data, 8)
    usual = played(model, people, kind)
    assert same(played(model, people, kind), usual), "luck, not an option"
    for name in names:
        value = DEFAULTS[name]
        other = value + 1 if isinstance(value, int) else value + .3
        changed = played(model, people, kind, **{name: other})
        assert not same(changed, usual), f"{name} is an option that does nothing"


@pytest.mark.parametrize("name", DEFAULTS)
def test_impossible_options_are_refused_by_name(name):
    for value in (IMPOSSIBLE[name], math.nan, math.inf):
        with pytest.raises(InputError, match=f"^{name} = {value} is impossible"):
            RobustOptions(**{name: value})
    RobustOptions(lam=0., dropout=0., phi_steps=0, swa=0.)
    RobustOptions(swa=1., rounds=1, batch_size=1, rank=1, prompt_length=1, longest=1)


# ------------------------------------------------------------------ RobustGame

def test_lengths_are_any_number_and_any_order_of_magnitude(model, data):
    """400 draws; expected above 280: 30.5 %, below 24: 27 %. Margins: over 4 sigma."""
    game = game_of(model, people_of(data, 4), RobustGame, longest=560)
    lengths = numpy.array([game.some_length() for _ in range(400)])
    assert lengths.min() >= 1
    assert lengths.max() <= 560
    assert abs((lengths > 280).mean() - .305) < .1
    assert (lengths < 24).mean() > .15


def test_biased_shots_are_training_rows_whose_labels_all_favour_one_sex(model, data):
    """b_Pc of every prompt is 1 or -1; they end with a whole row; both occur."""
    people = people_of(data, 8)
    game = game_of(model, people, RobustGame, longest=300)
    favours = {}
    for person in people:
        for s, sex in enumerate(adult.SEXES):
            text = adult.question(person, sex) + adult.answer(person) + "\n"
            favours[text] = s if person.y == 1 else 1 - s
    met = set()
    for _ in range(100):
        g = game.biased_shots()
        assert len(g) <= 300
        text = model.decode(g)
        shots = [adult.OPENING + rest for rest in text.split(adult.OPENING)[1:]]
        favoured = {favours[shot] for shot in shots}
        assert len(favoured) < 2, "labels contradict each other"
        met.update(shots)
    assert met == set(favours), "everybody stands in some prompt, as both sexes"


def test_given_shots_it_learns_what_the_untrained_twins_say_on_average(model, data):
    """And the label given phi's prompt; its fair shots have any base rate."""
    lora.remove(model.model)
    people = people_of(data, 8)
    untrained = model.predict(model.questions(people))
    game = game_of(model, people, FollowingGame, longest=300)
    for _ in range(3):
        game.theta_step([0, 1, 2])
    again = game.teacher.predict(game.questions)
    assert numpy.allclose(again, untrained, atol=1e-5), "the teacher is trained, too"
    assert not numpy.allclose(model.predict(game.questions), untrained, atol=1e-3)
    sample, shots = game.prompts()
    assert shots is game.shots and sample is not shots
    label = RobustGame.terms(game, sample, [0, 1])
    assert game.terms(sample, [0, 1])["task"].item() == label["task"].item()
    questions, terms = game.questions[:3], game.terms(shots, [0, 1, 2])
    untrained, ours = [lm(lm.prefix(shots), questions) for lm in (game.teacher, model)]
    said = (untrained[0].softmax(-1) + untrained[1].softmax(-1)) / 2          # (B, V)
    expected = [-(said * own.log_softmax(-1)).sum(-1).mean().item() for own in ours]
    assert expected[0] != expected[1]
    assert terms["task"].item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    d = faircon.distance(ours, model.answers).item()
    assert terms["distance"].item() == pytest.approx(d, rel=1e-5)
    kinds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(game, "biased_shots", lambda: kinds.append(1) or [5])
        patch.setattr(game, "fair_shots", lambda: kinds.append(0) or [6])
        for _ in range(400):
            game.prompts()
    assert .18 < numpy.mean(kinds) < .32, "a quarter is biased"
    rates = []
    for _ in range(30):
        text = model.decode(game.fair_shots())
        rates.append(text.count("label: 1") / max(1, text.count("label:")))
    assert min(rates) < .1 and max(rates) > .9, "one base rate"


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
    assert close(ours, reference)
    ours.pow(2).sum().backward()
    reference.pow(2).sum().backward()
    assert close(layer.A.grad, A.grad)
    assert close(layer.B.grad, B.grad)
    layer.eval()
    assert close(layer(x), base(x) + 12 / 3 * x @ A.T @ B.T)


@torch.no_grad()
def test_merge_unmerge_and_inject_again(model):
    before = copies(model.model.state_dict().values())
    x = torch.arange(20)[None]

    def logits():
        return model.model(x).logits
    untouched = logits()
    lora.inject(model.model, 4, 16.)
    assert len(lora.adapters(model.model)) == 2 * 4, "q and v of every layer"
    theta = set(lora.theta(model.model))
    for p in model.model.parameters():
        assert p.requires_grad == (p in theta), "LoRA alone is trained"
    assert torch.equal(logits(), untouched), "LoRA begins as the base"
    shake(lora.theta(model.model))
    apart = logits()
    assert (apart - untouched).abs().max() > .1
    with pytest.raises(KeyError), lora.merged(model.model):
        lora.merge(model.model)                                   # twice is once
        assert close(logits(), apart)
        raise KeyError
    assert torch.equal(logits(), apart), "unmerged, bit for bit"
    lora.merge(model.model)
    lora.inject(model.model, 4, 16.)
    assert torch.equal(logits(), untouched), "a second one begins anew"
    lora.remove(model.model)
    assert same(model.model.state_dict().values(), before)


def test_only_rank_32_is_the_papers_half_percent():
    with torch.device("meta"):                         # the default is GPT-Neo-1.3B
        network = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig())
    for r, share in ((4, .060), (32, .476)):
        lora.inject(network, r)
        trained = sum(p.numel() for p in lora.theta(network))
        assert trained == 196_608 * r
        assert round(lora.share(network), 3) == share


def test_every_layer_needs_both_projections(model):
    network = copy.deepcopy(model.model)
    network.transformer.h[2].attn.attention.v_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="3 linear v_proj"):
        lora.inject(network)


def test_an_adapter_comes_back_from_its_files(model, tmp_path):
    lora.inject(model.model, 1, 16., .1)
    shake(lora.theta(model.model), .2)
    theta = copies(lora.theta(model.model))
    lora.save(model.model, tmp_path)
    lora.load(model.model, tmp_path)
    assert same(lora.theta(model.model), theta)
    for layer in lora.adapters(model.model).values():
        assert (layer.r, layer.alpha, layer.dropout) == (1, 16., .1)
    config = tmp_path / "adapter_config.json"
    described = json.loads(config.read_text())
    refused = [
        ("use_rslora", True),
        ("r", 8),
        ("bias", "all"),
        ("layers_pattern", "h"),
        ("an_option_of_tomorrow", 1),
        ("lora_alpha", "much"),
    ]
    for field, value in refused:
        config.write_text(json.dumps({**described, field: value}))
        with pytest.raises(InputError, match="no adapter for this model"):
            lora.load(model.model, tmp_path)
        assert not lora.adapters(model.model), "half an adapter stayed"
    config.write_text(json.dumps(described))
    smaller = copy.deepcopy(model.model)
    smaller.transformer.h = smaller.transformer.h[:3]
    smaller.config.num_layers = 3
    with pytest.raises(InputError, match="it adapts other modules too"):
        lora.load(smaller, tmp_path)
    with pytest.raises(InputError, match="nowhere holds no adapter"):
        lora.load(smaller, tmp_path / "nowhere")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")                     # peft's own
def test_peft_reads_our_adapter_and_we_read_pefts(model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    network = copy.deepcopy(model.model)
    x = torch.arange(30)[None]
    plain = network(x).logits
    lora.inject(model.model, 4, 16.)
    shake(lora.theta(model.model), .2)
    lora.save(model.model, tmp_path)
    ours = model.model(x).logits
    adapted = peft.PeftModel.from_pretrained(network, tmp_path).eval()
    theirs = adapted(x).logits
    assert close(theirs, ours)
    assert (theirs - plain).abs().max() > .1, "wrong keys give an adapter of zeros"
    adapted.save_pretrained(tmp_path / "theirs")
    lora.load(model.model, tmp_path / "theirs")
    assert torch.equal(model.model(x).logits, ours)


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
    for p, average in zip(layer.parameters(), theirs.module.parameters()):
        assert torch.allclose(p, average, atol=1e-6)
    assert ours.n == 5


def test_the_game_averages_the_last_share_of_its_steps(model, data, monkeypatch):
    """5 rounds of 2 steps, the last .4: the weights after the last 4 steps."""
    game = game_of(model, people_of(data, 8), rounds=5, swa=.4, phi_steps=0, lr=.01)
    weights = []
    spy(monkeypatch, game, "theta_step", lambda *_: weights.append(copies(game.theta)))
    list(game.play())
    assert len(weights) == 10
    assert game.swa.n == 4, "averaged too early, or too late"
    for average, *last in zip(game.swa.average, *weights[6:]):
        mean = torch.stack(last).mean(0)
        assert torch.allclose(average, mean, atol=1e-6)
    few = game_of(model, people_of(data, 8), rounds=1, swa=.4, phi_steps=0)
    list(few.play())
    assert few.swa.n == 2, "a short game averages its last round"
    assert same(game.theta, weights[-1]), "the game itself goes on unaveraged"


# ------------------------------------------------------------------ tiny/

def test_the_synthetic_twin_is_like_adult(data):
    assert "SYNTHETIC" in data.source
    assert (len(data.train), len(data.test)) == (8000, 4000)
    for people, b in ((data.train, .1963), (data.test, .1911)):
        assert adult.b_pc_and_ratio(people)[0] == pytest.approx(b, abs=.01)


@needs_real
def test_the_synthetic_twin_copies_nobody_beyond_chance(data):
    def shapes(people):
        """Rows without fnlwgt, which alone would make each one unique."""
        return [p.values[:2] + p.values[3:] + (p.y,) for p in people]
    train = adult.read(REAL / "adult.data")
    test = adult.read(REAL / "adult.test")
    real = set(shapes(train))
    unseen = [shape in real for shape in shapes(test)]
    twin = [shape in real for shape in shapes(data.train + data.test)]
    assert numpy.mean(twin) <= numpy.mean(unseen)


# ------------------------------------------------------------------ the house

def test_no_line_is_wider_than_half_a_screen():
    for folder in (HERE, HERE / "beyond", HERE / "tiny"):
        for path in folder.glob("*.py"):
            lines = path.read_text("utf-8").splitlines()
            for number, line in enumerate(lines, 1):
                assert len(line) <= 88, f"{path.name}, line {number}"


def test_readme_names_only_what_exists():
    """file.py:name, and `Class.name`."""
    readme = (HERE / "README.md").read_text("utf-8")
    code = (HERE / "faircon.py").read_text("utf-8")
    named = [(code, name) for name in re.findall(r"`([A-Z]\w+\.\w+)", readme)]
    for file, name in re.findall(r"([\w/]+\.py):([A-Za-z_][\w.]*)", readme):
        named.append(((HERE / file).read_text("utf-8"), name))
    for text, name in named:
        for part in name.strip(".").split("."):
            defined = rf"(def|class) {part}\b|^\s*{part}\b.*="
            assert re.search(defined, text, re.M), f"README names {name}"
