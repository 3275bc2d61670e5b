#!/usr/bin/env bash
# transformers: one-hot @ embedding matrix is not what Gemma reads
#
# Expected:  `inputs_embeds = onehot @ model.get_input_embeddings().weight` gives the
#            logits of `input_ids`: an embedding is a look-up. Gemma's known factor,
#            sqrt(width), is applied inside the model, to either input.
# Happens:   true of Llama, Mistral, Qwen, GPT-Neo, OPT, Phi and Granite (which has a
#            factor too, inside the model). False of Gemma 1, 2 and 3, XGLM and BioGPT:
#            there the embedding module itself multiplies, and `weight` is without the
#            factor. No error: every token arrives sqrt(width) times too small, 45
#            times at 2,048. Two models with a factor, and the same line is right in
#            one and wrong in the other.
# Matters:   searched prompts (Gumbel-softmax, GCG, soft prompts) are made of this very
#            product. On Gemma the search climbs for texts that the model will not see,
#            and a robustness measured with it says nothing of the prompt as text.
# Instead:   take the rows from the module, not its matrix: `table =
#            module(torch.arange(module.num_embeddings))`, then onehot @ table. Check
#            once that both inputs give the same logits.
# Seen with: transformers 5.24.0, torch 2.13.0; random weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 \
    numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

print("transformers", transformers.__version__, " torch", torch.__version__)
transformers.logging.set_verbosity_error()
V, D = 64, 64
small = {"vocab_size": V, "hidden_size": D, "intermediate_size": 64,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}
# some families call the same things otherwise
special = {"gpt_neo": {"num_layers": 2, "num_heads": 4,
                       "attention_types": [[["global", "local"], 1]]},
           "opt": {"ffn_dim": 64, "word_embed_proj_dim": D},
           "granite": {"embedding_multiplier": 12.},
           "xglm": {"d_model": D, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}}
looked_up = ("gpt_neo", "llama", "mistral", "qwen2", "qwen3", "opt", "phi", "granite")
multiplied = ("gemma", "gemma2", "gemma3_text", "xglm", "biogpt")


@torch.no_grad()
def compare(family):
    """-> difference of logits by the matrix, by the module's rows; the factor."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**small | special.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, V, (1, 12))
    onehot = torch.nn.functional.one_hot(ids, V).float()
    module = model.get_input_embeddings()
    wanted = model(input_ids=ids, use_cache=False).logits
    differences = []
    for table in (module.weight, module(torch.arange(module.num_embeddings))):
        logits = model(inputs_embeds=onehot @ table, use_cache=False).logits
        differences.append(((logits - wanted).abs().max() / wanted.std()).item())
    factor = module(ids).norm() / module.weight[ids].norm()
    return differences[0], differences[1], factor.item()


print(f"\nwidth {D}; difference of the logits, in standard deviations of a logit")
print("family        onehot @ weight    onehot @ module's rows    module / weight")
for family in looked_up + multiplied:
    by_matrix, by_rows, factor = compare(family)
    print(f"{family:<13} {by_matrix:12.5f} {by_rows:22.5f} {factor:20.2f}")
    assert by_rows < 1e-3, family
    if family in looked_up:
        assert by_matrix < 1e-3 and abs(factor - 1) < 1e-4, family
    else:
        assert by_matrix > .1 and abs(factor - D ** .5) < .01 * D ** .5, family
PY
cd "$folder"
venv/bin/python run.py
echo "still so: Gemma's embedding module is not its matrix"
