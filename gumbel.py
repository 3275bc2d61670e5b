"""Section 3.2: a discrete prompt with a gradient (straight-through Gumbel-softmax).

A token is drawn as argmax_v (log p_v + G_v) with Gumbel noise G_v = -log(-log U); phi
is log p up to a constant.
That argmax has no derivative. Straight-through (Figure 3):

    forward     the one-hot vector of the argmax
    backward    the derivative of softmax((log p + G) / tau)

PAPER vs RELEASED CODE: the paper says "sampling", and its formula is an argmax without
noise; the released code, and this one, sample. The paper's derivative, sigma (1 -
sigma), is the diagonal of softmax's; here it is the full Jacobian.

    python gumbel.py                     # Figures 3 and 4 in numbers
    python -m beyond.pictures figure4      # Figure 4 as a picture (needs matplotlib)
"""
import torch

from swa import SWA


def gumbel_softmax(logits, tau=1., generator=None, noise=None):
    """Logits (..., V) -> a one-hot sample (..., V), differentiable in the logits.

    tau > 0, the temperature of the backward pass only: the sample itself does not
    depend on it. ValueError otherwise. noise: Gumbel noise (..., V) to use.
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau} is impossible: the temperature is positive.")
    logits = logits.float()                             # noise and softmax in float32
    if noise is None:
        noise = gumbel_noise(logits.shape, generator, logits.device)
    soft = ((logits + noise) / tau).softmax(-1)                      # (..., V)
    hard = torch.zeros_like(soft)
    hard.scatter_(-1, soft.argmax(-1, keepdim=True), 1.)             # one-hot
    return hard - soft.detach() + soft     # its value is hard, its derivative is soft's


def gumbel_noise(shape, generator=None, device=None):
    """G = -log(-log U): -log U is exponentially distributed."""
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return noise.log_().neg_()                            # in place: (L, V) is large


# ------------------------- what the game uses: same value and gradient, half the memory

ROWS = 64            # of the (L, V) gradient that are computed at a time: bounds memory


def sample_embeddings(logits, E, tau, noise):
    """Ids (L,) of a sample and its embeddings (L, D), differentiable in logits (L, V).

    The embeddings are gumbel_softmax(logits, tau, noise=noise) @ E, E (V, D) constant
    (tested, value and gradient), in half the memory: a one-hot row times E is a row of
    E. `noise` is OVERWRITTEN. Where it is -inf, the token is not drawn.
    """
    return SampleEmbeddings.apply(logits, E, tau, noise)


class SampleEmbeddings(torch.autograd.Function):
    """forward: the argmax's row of E. backward, for each row of logits:

        slope = E @ d loss / d embedding                what each token would be worth
        sigma = softmax((logits + noise) / tau)
        d loss / d logits = (diag(sigma) - sigma sigma^T) slope / tau
                          = sigma * (slope - sigma . slope) / tau
    """

    @staticmethod
    def forward(ctx, logits, E, tau, noise):
        scores = noise.add_(logits)                                          # (L, V)
        ids = scores.argmax(-1)                                              # (L,)
        ctx.tau = tau
        ctx.save_for_backward(scores, E)
        ctx.mark_non_differentiable(ids)
        return ids, E[ids]

    @staticmethod
    def backward(ctx, _, gradient):
        scores, E = ctx.saved_tensors
        for rows, toward in zip(scores.split(ROWS), gradient.split(ROWS)):
            slopes = (toward @ E.T).float()                                  # (R, V)
            for score, slope in zip(rows, slopes):
                sigma = (score / ctx.tau).softmax(-1)                        # (V,)
                score.copy_(sigma * (slope - sigma @ slope) / ctx.tau)
        return scores, None, None, None              # the scores became the gradient


# ------------------------------------------------------------------ the lesson

TARGET = torch.tensor([.02, .03, .05, .08, .12, .15, .2, .35])


def to_target(phi):
    """Total variation distance between softmax(phi) and TARGET, in [0, 1]."""
    return (phi.softmax(-1) - TARGET).abs().sum().item() / 2


def figure_4(tau, seed, steps=400, start=200, lr=.1):
    """Figure 4: train logits so that the mean of 64 of their samples is near TARGET.

    Returns the distance to it after each step: of phi, and of phi's average from
    `start` on.
    """
    generator = torch.Generator().manual_seed(seed)
    phi = torch.zeros(8, requires_grad=True)
    optimiser = torch.optim.Adam([phi], lr=lr)
    swa, last, averaged = SWA([phi]), [], []
    for step in range(steps):
        sample = gumbel_softmax(phi.expand(64, 8), tau, generator)   # (64, 8)
        loss = ((sample.mean(0) - TARGET) ** 2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= start:
            swa.update()
        last.append(to_target(phi))
        averaged.append(to_target(swa.average[0] if swa.n else phi))
    return last, averaged


def figure_3():
    """Figure 3: one draw, forward, and backward through a value of each token."""
    logits = torch.tensor([.6, .3, .1]).log().requires_grad_()
    value = torch.tensor([1., 2., 3.])
    sample = gumbel_softmax(logits, 1., torch.Generator().manual_seed(0))
    (sample @ value).backward()
    print("p = (.6, .3, .1); tokens are worth (1, 2, 3)")
    print(f"forward    one-hot               {[round(x) for x in sample.tolist()]}")
    gradient = [round(x, 3) for x in logits.grad.tolist()]
    print(f"backward   d worth / d log p     {gradient}")
    assert sample.max() == 1 and sample.sum() == 1, "the sample is one token"
    assert logits.grad.abs().min() > 0, "every token gets a gradient, drawn or not"


def lesson():
    torch.set_num_threads(1)                          # eight numbers: threads only wait
    figure_3()
    seeds = 3
    began = to_target(torch.zeros(8))
    print("\nFigure 4: logits trained until their samples look like a known "
          f"distribution;\ndistance to it, {began:.3f} at the start; "
          f"mean of the last 100 steps, {seeds} seeds\n\ntau     phi      its SWA")
    for tau in (.3, 1., 2.):
        runs = [figure_4(tau, seed) for seed in range(seeds)]
        last = sum(sum(run[0][-100:]) for run in runs) / (100 * seeds)
        averaged = sum(sum(run[1][-100:]) for run in runs) / (100 * seeds)
        print(f"{tau:<7} {last:.4f}   {averaged:.4f}", flush=True)
        assert averaged < last, "the average is nearer than what it averages"
    print("tau changes only the backward pass, and hardly matters here.")
    print("\nnow try: lr=1. in figure_4. Does tau still hardly matter?")


if __name__ == "__main__":
    lesson()
