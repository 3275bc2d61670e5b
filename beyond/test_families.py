"""Any causal language model with q and v projections: tiny random ones of each family.

`check` at load decides, not a list of names; these are the families that were tried.
"""
import json
import shutil
import warnings

import numpy
import pytest
import torch
import transformers

import adult
import faircon
import lora
import train
from beyond import fast

SIZES = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 640, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": None}
FAMILIES = {
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "window_size": 32,
               "attention_types": [[["global", "local"], 1]]},
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 48},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Phi": {}}
REFUSED = {
    "Gemma2": ({"num_key_value_heads": 2, "head_dim": 8,
                "final_logit_softcapping": .05}, "differs from one forward"),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "q_proj"),
    "Mamba": ({"state_size": 4}, "another model|q_proj")}


def random_model(family, directory, **more):
    """A model with random weights and the embedded tokenizer, saved -> directory."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    make = getattr(transformers, f"{family}ForCausalLM", None)
    make = make or getattr(transformers, f"{family}LMHeadModel")
    model = make(config)
    for parameter in model.parameters():       # larger weights: a question of degree
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=.1)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(adult.TINY / name, directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_equals_plain_in_value_and_gradient(family, tmp_path):
    model, _ = fast.load_model(random_model(family, tmp_path, **FAMILIES[family]))
    plain = faircon.LanguageModel(model.model, model.tokenizer)
    for layer in lora.inject(model.model, r=4):
        torch.nn.init.normal_(layer.B, std=.3)
    data = adult.load(adult.TINY)
    people = adult.sample(data.test, 6, 1 / 3, numpy.random.default_rng(0))
    g = torch.nn.functional.one_hot(torch.arange(40) + 300, 1024).float()
    results = []
    for f in (plain, model):
        onehot = g.clone().requires_grad_()
        logits = f(f.prefix(onehot), f.questions(people))
        loss = faircon.distance(logits, f.answers, log_odds=False)
        gradient = torch.autograd.grad(loss, [onehot, *lora.theta(model.model)])
        results.append((logits, gradient))
    (value, gradients), (value_fast, gradients_fast) = results
    assert torch.allclose(value, value_fast, atol=1e-4), "the same function"
    for ours, theirs in zip(gradients_fast, gradients):
        largest = theirs.abs().max()
        assert largest > 0 and (ours - theirs).abs().max() < 1e-5 + 1e-4 * largest


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")           # peft's
@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_trains_it_for_peft_to_read(family, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = random_model(family, tmp_path / "model", **FAMILIES[family])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    words = ["--quick", "--rounds", "2", "--rows", "20", "--test-rows", "20", "--bpc",
             "0.6", "--prompt-length", "9", "--seed", "3", "--shots", "4", "--jobs=1"]
    train.main(["--model", str(base), "--data", str(adult.TINY), *words])
    saved = tmp_path / "runs/quick/faircon-3/adapter"
    x = torch.arange(300, 330)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    untrained = model(x).logits
    theirs = peft.PeftModel.from_pretrained(model, saved).eval()(x).logits
    ours, _ = fast.load_model(base)
    lora.load(ours.model, saved)
    assert torch.allclose(ours.model(x).logits, theirs, atol=1e-5)
    assert (theirs - untrained).abs().max() > 1e-4, "the adapter does something"


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_read_rightly_is_refused(family, tmp_path):
    more, words = REFUSED[family]
    random_model(family, tmp_path, **more)
    with pytest.raises(adult.InputError, match=words):
        model, _ = fast.load_model(tmp_path)
        lora.inject(model.model)


def test_an_encoder_is_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=16)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(adult.InputError, match="cannot be loaded"):
        fast.load_model(tmp_path)


def test_what_the_tokenizer_begins_with_stands_in_front(tmp_path):
    """A model trained with BOS must see it; a prompt goes behind it."""
    random_model("Llama", tmp_path, **FAMILIES["Llama"])
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos = tokenizer["added_tokens"][0]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "BOS", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"BOS": {"id": "BOS", "ids": [bos["id"]],
                                   "tokens": [bos["content"]]}}}
    path.write_text(json.dumps(tokenizer))
    model, _ = fast.load_model(tmp_path)
    assert model.bos == [bos["id"]]
    prefix = model.prefix([5, 6])
    assert torch.equal(prefix[0], model.embed[bos["id"]])
    assert torch.equal(prefix[1:3], model.embed[[5, 6]])
