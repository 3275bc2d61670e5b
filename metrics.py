"""Section 1.1: what "fair" is measured by. `python metrics.py` runs Figure 1.

Eq. (1) and Eq. (2) are observational: they compare the group of men with the group of women, each person as they are. The
counterfactual gap is interventional: it asks about the same person as a man and as a woman. Figure 1's point is that only the
second tells a model that uses s from one that does not, when s also shapes X. The paper's text slides from one to the other.
"""
import warnings

import numpy


def rate(hits, of, what):
    """Share of `hits` among the rows of the mask `of`; NaN with a warning when nobody is there (0 would read as "fair")."""
    if not of.any():
        warnings.warn(f"nobody in the group {what}: the metric is undefined (NaN)", stacklevel=3)
        return float("nan")
    return float(hits[of].mean())


def dpd(yhat, s):
    """Eq. (1), demographic parity difference: |P(yhat=1|s=0) - P(yhat=1|s=1)|, in [0, 1]."""
    return abs(rate(yhat, s == 0, "s=0") - rate(yhat, s == 1, "s=1"))


def deo(yhat, y, s):
    """Eq. (2), difference of equalised odds: the SUM over y of |P(yhat=1|s=0,y) - P(yhat=1|s=1,y)|, in [0, 2].

    fairlearn's `equalized_odds_difference` is the maximum by default, and its mean is half of this.
    """
    return sum(abs(rate(yhat, (s == 0) & (y == k), f"s=0, y={k}") - rate(yhat, (s == 1) & (y == k), f"s=1, y={k}"))
               for k in (0, 1))


def evaluate(p, y, s):
    """p (N, 2): P(y=1) asked as a man and as a woman; y, s (N,) -> dict of everything in Table 3.

    The hard answer is p > 1/2 under the person's own sex. `soft_*` are the released notebook's: mean probability of the right
    class over all twins, counterfactual parity |mean p_m - mean p_f|, and the same within each class, maximum over y.
    """
    p, y, s = numpy.asarray(p, float), numpy.asarray(y), numpy.asarray(s)
    yhat, change = p[numpy.arange(len(y)), s] > .5, p[:, 0] - p[:, 1]
    with numpy.errstate(invalid="ignore"):
        per_class = [abs(change[y == k].mean()) if (y == k).any() else float("nan") for k in (0, 1)]
    return {"acc": float((yhat == y).mean()), "dpd": dpd(yhat, s), "deo": deo(yhat, y, s), "gap": float(abs(change).mean()),
            "gap_signed": float(change.mean()), "flip_rate": float(((p[:, 0] > .5) != (p[:, 1] > .5)).mean()),
            "soft_acc": float(numpy.where(y[:, None] == 1, p, 1 - p).mean()), "soft_dpd": float(abs(change.mean())),
            "soft_deo": float(max(per_class)), "positives": float(yhat.mean())}


def bootstrap(p, y, s, draws=500, seed=0):
    """95 % intervals of `evaluate`, people resampled together with their twin -> {name: [low, high]}."""
    p, y, s = numpy.asarray(p, float), numpy.asarray(y), numpy.asarray(s)
    rng, values = numpy.random.default_rng(seed), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cell has been announced by `evaluate`
        for _ in range(draws):
            i = rng.integers(len(y), size=len(y))
            values.append(evaluate(p[i], y[i], s[i]))
        return {k: [float(x) for x in numpy.nanquantile([v[k] for v in values], [.025, .975])] for k in values[0]}


def figure_1(n=200_000, seed=0):
    """Figure 1 in numbers: two worlds, two models; prints what each metric says."""
    rng = numpy.random.default_rng(seed)
    s = rng.integers(2, size=n)
    print("world                    model            DPD    DEO    counterfactual gap")
    for world, effect in (("s -> X (s confounds X)", 1.), ("X independent of s", 0.)):
        x = rng.normal(size=n) - effect * s  # men have the higher X when s shapes it
        y = (x + rng.normal(size=n) > -effect / 2).astype(int)  # y depends on X alone
        for model, weight in (("uses X only", 0.), ("uses X and s", 1.)):
            score = [x + effect / 2 - weight * (k - .5) for k in (0, 1)]  # asked as a man, as a woman
            r = evaluate(numpy.stack([1 / (1 + numpy.exp(-4 * z)) for z in score], 1), y, s)
            print(f"{world:<24} {model:<15}  {r['dpd']:.3f}  {r['deo']:.3f}  {r['gap']:.3f}")
    print("A model that ignores s has gap 0 in both worlds; its DPD and DEO are 0 only where X is independent of s.")


if __name__ == "__main__":
    figure_1()
