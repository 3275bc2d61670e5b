#!/usr/bin/env bash
# PEFT: the average of n checkpoints of one LoRA is n times too large (or too small)
#
# Expected:  `add_weighted_adapter` with weights 1/n gives about the mean of n
#            checkpoints of one run (SWA), and of n copies of one adapter exactly that
#            adapter. With "linear" one would expect a term too many at worst: its
#            docstring calls it "a very rough approximation".
# Happens:   n copies at 1/n each: "linear" gives n times the adapter, "ties" (density
#            1) 1/n of it, "cat" and "svd" the adapter. Not rough, but off by the
#            factor n: A and B are each weighted with the root of the weight and
#            summed, so B A becomes (n / sqrt(n))^2 times itself. ("ties" weights them
#            alike and takes a mean, not a sum: (1 / sqrt(n))^2.)
# Matters:   averaging the last checkpoints is what SWA is. Below, five of them in a
#            row, all but equal: averaged with "linear" the loss is worse than without
#            any adapter, averaged by hand it is better than the last one's.
# Instead:   average A's and B's tensors yourself and load them as one adapter (that is
#            SWA of the factors), or "cat" or "svd" (the mean of the products B A).
#            Test: an adapter averaged with itself must be itself.
# Seen with: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 \
    peft==0.21.2 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import warnings

import peft
import torch
from peft import (LoraConfig, get_peft_model, get_peft_model_state_dict,
                  set_peft_model_state_dict)

print("peft", peft.__version__, " torch", torch.__version__)
warnings.simplefilter("ignore")                  # density 1 is said to prune nothing
torch.manual_seed(0)
config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.layer(x)


base = Model()
update = torch.randn(32, 4) @ torch.randn(4, 32) / 12
wanted = base.layer.weight.detach() + update     # LoRA is to learn the update
model = get_peft_model(base, config)
optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=.02)
test = torch.randn(2000, 32)


@torch.no_grad()
def loss():
    return (model(test) - test @ wanted.T).pow(2).mean().item()


def delta(name):
    return model.base_model.model.layer.get_delta_weight(name).detach()


def average(names, kind):
    """Equal weights, a new adapter "mean" -> its B A, and the loss with it."""
    options = {"density": 1.} if kind == "ties" else {}
    if kind == "svd":
        options["svd_rank"] = 4 * len(names)
    if "mean" in model.peft_config:
        model.delete_adapter("mean")
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "mean",
                               combination_type=kind, **options)
    model.set_adapter("mean")
    return delta("mean"), loss()


start, checkpoints = loss(), []
for step in range(400):
    x = torch.randn(16, 32)
    error = (model(x) - x @ wanted.T + .3 * torch.randn(16, 32)).pow(2).mean()
    optimiser.zero_grad()
    error.backward()
    optimiser.step()
    if step >= 395:
        state = get_peft_model_state_dict(model)
        checkpoints.append({name: tensor.clone() for name, tensor in state.items()})
last = loss()

for k, state in enumerate(checkpoints):
    model.add_adapter(f"step{k}", config)
    set_peft_model_state_dict(model, state, adapter_name=f"step{k}")
    model.add_adapter(f"copy{k}", config)
    set_peft_model_state_dict(model, checkpoints[-1], adapter_name=f"copy{k}")

print("\none adapter averaged with itself: its size afterwards, in times its own")
print("n       linear     ties      cat      svd")
one = delta("copy0")
for n in (1, 2, 3, 5):
    factors = {}
    for kind in ("linear", "ties", "cat", "svd"):
        mean, _ = average([f"copy{k}" for k in range(n)], kind)
        factors[kind] = ((mean * one).sum() / one.pow(2).sum()).item()
        assert torch.allclose(mean, factors[kind] * one, atol=1e-4), "a multiple of it"
    print(n, "   ", "".join(f"{factor:9.3f}" for factor in factors.values()))
    assert abs(factors["linear"] - n) < 1e-3 and abs(factors["ties"] - 1 / n) < 1e-3
    assert abs(factors["cat"] - 1) < 1e-3 and abs(factors["svd"] - 1) < 1e-3

print("\nSWA of the last five checkpoints, mean squared error")
for name, value in (("no adapter", start), ("last checkpoint", last)):
    print(f"    {name:<24} {value:8.4f}")
steps, losses = [f"step{k}" for k in range(5)], {}
for kind in ("linear", "ties", "cat", "svd"):
    losses[kind] = average(steps, kind)[1]
by_hand = {key: sum(state[key] for state in checkpoints) / 5 for key in checkpoints[0]}
model.add_adapter("by hand", config)
set_peft_model_state_dict(model, by_hand, adapter_name="by hand")
model.set_adapter("by hand")
losses["A and B by hand"] = loss()
for kind, value in losses.items():
    print(f"    {kind:<24} {value:8.4f}")
assert losses["linear"] > start > losses["ties"] > 4 * last
assert max(losses["cat"], losses["svd"], losses["A and B by hand"]) < last
PY
cd "$folder"
venv/bin/python run.py
echo "still so: five equal adapters, averaged with linear, are five times one"
