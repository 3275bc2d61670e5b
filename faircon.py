"""Section 3: a language model that stays fair under the most unfair prompt.

    Eq. (3)   min over theta   task(theta, g) + lam * distance(theta, g)
              where g = argmax over phi of distance(theta, g_phi)
    Eq. (4)   min over phi     distance(theta, g_phi), theta frozen

    distance(theta, g) = mean over people of || f_theta(g, x_m) - f_theta(g, x_f) ||_2

    f_theta    the model's answer: its log-odds                    LanguageModel
    theta      LoRA's A and B                                      lora.theta
    g_phi      for each token of the prompt g a categorical
               distribution; phi are its logits                    Adversary
    x_m, x_f   one person's text as a man and as a woman           adult.twins
    task       the L of Eq. (3)                                    task
    the loop   a round: phi attacks, then theta answers            Game.round

PAPER: prints "min over phi" in Eq. (3), a slip: phi maximises. Eq. (4) is called "one
part" of Eq. (3); that part maximises, Eq. (4) minimises: Adversary.sign. "ADMM" is
plain alternation; there is no dual variable.
PAPER vs RELEASED CODE: the paper does not say which output of the LLM f_theta is;
released, the raw logits of all tokens. Here the log-odds of the answer, log p(1) - log
p(0): on the same people their distance is at least four times the gap of the tables.
The released step of theta has no distance and no lam in it.

    python faircon.py      # the game on forty people, step by step
"""
import math
import textwrap
from dataclasses import dataclass, replace

import numpy
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import adult
import lora
import metrics
from adult import InputError
from gumbel import gumbel_noise, gumbel_softmax
from swa import SWA

CLEAN = None                                          # the empty prompt


# ------------------------------------------------------------------ f_theta

class LanguageModel:
    """f_theta: a causal language model, its tokenizer, the two answer tokens.

    This is the definition. beyond/fast.py computes the same numbers (tested, value and
    gradient) without reading twice what texts share, and is what train.py uses.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.embed = model.get_input_embeddings().weight                     # (V, D)
        self.window = getattr(model.config, "max_position_embeddings", math.inf)
        self.bos = self.beginning()
        self.answers = torch.tensor(self.answer_tokens(), device=self.device)
        self.usable = self.usable_tokens()
        mask = torch.full((len(self.embed),), -torch.inf)
        mask[self.usable] = 0.                # added to phi's logits: a prompt is text
        self.mask = mask.to(self.device)

    # ---- text to tokens

    def ids(self, text):
        """The tokens of a text, a list of ids."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if max(ids, default=0) >= len(self.embed):
            raise InputError(f"the tokenizer gives token {max(ids)} and the model has "
                             f"{len(self.embed)} embeddings; resize them, or take the "
                             "model's own tokenizer.")
        return ids

    def question(self, text):
        """The tokens in front of the answer.

        Encoded with an answer, which is then dropped: a tokenizer may split what stands
        in front of one otherwise.
        """
        return self.ids(text + " 0")[:-1]

    def questions(self, people, attributes=adult.ATTRIBUTES):
        """-> for each person the tokens of x_m and of x_f."""
        questions = []
        for person in people:
            texts = adult.twins(person, attributes)
            questions.append([self.question(text) for text in texts])
        return questions

    def beginning(self):
        """What the tokenizer puts before any text (BOS), if anything."""
        bare = self.tokenizer.encode("label", add_special_tokens=False)
        full = self.tokenizer.encode("label")
        return full[:full.index(bare[0])] if bare and bare[0] in full else []

    def answer_tokens(self):
        """The two tokens that answer a question; InputError if there are none."""
        text = f"{adult.OPENING} sex Male\nlabel:"
        no, yes = self.ids(text + " 0"), self.ids(text + " 1")
        apart = self.ids("x") + self.ids("\n") + self.ids(adult.INSTRUCTION) + no
        if no[:-1] != yes[:-1] or no[-1:] == yes[-1:] or len(no) < 2:
            raise InputError('the tokenizer has no single tokens for " 0" and " 1" '
                             "after label:; use another model, such as GPT-Neo.")
        if apart != self.ids("x\n" + adult.INSTRUCTION + text + " 0"):
            raise InputError("the tokenizer splits a prompt and its question otherwise "
                             "than the two apart; use another model, such as GPT-Neo.")
        return [no[-1], yes[-1]]

    def usable_tokens(self):
        """The tokens that come back when decoded and encoded again: text."""
        every = range(min(len(self.tokenizer), len(self.embed)))
        words = self.tokenizer.batch_decode([[i] for i in every])
        again = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        special = set(self.tokenizer.all_special_ids)
        usable = []
        for i in every:
            if again[i] == [i] and i not in special and "\ufffd" not in words[i]:
                usable.append(i)
        if not usable:
            raise InputError("no token of this tokenizer survives decoding and "
                             "encoding: no prompt can be searched; use another model.")
        return usable

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    # ---- the forward pass

    def prefix(self, g=CLEAN, context=adult.INSTRUCTION):
        """Embeddings (P, D) of what stands before the question:

            BOS   g   newline   context

        g: CLEAN, token ids, or one-hot rows (L, V) that carry a gradient.
        context: the instruction, or a few-shot prompt, which begins with it.
        """
        context = self.embed[self.ids(context)]
        bos = self.embed[torch.tensor(self.bos, dtype=torch.long)]
        if g is CLEAN:
            return torch.cat([bos, context])
        g = g.to(self.embed.dtype) @ self.embed if torch.is_tensor(g) else self.embed[g]
        return torch.cat([bos, g, self.embed[self.ids("\n")], context])

    def __call__(self, prefix, questions):
        """-> float32 logits (2, B, V) at the answer; twin 0 is the man. InputError."""
        self.check_length(len(prefix), questions)
        texts = []
        for s in (0, 1):
            for twins in questions:
                texts.append(torch.cat([prefix, self.embed[twins[s]]]))      # (T, D)
        last = torch.tensor([len(x) - 1 for x in texts], device=self.device)
        x = pad_sequence(texts, batch_first=True)      # (2B, T, D), padded at the end
        logits = self.model(inputs_embeds=x, use_cache=False).logits     # (2B, T, V)
        logits = logits[torch.arange(len(x), device=self.device), last]      # (2B, V)
        return logits.float().view(2, len(questions), -1)

    def check_length(self, before, questions):
        """InputError when a text would be longer than the model's context."""
        longest = before
        for twins in questions:
            longest = max(longest, before + max(map(len, twins)))
        if longest > self.window:
            raise InputError(f"prompt and question are {longest} tokens and the "
                             f"model's context is {self.window}; use a shorter prompt "
                             "(--prompt-length) or fewer shots (--shots).")

    @torch.no_grad()
    def predict(self, questions, g=CLEAN, context=adult.INSTRUCTION, batch=64):
        """-> P(y=1 | y is 0 or 1) of each person as a man and as a woman, (N, 2).

        InputError when the model gives numbers that are none.
        """
        prefix, parts = self.prefix(g, context), []
        for i in range(0, len(questions), batch):
            logits = self(prefix, questions[i:i + batch])
            parts.append(self.p_yes(logits).T)                               # (B, 2)
        return self.finite(torch.cat(parts))

    def p_yes(self, logits):
        """P(y=1 | y is 0 or 1); logits (..., V) -> (...)."""
        return logits[..., self.answers].softmax(-1)[..., 1]

    def finite(self, p):
        if not p.isfinite().all():
            raise InputError("the model's answers are not finite numbers (NaN); its "
                             "weights are damaged, or need --dtype float32.")
        return p.double().cpu().numpy()

    @torch.no_grad()
    def write(self, n, length, generator):
        """n texts of `length` tokens, written by the model itself -> ids, n lists."""
        x = self.prefix().expand(n, -1, -1)
        texts = []
        for _ in range(length):
            logits = self.model(inputs_embeds=x, use_cache=False).logits[:, -1]
            texts.append(self.draw(logits, generator))                       # (n, 1)
            x = torch.cat([x, self.embed[texts[-1]]], 1)
        return torch.cat(texts, 1).tolist()

    def draw(self, logits, generator):
        """One usable token for each row of logits (n, V) -> (n, 1)."""
        p = (logits.float() + self.mask).softmax(-1).cpu()
        return torch.multinomial(p, 1, generator=generator).to(self.device)


# ------------------------------------------------------------------ the two terms

def task(logits, people, answers):
    """L of Eq. (3): cross-entropy of the answer, on the twin with the own sex."""
    s = torch.tensor([p.s for p in people], device=logits.device)
    y = torch.tensor([p.y for p in people], device=logits.device)
    own = logits[s, torch.arange(len(people), device=logits.device)]         # (B, V)
    return F.cross_entropy(own, answers[y])


def distance(logits, answers, log_odds=True):
    """Mean over people of || f(g, x_m) - f(g, x_f) ||_2, Eq. (3); logits (2, B, V).

    f: log-odds of the two answers, one number; or the probabilities of all tokens,
    which hardly differ where the model is sure, however far apart its log-odds are.
    1e-8 keeps the root differentiable where twins agree.
    """
    if log_odds:
        f = logits[..., answers[1:]] - logits[..., answers[:1]]              # (2, B, 1)
    else:
        f = logits.softmax(-1)                                               # (2, B, V)
    return ((f[0] - f[1]).pow(2).sum(-1) + 1e-8).sqrt().mean()


def measure(model, people, g=CLEAN, context=adult.INSTRUCTION,
            attributes=adult.ATTRIBUTES):
    """Table 3's numbers on some people, under a prompt -> metrics.evaluate's dict."""
    p = model.predict(model.questions(people, attributes), g, context)       # (N, 2)
    return metrics.evaluate(p, [x.y for x in people], [x.s for x in people])


# ------------------------------------------------------------------ phi

@dataclass
class Options:
    """The game's settings; in brackets what the paper, else its released code, has."""
    lam: float = 1.                # weight of the distance in Eq. (3)
    rounds: int = 16               # rounds of the game, each a pass over the rows  [10]
    batch_size: int = 10           # people in a step of theta and of phi            [9]
    lr: float = 2e-3               # AdamW's, for theta                           [5e-4]
    prompt_length: int = 560       # tokens of g; at most, where lengths are drawn  [10]
    phi_steps: int = 20            # in a round: as many as theta's, with 200 rows  [23]
    phi_lr: float = 3.             # Adam's, for phi                               [0.1]
    tau: float = 1.                # temperature of Gumbel-softmax                   [1]
    log_odds: bool = True          # f_theta: log-odds, else probabilities  [all logits]
    swa: float = .4                # last share of the rounds that SWA averages; 6 of 16
    dropout: float = 0.            # on LoRA's input; each twin its own mask      [0.01]


class Adversary:
    """g_phi: for each of L positions a categorical distribution over V tokens.

    sign: +1 makes the prompt unfair, Eq. (3); -1 makes it fair, Eq. (4).
    """

    def __init__(self, model, options, generator, sign=1):
        self.model, self.options, self.generator = model, options, generator
        self.sign = sign
        self.start(self.noise(options.prompt_length))

    def noise(self, length):
        """phi that prefers no token on purpose: standard normal, as released."""
        return torch.randn(length, len(self.model.embed), generator=self.generator)

    def start(self, phi):
        """Begin at phi (L, V), with a fresh Adam."""
        self.phi = phi.to(self.model.device).requires_grad_()
        self.optimiser = torch.optim.Adam([self.phi], lr=self.options.phi_lr)

    def sample(self):
        """A prompt, one-hot (L, V), differentiable in phi; both twins get the SAME."""
        noise = gumbel_noise(self.phi.shape, self.generator).to(self.model.device)
        return gumbel_softmax(self.phi + self.model.mask, self.options.tau, noise=noise)

    def sample_ids(self):
        return self.sample().argmax(-1).tolist()

    def likeliest_ids(self):
        """The most probable token of each place: what phi stands for, without luck."""
        return (self.phi + self.model.mask).argmax(-1).tolist()

    def step(self, questions):
        """One step of phi up (sign +1) or down (-1) the distance, theta frozen.

        -> the distance before it
        """
        prefix = self.model.prefix(self.sample())
        logits = self.model(prefix, questions)                           # (2, B, V)
        d = distance(logits, self.model.answers, self.options.log_odds)
        loss = -self.sign * d
        gradient, = torch.autograd.grad(loss, self.phi)
        self.phi.grad = average_over_processes(gradient)
        self.optimiser.step()
        return d.item()


# ------------------------------------------------------------------ the game, Eq. (3)

class Game:
    """The alternating loop of section 3.1 (Figure 2)."""

    def __init__(self, model, people, options, seed, adversary=True):
        self.model, self.people, self.options = model, people, options
        self.questions = model.questions(people)
        self.done = 0                                                 # rounds played
        self.rng = numpy.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.adversary = Adversary(model, options, self.generator) if adversary else None
        self.theta = lora.theta(model.model)
        self.optimiser = torch.optim.AdamW(self.theta, lr=options.lr, weight_decay=0.)
        self.swa = SWA(self.theta)

    def round(self):
        """phi's half, then theta's: one pass over the people -> what happened."""
        with lora.merged(self.model.model):              # theta is not trained here
            found = self.phi_half() if self.adversary else []
        terms = [self.theta_step(batch) for batch in self.batches()]
        self.done += 1
        t, d = numpy.mean(terms, 0).tolist()
        return {"round": self.done, "phi": found, "task": t, "distance": d}

    def phi_half(self):
        """phi's turn, a few steps towards the argmax of Eq. (3).

        -> [mean distance at the first step, at the last]; each step has other people,
        so that the two differ by these as well
        """
        self.start_phi()
        distances = []
        for batch in self.batches(self.options.phi_steps):
            questions = [self.questions[i] for i in batch]
            distances.append(self.adversary.step(questions))
        return [distances[0], distances[-1]] if distances else []

    def start_phi(self):
        """Where phi begins in a round: where it is."""

    def prompts(self):
        """What stands in front in one step of theta: a sample of the adversary."""
        return [self.adversary.sample_ids()] if self.adversary else []

    def theta_step(self, batch):
        """One step of theta down Eq. (3), phi frozen -> task and distance before it.

        The loss is the mean over the prompts; a backward pass for each keeps one graph
        in memory. Gradients are clipped to norm 1 (neither paper nor released code).
        """
        people = [self.people[i] for i in batch]
        questions = [self.questions[i] for i in batch]
        prompts = self.prompts() or [CLEAN]
        terms = torch.zeros(2)
        lora.train(self.model.model, True)
        self.optimiser.zero_grad()
        for g in prompts:
            logits = self.model(self.model.prefix(g), questions)             # (2, B, V)
            t = task(logits, people, self.model.answers)
            d = distance(logits, self.model.answers, self.options.log_odds)
            loss = t + self.options.lam * d                                  # Eq. (3)
            (loss / len(prompts)).backward()
            terms += torch.stack([t, d]).detach().cpu() / len(prompts)
        lora.train(self.model.model, False)
        terms = average_over_processes(terms)
        if not terms.isfinite().all():
            raise InputError(f"the loss is not finite in round {self.done + 1}; lower "
                             f"lr ({self.options.lr}) or lam ({self.options.lam}).")
        for p in self.theta:
            p.grad = average_over_processes(p.grad)
        torch.nn.utils.clip_grad_norm_(self.theta, 1.)
        self.optimiser.step()
        left = self.options.rounds - self.done             # this round is one of them
        if left <= self.options.swa * self.options.rounds:
            self.swa.update()               # section 4.2, at every step of these rounds
        return terms.tolist()

    def batches(self, n=None):
        """One pass over the people in random order, or n batches, pass after pass."""
        size, batches = self.options.batch_size, []
        while n is None or len(batches) < n:
            order = self.rng.permutation(len(self.people))
            for i in range(0, len(order), size):
                batches.append(mine(order[i:i + size]))
            if n is None:
                break
        return batches[:n]


# ---- several processes (torchrun): each takes its share of every batch

def several_processes():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mine(batch):
    """This process's share of a batch."""
    if several_processes():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return batch[rank::size]
    return batch


def average_over_processes(tensor):
    if several_processes():
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


# ------------------------------------------------------------------ the lesson

def show_people(model, people):
    """One question as text, and what the model answers to a few people and twins."""
    print(f"x_m:\n{textwrap.fill(adult.twins(people[0])[0], 84)}")
    print('x_f: the same with "sex Female". The next token answers: " 0" or " 1".\n')
    print("    person                     y     p as a man     p as a woman")
    for person, (p_m, p_f) in zip(people[:4], model.predict(model.questions(people))):
        values = dict(zip(adult.COLUMNS, person.values))
        who = f"{values['sex']}, {values['age']}, {values['education']}"
        print(f"    {who:<26} {person.y} {p_m:12.3f} {p_f:16.3f}")


def lesson():
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(adult.TINY).eval(),
                          AutoTokenizer.from_pretrained(adult.TINY))
    data = adult.load(adult.TINY)
    rng = numpy.random.default_rng(0)
    people = adult.sample(data.train, 40, .5, rng)
    test = adult.sample(data.test, 40, 0., rng)
    show_people(model, people)

    options = Options(rounds=4, prompt_length=30, phi_steps=10)
    climb_once(model, people, options)
    gaps = [play(model, people, test, replace(options, lam=lam)) for lam in (0., 1.)]
    assert gaps[1] < gaps[0], "the distance in the loss closes the gap"
    print("\nnow try: lam = 0.1; then lam = 10. Which leaves a larger gap?")


def climb_once(model, people, options):
    """One adversary, 24 steps up; then three of theta's steps behind its prompts."""
    print("\nphi climbs: theta is frozen, the prompt g becomes more unfair")
    options = replace(options, prompt_length=20, phi_lr=2.)
    lora.inject(model.model)
    game = Game(model, people, options, seed=0)
    adversary, questions, means = game.adversary, game.questions[:20], []
    for steps in (0, 8, 16):
        for _ in range(steps):
            adversary.step(questions)
        means.append(mean_distance(adversary, questions))
        text = model.decode(adversary.sample_ids())
        print(f"    {steps:>2} more steps: distance {means[-1]:.3f}  g = {text[:40]!r}")
    assert means[-1] > 1.3 * means[0], "phi maximises"
    terms = [game.theta_step(range(20)) for _ in range(3)]
    print("theta descends: phi is frozen, three steps down task + lam * distance")
    for step, (t, d) in enumerate(terms):
        print(f"    step {step:<3} task {t:.3f}   distance {d:.3f}")


@torch.no_grad()
def mean_distance(adversary, questions, samples=6):
    """The distance under an adversary, mean of a few of its prompts."""
    model, seen = adversary.model, []
    for _ in range(samples):
        logits = model(model.prefix(adversary.sample()), questions)
        seen.append(distance(logits, model.answers).item())
    return numpy.mean(seen)


def play(model, people, test, options):
    """A few rounds of the game -> the gap on test people at the end."""
    print(f"\nthe game at lam = {options.lam:g}: 40 people, gap on 40 others"
          "\n    round   phi: distance    theta: task   distance     gap")
    lora.inject(model.model)
    game = Game(model, people, options, seed=0)
    for _ in range(options.rounds):
        seen = game.round()
        gap = measure(model, test)["gap"]
        first, last = seen["phi"]
        print(f"    {seen['round']:<7} {first:.3f} -> {last:.3f} {seen['task']:13.3f} "
              f"{seen['distance']:10.3f} {gap:7.3f}", flush=True)
    return gap


if __name__ == "__main__":
    lesson()
