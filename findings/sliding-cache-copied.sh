#!/usr/bin/env bash
# transformers: keys and values copied out of a sliding-window cache are at wrong places
#
# Expected:  the usual way to read a prompt once for many questions, run it, put each
#            layer's keys and values, expanded to the batch, into a fresh
#            `DynamicCache()` and go on, gives what one pass over the whole text gives.
#            In a model with a sliding window too: the window only leaves out what it
#            does not need.
# Happens:   right until the prompt is as long as the window, wrong from then on. The
#            cache that a model makes for itself keeps window - 1 positions and, beside
#            them, how many there have been; keys and values do not tell. In the fresh
#            cache a prompt of 20 tokens is one of 7: the rest goes on at position 7,
#            beside keys rotated for positions 13 to 19. Mistral: silently other
#            logits; a fresh `DynamicCache(config=...)` errs alike. A Gemma 3 with
#            layers of both kinds raises in the first way (their lengths differ) and is
#            silent in the second. Tests with a short prompt see nothing.
# Matters:   prompts of labelled people are long, and what a biased prompt does to the
#            answers is then measured at wrong positions.
# Instead:   `copy.deepcopy(cache)` and `batch_repeat_interleave(n)`, which keep the
#            count; or read the prompt into a `DynamicCache()` made without the config:
#            it keeps every position (and the memory), and may be copied as above. Test
#            with a prompt longer than the window.
# Seen with: transformers 5.24.0, torch 2.13.0; random weights, a window of 8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 \
    numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import copy
import warnings

import torch
import transformers
from transformers import (DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig,
                          MistralConfig, MistralForCausalLM)

print("transformers", transformers.__version__, " torch", torch.__version__)
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")                  # past_key_values will be called cache
WINDOW, N = 8, 3
small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "num_hidden_layers": 2, "sliding_window": WINDOW, "initializer_range": .3}


def copied(cache, fresh):
    """Keys and values, for N questions, in a fresh cache."""
    for i, layer in enumerate(cache.layers):
        fresh.update(layer.keys.expand(N, -1, -1, -1),
                     layer.values.expand(N, -1, -1, -1), i)
    return fresh


@torch.no_grad()
def compare(model, length):
    """A prompt of `length` tokens, N questions -> difference of logits by each way."""
    torch.manual_seed(length)
    prompt, questions = torch.randint(3, 64, (1, length)), torch.randint(3, 64, (N, 4))
    whole = torch.cat([prompt.expand(N, -1), questions], 1)
    wanted = model(whole, use_cache=False).logits[:, length:]
    own = model(prompt, use_cache=True).past_key_values
    every = model(prompt, past_key_values=DynamicCache()).past_key_values
    repeated = copy.deepcopy(own)
    repeated.batch_repeat_interleave(N)
    ways = {"copied, DynamicCache()": lambda: copied(own, DynamicCache()),
            "copied, with config": lambda: copied(
                own, DynamicCache(config=model.config)),
            "repeated": lambda: repeated,
            "read without config": lambda: copied(every, DynamicCache())}
    found = {"kept": own.layers[0].keys.shape[2]}
    for name, way in ways.items():
        try:
            logits = model(questions, past_key_values=way()).logits
            found[name] = ((logits - wanted).abs().max() / wanted.std()).item()
        except RuntimeError:
            found[name] = "raises"
    return found


def models():
    for name, cls, config in (
            ("Mistral", MistralForCausalLM, MistralConfig(**small)),
            ("Gemma 3, sliding only", Gemma3ForCausalLM, Gemma3TextConfig(
                **small, layer_types=["sliding_attention"] * 2)),
            ("Gemma 3, both kinds", Gemma3ForCausalLM, Gemma3TextConfig(
                **small, layer_types=["sliding_attention", "full_attention"]))):
        torch.manual_seed(0)
        yield name, cls(config).eval()


print(f"\nwindow {WINDOW}; difference to one pass, in standard deviations of a logit")
for name, model in models():
    print(f"\n{name}")
    for length in (WINDOW - 1, WINDOW, 20):
        found = compare(model, length)
        print(f"  prompt {length}")
        for way, value in found.items():
            shown = f"{value:.5f}" if isinstance(value, float) else value
            print(f"    {way:<24} {shown}")
        assert found["kept"] == min(length, WINDOW - 1)
        assert found["repeated"] < 1e-3 and found["read without config"] < 1e-3
        wrong = found["copied, DynamicCache()"], found["copied, with config"]
        if length < WINDOW:
            assert max(wrong) < 1e-3, "as long as the window is not full, all is well"
        elif name == "Gemma 3, both kinds":
            assert wrong[0] == "raises" and wrong[1] > .05
        else:
            assert min(wrong) > .1, "silently wrong"
PY
cd "$folder"
venv/bin/python run.py
echo "still so: copied keys and values forget how many came before them"
