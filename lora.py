"""Section 4.1: low-rank adapters (LoRA) on the query and value projections, by hand.

    W x   becomes   W x + (alpha / r) B A dropout(x)

    W (out, in)   frozen
    A (r, in)     trained, random at the start
    B (out, r)    trained, zero at the start: LoRA begins as the base model

All A and B together are the theta of Eq. (3). Adapters are saved in PEFT's format.
PAPER vs RELEASED CODE: the paper trains "0.5 %" of GPT-Neo-1.3B and gives no r; among
powers of two r = 32 is nearest (0.476 %). The released r = 4 is 0.060 %.

    python lora.py      # what the lines above say, checked in numbers
"""
import json
import math
import pathlib
from contextlib import contextmanager

import torch
from torch import nn

from adult import InputError

TARGETS = ("q_proj", "v_proj")


class LoRALinear(nn.Module):
    """A frozen Linear and its low-rank update; A and B are float32 on any base."""

    def __init__(self, base, r, alpha, dropout=0., generator=None):
        super().__init__()
        self.base, self.dropout = base, dropout
        self.r, self.alpha = r, alpha
        self.original = None                        # the frozen W, while B A is merged
        A = torch.empty(r, base.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        B = torch.zeros(base.out_features, r)
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(B.to(base.weight.device))

    def forward(self, x):                                         # (..., in)
        y = self.base(x)                                          # W x: (..., out)
        if self.original is not None:
            return y                                              # B A is in W already
        x = nn.functional.dropout(x, self.dropout, self.training)
        low = x @ self.A.to(x.dtype).T                            # A x: (..., r)
        low = low * (self.alpha / self.r)                         # scaled while narrow
        return y + low @ self.B.to(x.dtype).T                     # + B A x: (..., out)


def inject(model, r=32, alpha=16, dropout=0., seed=0):
    """Freeze `model`, wrap every q_proj and v_proj; a second call replaces adapters."""
    remove(model)
    found = projections(model)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name in found:
        layer = LoRALinear(getattr(parent, name), r, alpha, dropout, generator)
        setattr(parent, name, layer)
    set_dropout(model, False)


def projections(model):
    """Where q_proj and v_proj are -> [(module that holds it, name)].

    InputError unless each layer has one of each: GPT-2, GPT-NeoX and Phi-3 have q, k
    and v in one matrix.
    """
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if name in TARGETS and isinstance(child, nn.Linear):
                found.append((parent, name))
    layers, kind = getattr(model.config, "num_hidden_layers", 0), type(model).__name__
    for name in TARGETS:
        count = sum(name == other for _, other in found)
        if count != layers or count == 0:
            raise InputError(
                f"{kind} has {count} linear {name} where LoRA needs one in each of its "
                f"{layers} layers; use a model with q_proj and v_proj, such as GPT-Neo "
                "or Llama.")
    return found


def remove(model):
    """Take all adapters off again."""
    unmerge(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.base)


def adapters(model):
    """{name: LoRALinear}, in the order of the layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def theta(model):
    """What the model's step trains: every A and B."""
    return [p for layer in adapters(model).values() for p in (layer.A, layer.B)]


def set_dropout(model, on):
    """LoRA's dropout on or off; the frozen model's own dropout stays off."""
    for layer in adapters(model).values():
        layer.train(on)


def share(model):
    """Trained share of all parameters, in percent."""
    trained = sum(p.numel() for p in theta(model))
    return 100 * trained / sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------ merging

@torch.no_grad()
def merge(model):
    """W <- W + (alpha / r) B A: the base model's speed where theta is not trained."""
    for layer in adapters(model).values():
        if layer.original is None:
            W = layer.base.weight.data
            merged = W.float() + layer.alpha / layer.r * (layer.B @ layer.A)
            layer.original = W
            layer.base.weight.data = merged.to(W.dtype)


def unmerge(model):
    """The very same W as before: it was kept, not computed back."""
    for layer in adapters(model).values():
        if layer.original is not None:
            layer.base.weight.data = layer.original
            layer.original = None


@contextmanager
def merged(model):
    """Inside this `with` B A is in the weights."""
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


# ------------------------------------------------------------------ PEFT's files

def save(model, directory, base_name=None):
    """Write A and B so that `PeftModel.from_pretrained(base, directory)` reads them.

    base_name: the base model's name for others, such as a hub id.
    """
    from safetensors.torch import save as to_bytes
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in adapters(model).items():
        for key in "AB":
            tensor = getattr(layer, key).detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_{key}.weight"] = tensor
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
        "base_model_name_or_path": base_name and str(base_name),
        "target_modules": list(TARGETS),
        "r": layer.r, "lora_alpha": layer.alpha, "lora_dropout": layer.dropout,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    files = {"adapter_model.safetensors": to_bytes(tensors, metadata={"format": "pt"}),
             "adapter_config.json": json.dumps(config, indent=1).encode()}
    for name, content in files.items():
        (directory / f"{name}.part").write_bytes(content)
    for name in files:
        (directory / f"{name}.part").replace(directory / name)


# Fields of adapter_config.json that do not change what is computed here. Any other must
# be off (null, false, empty) or as ours: unknown fields are refused.
SILENT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha",
          "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
          "revision", "runtime_config", "target_modules", "task_type")
OURS = {"bias": ["none"], "peft_type": ["LORA"],
        "init_lora_weights": [True, "gaussian"]}


def load(model, directory):
    """Inject the adapter of `directory`; InputError if broken or another model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    directory = pathlib.Path(directory)
    try:
        config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
        for field, value in config.items():
            if value and field not in SILENT and value not in OURS.get(field, ()):
                raise ValueError(f"its {field} is {value!r}")
        inject(model, int(config["r"]), float(config["lora_alpha"]),
               float(config["lora_dropout"]))
        for name, layer in adapters(model).items():
            for key in "AB":
                read = tensors.pop(f"base_model.model.{name}.lora_{key}.weight")
                if read.shape != getattr(layer, key).shape:
                    raise ValueError(f"{name} has another shape than its r says")
                getattr(layer, key).data.copy_(read)
        if tensors:
            raise ValueError(f"it adapts other modules too: {next(iter(tensors))}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
            SafetensorError) as error:
        remove(model)
        raise InputError(f"{directory} holds no adapter for this model "
                         f"({str(error)[:80]}); give a run's adapter/.") from None


# ------------------------------------------------------------------ the lesson

def fit(update, r, steps=400):
    """Mean squared error of a rank-r LoRA trained to become W + update."""
    layer = LoRALinear(nn.Linear(32, 32), r, alpha=r)
    W = layer.base.weight.detach()
    optimiser = torch.optim.Adam([layer.A, layer.B], lr=.02)
    for _ in range(steps):
        x = torch.randn(64, 32)
        wanted = x @ (W + update).T + layer.base.bias
        loss = (layer(x) - wanted).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


def lesson():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, layer = torch.randn(4, 32), LoRALinear(nn.Linear(32, 32), r=4, alpha=16)
    change = (layer(x) - layer.base(x)).abs().max()
    print(f"before training, LoRA changes the output by {change:.1f}: B = 0")
    assert change == 0
    print("\nan update W + U of rank 3, learned by LoRA: mean squared error")
    U = torch.randn(32, 3) @ torch.randn(3, 32) / 6
    errors = [fit(U, r) for r in (1, 2, 3, 4)]
    for r, error in enumerate(errors, 1):
        print(f"    r = {r}    {error:.3f}")
    assert errors[2] < .01 * errors[1], "rank 3 is enough, rank 2 is not"
    with torch.device("meta"):
        gpt_neo = GPTNeoForCausalLM(GPTNeoConfig())    # the default is 1.3B; no memory
    print("\ntrained share of GPT-Neo-1.3B (paper: 0.5 %)")
    for r in (4, 8, 32):
        inject(gpt_neo, r)
        print(f"    r = {r:<4} {share(gpt_neo):.3f} %")
    print("\nnow try: LoRA on k_proj too (TARGETS). Which r is nearest to 0.5 % then?")


if __name__ == "__main__":
    lesson()
