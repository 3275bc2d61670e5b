"""NOT IN THE PAPER: f_theta without reading anything twice.

Value and gradient are those of `faircon.LanguageModel`: tested, and short texts of two
people are checked at load.

    prompt, instruction, first words of the question    read once for everybody
    the tokens that twins share                         read once for the two
    the vocabulary's logits                             at the answer alone

Only what transformers offers for every model is used: embeddings in, a cache of keys
and values, hidden states out, and the output embeddings. What a model does after those
(Gemma 2 caps its logits) is missed, so `check` compares the two at load.

    python -m beyond.fast      # both ways side by side: largest difference, and time
"""
import ctypes
import itertools
import pathlib
import re
import sys
import time

import numpy
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import adult
import faircon
from adult import InputError
from faircon import CLEAN

AT_ONCE = 4096                # tokens in a batch of `predict`: larger is no faster
CACHE_NUMBERS = 2 ** 27       # keys and values that `predict` copies: 0.5 GB in fp32
SMALL = 512                   # hidden size below which one thread is as good as two


class FastModel(faircon.LanguageModel):
    """LanguageModel that keeps the keys and values of shared tokens."""

    def __call__(self, prefix, questions):
        prefix, questions = self.share(prefix, questions)
        return self.answer(self.read(prefix), questions)

    def share(self, prefix, questions):
        """Move what all questions begin with to the end of the prefix (P, D)."""
        self.check_length(len(prefix), questions)
        texts = itertools.chain.from_iterable(questions)
        same = common(texts)
        prefix = torch.cat([prefix, self.embed[torch.tensor(same).long()]])
        rest = []
        for x_m, x_f in questions:
            rest.append([x_m[len(same):], x_f[len(same):]])
        return prefix, rest

    def read(self, prefix):
        """Keys and values of a prefix (P, D), for one text."""
        cache = DynamicCache()
        self.hidden(prefix[None], cache)
        return cache

    def answer(self, cache, questions):
        """Logits (2, B, V) behind a prefix that has been read.

        Twins part where the shortest shared part of the batch ends, so nothing but the
        end is padded, where causal attention does not look. Keys and values are
        expanded, not detached: the gradient is exact too.
        """
        B = len(questions)
        k = min(len(common(twins)) for twins in questions)
        heads = torch.tensor([x_m[:k] for x_m, x_f in questions], device=self.device)
        cache = copy(cache, lambda x: x.expand(B, -1, -1, -1))
        if k:
            self.hidden(self.embed[heads], cache)              # (B, k): once for both
        cache = copy(cache, lambda x: torch.cat([x, x]))
        tails = []
        for s in (0, 1):
            for twins in questions:
                tails.append(torch.tensor(twins[s][k:]))
        last = torch.tensor([len(tail) - 1 for tail in tails], device=self.device)
        tails = pad_sequence(tails, batch_first=True).to(self.device)        # (2B, T)
        x = self.hidden(self.embed[tails], cache, last)                      # (2B, D)
        return self.logits(x).view(2, B, -1)

    def hidden(self, x, cache, at=None):
        """Run embeddings x (N, T, D); their keys and values join the cache.

        -> last hidden states (N, D) at the positions `at` (N,), or None.
        """
        x = self.model.base_model(inputs_embeds=x, cache=cache, use_cache=True)
        if at is None:
            return None
        return x.last_hidden_state[torch.arange(len(at), device=self.device), at]

    def logits(self, x):
        """Float32 logits (N, V) of hidden states (N, D)."""
        return self.model.get_output_embeddings()(x).float()

    @torch.no_grad()
    def predict(self, questions, g=CLEAN, context=adult.INSTRUCTION, batch=64):
        prefix, questions = self.share(self.prefix(g, context), questions)
        cache = self.read(prefix)
        batch = min(batch, self.copies_that_fit(len(prefix)))
        order = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
        p = torch.zeros(len(questions), 2)
        for i in range(0, len(order), batch):
            some = order[i:i + batch]                  # of like length: little padding
            logits = self.answer(cache, [questions[j] for j in some])
            p[some] = self.p_yes(logits).T.cpu()
        return self.finite(p)

    def copies_that_fit(self, positions):
        """How many people at once: each copies the prefix's keys and values, at most
        thrice."""
        config = self.model.config
        numbers = 2 * config.num_hidden_layers * config.hidden_size * positions
        room = CACHE_NUMBERS if self.device.type == "cpu" else 16 * CACHE_NUMBERS
        return max(1, min(AT_ONCE // positions, room // numbers))

    @torch.no_grad()
    def write(self, n, length, generator):
        x = self.prefix().expand(n, -1, -1)
        cache, texts = DynamicCache(), []
        for _ in range(length):
            last = torch.full((n,), x.shape[1] - 1, device=self.device)
            logits = self.logits(self.hidden(x, cache, last))
            texts.append(self.draw(logits, generator))                       # (n, 1)
            x = self.embed[texts[-1]]
        return torch.cat(texts, 1).tolist()


def common(texts):
    """The tokens that all texts begin with; each keeps one token of its own."""
    columns = zip(*(text[:-1] for text in texts))
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return [column[0] for column in same]


def copy(cache, change):
    """A cache with `change` of all keys and values: a forward pass alters its cache."""
    fresh = DynamicCache()
    for i, layer in enumerate(cache.layers):
        fresh.update(change(layer.keys), change(layer.values), i)
    return fresh


def check(model):
    """InputError unless `model` gives what one ordinary forward pass gives.

    Two people behind a prompt, as token ids through the model's own front door. The
    root mean square difference may be 1e-3 of the logits' spread (bf16: 2e-2).
    """
    g = model.usable[:5]
    questions = model.questions(adult.read(adult.TINY / "adult.test")[:2])
    try:
        with torch.no_grad():
            ours = model(model.prefix(g), questions).flatten(0, 1)           # (4, V)
        before = model.bos + g + model.ids("\n") + model.ids(adult.INSTRUCTION)
        theirs = []
        for text in [x_m for x_m, x_f in questions] + [x_f for x_m, x_f in questions]:
            ids = torch.tensor([before + text], device=model.device)
            with torch.no_grad():
                theirs.append(model.model(input_ids=ids).logits[0, -1].float())
        theirs = torch.stack(theirs)
        difference = (ours - theirs).pow(2).mean().sqrt() / theirs.std()
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{type(model.model).__name__} cannot be read through "
                         f"embeddings and a cache of keys and values "
                         f"({str(error)[:60]!r}); use another model.") from None
    allowed = 1e-3 if model.embed.dtype == torch.float32 else 2e-2
    if not difference < allowed:
        raise InputError(
            f"{type(model.model).__name__} read by parts differs from one forward pass "
            f"by {difference:.2g} of its logits' spread (allowed: {allowed:g}), so its "
            "numbers would be wrong; use another model.")


# ------------------------------------------------------------------ GPT-Neo

class FastGPTNeo(FastModel):
    """FastModel that pads in attention alone, and reads of the last block the answers.

    The tokens of all people lie in one matrix (M, D): for each person those that the
    twins share, then the man's own, then the woman's. Attention alone needs people
    side by side: Layout. `write` is still FastModel's.
    """

    def read(self, prefix):
        """Keys and values (1, H, P, d) of a prefix (P, D), for each block."""
        layout = Layout([(len(prefix), 0, 0)], 0, self.device)
        cache = []
        self.blocks(prefix, layout, cache)
        return cache

    def answer(self, cache, questions):
        ids, sizes, ends = [], [], []
        for x_m, x_f in questions:
            both = len(common((x_m, x_f)))
            sizes.append((both, len(x_m) - both, len(x_f) - both))
            ids += x_m
            ends.append(len(ids) - 1)
            ids += x_f[both:]
            ends.append(len(ids) - 1)
        layout = Layout(sizes, cache[0][0].shape[2], self.device)
        ends = torch.tensor(ends, device=self.device).view(-1, 2)            # (B, 2)
        x = self.embed[torch.tensor(ids, device=self.device)]                # (M, D)
        x = self.blocks(x, layout, cache, ends)                              # (2B, D)
        return self.logits(x).view(len(questions), 2, -1).transpose(0, 1)

    def blocks(self, x, layout, cache, ends=None):
        """GPT-Neo from its own parts: x (M, D) behind `cache`.

        -> last hidden states (B * E, D) at `ends` (B, E). Without `ends` keys and
        values of x join the cache, which was empty, and that is all.
        """
        neo = self.model.base_model
        x = x + neo.wpe.weight[layout.position]
        for i, block in enumerate(neo.h):
            last = i == len(neo.h) - 1
            attention = block.attn.attention
            H = attention.num_heads
            h = block.ln_1(x)
            k = heads(layout.spread(attention.k_proj(h)), H)               # (B,H,n,d)
            v = heads(layout.spread(attention.v_proj(h)), H)
            if ends is None:
                cache.append((k, v))
                if last:
                    return None
            else:
                old_k, old_v = cache[i]                                    # (1,H,S,d)
                k = torch.cat([old_k.expand(len(k), -1, -1, -1), k], 2)
                v = torch.cat([old_v.expand(len(v), -1, -1, -1), v], 2)
            sees = layout.sees(attention)                                  # (B,n,S+n)
            if last:                              # from here on, the answers alone
                x = x[ends.flatten()]                                      # (B * E, D)
                q = attention.q_proj(h[ends])                              # (B, E, D)
                sees = sees.flatten(0, 1)[layout.place[ends]]              # (B,E,S+n)
            else:
                q = layout.spread(attention.q_proj(h))                     # (B, n, D)
            # GPT-Neo does not divide by sqrt(d).
            mixed = F.scaled_dot_product_attention(heads(q, H), k, v, sees[:, None],
                                                   scale=1.)
            mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
            if not last:
                mixed = mixed[layout.place]                                # (M, D)
            x = x + attention.out_proj(mixed)
            x = x + block.mlp(block.ln_2(x))
        return neo.ln_f(x)


def heads(x, H):
    """(B, n, D) -> (B, H, n, d)"""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


class Layout:
    """The tokens of B people side by side, n places each, and which see which.

    sizes: of each person (tokens that the twins share, the man's own, the woman's).
    seen: how many tokens stand before, S; everybody sees them all.
    position, place (M,): where a token stands in its text, and among the B * n places.
    """

    def __init__(self, sizes, seen, device):
        self.B, self.n = len(sizes), max(map(sum, sizes))
        twin = torch.full((self.B, self.n), -1)  # 2: both, 0: man, 1: woman, -1: nobody
        position = torch.full((self.B, self.n), seen)
        for i, (both, man, woman) in enumerate(sizes):
            own = [*range(both + man), *range(both, both + woman)]
            twin[i, :len(own)] = torch.tensor([2] * both + [0] * man + [1] * woman)
            position[i, :len(own)] = seen + torch.tensor(own)
        used = (twin >= 0).flatten()
        self.place = used.nonzero().flatten().to(device)
        self.position = position.flatten()[used].to(device)
        before = torch.arange(seen).expand(self.B, -1)
        ago = position[:, :, None] - torch.cat([before, position], 1)[:, None]
        key, query = twin[:, None], twin[:, :, None]
        mine = (key == 2) | (key == query)             # nobody's places see each other
        mine = F.pad(mine, (seen, 0), value=True)                          # (B,n,S+n)
        self.ago = ago.to(device)
        self.visible = (mine & (ago >= 0)).to(device)

    def sees(self, attention):
        """(B, n, S + n): GPT-Neo's local attention sees the last few tokens alone."""
        if attention.attention_type == "local":
            return self.visible & (self.ago < attention.config.window_size)
        return self.visible

    def spread(self, x):
        """(M, D) -> (B, n, D), zeros in nobody's places."""
        if len(self.place) < self.B * self.n:
            empty = x.new_zeros(self.B * self.n, x.shape[1])
            x = empty.index_copy(0, self.place, x)
        return x.view(self.B, self.n, -1)


# ------------------------------------------------------------------ loading

def load_model(name, dtype="auto", device="auto"):
    """A model directory or hub id -> (FastModel, why this dtype and device).

    InputError when it cannot be loaded, is not whole, or is not read rightly (`check`).
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_memory()
    device = choose_device(device)
    refuse_half_typed(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if getattr(config, "activation_function", "") == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"   # the same, in one kernel
        small = getattr(config, "hidden_size", SMALL) < SMALL
        dtype, why = choose_dtype(dtype, device, small)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), output_loading_info=True)
    except Exception as error:  # noqa: BLE001  a dozen kinds, one meaning to the user
        said = " ".join(str(error).split())
        raise InputError(f"{name} cannot be loaded as a causal language model with its "
                         f"tokenizer ({type(error).__name__}: {said[:150]}); give a "
                         "complete directory or a hub id.") from None
    broken = len(info["missing_keys"]) + len(info["mismatched_keys"])
    if broken:
        raise InputError(f"{name} lacks {broken} of its weights; it is not a whole "
                         "causal language model: download it again.")
    if small:
        torch.set_num_threads(1)       # so that results do not depend on the cores
    kind = FastGPTNeo if config.model_type == "gpt_neo" else FastModel
    fast = kind(model.to(device).eval(), tokenizer)
    fast.small = small                 # several of them can run side by side
    check(fast)
    threads = torch.get_num_threads()
    return fast, f"{dtype} ({why}) on {device} ({threads} thread{'s' * (threads > 1)})"


def refuse_half_typed(name):
    """InputError for what is neither a model directory nor can be a hub id."""
    local = pathlib.Path(name)
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not local.parent.is_dir()
    if not hub and not (local / "config.json").is_file():
        raise InputError(f"{name} is not a model directory (no config.json); give one, "
                         "or a hub id such as EleutherAI/gpt-neo-125m.")


def choose_device(device):
    """"auto" or a device's name -> a device that works here. InputError."""
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


# ------------------------------------------------------------------ the lesson

def lesson():
    torch.set_num_threads(1)
    fast, _ = load_model(adult.TINY)
    plain = faircon.LanguageModel(fast.model, fast.tokenizer)
    data = adult.load(adult.TINY)
    rng = numpy.random.default_rng(0)
    people = adult.sample(data.test, 20, 0., rng)
    shots = adult.few_shot(data.train, 16, 1., rng)
    print("20 people, both twins               plain s    fast s   largest difference")
    for name, context in (("zero-shot", adult.INSTRUCTION), ("16 shots", shots)):
        p, seconds = [], []
        for model in (plain, fast):
            began = time.perf_counter()
            p.append(model.predict(fast.questions(people), context=context))
            seconds.append(time.perf_counter() - began)
        difference = abs(p[0] - p[1]).max()
        print(f"{name:<30} {seconds[0]:12.2f} {seconds[1]:9.2f} {difference:14.1e}")
        assert difference < 1e-4, "the fast way must be the same function"
    print("\nnow try: expand the cache with .detach(); which test in beyond/ fails?")


if __name__ == "__main__":
    lesson()
