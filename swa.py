"""Section 4.2: stochastic weight averaging (SWA), by hand.

    average <- average + (w - average) / (n + 1)

    w    the weights now
    n    how many weights have been averaged before

PAPER vs RELEASED CODE: the paper averages "the model weights"; the released code
averages the adversary's logits and never uses the average. Here: LoRA's A and B, and so
the average is an adapter, too. (It is not the average of the weights W + B A: mean(B)
mean(A) is not mean(B A).)

    python swa.py       # the last weights of a noisy descent, and their average
"""
import torch


class SWA:
    """The equal running average of a list of tensors, in their own dtype: float32 here.

    (In bf16 an average of hundreds of weights would stall through rounding: findings/.)
    """

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.average = [torch.zeros_like(p) for p in self.parameters]
        self.n = 0                                  # weights averaged so far

    @torch.no_grad()
    def update(self):
        """Add the weights as they are now to the average."""
        for average, w in zip(self.average, self.parameters):
            average += (w - average) / (self.n + 1)
        self.n += 1

    @torch.no_grad()
    def apply(self):
        """Let the parameters be the average, for good (nothing averaged: no change)."""
        if self.n == 0:
            return
        for w, average in zip(self.parameters, self.average):
            w.copy_(average)


# ------------------------------------------------------------------ the lesson

def noisy_descent(lr, steps=400, start=200):
    """Go down ||w||^2 / 2 with noise in each gradient -> ||w||, ||SWA of w||."""
    generator = torch.Generator().manual_seed(0)
    w = torch.ones(100)
    swa = SWA([w])
    for step in range(steps):
        gradient = w + torch.randn(100, generator=generator)
        w -= lr * gradient
        if step >= start:
            swa.update()
    return w.norm().item(), swa.average[0].norm().item()


def lesson():
    print("||w||^2 / 2, noisy gradients: distance to the minimum after 400 steps (10 "
          "at the start)\n\nlearning rate    last w    SWA of the last 200")
    for lr in (.05, .2, .8):
        last, averaged = noisy_descent(lr)
        print(f"{lr:<13} {last:9.2f} {averaged:9.2f}")
        assert averaged < last, "averaging takes the noise out"
    print("\nThe last weights get worse as the rate grows, and their average hardly "
          'changes:\n"reduces influence on learning rate" (section 4.2).')
    print("\nnow try: start=0. For which rates does the average improve? Why not for "
          "all?")


if __name__ == "__main__":
    lesson()
