"""The embedded model: a 4 x 128 GPT-Neo of one million parameters that learns in context, from adult.data in under an hour.

    python tiny/pretrain.py [--data DIR] [--out tiny]     # 2 CPU cores; run again to resume; the last lines are its table

Section 2 needs a model that reads labelled people in its prompt and lets their bias into its answer. Such a model does not
come out of language modelling on census rows alone. With y and s balanced, "the label that people of MY sex got" is a
three-way parity (label x sex x own sex): each of the three alone predicts nothing, so no first-order gradient points to it,
and the model stays on a plateau where it ignores sex whatever the shots say. Two things break the plateau, both below:

  documents  P(y=1|men) and P(y=1|women) are drawn independently for each document, so the average label of the context
             already helps, and the model first learns to read labels, then whose labels they are;
  a probe    a linear layer on the middle of the network, in training only, must name each person's own sex at "label:" and
             at the answer. Attention can then match sex with sex, because sex stands where the labels stand.

Short rows (a few attributes) come first: the same lesson at half the price. No row of adult.test is trained on.
"""
import argparse
import math
import os
import pathlib
import sys
import time

import numpy
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import adult  # noqa: E402  (one folder up)

VOCABULARY, POSITIONS, PEOPLE = 1024, 640, 18
SHORT, FULL = 1800, 2300  # steps on short rows, then on full ones
BATCH, PEAK_LR = 32, 2e-3
NATURAL = .25  # share of documents whose first person keeps the sex of the row
PROBE, LANGUAGE, FIRST = .3, .1, .15  # weights of the probe, of the tokens that are no labels, of the first answer once more


def build_tokenizer(people):
    """A byte-level BPE that knows the template: what never varies is one token, and values never merge with names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" [^ ,\n]+|."), "isolated"),  # " Bachelors" | any other character by itself
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    template = [adult.INSTRUCTION, f"{adult.OPENING} age", "\nlabel:"] + [f", {name}" for name in adult.ATTRIBUTES[1:]]
    tokenizer.train_from_iterator(
        (adult.text(p) + adult.answer(p) for p in people),
        trainers.BpeTrainer(vocab_size=VOCABULARY - len(template), show_progress=False,
                            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens(template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, clean_up_tokenization_spaces=False)


class Documents:
    """Batches of documents of PEOPLE people with labels, as token ids."""

    def __init__(self, people, tokenizer, rng):
        self.people, self.tokenizer, self.rng, self.pieces = people, tokenizer, rng, {}
        self.by_label = [[i for i, p in enumerate(people) if p.y == y] for y in (0, 1)]
        self.by_cell = [[[i for i in self.by_label[y] if people[i].s == s] for s in (0, 1)] for y in (0, 1)]

    def ids(self, piece):
        if piece not in self.pieces:
            self.pieces[piece] = self.tokenizer.encode(piece)
        return self.pieces[piece]

    def people_of_one(self):
        """-> list of (row index, sex, y). P(y=1|sex) is drawn for each sex on its own, half of the time 0 or 1, and sex is dealt
        out whatever the row says: were it the row's own, the rest of the row would betray it. Only a first person may be a
        real one, so that the answer without shots has the natural bias; were all of a document natural, shots without bias
        would leave that possible and be answered with a bias of their own (measured: a gap of +.08 at b = 0)."""
        rate, drawn = self.rng.random(2), []
        rate = numpy.where(self.rng.random(2) < .5, rate.round(), rate)
        for k in range(PEOPLE):
            sex, natural = int(self.rng.random() < .5), k == 0 and self.rng.random() < NATURAL
            y = int(self.rng.random() < (.5 if natural else rate[sex]))
            cell = self.by_label[y] if natural else self.by_cell[y][self.rng.integers(2)]
            row = cell[self.rng.integers(len(cell))]
            drawn.append((row, self.people[row].s if natural else sex, y))
        return drawn

    def batch(self, short):
        """-> ids (B, T) padded with -1, positions (B, T), labels at (B, PEOPLE): the index of "label:", and own sex."""
        some = list(adult.ATTRIBUTES[1:])
        keep = {"age", "sex", *self.rng.choice([a for a in some if a != "sex"], self.rng.integers(2, 5), replace=False)}
        attributes = [a for a in adult.ATTRIBUTES if a in keep] if short else adult.ATTRIBUTES
        rows, where, sexes = [], [], []
        for _ in range(BATCH):
            ids, at, own = list(self.ids(adult.INSTRUCTION)), [], []
            for row, sex, y in self.people_of_one():
                values = dict(zip(adult.COLUMNS, self.people[row].values), sex=adult.SEXES[sex])
                ids += self.ids(f"{adult.OPENING} age {values['age']}")
                for name in attributes[1:]:
                    ids += self.ids(f", {name} {values[name]}")
                ids += self.ids("\nlabel:")
                at.append(len(ids) - 1)
                ids += self.ids(f" {y}") + self.ids("\n")
                own.append(sex)
            rows.append(ids)
            where.append(at)
            sexes.append(own)
        T = max(map(len, rows))
        ids = torch.tensor([r + [-1] * (T - len(r)) for r in rows])
        offset = numpy.where(self.rng.random(BATCH) < .5, 0, self.rng.integers(0, POSITIONS - T + 1, BATCH))
        return ids, torch.tensor(offset)[:, None] + torch.arange(T), torch.tensor(where), torch.tensor(sexes)


def loss_of(model, probe, ids, positions, where, sexes):
    """Cross-entropy at the answers, a little of it everywhere else, and the probe's -> (loss, answers' loss (PEOPLE,))"""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(ids.clamp(min=0), position_ids=positions, output_hidden_states=True, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[:, :-1])  # (B, T-1, V)
        middle = hidden.hidden_states[len(model.transformer.h) // 2]  # (B, T, D)
        seen = torch.stack([middle.gather(1, (where + k)[..., None].expand(-1, -1, middle.shape[-1])) for k in (0, 1)], 1)
        read = probe(seen)  # (B, 2, PEOPLE, 2)
    losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], ignore_index=-1, reduction="none")  # (B, T-1)
    answers = losses.gather(1, where)  # (B, PEOPLE)
    language = (losses.sum() - answers.sum()) / ((ids[:, 1:] >= 0).sum() - answers.numel())
    own = F.cross_entropy(read.float().flatten(0, 2), sexes[:, None].expand(-1, 2, -1).flatten())
    loss = answers.mean() + FIRST * answers[:, 0].mean() + LANGUAGE * language + PROBE * own
    return loss, answers.detach().mean(0), own.detach()


@torch.no_grad()
def table(model, tokenizer, data, draws=8, rows=128, seed=1):
    """Table 1 by the frozen model on balanced rows of adult.test: `rows` new ones for each of `draws` prompts; prints."""
    answers = [tokenizer.encode(a)[0] for a in (" 0", " 1")]
    print(f"frozen, {draws} prompt draws x {rows} balanced rows of adult.test each, 16 shots of adult.data")
    print("shots                  ACC    signed gap  |gap|  flip   P(0)+P(1)")
    for name, shots, bpc, twice in [("none", 0, 0, False)] + [(f"b = {b:+}", 16, b, False) for b in (0, .5, 1, -.5, -1)] \
            + [("b = 0.5, counterbalanced", 16, .5, True)]:
        p, y, mass = [], [], []
        for draw in range(draws):
            rng = numpy.random.default_rng((seed, draw))
            prompt = adult.few_shot(data.train, shots, bpc, rng, twice)
            for person in adult.sample(data.test, rows, 0, rng):
                ids = [torch.tensor(tokenizer.encode(prompt + x)) for x in adult.twins(person)]
                last = torch.tensor([len(i) - 1 for i in ids])
                h = model.transformer(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), use_cache=False).last_hidden_state
                q = model.lm_head(h[torch.arange(2), last]).float().softmax(-1)[:, answers]
                mass.append(q.sum(-1).mean())
                p.append(q[:, 1] / q.sum(-1))
                y.append((person.s, person.y))
        p, (s, y) = torch.stack(p), torch.tensor(y).T
        own = p.gather(1, s[:, None])[:, 0]
        print(f"{name:<24} {((own > .5) == y).float().mean():.3f}  {(p[:, 0] - p[:, 1]).mean():+.3f}     "
              f"{(p[:, 0] - p[:, 1]).abs().mean():.3f}  {((p[:, 0] > .5) != (p[:, 1] > .5)).float().mean():.3f}  "
              f"{torch.stack(mass).mean():.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="directory with adult.data and adult.test (default: cache, else UCI)")
    parser.add_argument("--out", default=str(adult.TINY), help="where the model goes (default: tiny/)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        data = adult.load(args.data)
    except adult.InputError as problem:
        sys.exit(f"pretrain.py: {problem}")
    if "SYNTHETIC" in data.source:
        sys.exit("pretrain.py: the model is trained on the real adult.data, and UCI could not be reached; give --data DIR.")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(data.train)
    tokenizer.save_pretrained(out)
    torch.manual_seed(args.seed)
    model = GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, hidden_size=128, num_layers=4, num_heads=4,
        attention_types=[[["global", "local"], 2]], window_size=256, bos_token_id=None, eos_token_id=None,
        embed_dropout=0, attention_dropout=0, resid_dropout=0))
    probe = torch.nn.Linear(128, 2)
    parameters = [*model.parameters(), *probe.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(.9, .98), weight_decay=.1)
    state, start, total, seconds = out / "pretrain.state", 0, SHORT + FULL, 0.
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        probe.load_state_dict(saved["probe"])
        optimiser.load_state_dict(saved["optimiser"])
        start, seconds = saved["step"], saved["seconds"]
        print(f"resuming at step {start}")
    documents = Documents(data.train, tokenizer, numpy.random.default_rng((args.seed, start)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens, {total} steps", flush=True)
    step_loss = torch.compile(loss_of, dynamic=True)  # needs a C++ compiler; plain loss_of is the same, 1.6 times slower
    recent, began = [], time.time()
    for step in range(start, total):
        cosine = .02 + .98 * (1 + math.cos(math.pi * step / total)) / 2
        optimiser.param_groups[0]["lr"] = PEAK_LR * min(1, (step + 1) / 200) * cosine
        loss, answers, own = step_loss(model, probe, *documents.batch(short=step < SHORT))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        optimiser.step()
        recent.append(torch.cat([answers, own[None]]))
        if (step + 1) % 100 == 0 or step + 1 == total:
            mean = torch.stack(recent).mean(0)
            now = seconds + time.time() - began
            print(f"step {step + 1}/{total} {now / 60:.1f} min | answer loss: first person {mean[0]:.3f}, persons 12-18 "
                  f"{mean[11:-1].mean():.3f} | probe {mean[-1]:.3f}", flush=True)
            recent = []
            torch.save({"model": model.state_dict(), "probe": probe.state_dict(), "optimiser": optimiser.state_dict(),
                        "step": step + 1, "seconds": now}, state.with_suffix(".part"))
            os.replace(state.with_suffix(".part"), state)
    model.eval().save_pretrained(out)
    table(model, tokenizer, data)


if __name__ == "__main__":
    main()
