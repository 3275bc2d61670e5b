"""Section 3.2: a discrete prompt with a gradient. `python gumbel.py [--plot FILE.png]` runs Figure 4.

A token is drawn as  argmax_v (log p_v + G_v),  G_v = -log(-log U), and that argmax cannot be differentiated. Straight-through:
forward the one-hot of the argmax, backward the gradient of  softmax((log p + G) / tau)  (Figure 3).
The paper's text describes an argmax without noise; the released code, and this one, sample.
"""
import argparse

import torch

from swa import SWA


def gumbel_softmax(logits, tau=1., generator=None, noise=None):
    """Straight-through Gumbel-softmax (§3.2): logits (..., V) -> one-hot (..., V), differentiable in logits.

    Noise and softmax are float32. tau > 0: high is smooth and biased, low is noisy and vanishing. Raises ValueError for tau <= 0.
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau} is impossible: the temperature must be positive (1 is usual).")
    logits = logits.float()
    if noise is None:
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = ((logits + noise) / tau).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.)
    return hard - soft.detach() + soft  # the value is hard, the derivative is soft's


def figure_4(tau, seed, steps=600, K=8, lr=.1, start=300):
    """Train logits until their samples look like a known distribution -> total variation per step: (raw, averaged)."""
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(K, generator=torch.Generator().manual_seed(0)).pow(2)
    target /= target.sum()
    phi = torch.zeros(K, requires_grad=True)
    optimiser, swa, distances = torch.optim.Adam([phi], lr=lr), SWA([phi]), []
    for step in range(steps):
        drawn = gumbel_softmax(phi.expand(64, K), tau, g).mean(0)  # empirical distribution of 64 samples
        loss = ((drawn - target) ** 2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= start:
            swa.update()
        with swa.averaged():
            average = (phi.softmax(-1) - target).abs().sum().item() / 2
        distances.append(((phi.softmax(-1) - target).abs().sum().item() / 2, average))
    return torch.tensor(distances).T


def main():
    parser = argparse.ArgumentParser(description="Figure 4: training a known distribution through Gumbel-softmax samples")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    args = parser.parse_args()
    curves = {tau: torch.stack([figure_4(tau, seed) for seed in range(args.seeds)]) for tau in (.3, 1., 2.)}
    print(f"total variation distance to the target after 600 steps, {args.seeds} seeds (mean +- std; Figure 4)")
    for tau, c in curves.items():  # (seeds, 2, steps)
        for k, name in enumerate(("raw", "SWA")):
            last = c[:, k, -1]
            bars = "".join(" .:-=+*#%@"[min(9, int(v * 20))] for v in c[:, k].mean(0)[::15])
            print(f"tau {tau:<4} {name}  {last.mean():.4f} +- {last.std():.4f}  |{bars}|")
    if args.plot:
        from train import plotting
        plt = plotting()
        for tau, c in curves.items():
            line, = plt.plot(c[:, 0].mean(0), lw=.7, label=f"raw, tau {tau}")
            plt.plot(range(300, 600), c[:, 1].mean(0)[300:], lw=2, color=line.get_color(), label=f"SWA, tau {tau}")
        plt.xlabel("step")
        plt.ylabel("total variation distance")
        plt.yscale("log")
        plt.legend()
        plt.savefig(args.plot, dpi=110)


if __name__ == "__main__":
    main()
