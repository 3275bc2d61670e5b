"""Section 4.1: LoRA on the q and v projections, by hand.

    W x  becomes  W x + (alpha / r) B A dropout(x),   A (r, in) random, B (out, r) zero, W frozen

so at the start the model is the base model, and only A and B are trained. Conventions and file format are PEFT's.
PAPER vs RELEASED CODE: the paper's "0.5 %" is r = 32 on GPT-Neo-1.3B (0.476 %); the released r = 4 is 0.060 %.
"""
import json
import math
import os
import pathlib
from contextlib import contextmanager

import torch
from torch import nn

from adult import InputError

TARGETS = ("q_proj", "v_proj")


class LoRALinear(nn.Module):
    """A frozen Linear and its low-rank update. A and B are float32 whatever the base's dtype."""

    def __init__(self, base, r, alpha, dropout=0., generator=None):
        super().__init__()
        if r < 1:
            raise InputError(f"rank {r} is impossible: LoRA needs a rank of at least 1.")
        self.base, self.scale, self.dropout, self.original = base, alpha / r, dropout, None
        A = torch.empty(r, base.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(A.to(base.weight.device))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))  # (out, r)

    def forward(self, x):  # (..., in) -> (..., out)
        if self.original is not None:
            return self.base(x)
        low = nn.functional.dropout(x, self.dropout, self.training) @ self.A.to(x.dtype).T  # (..., r)
        return self.base(x) + (self.scale * low) @ self.B.to(x.dtype).T  # scaled while it is small


def inject(model, r=8, alpha=16, dropout=0., seed=0):
    """Freeze `model` and wrap every q_proj and v_proj -> list of the LoRALinear, in the order of the layers.

    Raises InputError for a model that has none, or not two a layer.
    """
    for parent, name, old in [(m, n, c) for m in model.modules() for n, c in m.named_children() if isinstance(c, LoRALinear)]:
        unmerge(model)
        setattr(parent, name, old.base)  # a second call begins anew
    for p in model.parameters():
        p.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = [(parent, name) for parent in list(model.modules()) for name, child in parent.named_children()
             if name in TARGETS and isinstance(child, nn.Linear)]
    if not found or len(found) != 2 * model.config.num_hidden_layers:
        raise InputError(f"{type(model).__name__} has {len(found)} linear q_proj / v_proj where LoRA needs two in each of its "
                         f"{model.config.num_hidden_layers} layers; use a GPT-Neo.")
    for parent, name in found:
        setattr(parent, name, LoRALinear(getattr(parent, name), r, alpha, dropout, generator))
    return adapters(model)


def adapters(model):
    """The LoRALinear modules of a model."""
    return [m for m in model.modules() if isinstance(m, LoRALinear)]


def theta(model):
    """What the model's step trains: every A and B."""
    return [p for m in adapters(model) for p in (m.A, m.B)]


def share(model):
    """Trainable share of all parameters, in percent (§4.1: "0.5 %")."""
    trained = sum(p.numel() for p in theta(model))
    return 100 * trained / (sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def merge(model):
    """Put B A into the weights, where theta is not trained: evaluation and phi's half, at the base model's price (in bf16 rounded).
    `unmerge` brings the very same weights back."""
    for m in adapters(model):
        if m.original is None:
            m.original = m.base.weight.data
            m.base.weight.data = (m.original.float() + m.scale * (m.B @ m.A)).to(m.original.dtype)


def unmerge(model):
    """Undo `merge`, bit for bit: the base weights were kept, not recomputed."""
    for m in adapters(model):
        if m.original is not None:
            m.base.weight.data, m.original = m.original, None


@contextmanager
def merged(model):
    """Inside this `with` B A is in the weights."""
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


def save(model, directory, base_name):
    """Write A and B as PEFT does: `PeftModel.from_pretrained(base, directory)` reads them."""
    from safetensors.torch import save_file
    directory, first = pathlib.Path(directory), adapters(model)[0]
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.lora_{k}.weight": getattr(m, k).detach().cpu().contiguous()
               for name, m in model.named_modules() if isinstance(m, LoRALinear) for k in "AB"}
    r = first.A.shape[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "r": r, "bias": "none",
              "lora_alpha": first.scale * r, "lora_dropout": first.dropout, "target_modules": list(TARGETS),
              "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    save_file(tensors, directory / "weights.part", metadata={"format": "pt"})
    (directory / "config.part").write_text(json.dumps(config, indent=1))
    os.replace(directory / "weights.part", directory / "adapter_model.safetensors")
    os.replace(directory / "config.part", directory / "adapter_config.json")


def load(model, directory):
    """Inject the adapter saved in `directory`. Raises InputError when it is missing, broken or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    directory = pathlib.Path(directory)
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        inject(model, config["r"], config["lora_alpha"], config["lora_dropout"])
        for name, m in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]:
            for k in "AB":
                getattr(m, k).data.copy_(tensors.pop(f"base_model.model.{name}.lora_{k}.weight"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{directory} holds no adapter for this model ({str(error)[:80]}); give a run's adapter/.") from None
    if tensors:
        raise InputError(f"{directory} adapts other modules too ({next(iter(tensors))}); it is not an adapter of this program.")
