"""The bundled model: a GPT-Neo of one million parameters that learns in context.

    python tiny/pretrain.py [--data DIR] [--out tiny]

4 layers x 128, from adult.data, in under an hour on 2 CPU cores. Run it again to
resume; its last lines are the table of tiny/README.md.

Section 2 needs a model that reads labelled people in its prompt and lets their bias
into its answer. Such a model does not come out of language modelling on census rows
alone. With y and s balanced, "the label that people of MY sex got" is a three-way
parity (label x sex x own sex): each of the three alone predicts nothing, so no
first-order gradient points to it, and the model stays on a plateau where it ignores sex
whatever the shots say. Two things break the plateau, both below:

  documents  P(y=1|men) and P(y=1|women) are drawn independently for each document, so
             the average label of the context already helps, and the model first learns
             to read labels, then whose labels they are;
  a probe    a linear layer on the middle of the network, in training only, must name
             each person's own sex at "label:" and at the answer. Attention can then
             match sex with sex, because sex stands where the labels stand.

Short rows (a few attributes) come first: the same lesson at half the price. No row of
adult.test is trained on.

Shapes: B documents, T tokens, V tokens of vocabulary, D the width.
"""
import argparse
import collections
import math
import os
import pathlib
import pickle
import sys
import tempfile
import time

import numpy
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import adult  # noqa: E402  (one folder up)
from beyond import people  # noqa: E402

VOCABULARY = 1024  # V
WIDTH = 128        # D
LAYERS = 4
POSITIONS = 640    # 16 shots, a prompt and a question, about 25 tokens a person
PEOPLE = 18        # in a document; 16 shots and a question are 17

SHORT = 1800       # steps on short rows,
FULL = 2300        # then on full ones
BATCH = 32         # B
PEAK_LR = 2e-3
WARM_UP = 200      # steps
EVERY = 100        # steps from one line of the log, and one saved state, to the next
NATURAL = .25      # share of documents whose first person keeps the sex of the row

# Weights in the loss, where the answers have 1:
PROBE = .3         # the probe
LANGUAGE = .1      # the tokens that are no answers
FIRST = .15        # the first answer once more: it is the one without shots

# The table at the end: name, shots, b_Pc, each person both as man and as woman.
SETTINGS = (
    ("none", 0, 0, False),
    ("b = +0", 16, 0, False),
    ("b = +0.5", 16, .5, False),
    ("b = +1", 16, 1, False),
    ("b = -0.5", 16, -.5, False),
    ("b = -1", 16, -1, False),
    ("b = 0.5, counterbalanced", 16, .5, True),
)
DRAWS = 8          # prompts of each setting
ROWS = 128         # balanced test rows for each of them
TABLE_SEED = 1


# ------------------------------------------------------------------ tokenizer

def build_tokenizer(people):
    """A byte-level BPE that knows the template, trained on the texts of `people`.

    What never varies is one token, and values never merge with names.
    """
    words = Regex(r" [^ ,\n]+|.")  # " Bachelors" | any other character by itself
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    template = [adult.INSTRUCTION, f"{adult.OPENING} age", "\nlabel:"]
    template += [f", {name}" for name in adult.ATTRIBUTES[1:]]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(template),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (adult.question(person) + adult.answer(person) for person in people)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(template)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------ documents

class Documents:
    """Batches of documents of PEOPLE people with labels, as token ids."""

    def __init__(self, people, tokenizer, rng):
        self.tokenizer = tokenizer
        self.rng = rng  # a numpy Generator
        self.pieces = {}  # {text: its ids}; the same pieces come again and again
        self.by_label = collections.defaultdict(list)  # {y: people}
        self.by_cell = collections.defaultdict(list)   # {(s, y): people}
        for person in people:
            self.by_label[person.y].append(person)
            self.by_cell[person.s, person.y].append(person)

    def encode(self, piece):
        """Token ids of a piece of the template, encoded once."""
        if piece not in self.pieces:
            self.pieces[piece] = self.tokenizer.encode(piece)
        return self.pieces[piece]

    def pick(self, people):
        """One of `people`."""
        return people[self.rng.integers(len(people))]

    def rates(self):
        """P(y=1|man) and P(y=1|woman) of one document; each is often just 0 or 1."""
        rates = self.rng.random(2)
        certain = self.rng.random(2) < .5
        return numpy.where(certain, rates.round(), rates)

    def people_of_one(self):
        """The people of one document -> list of (Person, sex, y), all of them dealt.

        Sex is dealt out whatever the row says: were it the row's own, the rest of the
        row would betray it. Only a first person may be a real one, so that the answer
        without shots has the natural bias; were all of a document natural, shots
        without bias would leave that possible and be answered with a bias of their own
        (measured: a gap of +.08 at b = 0).
        """
        rates = self.rates()
        dealt = []
        for k in range(PEOPLE):
            sex = int(self.rng.random() < .5)
            natural = k == 0 and self.rng.random() < NATURAL
            rate = .5 if natural else rates[sex]
            y = int(self.rng.random() < rate)
            if natural:
                person = self.pick(self.by_label[y])
                sex = person.s
            else:
                person = self.pick(self.by_cell[self.rng.integers(2), y])
            dealt.append((person, sex, y))
        return dealt

    def attributes(self, short):
        """The attributes of a batch; of a short one: age, sex and 2 to 4 others."""
        others = [name for name in adult.ATTRIBUTES[1:] if name != "sex"]
        some = self.rng.choice(others, self.rng.integers(2, 5), replace=False)
        if not short:
            return adult.ATTRIBUTES
        keep = {"age", "sex", *some}
        return [name for name in adult.ATTRIBUTES if name in keep]

    def document(self, attributes):
        """One document -> its ids, the index of each "label:", each own sex: lists."""
        ids = list(self.encode(adult.INSTRUCTION))
        where = []
        sexes = []
        for person, sex, y in self.people_of_one():
            values = dict(zip(adult.COLUMNS, person.values))
            values["sex"] = adult.SEXES[sex]
            ids += self.encode(f"{adult.OPENING} age {values['age']}")
            for name in attributes[1:]:
                ids += self.encode(f", {name} {values[name]}")
            ids += self.encode("\nlabel:")
            where.append(len(ids) - 1)
            sexes.append(sex)
            ids += self.encode(f" {y}")
            ids += self.encode("\n")
        return ids, where, sexes

    def batch(self, short):
        """-> ids and positions (B, T), where and sexes (B, PEOPLE).

        ids are padded with -1, `where` is the index of "label:", `sexes` the own sex.
        """
        attributes = self.attributes(short)
        documents = [self.document(attributes) for _ in range(BATCH)]
        rows, where, sexes = zip(*documents)
        rows = [torch.tensor(row) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1)    # (B, T)
        T = ids.shape[1]
        # Half of the documents begin further on, so that late positions are trained.
        first = self.rng.random(BATCH) < .5
        later = self.rng.integers(0, POSITIONS - T + 1, BATCH)
        offset = torch.tensor(numpy.where(first, 0, later))         # (B,)
        positions = offset[:, None] + torch.arange(T)               # (B, T)
        return ids, positions, torch.tensor(where), torch.tensor(sexes)


# ------------------------------------------------------------------ loss

def probed(middle, where):
    """The states at "label:" and at the answer after it.

    middle (B, T, D), where (B, PEOPLE) -> (B, 2 PEOPLE, D).
    """
    index = torch.cat([where, where + 1], 1)                        # (B, 2 PEOPLE)
    index = index[..., None].expand(-1, -1, middle.shape[-1])       # (B, 2 PEOPLE, D)
    return middle.gather(1, index)


def loss_of(model, probe, ids, positions, where, sexes):
    """The loss of a batch, and parts of it for the log.

        answers + FIRST * first answer + LANGUAGE * other tokens + PROBE * own sex

    Each is a mean cross-entropy. ids, positions (B, T); where, sexes (B, PEOPLE).
    -> the loss, the answers' loss person by person (PEOPLE,), the probe's loss.
    """
    with torch.autocast("cpu", torch.bfloat16):
        output = model.transformer(
            ids.clamp(min=0),  # padding is behind everything that is read
            position_ids=positions,
            output_hidden_states=True,
            use_cache=False,
        )
        logits = model.lm_head(output.last_hidden_state[:, :-1])    # (B, T-1, V)
        middle = output.hidden_states[LAYERS // 2]                  # (B, T, D)
        seen = probed(middle, where)                                # (B, 2 PEOPLE, D)
        guesses = probe(seen)                                       # (B, 2 PEOPLE, 2)
    targets = ids[:, 1:]                                            # (B, T-1)
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=-1, reduction="none"
    )                                                               # (B, T-1)
    answers = losses.gather(1, where)                               # (B, PEOPLE)
    others = (targets >= 0).sum() - answers.numel()
    language = (losses.sum() - answers.sum()) / others
    own_sex = F.cross_entropy(
        guesses.float().flatten(0, 1), sexes.repeat(1, 2).flatten()
    )
    loss = answers.mean() + FIRST * answers[:, 0].mean()
    loss = loss + LANGUAGE * language + PROBE * own_sex
    return loss, answers.detach().mean(0), own_sex.detach()


# ------------------------------------------------------------------ training

def new_model():
    """The untrained GPT-Neo, without dropout."""
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=256,
        bos_token_id=None,
        eos_token_id=None,
        embed_dropout=0,
        attention_dropout=0,
        resid_dropout=0,
    ))


def learning_rate(step):
    """WARM_UP steps of ascent, on a cosine from PEAK_LR down to 2 % of it."""
    cosine = (1 + math.cos(math.pi * step / (SHORT + FULL))) / 2
    return PEAK_LR * min(1, (step + 1) / WARM_UP) * (.02 + .98 * cosine)


# What torch.load and the lines after it raise on a file that is cut off or foreign.
DAMAGED = (EOFError, KeyError, RuntimeError, TypeError, ValueError,
           pickle.UnpicklingError)


class Training:
    """Model, probe and optimiser, and how far they are: what pretrain.state holds."""

    def __init__(self):
        self.model = new_model()
        self.probe = torch.nn.Linear(WIDTH, 2)
        self.parameters = [*self.model.parameters(), *self.probe.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=PEAK_LR, betas=(.9, .98), weight_decay=.1
        )
        self.step = 0
        self.seconds = 0.

    def save(self, path):
        """Write the state file, by way of a temporary name."""
        state = {
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path):
        """Go on from the state file `path`. Raises InputError when it is damaged."""
        try:
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.probe.load_state_dict(state["probe"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step = state["step"]
            self.seconds = state["seconds"]
        except DAMAGED:
            raise adult.InputError(f"{path} is damaged or not of this program; "
                                   "delete it to begin anew.") from None

    def update(self, batch, loss_function):
        """One step -> losses (PEOPLE + 1,): each person's answer, then the probe."""
        self.optimiser.param_groups[0]["lr"] = learning_rate(self.step)
        loss, answers, own_sex = loss_function(self.model, self.probe, *batch)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.)
        self.optimiser.step()
        self.step += 1
        return torch.cat([answers, own_sex[None]])


def train(training, documents, path):
    """All steps that are left. Every EVERY steps a line is printed, `path` written."""
    # Needs a C++ compiler; plain loss_of is the same, 1.6 times slower.
    compiled = torch.compile(loss_of, dynamic=True)
    total = SHORT + FULL
    began = time.time() - training.seconds
    recent = []
    while training.step < total:
        batch = documents.batch(short=training.step < SHORT)
        recent.append(training.update(batch, compiled))
        if training.step % EVERY == 0 or training.step == total:
            training.seconds = time.time() - began
            losses = torch.stack(recent).mean(0)                    # (PEOPLE + 1,)
            recent = []
            print(f"step {training.step}/{total} {training.seconds / 60:.1f} min | "
                  f"answer loss: first person {losses[0]:.3f}, "
                  f"persons 12-18 {losses[11:-1].mean():.3f} | "
                  f"probe {losses[-1]:.3f}", flush=True)
            training.save(path)


# ------------------------------------------------------------------ table

def answer_probabilities(model, tokenizer, prompt, person):
    """P(" 0") and P(" 1") after the prompt and the question -> (2, 2).

    Row 0 asks about the person as a man, row 1 as a woman.
    """
    ids = [torch.tensor(tokenizer.encode(prompt + x)) for x in adult.twins(person)]
    last = torch.tensor([len(row) - 1 for row in ids])              # (2,)
    padded = pad_sequence(ids, batch_first=True)                    # (2, T)
    output = model.transformer(padded, use_cache=False)
    hidden = output.last_hidden_state[torch.arange(2), last]        # (2, D)
    p = model.lm_head(hidden).float().softmax(-1)                   # (2, V)
    return p[:, tokenizer.encode(" 0") + tokenizer.encode(" 1")]


def questions(data, shots, bpc, counterbalanced):
    """DRAWS prompts of people of adult.data, and ROWS rows of adult.test for each.

    Yields (prompt, Person).
    """
    for draw in range(DRAWS):
        rng = numpy.random.default_rng((TABLE_SEED, draw))
        prompt = adult.few_shot(data.train, shots, bpc, rng, counterbalanced)
        for person in adult.sample(data.test, ROWS, 0, rng):
            yield prompt, person


def print_row(name, probabilities, people):
    """One line of the table, from (N, twin, answer) probabilities of N people."""
    s = torch.tensor([person.s for person in people])
    y = torch.tensor([person.y for person in people])
    mass = probabilities.sum(-1)                                    # (N, 2)
    p = probabilities[..., 1] / mass                                # (N, 2)
    gap = p[:, 0] - p[:, 1]                                         # (N,)
    says = p > .5                                                   # (N, 2)
    right = says.gather(1, s[:, None])[:, 0] == y                   # (N,)
    flip = says[:, 0] != says[:, 1]                                 # (N,)
    print(f"{name:<24} {right.float().mean():.3f}  "
          f"{gap.mean():+.3f}     {gap.abs().mean():.3f}  "
          f"{flip.float().mean():.3f}  {mass.mean():.3f}", flush=True)


@torch.no_grad()
def table(model, tokenizer, data):
    """Print Table 1 by the frozen model on balanced rows of adult.test."""
    print(f"frozen, {DRAWS} prompt draws x {ROWS} balanced rows of adult.test each, "
          "16 shots of adult.data")
    print("shots                  ACC    signed gap  |gap|  flip   P(0)+P(1)")
    for name, *setting in SETTINGS:
        probabilities = []
        people = []
        for prompt, person in questions(data, *setting):
            p = answer_probabilities(model, tokenizer, prompt, person)  # (2, 2)
            probabilities.append(p)
            people.append(person)
        print_row(name, torch.stack(probabilities), people)


# ------------------------------------------------------------------ the command

def save_pretrained(thing, out):
    """A model's or tokenizer's files into `out`, by way of a temporary folder."""
    with tempfile.TemporaryDirectory(dir=out) as part:
        thing.save_pretrained(part)
        for file in pathlib.Path(part).iterdir():
            os.replace(file, out / file.name)


def load_real(directory):
    """The people of the real files -> adult.Adult. Raises InputError."""
    data = people.load(directory)
    if "SYNTHETIC" in data.source:
        raise adult.InputError("the model is trained on the real adult.data, and UCI "
                               "could not be reached; give --data DIR.")
    return data


def pretrain(data, out, seed):
    """Tokenizer, model and table, from an adult.Adult. Raises InputError."""
    tokenizer = build_tokenizer(data.train)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_pretrained(tokenizer, out)
    except OSError as error:
        raise adult.InputError(f"{out} cannot be written ({error.strerror}); "
                               "give another folder as --out.") from None
    torch.manual_seed(seed)
    training = Training()
    path = out / "pretrain.state"
    if path.exists():
        training.resume(path)
        print(f"resuming at step {training.step}")
    rng = numpy.random.default_rng((seed, training.step))
    documents = Documents(data.train, tokenizer, rng)
    size = sum(weight.numel() for weight in training.model.parameters())
    print(f"{size:,} parameters, {len(tokenizer):,} tokens, {SHORT + FULL} steps",
          flush=True)
    train(training, documents, path)
    model = training.model.eval()
    save_pretrained(model, out)
    table(model, tokenizer, data)


def main():
    """The command. InputError becomes one sentence and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="directory with adult.data and adult.test "
                                       "(default: cache, else UCI)")
    parser.add_argument("--out", default=adult.TINY, type=pathlib.Path,
                        help="where the model goes (default: tiny/)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.seed < 0:
            raise adult.InputError(f"--seed {args.seed} is impossible: "
                                   "it must be at least 0.")
        pretrain(load_real(args.data), args.out, args.seed)
    except adult.InputError as problem:
        sys.exit(f"pretrain.py: {problem}")


if __name__ == "__main__":
    main()
