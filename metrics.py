"""Section 1.1: what "fair" is measured by.

    M_dpd   Eq. (1)   |P(yhat=1|s=0) - P(yhat=1|s=1)|                          dpd
    M_deo   Eq. (2)   sum over y of |P(yhat=1|s=0,y) - P(yhat=1|s=1,y)|        deo
    gap               mean over people of |p_m - p_f|                          evaluate
    flip              share of people whose answer changes with their sex      evaluate

p_m and p_f are P(y=1) of one person asked as a man and as a woman. Eq. (1) and (2) are
observational: they compare the group of men with the group of women. The gap is
counterfactual: it compares a person with themselves. Figure 1 is about the difference.

PAPER: calls Eq. (2) M_deo in section 1.1 and M_eod in the tables. Below Eq. (1) it says
"altering the sensitive attribute while keeping everything else constant", which is the
gap, not Eq. (1).
PAPER vs RELEASED CODE: the released notebook's DPD is |mean of p_m - p_f| (our
|signed_gap|), its EOD the larger of that within y = 0 and within y = 1.

    python metrics.py       # Figure 1 in numbers
"""
import warnings

import numpy


def rate(hits, of, what):
    """Share of `hits` in the rows of the mask `of`; NaN and a warning if it is empty.

    0 would turn "no data" into "perfectly fair".
    """
    if not of.any():
        warnings.warn(f"nobody has {what}: the metric is undefined (NaN)", stacklevel=3)
        return float("nan")
    return float(hits[of].mean())


def dpd(yhat, s):
    """Eq. (1), demographic parity difference, in [0, 1]. yhat, s: (N,) of 0 and 1."""
    return abs(rate(yhat, s == 0, "s=0") - rate(yhat, s == 1, "s=1"))


def deo(yhat, y, s):
    """Eq. (2), difference of equalised odds, in [0, 2]. yhat, y, s: (N,) of 0 and 1.

    A SUM over y. fairlearn's `equalized_odds_difference` is the maximum.
    """
    total = 0.
    for k in (0, 1):
        men = rate(yhat, (s == 0) & (y == k), f"s=0, y={k}")
        women = rate(yhat, (s == 1) & (y == k), f"s=1, y={k}")
        total += abs(men - women)
    return total


def evaluate(p, y, s):
    """p (N, 2): P(y=1) asked as a man and as a woman; y, s (N,) -> dict for Table 3.

    The answer yhat is p > 1/2 under the person's own sex. Predictions that are not
    numbers make every metric NaN, with a warning: NaN > 1/2 is False, and would pass
    for a model that answers 0 to everybody, men and women alike.
    """
    p, y, s = numpy.asarray(p, float), numpy.asarray(y), numpy.asarray(s)
    names = ("acc", "dpd", "deo", "gap", "signed_gap", "flip", "positives")
    if numpy.isnan(p).any():
        warnings.warn("predictions are NaN: every metric is undefined", stacklevel=2)
        return dict.fromkeys(names, float("nan"))
    yhat = p[numpy.arange(len(y)), s] > .5                      # (N,)
    change = p[:, 0] - p[:, 1]                                  # p_m - p_f
    flipped = (p[:, 0] > .5) != (p[:, 1] > .5)
    values = ((yhat == y).mean(), dpd(yhat, s), deo(yhat, y, s), abs(change).mean(),
              change.mean(), flipped.mean(), yhat.mean())
    return {name: float(value) for name, value in zip(names, values)}


def bootstrap(p, y, s, draws=200, seed=0):
    """95 % intervals of `evaluate` over people, drawn again with their twin.

    -> {name: [low, high]}
    """
    p, y, s = numpy.asarray(p, float), numpy.asarray(y), numpy.asarray(s)
    rng = numpy.random.default_rng(seed)
    drawn = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # an empty cell: `evaluate` has said it
        for _ in range(draws):
            rows = rng.integers(len(y), size=len(y))
            drawn.append(evaluate(p[rows], y[rows], s[rows]))
        intervals = {}
        for name in drawn[0]:
            values = [one[name] for one in drawn]
            intervals[name] = numpy.nanquantile(values, [.025, .975]).tolist()
    return intervals


# ------------------------------------------------------------------ the lesson

def figure_1(s_shapes_x, model_uses_s, n=200_000, seed=0):
    """A world (case 1 or 2 of Figure 1) and a model -> its metrics.

    In both worlds y depends on X alone. In the paper's figure the model always uses s;
    NOT IN THE PAPER: one that does not, for comparison.
    """
    rng = numpy.random.default_rng(seed)
    s = rng.integers(2, size=n)
    x = rng.normal(size=n) + s_shapes_x * (.5 - s)         # case 1: men have higher X
    y = (x + rng.normal(size=n) > 0).astype(int)
    score = [x + model_uses_s * (.5 - asked_as) for asked_as in (0, 1)]
    p = 1 / (1 + numpy.exp(-4 * numpy.stack(score, 1)))    # (N, 2)
    return evaluate(p, y, s)


def lesson():
    print("world (Figure 1)          model          DPD    DEO    gap")
    worlds = (("case 1: s shapes X", 1), ("case 2: X without s", 0))
    for world, s_shapes_x in worlds:
        for model, uses_s in (("uses X only", 0), ("uses X and s", 1)):
            m = figure_1(s_shapes_x, uses_s)
            print(f"{world:<25} {model:<12} {m['dpd']:6.3f} {m['deo']:6.3f} "
                  f"{m['gap']:6.3f}")
            assert (m["gap"] > 0) == bool(uses_s), "the gap sees whether s is used"
    innocent = figure_1(1, 0)
    print("\nIn case 1 the model that never looks at s has gap 0, and still a DPD of "
          f"{innocent['dpd']:.2f}\nand a DEO of {innocent['deo']:.2f}: men and women "
          "differ in X. In both worlds only the gap\ntells a model that uses s from "
          "one that does not.")
    print("\nnow try: a model that weighs X less for women. Which metric sees it?")


if __name__ == "__main__":
    lesson()
