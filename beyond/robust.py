"""NOT IN THE PAPER: the game as we changed it, all in one place."""
import adult
import faircon


class RobustGame(faircon.Game):
    """The adversary begins anew in each round; theta also meets biased shots."""

    def start_phi(self):
        """phi begins anew, since theta has moved, at a length of its own."""
        self.adversary.start(self.adversary.noise(self.some_length()))

    def prompts(self):
        """A sample of the adversary, and section 2's biased few-shot prompts."""
        sample = super().prompts()
        return sample + [self.biased_shots()]

    def some_length(self):
        """1 to `prompt_length`: half of the time uniform, else in its logarithm."""
        most = self.options.prompt_length
        if self.rng.random() < .5:
            return int(self.rng.integers(1, most + 1))
        return round(most ** self.rng.random())

    def biased_shots(self):
        """A prompt of labelled training rows at b_Pc = 1 or -1, as token ids.

        Each row stands there as the sex that makes its label unfair: flipped, if need
        be. The first one may be cut; one may be of a person who is being asked about.
        """
        length, ids = self.some_length(), []
        favoured = self.rng.integers(2)                  # whose rows say 1: 0 is men
        while len(ids) < length:
            person = self.people[self.rng.integers(len(self.people))]
            sex = favoured if person.y == 1 else 1 - favoured
            if person.s != sex:
                person = adult.flipped(person)
            ids += self.model.ids(adult.shot(person))
        return ids[-length:]
