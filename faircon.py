"""Section 3: a language model that stays fair under the most unfair prompt.

    Eq. (3)   min over theta   task(theta, g) + lam * distance(theta, g)
              where g = argmax over phi of distance(theta, g_phi)
    Eq. (4)   min over phi     distance(theta, g_phi), theta frozen

    distance(theta, g) = mean over people of || f_theta(g, x_m) - f_theta(g, x_f) ||_2

    f_theta    the model; the task takes all its logits, the
               distance the log-odds of " 1" against " 0"          LanguageModel
    theta      LoRA's A and B                                      lora.theta
    g_phi      for each token of the prompt g a categorical
               distribution; phi are its logits                    Adversary
    x_m, x_f   one person's text as a man and as a woman           adult.twins
    task       the L of Eq. (3), each person asked as their sex    task
    the loop   phi climbs, theta descends, repeat                  Game.play

The paper's "contrastive" objective is this comparison of the two twins; there are no
negatives.

PAPER: prints "min over phi" in Eq. (3), a slip: phi maximises. Eq. (4) is called "one
part" of Eq. (3); that part maximises, Eq. (4) minimises: `sign` in Adversary.step.
"ADMM" is plain alternation; there is no dual variable. The paper alternates theta, then
phi; here phi moves first, so that theta meets a trained prompt from round 1 on.
PAPER vs RELEASED CODE: the paper does not say which output of the LLM the distance
compares; released, the raw logits of all tokens. Here the log-odds of the answer, log
p(1) - log p(0), one number. p is their sigmoid, whose slope is at most 1/4, so that the
distance is at least four times the gap |p_m - p_f| given the same prompt.
The released step of theta has no distance and no lam in it.

    python faircon.py      # the game on forty people, step by step
"""
import copy
import inspect
import math
from dataclasses import dataclass, field, fields

import numpy
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

import adult
import lora
import metrics
from adult import InputError
from gumbel import gumbel_noise, sample_embeddings
from swa import SWA

NO_PROMPT = None
AT_ONCE = 8192        # tokens of copied prefixes in a batch of `predict`: bounds memory


# ------------------------------------------------------------------ the two terms

def task(own, people, answers):
    """L of Eq. (3): cross-entropy of the answer. own (B, V): asked as their own sex."""
    y = torch.tensor([p.y for p in people], device=own.device)
    return F.cross_entropy(own, answers[y])


def distance(logits, answers):
    """Mean over people of || f(g, x_m) - f(g, x_f) ||_2, Eq. (3); logits (2, B, V).

    f: the log-odds of the two answers, one number, so the norm is an absolute value.
    1e-8 keeps the root differentiable where twins agree.
    """
    f = logits[..., answers[1]] - logits[..., answers[0]]                # (2, B)
    return ((f[0] - f[1]).pow(2) + 1e-8).sqrt().mean()


def measure(model, people, g=NO_PROMPT, context=None, attributes=None):
    """Table 3's numbers on some people, under a prompt -> metrics.evaluate's dict."""
    p = model.predict(model.questions(people, attributes), g, context)       # (N, 2)
    return metrics.of_people(p, people)


# ------------------------------------------------------------------ options

def option(default, low, high, meaning):
    """A field of Options: its value, its range, what it means (train.py's --help)."""
    return field(default=default, metadata={"range": (low, high), "help": meaning})


@dataclass
class Options:
    """The game's settings: the paper's value, else that of the released code.

    lam and swa are ours, since neither gives them. phi_steps: 23 batches of 9 are one
    pass over 200 people. Raises InputError for a value outside its range.
    """
    lam: float = option(1., 0, 1e9, "weight of the distance in Eq. (3)")
    rounds: int = option(10, 1, 10 ** 6, "rounds of the game, each a pass of theta")
    batch_size: int = option(9, 1, 10 ** 6, "people in a step of theta and of phi")
    lr: float = option(5e-4, 1e-30, 1e9, "AdamW's rate for theta")
    rank: int = option(32, 1, 4096, "r of LoRA (released 4)")
    alpha: float = option(16., 1e-30, 1e9, "alpha of LoRA")
    dropout: float = option(.01, 0, .99, "on LoRA's input")
    prompt_length: int = option(10, 1, 10 ** 6, "tokens of g (FreshGame: longest)")
    phi_steps: int = option(23, 0, 10 ** 6, "steps of phi in a round")
    phi_lr: float = option(.1, 1e-30, 1e9, "Adam's rate for phi")
    tau: float = option(1., 1e-30, 1e9, "temperature of Gumbel-softmax")
    swa: float = option(.4, 0, 1, "the last share of the rounds, which SWA averages")

    def __post_init__(self):
        for f in fields(self):
            low, high = f.metadata["range"]
            value = getattr(self, f.name)
            if not low <= value <= high:
                raise InputError(f"{f.name} = {value} is impossible: it lies between "
                                 f"{low:g} and {high:g}.")


# ------------------------------------------------------------------ phi

class Adversary:
    """g_phi: for each of L places a categorical distribution over V tokens."""

    def __init__(self, model, options, generator):
        self.model, self.options, self.generator = model, options, generator
        self.start(self.initial_phi(options.prompt_length))

    def initial_phi(self, length):
        """A random phi (L, V): standard normal, as released."""
        return torch.randn(length, len(self.model.embed), generator=self.generator)

    def start(self, phi):
        """Begin at phi (L, V), with a fresh Adam."""
        self.phi = phi.to(self.model.device).requires_grad_()
        self.optimiser = torch.optim.Adam([self.phi], self.options.phi_lr, fused=True)

    def sample(self):
        """A prompt -> its ids (L,) and embeddings (L, D), differentiable in phi."""
        noise = gumbel_noise(self.phi.shape, self.generator).to(self.model.device)
        noise += self.model.mask                         # -inf: this token is not drawn
        return sample_embeddings(self.phi, self.model.embed, self.options.tau, noise)

    @torch.no_grad()
    def sample_ids(self):
        return self.sample()[0].tolist()

    def likeliest_ids(self):
        """The most probable token of each place, without sampling noise."""
        return (self.phi + self.model.mask).argmax(-1).tolist()

    def step(self, questions, sign=1):
        """One step of phi, theta frozen; both twins get the same sample.

        sign +1: up the distance, Eq. (3). -1: down, Eq. (4). Returns the distance
        before the step.
        """
        self.phi.grad = None                    # free the old gradient: phi is large
        _, g = self.sample()
        logits = self.model(self.model.prefix(g), questions)             # (2, B, V)
        d = distance(logits, self.model.answers)
        [self.phi.grad] = torch.autograd.grad(-sign * d, self.phi)  # theta gets none
        self.optimiser.step()
        return d.item()


# ------------------------------------------------------------------ the game, Eq. (3)

class Game:
    """The alternating loop of section 3.1 (Figure 2).

    adversary False: theta trains without a prompt; if lam is 0 as well, that is plain
    fine-tuning. `bar`: show a progress bar within a round.
    """

    def __init__(self, model, people, options, seed, adversary=True, bar=False):
        lora.inject(model.model, options.rank, options.alpha, options.dropout, seed)
        self.model, self.people, self.options, self.bar = model, people, options, bar
        self.questions = model.questions(people)
        # Not default_rng(seed), which adult.split uses already.
        self.rng = numpy.random.default_rng((seed, 1))
        self.generator = torch.Generator().manual_seed(int(self.rng.integers(2 ** 62)))
        self.adversary = None
        if adversary:
            self.adversary = Adversary(model, options, self.generator)
        self.theta = lora.theta(model.model)
        self.optimiser = torch.optim.AdamW(self.theta, lr=options.lr, weight_decay=0.)
        self.swa = SWA(self.theta)
        self.done = 0                                                 # rounds played

    def play(self):
        """Play the rounds that are left; yields what happened in each.

        After them `swa.apply()` puts the average (section 4.2) in place of theta.
        """
        while self.done < self.options.rounds:
            record = {"round": self.done + 1}
            if self.adversary:
                record["phi"] = self.phi_turn()
            record.update(self.theta_turn())
            self.done += 1
            yield record

    def phi_turn(self):
        """phi's turn, a few steps towards the argmax of Eq. (3); theta is frozen.

        Returns the distance at the first step and at the last. Each step has other
        people, so that the two differ by these as well.
        """
        self.start_phi()
        distances = []
        with lora.merged(self.model.model):
            for batch in self.watch(self.batches(self.options.phi_steps), "phi"):
                questions = [self.questions[i] for i in batch]
                distances.append(self.adversary.step(questions))
        return [distances[0], distances[-1]] if distances else []

    def theta_turn(self):
        """theta's turn: one pass over the people, phi is frozen -> the terms' means."""
        batches = self.watch(self.batches(), "theta")
        return mean_of([self.theta_step(batch) for batch in batches])

    def theta_step(self, batch):
        """One step of theta down Eq. (3) -> its terms before the step.

        The paper's game has one prompt. With two (RobustGame) the loss is their mean, a
        backward pass for each, so that one graph is in memory. Gradients are clipped to
        norm 1, which neither paper nor released code does.
        """
        prompts = self.prompts() or [NO_PROMPT]
        found = []
        lora.set_dropout(self.model.model, True)
        self.optimiser.zero_grad()
        for g in prompts:
            terms = self.terms(g, batch)
            loss = terms["task"]
            if "distance" in terms:
                loss = loss + self.options.lam * terms["distance"]  # Eq. (3): the loss
            (loss / len(prompts)).backward()
            found.append({name: term.item() for name, term in terms.items()})
        lora.set_dropout(self.model.model, False)
        means = mean_of(found)
        self.check_finite(means)
        torch.nn.utils.clip_grad_norm_(self.theta, 1.)
        self.optimiser.step()
        if self.averaging():
            self.swa.update()                                            # section 4.2
        return means

    def terms(self, g, batch):
        """The two terms of Eq. (3) given a prompt.

        With lam = 0 the task only, for which the other twin is not needed.
        """
        people = [self.people[i] for i in batch]
        prefix, answers = self.model.prefix(g), self.model.answers
        if self.options.lam == 0:
            own = [[self.questions[i][self.people[i].s]] for i in batch]
            return {"task": task(self.model(prefix, own)[0], people, answers)}
        logits = self.model(prefix, [self.questions[i] for i in batch])      # (2, B, V)
        s = torch.tensor([p.s for p in people])
        own = logits[s, torch.arange(len(people))]                           # (B, V)
        return {"task": task(own, people, answers),
                "distance": distance(logits, answers)}

    # ---- what FreshGame and RobustGame change, beyond/robust.py

    def start_phi(self):
        """Before phi's turn. Nothing: phi goes on where the last round left it.

        After round 1 it hardly climbs any more; see FreshGame in beyond/robust.py.
        """

    def prompts(self):
        """What stands in front in one step of theta: a sample of the adversary."""
        return [self.adversary.sample_ids()] if self.adversary else []

    # ---- small parts

    def averaging(self):
        """True in the last share `swa` of the rounds, at least in the last one."""
        left = self.options.rounds - self.done             # this round is one of them
        share = self.options.swa * self.options.rounds
        return share > 0 and left <= max(1, share)

    def check_finite(self, terms):
        """InputError if the loss is not finite."""
        if not numpy.isfinite(list(terms.values())).all():
            raise InputError(f"the loss is not finite in round {self.done + 1}; lower "
                             f"lr ({self.options.lr}) or lam ({self.options.lam}).")

    def batches(self, n=None):
        """One pass over the people in random order, or n batches, pass after pass."""
        size, batches = self.options.batch_size, []
        n = math.ceil(len(self.people) / size) if n is None else n
        while len(batches) < n:
            order = self.rng.permutation(len(self.people))
            batches += [order[i:i + size] for i in range(0, len(order), size)]
        return batches[:n]

    def watch(self, batches, name):
        """The batches, with a bar on a terminal: some models take minutes a round."""
        return tqdm(batches, name, leave=False, disable=None if self.bar else True)


def mean_of(records):
    """Dicts of the same names -> their means."""
    return {name: float(numpy.mean([one[name] for one in records]))
            for name in records[0]}


# ------------------------------------------------------------------ f_theta

class LanguageModel:
    """f_theta: a causal language model, its tokenizer, the two answer tokens.

    Plumbing: text to tokens, and a forward pass that reads what is shared once.
    """
    before = after = ""       # a chat template's texts around all this: beyond/chat.py

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.dtype = head_in_float32(model)
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"   # < 5.24
        self.embed = embeddings(model)                                       # (V, D)
        self.window = getattr(model.config, "max_position_embeddings", math.inf)
        self.bos = self.beginning()
        self.answers = torch.tensor(self.answer_tokens(), device=self.device)
        self.usable = self.usable_tokens()
        mask = torch.full((len(self.embed),), -torch.inf)
        mask[self.usable] = 0.            # added to the noise: a prompt is text
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

        Encoded with an answer, which is then dropped: a tokenizer may split a question
        differently when an answer follows.
        """
        return self.ids(f"{text} {adult.ANSWERS[0]}")[:-1]

    def whole(self, text):
        """The tokens of a prompt and a question as one text, BOS included."""
        return self.bos + self.question(text)

    def questions(self, people, attributes=None):
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
        words = [f" {word}" for word in adult.ANSWERS]
        no, yes = [self.ids(text + word) for word in words]
        apart = self.ids("x") + self.ids("\n") + self.ids(adult.INSTRUCTION) + no
        if no[:-1] != yes[:-1] or no[-1:] == yes[-1:] or len(no) < 2:
            raise InputError(f"the tokenizer has no single tokens for {words} after "
                             "label:; use another model, such as GPT-Neo.")
        if apart != self.ids("x\n" + adult.INSTRUCTION + text + words[0]):
            raise InputError("the tokenizer splits a prompt and its question together "
                             "differently from the two apart; use another model, such "
                             "as GPT-Neo.")
        return [no[-1], yes[-1]]

    def usable_tokens(self):
        """The tokens that come back when decoded and encoded again: text."""
        every = [[i] for i in range(min(len(self.tokenizer), len(self.embed)))]
        words = self.tokenizer.batch_decode(every, skip_special_tokens=True)
        again = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        return [i for i, word in enumerate(words)
                if again[i] == [i] and "\ufffd" not in word]

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    # ---- the forward pass

    def prefix(self, g=NO_PROMPT, context=None):
        """Embeddings (P, D) of what stands before the question:

            BOS   g   newline   context

        g: NO_PROMPT, token ids, or embeddings (L, D) that carry a gradient.
        context: a few-shot prompt, which begins with the instruction; None: only that.
        """
        context = self.ids(adult.INSTRUCTION if context is None else context)
        if g is NO_PROMPT:
            return self.embed[self.bos + context]
        g = g if torch.is_tensor(g) else self.embed[g]
        rest = self.ids("\n") + context
        return torch.cat([self.embed[self.bos], g, self.embed[rest]])

    def __call__(self, prefix, questions):
        """-> float32 logits (K, B, V) at the answer. InputError: too long.

        questions: for each of B people K token lists; two (the man's, the woman's) or
        one. Three passes share one cache of keys and values, and the gradient goes
        through all of them: (1) the prefix, once; (2) the tokens with which a person's
        twins begin, once per person; (3) the rest of each twin.
        """
        return self.logits(self.read(prefix, questions), questions)

    def read(self, prefix, questions):
        """Pass (1): keys and values of a prefix (P, D), read once for everybody."""
        self.check_length(len(prefix), questions)
        cache = DynamicCache()
        self.run(prefix[None], cache)
        return cache

    def logits(self, cache, questions):
        """Logits (K, B, V) given the keys and values of a prefix, which are changed."""
        B, K = len(questions), len(questions[0])
        head = min(shared(texts) for texts in questions)      # as long for everybody
        cache.batch_repeat_interleave(B)
        if head:                                                            # pass (2)
            heads = torch.tensor([texts[0][:head] for texts in questions])
            self.run(self.embed[heads.to(self.device)], cache)          # (B, head, D)
        cache.batch_repeat_interleave(K)          # pass (3): twins lie side by side
        tails = []
        for texts in questions:
            for text in texts:
                tails.append(torch.tensor(text[head:], device=self.device))
        last = torch.tensor([len(tail) - 1 for tail in tails], device=self.device)
        # Logits only at the texts' last tokens; padding comes after these.
        ends, place = last.unique(return_inverse=True)
        tails = pad_sequence(tails, batch_first=True)                   # (B K, T)
        logits = self.run(self.embed[tails], cache, ends)               # (B K, ends, V)
        logits = logits[torch.arange(B * K, device=self.device), place]     # (B K, V)
        return logits.float().view(B, K, -1).transpose(0, 1)

    def run(self, x, cache, keep=1):
        """Reads embeddings x (N, T, D) after a cache, and adds them to it -> logits.

        keep: of how many last positions, or of which positions (a tensor).
        """
        cache = {self.cache_name: cache}
        x = x.to(self.dtype)
        return self.model(inputs_embeds=x, logits_to_keep=keep, **cache).logits

    def check_length(self, before, questions):
        """InputError when a text would be longer than the model's context."""
        longest = before + max(max(map(len, texts)) for texts in questions)
        if longest > self.window:
            raise InputError(f"prompt and question are {longest} tokens and the "
                             f"model's context is {self.window}; use a shorter prompt "
                             "(--prompt-length, --longest) or fewer --shots.")

    @torch.no_grad()
    def predict(self, questions, g=NO_PROMPT, context=None):
        """-> P(y=1 | y is 0 or 1) of each person as a man and as a woman, (N, 2).

        InputError when the model gives NaN or infinity.
        """
        prefix, parts = self.prefix(g, context), []
        cache = self.read(prefix, questions)
        batch = max(1, min(64, AT_ONCE // len(prefix)))
        for i in range(0, len(questions), batch):
            logits = self.logits(copy.deepcopy(cache), questions[i:i + batch])
            parts.append(self.p_yes(logits).T)                               # (B, 2)
        p = torch.cat(parts)
        if not p.isfinite().all():
            raise InputError("the model's answers are not finite numbers (NaN); its "
                             "weights are damaged, or need --dtype float32.")
        return p.double().cpu().numpy()

    def p_yes(self, logits):
        """P(y=1 | y is 0 or 1); logits (..., V) -> (...)."""
        return logits[..., self.answers].softmax(-1)[..., 1]


def head_in_float32(model):
    """Makes a bf16 model compute its logits in float32 -> the dtype of its blocks.

    In bf16 logits of about 20 come in steps of .125, and log-odds with them.
    """
    dtype = min({p.dtype for p in model.parameters()}, key=lambda dtype: dtype.itemsize)
    head = model.get_output_embeddings()
    if head.weight.dtype != torch.float32:
        head.float()                        # and the embeddings, where they are tied
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return dtype


def embeddings(model):
    """What the embedding module gives for every token (V, D).

    Gemma's multiplies by sqrt(D), so its weight only would be wrong.
    """
    module = model.get_input_embeddings()
    if type(module) is torch.nn.Embedding:
        return module.weight
    every = torch.arange(module.num_embeddings, device=module.weight.device)
    return module(every).detach()


def shared(texts):
    """How many tokens all texts begin with; each keeps one token of its own."""
    n = 0
    for column in zip(*(text[:-1] for text in texts)):
        if len(set(column)) > 1:
            break
        n += 1
    return n


# ------------------------------------------------------------------ the lesson

def show_people(model, people):
    """One question as text, and what the model answers to a few people and twins."""
    print("x_m:")
    adult.show(adult.twins(people[0])[0])
    print('x_f: the same with "sex Female". The next token answers: " 0" or " 1".\n')
    print("    person                     y     p as a man     p as a woman")
    for person, (p_m, p_f) in zip(people[:4], model.predict(model.questions(people))):
        values = dict(zip(adult.COLUMNS, person.values))
        who = f"{values['sex']}, {values['age']}, {values['education']}"
        print(f"    {who:<26} {person.y} {p_m:12.3f} {p_f:16.3f}")


def climb(model, people):
    """One adversary, its steps up the distance while theta is frozen."""
    print("\nphi climbs, at rate 2 and against an untrained theta, which is frozen")
    options = Options(prompt_length=20, phi_lr=2.)
    adversary = Adversary(model, options, torch.Generator().manual_seed(2))
    questions, means = model.questions(people[:20]), []
    for steps in ("1 to 8", "9 to 16", "17 to 24"):
        means.append(numpy.mean([adversary.step(questions) for _ in range(8)]))
        g = model.decode(adversary.sample_ids())
        print(f"    steps {steps:<9} distance {means[-1]:.3f}   then g = {g[:30]!r}")
    assert means[-1] > 1.3 * means[0], "phi maximises"


def play(model, people, test, lam):
    """The paper's game, rates raised for four rounds -> the gap on test people."""
    options = Options(lam=lam, rounds=4, batch_size=8, lr=2e-3, phi_steps=5, phi_lr=2.)
    game = Game(model, people, options, seed=0)
    show_gap(model, test, "not trained")
    for record in game.play():
        show_gap(model, test, f"round {record['round']}", f"{record['task']:.3f}")
    game.swa.apply()
    return show_gap(model, test, "the average, section 4.2")


def show_gap(model, test, when, task=""):
    gap = measure(model, test)["gap"]
    print(f"    {when:<26} {task:<8} {gap:.3f}", flush=True)
    return gap


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
    climb(model, people)
    print("\nthe game on 40 people; gap on 40 others, without a prompt. theta's task is"
          "\nthe cross-entropy over all tokens given the adversary's prompt: at first\n"
          f"little of the probability is on 0 and 1\n{'':31}task     gap")
    gaps = []
    for lam, what in ((0., "as theta's step was released"), (1., "Eq. (3)")):
        print(f"  lam = {lam:g}: {what}")
        gaps.append(play(model, people, test, lam))
    assert gaps[1] < gaps[0], "the distance in the loss keeps the gap closed"
    print("\nnow try: lam = 0.1 in `lesson`. How much of the gap is left?")


if __name__ == "__main__":
    lesson()
