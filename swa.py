"""Section 4.2: stochastic weight averaging of what is trained.

    average <- average + (w - average) / (n + 1)        after n earlier ones; the starting weights are no part of it

PAPER vs RELEASED CODE: the paper averages "the model weights"; the released code averages the adversary's logits and never
uses the average. Here it is theta (A and B, never the frozen model), and `gumbel.py` shows what it does to phi.
mean(A) mean(B) is not mean(B A): the average is taken over the factors, as an optimiser sees them.
"""
from contextlib import contextmanager

import torch


class SWA:
    """The equal running average of a list of tensors."""

    def __init__(self, parameters):
        self.parameters, self.average, self.n = list(parameters), None, 0

    @torch.no_grad()
    def update(self):
        """Take the weights as they are now into the average."""
        if self.average is None:
            self.average = [torch.zeros_like(p) for p in self.parameters]
        for a, p in zip(self.average, self.parameters):
            a += (p - a) / (self.n + 1)
        self.n += 1

    @contextmanager
    def averaged(self):
        """Inside this `with` the parameters hold the average; afterwards their own values again. No update, no change."""
        own = [p.detach().clone() for p in self.parameters]
        try:
            self.apply()
            yield
        finally:
            with torch.no_grad():
                for p, w in zip(self.parameters, own):
                    p.copy_(w)

    @torch.no_grad()
    def apply(self):
        """Let the parameters be the average, for good."""
        for p, a in zip(self.parameters, self.average or self.parameters):
            p.copy_(a)
