"""NOT IN THE PAPER: the game as we changed it, all of it in this file.

    faircon.Game: Eq. (3), released rates    here
    phi goes on over the rounds              FreshGame: phi begins anew in each round
    phi's rate is .1                         3: phi has one round only to climb
    10 tokens                                any number of tokens, up to `longest`
    theta meets a sample of the adversary    RobustGame: that, and biased shots
                                             (labelled people at b_Pc = 1 or -1)

A phi that goes on hardly climbs after the first round. (On one seed its tokens stayed
nearly random at rate .1, and at 3 it stayed at one prompt.) A phi that begins anew
climbs in each, and training on its prompts helps against prompts that training never
saw, too. Fresh start, rate and length are all needed (beyond/RESULTS.md).

Labelled people stand in front of a question when a model is used few-shot (section 2).
RobustGame's theta learns to ignore them, FollowingGame's to be fair and to read them.

    python -m beyond.robust     # the paper's game and RobustGame on forty people
"""
import copy
from dataclasses import dataclass

import numpy
import torch

import adult
import faircon
import lora
from beyond.load import load_model
from faircon import option


@dataclass
class RobustOptions(faircon.Options):
    """faircon.Options with another rate for phi, and the longest prompt."""
    phi_lr: float = option(3., 1e-30, 1e9, "Adam's rate for phi")
    longest: int = option(560, 1, 10 ** 6, "tokens of FreshGame's prompts, at most")


class FreshGame(faircon.Game):
    """phi begins anew in each round, since theta has moved, at a length of its own."""

    def start_phi(self):
        self.adversary.start(self.adversary.initial_phi(self.some_length()))

    def some_length(self):
        """1 to `longest`: half the time uniform, half log-uniform."""
        longest = self.options.longest
        if self.rng.random() < .5:
            return int(self.rng.integers(1, longest + 1))
        return round(longest ** self.rng.random())


class RobustGame(FreshGame):
    """FreshGame whose theta also meets biased shots."""

    def prompts(self):
        """A sample of the adversary, if there is one, and biased shots."""
        return super().prompts() + [self.biased_shots()]

    def biased_shots(self):
        """Labelled training rows at b_Pc = 1 or -1, as token ids.

        They stand where g stands, before the instruction; at test (adult.few_shot)
        labelled people come after it. A person's sex is flipped where the label would
        not fit the bias. The first shot may be cut; the person who is asked about may
        be among them.
        """
        length = self.some_length()
        favoured = self.rng.integers(2)      # the sex whose shots are all 1; 0: men

        def draw():
            person = self.people[self.rng.integers(len(self.people))]
            sex = favoured if person.y == 1 else 1 - favoured
            return person if person.s == sex else adult.flipped(person)
        return self.shots_of(draw, length)

    def shots_of(self, draw, length):
        """Shots one after the other, until there are `length` tokens; the last ones."""
        ids = []
        while len(ids) < length:
            ids += self.model.ids(adult.shot(draw()))
        return ids[-length:]


class FollowingGame(RobustGame):
    """RobustGame whose theta, given shots, learns what the untrained model answers.

    Labels do not depend on the shots, so theta would learn from them to ignore shots.
    The untrained model follows them, and the mean of its answers to the two twins has
    no gap. In a quarter of the steps the shots are biased; in the others they are drawn
    without regard to sex, and mostly have one label.
    """

    def __init__(self, model, *args, **more):
        lora.remove(model.model)
        self.teacher = copy.deepcopy(model)
        super().__init__(model, *args, **more)

    def prompts(self):
        """A sample of the adversary, if there is one, and shots."""
        biased = self.rng.random() < .25
        self.shots = self.biased_shots() if biased else self.fair_shots()
        return faircon.Game.prompts(self) + [self.shots]

    def fair_shots(self):
        """Labelled training rows of either sex, with a base rate of their own."""
        length, rate = self.some_length(), self.rng.beta(.2, .2)   # mostly near 0 or 1

        def draw():
            y = self.rng.random() < rate
            alike = [person for person in self.people if person.y == y]
            person = alike[self.rng.integers(len(alike))]
            return adult.flipped(person) if self.rng.random() < .5 else person
        return self.shots_of(draw, length)

    def terms(self, g, batch):
        """Eq. (3)'s; given shots the task is to answer as the teacher's mean."""
        if g is not self.shots:                        # the adversary's prompt, or none
            return super().terms(g, batch)
        questions, answers = [self.questions[i] for i in batch], self.model.answers
        logits = self.model(self.model.prefix(g), questions)             # (2, B, V)
        with torch.no_grad():
            said = self.teacher(self.teacher.prefix(g), questions)
            said = said.softmax(-1).mean(0, keepdim=True)                # (1, B, V)
        task = -(said * logits.log_softmax(-1)).sum(-1).mean()
        return {"task": task, "distance": faircon.distance(logits, answers)}


# ------------------------------------------------------------------ the lesson

def gaps(model, test, shots):
    """The gap on test people, without a prompt and given shots."""
    return [faircon.measure(model, test)["gap"],
            faircon.measure(model, test, context=shots)["gap"]]


def lesson():
    model = load_model("tiny", device="cpu")
    data = adult.load(adult.TINY)
    rng = numpy.random.default_rng(0)
    people = adult.sample(data.train, 40, .5, rng)
    test = adult.sample(data.test, 40, 0., rng)
    shots = adult.few_shot(data.train, 8, 1., rng)
    rates = {"rounds": 4, "batch_size": 8, "lr": 2e-3, "phi_steps": 5}
    print("40 people, 4 rounds; gap on 40 others\n\n"
          "game          no prompt   given 8 shots at b_Pc = 1")
    no_prompt, given = gaps(model, test, shots)
    print(f"none          {no_prompt:9.3f} {given:12.3f}")
    given_shots = []
    for name, kind, options in (
            ("the paper's", faircon.Game, faircon.Options(**rates)),
            ("RobustGame", RobustGame, RobustOptions(**rates, longest=200))):
        torch.manual_seed(0)
        game = kind(model, people, options, seed=0)
        list(game.play())                                       # all its rounds
        game.swa.apply()
        no_prompt, given = gaps(model, test, shots)
        given_shots.append(given)
        print(f"{name:<13} {no_prompt:9.3f} {given:12.3f}", flush=True)
    assert given_shots[1] < given_shots[0], "RobustGame's theta has met biased shots"
    print("\nnow try: longest=20, less than a labelled person. How much protection is "
          "left?")


if __name__ == "__main__":
    lesson()
