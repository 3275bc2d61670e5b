"""Section 3: the game of Eq. (3), the prompt tuning of Eq. (4), and the attacks that test what the game claims.

    min over theta   E[ task(theta) ] + lam * E[ || f_theta(g ++ x_m) - f_theta(g ++ x_f) ||_2 ],   g ~ g_phi
    g_phi      =     argmax over phi of that same gap                                             Eq. (3)
    min over phi     of that gap, theta frozen                                                    Eq. (4)

f_theta is the next-token distribution at the answer, theta is LoRA's A and B, phi the logits of a categorical distribution for
each position of the prompt, x_m and x_f one person's text as a man and as a woman. (The paper prints "min over phi" in
Eq. (3): a slip.) PAPER vs RELEASED CODE: the released step of the model has no gap in it, and its gap compares raw logits.
"""
import contextlib
import itertools
import math
from dataclasses import dataclass, field

import numpy
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import adult
import lora
from adult import InputError
from gumbel import gumbel_softmax
from swa import SWA


# ---------------------------------------------------------------- f_theta

class Reader:
    """A model, its tokenizer and the two answer tokens; `__call__` is f_theta."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.tokens, self.flop = model, tokenizer, 0, 0
        if model.config.model_type != "gpt_neo":
            raise InputError(f"{type(model).__name__} is not a GPT-Neo, whose blocks with q_proj and v_proj are read and trained here; "
                             "give one, such as EleutherAI/gpt-neo-125m.")
        self.blocks, self.last = model.base_model.h, model.base_model.h[-1]
        self.weights = sum(p.numel() for p in self.blocks.parameters())  # that a token passes, but for `tip` where nobody reads
        self.tip = sum(p.numel() for n, p in self.last.named_parameters() if "k_proj" not in n and "v_proj" not in n)
        self.device, self.embed = model.device, model.get_input_embeddings().weight
        self.context = model.config.max_position_embeddings
        question = adult.INSTRUCTION + adult.OPENING + "\nlabel:"
        stem, after = self.ids(question), [self.ids(question + a) for a in (" 0", " 1")]
        if not stem or any(a[:-1] != stem or len(a) != len(stem) + 1 for a in after):
            raise InputError('the tokenizer has no single tokens for the answers " 0" and " 1"; use GPT-Neo\'s or tiny/\'s.')
        self.answers = torch.tensor([a[-1] for a in after], device=self.device)
        special = set(tokenizer.all_special_ids)
        words = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), len(self.embed)))])
        again = tokenizer(words, add_special_tokens=False)["input_ids"]
        self.usable = [i for i, w in enumerate(words) if i not in special and "\ufffd" not in w and again[i] == [i]]
        self.mask = torch.full((len(self.embed),), -torch.inf, device=self.device)  # of phi's logits: only text can be a prompt
        self.mask[self.usable] = 0.

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def questions(self, people, attributes=adult.ATTRIBUTES):
        """-> for each person (tokens both twins share, [the man's rest, the woman's rest])."""
        out = []
        for p in people:
            m, f = (self.ids(adult.text(p, s, attributes)) for s in adult.SEXES)
            k = next((i for i, (a, b) in enumerate(zip(m, f)) if a != b), len(m) - 1)
            out.append((m[:k], (m[k:], f[k:])))
        return out

    def prefix(self, g=None, context=adult.INSTRUCTION):
        """Embeddings (P, D) of what stands before the question: the prompt g, a line break, and the instruction or shots.

        g: token ids, or one-hot rows (L, V) that carry a gradient."""
        rows = [self.embed[torch.tensor(self.ids(context), device=self.device)]]
        if g is not None:
            g = g.to(self.embed.dtype) @ self.embed if torch.is_tensor(g) else self.embed[list(g)]
            rows = [g, self.embed[self.ids("\n")]] + rows
        return torch.cat(rows)

    def __call__(self, prefix, questions):
        """f_theta: the logits at the answer, float32, (2, B, V); twin 0 is the man. Raises InputError beyond the context.

        Exactly what the plain forward pass of every whole text gives (tested), value and gradient, but what everybody shares is found
        by `share` and computed by `read` once for everybody, what two twins share by `answer` once for both, and of the last block
        `hidden` computes only what is read.
        """
        prefix, questions = self.share(prefix, questions)
        return self.answer(self.read(prefix), questions)

    def share(self, prefix, questions):
        """Move what all questions begin with to the end of the prefix -> prefix (P, D), questions."""
        longest = len(prefix) + max(len(head) + len(rest) for head, rests in questions for rest in rests)
        if longest > self.context:
            raise InputError(f"prompt and question are {longest} tokens and the model's context is {self.context}; "
                             "use a shorter prompt or fewer shots.")
        columns = zip(*(head[:-1] for head, _ in questions))  # a head keeps a token
        same = [c[0] for c in itertools.takewhile(lambda c: len(set(c)) == 1, columns)]
        prefix = torch.cat([prefix, self.embed[torch.tensor(same, dtype=torch.long, device=self.device)]])
        return prefix, [(head[len(same):], rests) for head, rests in questions]

    def read(self, prefix):
        """Keys and values of a prefix (P, D)."""
        past = DynamicCache()
        self.hidden(prefix[None], past)
        self.count(len(prefix))
        return past

    def answer(self, past, questions):
        """`__call__` behind a prefix that has been read.

        Twins part where the shortest shared part of the batch ends: so nothing but the end of the rest is padded, where causal
        attention does not look. Keys and values are expanded, not detached: the gradient is exact too.
        """
        B, k = len(questions), min(len(q[0]) for q in questions)
        head = torch.tensor([q[0][:k] for q in questions], device=self.device)  # (B, k)
        tail, t = pad([q[0][k:] + q[1][s] for s in (0, 1) for q in questions], self.device)  # (2B, T), (2B,)
        self.count(head.numel() + int(t.sum()), 2 * B)
        past = copy(past, lambda x: x.expand(B, -1, -1, -1))
        self.hidden(self.embed[head], past)
        past = copy(past, lambda x: torch.cat([x, x]))
        last = self.hidden(self.embed[tail], past, t - 1)  # (2B, D)
        return self.model.get_output_embeddings()(last).float().view(2, B, -1)

    def hidden(self, x, past, at=None):
        """The last hidden states (N, D) at the positions `at` (N,) of embeddings x (N, T, D); keys and values join those in `past`.

        GPT-Neo's own blocks, but for the last: of that, where nobody reads, keys and values alone.
        """
        neo, block, P, N = self.model.base_model, self.last, past.get_seq_length(), torch.arange(len(x), device=self.device)
        x = neo.drop(x + neo.wpe.weight[P:P + x.shape[1]])
        for other in self.blocks[:-1]:
            x, _ = other(x, past)
        a, h = block.attn.attention, block.ln_1(x)
        heads = lambda z: z.unflatten(-1, (a.num_heads, -1)).transpose(1, 2)  # (N, T, D) -> (N, H, T, d)
        k, v = past.update(heads(a.k_proj(h)), heads(a.v_proj(h)), a.layer_id)
        if at is None:
            return None
        q, sees = heads(a.q_proj(h[N, at][:, None])), a.bias[0, 0, P + at, :k.shape[2]]  # (N, H, 1, d), (N, P + T)
        weights = (q.float() @ k.float().mT).masked_fill(~sees[:, None, None], -torch.inf).softmax(-1)
        x = x[N, at] + a.out_proj((weights.to(v.dtype) @ v).flatten(1))
        return neo.ln_f(x + block.mlp(block.ln_2(x)))

    def count(self, tokens, read=0):
        """Tokens and FLOP of a forward pass that is `read` at so many positions; backward, weights frozen, costs the same."""
        self.tokens += tokens
        flop = tokens * (self.weights - self.tip) + read * (self.tip + self.embed.numel())
        self.flop += 2 * flop * (2 if torch.is_grad_enabled() else 1)

    @torch.no_grad()
    def write(self, n, length, generator):
        """n texts of `length` tokens that the model itself writes after the instruction -> ids (n, length), a list of lists."""
        x, past, g = self.prefix().expand(n, -1, -1), DynamicCache(), []
        for _ in range(length):
            last = self.hidden(x, past, torch.full((n,), x.shape[1] - 1, device=self.device))
            self.count(n * x.shape[1], n)
            logits = self.model.get_output_embeddings()(last).float() + self.mask
            g.append(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).to(self.device))  # (n, 1)
            x = self.embed[g[-1]]
        return torch.cat(g, 1).tolist()

    @torch.no_grad()
    def predict(self, questions, g=None, context=adult.INSTRUCTION, batch=64):
        """P(y=1 | y is 0 or 1) for each person as a man and as a woman (N, 2), and the two answers' joint probability."""
        prefix, questions = self.share(self.prefix(g, context), questions)
        past, p, mass = self.read(prefix), numpy.zeros((len(questions), 2)), []
        one = 2 * self.model.config.num_hidden_layers * self.embed.shape[1]  # numbers in the keys and values of one position
        most = min(4096, 2 ** 27 // one) * (1 if self.device.type == "cpu" else 16)  # positions: each person copies the prefix, thrice
        batch = max(1, min(batch, most // len(prefix)))
        by_length = sorted(range(len(questions)), key=lambda i: len(questions[i][0]))
        for part in (by_length[i:i + batch] for i in range(0, len(questions), batch)):
            q = self.answer(past, [questions[i] for i in part]).softmax(-1)[..., self.answers]  # (2, B, 2)
            p[part] = (q[..., 1] / q.sum(-1)).T.double().cpu().numpy()
            mass.append(q.sum(-1).mean(0).cpu())
        return p, float(torch.cat(mass).mean())


def pad(rows, device):
    """Right padding -> ids (N, longest), lengths (N,)."""
    lengths = torch.tensor([len(r) for r in rows], device=device)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True).to(device), lengths


def copy(cache, change):
    """A fresh cache with `change` applied to all keys and values: a used one would be altered by the next forward pass."""
    fresh = DynamicCache()
    for i, layer in enumerate(cache.layers):
        fresh.update(change(layer.keys), change(layer.values), i)
    return fresh


def gap(logits):
    """The fairness term of Eq. (3): mean over people of || f(g ++ x_m) - f(g ++ x_f) ||_2, unsquared; logits (2, B, V)."""
    p = logits.softmax(-1)
    return ((p[0] - p[1]).pow(2).sum(-1) + 1e-8).sqrt().mean()


def task(logits, people, answers, both=False):
    """Cross-entropy of the right answer, read off the twin that is the person; with `both`, off both twins (CDA)."""
    s, y = (torch.tensor(z, device=logits.device) for z in ([p.s for p in people], [p.y for p in people]))
    own = logits[s, torch.arange(len(people), device=logits.device)]
    return torch.stack([F.cross_entropy(z, answers[y]) for z in (logits if both else [own])]).mean()


# ---------------------------------------------------------------- the game

THREE = 3  # prompts of a step of theta, see Game.prompts


@dataclass
class Options:
    """Everything the game can be told; train.py's --help explains each, but for what its --ablation alone changes."""
    lam: float = 1.
    prompts: str = "adversarial"  # what stands in front in the model's step, see Game.prompts: adversarial | random | none
    cda: bool = False
    attributes: tuple = adult.ATTRIBUTES
    rounds: int = 12
    batch_size: int = 10
    lr: float = 1e-3
    prompt_length: int = 80
    phi_steps: int = 8
    phi_lr: float = .3
    phi_eps: float = 1e-16
    starts: str = "written"  # where phi begins each round: written (by the model) | noise
    shrink: float = .3
    restarts: int = 3
    tau: float = 1.
    warm_up: float = .3
    swa: float = .4
    swa_phi: bool = False
    pool: int = 8
    cut: bool = True  # past prompts, to a random length
    sign: int = 1  # of the adversary: +1 maximises the gap, Eq. (3); -1 minimises it, Eq. (4)
    history: list = field(default_factory=list)


class Adversary:
    """g_phi: for each of L positions a categorical distribution over the tokens. `phi`: the logits (L, V) of each of R restarts."""

    def __init__(self, reader, o, generator):
        self.reader, self.o, self.generator = reader, o, generator
        self.renew(.2 * torch.randn(o.restarts, o.prompt_length, len(reader.mask), generator=generator))

    def renew(self, phi):
        """Begin at `phi`, R times (L, V), each restart with an Adam of its own.
        Straight-through gradients on 50,000 logits are 1e-6 and smaller: with Adam's usual eps of 1e-8 nothing moves."""
        self.phi = [p.detach().to(self.reader.device).clone().requires_grad_() for p in phi]
        self.optimisers = [torch.optim.Adam([p], lr=self.o.phi_lr, eps=self.o.phi_eps) for p in self.phi]

    def around(self, prompts, odds=14.):
        """phi (R, L, V) that draws each token of R prompts with these odds (14 to 1: .93), else any other usable one."""
        own = F.one_hot(torch.tensor(prompts), len(self.reader.mask)).to(self.reader.device)
        noise = .2 * torch.randn(own.shape, generator=self.generator).to(own.device)
        return noise + math.log(odds * len(self.reader.usable)) * own

    def draw(self, restart):
        """One prompt, one-hot (L, V), differentiable in phi; the SAME one is put before both twins."""
        noise = -torch.empty(self.phi[restart].shape).exponential_(generator=self.generator).log().to(self.reader.device)
        return gumbel_softmax(self.phi[restart] + self.reader.mask, self.o.tau, noise=noise)

    def step(self, questions, restart):
        """One step of phi, theta frozen -> gap before it. The gradient is asked for phi alone."""
        phi, loss = self.phi[restart], gap(self.reader(self.reader.prefix(self.draw(restart)), questions))
        phi.grad, = torch.autograd.grad(-self.o.sign * loss, phi)
        all_reduce([phi.grad])
        self.optimisers[restart].step()
        return loss.item()

    def ids(self, restart):
        return self.draw(restart).argmax(-1).tolist()


def all_reduce(gradients):
    """Mean over processes, when there are several (torchrun): each saw its own share of the rows."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for g in gradients:
            torch.distributed.all_reduce(g)
            g /= torch.distributed.get_world_size()


def mine(rows):
    """This process's share of a batch."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return rows[torch.distributed.get_rank()::torch.distributed.get_world_size()]
    return rows


class Game:
    """Eq. (3): `round` alternates phi (attack the model as it is) and theta (answer the task, close the gap)."""

    def __init__(self, reader, people, validation, o, seed, clock=lambda phase: contextlib.nullcontext()):
        self.reader, self.people, self.o, self.clock, self.done = reader, people, o, clock, 0
        self.rng, self.generator = numpy.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.questions = reader.questions(people, o.attributes)
        self.validation = reader.questions(validation, o.attributes)
        self.adversary = Adversary(reader, o, self.generator)
        self.theta = lora.theta(reader.model)
        self.optimiser = torch.optim.AdamW(self.theta, lr=o.lr, weight_decay=0.) if self.theta else None
        self.swa, self.pool = SWA(self.theta), []

    def round(self, theta=True):
        """phi's half, then theta's: one pass over the people (with `theta` False phi's alone, Eq. (4)) -> what happened."""
        o, losses, record = self.o, [], {"round": self.done}
        if o.prompts == "adversarial":
            with self.clock("phi"), lora.merged(self.reader.model):
                record["attack"] = self.attack()
        steps = math.ceil(len(self.people) / o.batch_size) if theta else 0
        with self.clock("theta"):
            for k, rows in enumerate(itertools.islice(self.batches(), steps)):
                progress = (self.done + k / steps) / o.rounds
                lam = o.lam * min(1., max(0., (progress - o.warm_up) / .2))  # the task first, then the ramp
                losses.append(self.model_step(rows, lam))
                if progress >= 1 - o.swa:
                    self.swa.update()
        if losses:
            record.update(zip(("task", "gap"), numpy.mean(losses, 0).tolist()))
        self.done += 1
        o.history.append(record)
        return record

    def batches(self):
        """Rows, a batch at a time, pass after pass, in random order; but each four batches are sorted by length, or much is padded."""
        b = self.o.batch_size
        while True:
            order = self.rng.permutation(len(self.people))
            for window in (order[i:i + 4 * b] for i in range(0, len(order), 4 * b)):
                window = sorted(window, key=lambda i: len(self.questions[i][0]))
                batches = [mine(window[i:i + b]) for i in range(0, len(window), b)]
                yield from (batches[i] for i in self.rng.permutation(len(batches)))

    def attack(self):
        """phi's half of a round -> worst gap found. The best prompt of this round joins the pool of past ones.

        A collapsed distribution cannot follow a moving model. So each round begins anew around cuttings of texts that the model
        itself writes: random tokens never look like the text it has learned to follow. (starts="noise": phi towards uniform.)
        """
        o, found, dropout = self.o, [], self.reader.model.training
        self.reader.model.eval()  # two masks of dropout would fake a gap
        if o.starts == "written":
            at = int(torch.randint(o.prompt_length + 1, (), generator=self.generator))
            texts = self.reader.write(o.restarts, 2 * o.prompt_length, self.generator)
            self.adversary.renew(self.adversary.around([g[at:at + o.prompt_length] for g in texts]))
        else:
            self.adversary.renew([p * o.shrink for p in self.adversary.phi])
        for restart in range(o.restarts):
            average = SWA([self.adversary.phi[restart]])  # what the released code averages: used in --ablation alone
            for rows in itertools.islice(self.batches(), o.phi_steps):
                self.adversary.step([self.questions[i] for i in rows], restart)
                if o.swa_phi:
                    average.update()
            if o.swa_phi:
                average.apply()
            found += [self.adversary.ids(restart) for _ in range(2)]
        best = max((o.sign * score(self.reader, g, self.validation), g) for g in found)
        self.pool = (self.pool + [best[1]])[-o.pool:]
        self.reader.model.train(dropout)
        return o.sign * best[0]

    def prompts(self):
        """The prompts of one step of the model: none ("no prompt" is one draw of g), the adversary's as it is, a past worst one,
        cut to a random length."""
        def random_tokens():
            return [self.reader.usable[i] for i in self.rng.integers(len(self.reader.usable), size=self.o.prompt_length)]
        if self.o.prompts == "none":
            return [None]
        if self.o.prompts == "random":
            return [None, random_tokens(), random_tokens()]
        past = self.pool[self.rng.integers(len(self.pool))]
        if self.o.cut:
            past = past[-int(self.rng.integers(1, len(past) + 1)):]  # prompts come in all lengths
        return [None, self.adversary.ids(int(self.rng.integers(self.o.restarts))), past]

    def loss(self, rows, g):
        """Both terms of Eq. (3) on some people under a prompt (None: the clean one) -> task, gap."""
        questions = [self.questions[i] for i in rows]
        logits = self.reader(self.reader.prefix(g), questions)
        return task(logits, [self.people[i] for i in rows], self.reader.answers, self.o.cda), gap(logits)

    def model_step(self, rows, lam):
        """theta's half: one step on a batch -> (task, gap) before it.

        The task is averaged over the prompts, and the gap of each weighs lam; THREE always, so that lam means the same
        where all three are none and are computed once. A backward pass for each prompt: one graph in memory at a time.
        """
        seen, prompts = torch.zeros(2, device=self.reader.device), self.prompts()
        self.optimiser.zero_grad()
        for g in prompts:
            t, d = self.loss(rows, g)
            ((t + lam * THREE * d if lam else t) / len(prompts)).backward()
            seen += torch.stack([t, d]).detach() / len(prompts)
        all_reduce([p.grad for p in self.theta] + [seen])
        if not torch.isfinite(seen).all():
            raise InputError(f"the loss is not finite in round {self.done + 1}; the learning rate ({self.o.lr}) or lam "
                             f"({self.o.lam}) is likely too high: lower it.")
        torch.nn.utils.clip_grad_norm_(self.theta, 1.)
        self.optimiser.step()
        return seen.tolist()

    def state(self):
        """Everything a resumed game needs to go on bit for bit."""
        return {"theta": [p.detach() for p in self.theta], "optimiser": self.optimiser.state_dict(), "pool": self.pool,
                "phi": [p.detach() for p in self.adversary.phi], "swa": (self.swa.average, self.swa.n), "done": self.done,
                "rng": self.rng.bit_generator.state, "generator": self.generator.get_state(), "dropout": torch.get_rng_state(),
                "history": self.o.history}

    def restore(self, state):
        """Undo `state`."""
        for p, w in zip(self.theta, state["theta"]):
            p.data.copy_(w)
        self.optimiser.load_state_dict(state["optimiser"])
        self.adversary.renew(state["phi"])
        self.pool, self.done = state["pool"], state["done"]
        self.swa.average, self.swa.n = state["swa"]
        self.rng.bit_generator.state = state["rng"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout"])
        self.o.history[:] = state["history"]


# ---------------------------------------------------------------- attacks on the finished model

def score(reader, g, questions):
    """Counterfactual gap under a prompt: mean |p_m - p_f|."""
    p, _ = reader.predict(questions, g)
    return float(abs(p[:, 0] - p[:, 1]).mean())


def survives(reader, g):
    """Whether a prompt is text: decoded and encoded again, in its place, it is the same tokens."""
    rest = "\n" + adult.INSTRUCTION
    return reader.ids(reader.tokenizer.decode(g) + rest) == list(g) + reader.ids("\n") + reader.ids(adult.INSTRUCTION)


def random_prompt(reader, length, rng):
    """Usable tokens at random, until they survive decode -> encode."""
    g = []
    while len(g) < length:  # grown token by token: a whole random string seldom survives
        g.append(reader.usable[rng.integers(len(reader.usable))])
        if not survives(reader, g):
            g.pop()
    return g


def random_search(reader, questions, length, budget, rng):
    """NOT IN THE PAPER: the best of `budget` random prompts -> (gap, prompt)."""
    return max((score(reader, g, questions), g) for g in (random_prompt(reader, length, rng) for _ in range(budget)))


def written_search(reader, questions, length, budget, rng):
    """NOT IN THE PAPER: the best of `budget` prompts that the attacked model writes itself -> (gap, prompt)."""
    texts = reader.write(budget, length, torch.Generator().manual_seed(int(rng.integers(2 ** 31))))
    texts = [g for g in texts if survives(reader, g)] or [random_prompt(reader, length, rng)]
    return max((score(reader, g, questions), g) for g in texts)


def gumbel_attack(reader, questions, length, budget, rng):
    """NOT IN THE PAPER: a fresh adversary against the frozen model -> (gap, prompt). A step costs about three forward passes.

    It starts from the best of a few random and written prompts (a tenth of the budget each) and samples around what it learns."""
    best = max(search(reader, questions, length, max(1, budget // 10), rng) for search in (random_search, written_search))
    o = Options(prompt_length=length, restarts=1, phi_lr=3.)
    adversary = Adversary(reader, o, torch.Generator().manual_seed(int(rng.integers(2 ** 31))))
    adversary.renew(adversary.around([best[1]], odds=.2))
    for step in range(max(1, budget // 5)):
        adversary.step(questions, 0)
        g = adversary.ids(0)
        if survives(reader, g):
            best = max(best, (score(reader, g, questions), g))
    return best


def gcg(reader, questions, length, budget, rng, candidates=8, top=64):
    """NOT IN THE PAPER: greedy coordinate gradient (Zou et al. 2023) -> (gap, prompt).

    The gradient of the gap in each position's one-hot ranks the tokens that might replace it; of `candidates` single
    replacements the best is taken, and the best prompt ever seen is returned. Half of the budget goes to the start.
    """
    value, g = max(search(reader, questions, length, max(1, budget // 4), rng) for search in (random_search, written_search))
    best, spent = (value, g), budget // 2
    while spent + candidates + 3 <= budget:
        onehot = F.one_hot(torch.tensor(g), len(reader.mask)).float().to(reader.device).requires_grad_()
        slope, = torch.autograd.grad(gap(reader(reader.prefix(onehot), questions)), onehot)  # (L, V)
        ranked, tried = (slope + reader.mask).topk(min(top, len(reader.usable)), -1).indices.cpu(), []
        for _ in range(candidates * 4):
            position, other = int(rng.integers(length)), list(g)
            other[position] = int(ranked[position, rng.integers(ranked.shape[1])])
            if survives(reader, other) and len(tried) < candidates:
                tried.append((score(reader, other, questions), other))
        spent += len(tried) + 3
        if tried:
            value, g = max(tried)  # go on from the best neighbour, even when it is worse
            best = max(best, (value, g))
    return best
