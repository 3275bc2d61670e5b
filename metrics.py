"""Section 1.1: what "fair" is measured by.

    M_dpd   Eq. (1)   |P(yhat=1|s=0) - P(yhat=1|s=1)|                          dpd
    M_deo   Eq. (2)   sum over y of |P(yhat=1|s=0,y) - P(yhat=1|s=1,y)|        deo
    gap               mean over people of |p_m - p_f|                          evaluate
    flip              share of people whose answer changes with their sex      evaluate

p_m and p_f are P(y=1) of one person asked as a man and as a woman. Eq. (1) and (2) are
observational: they compare the group of men with the group of women. The gap is
counterfactual: it compares a person with themselves. Figure 1 shows the difference.

PAPER: calls Eq. (2) M_deo in section 1.1 and M_eod in the tables. Below Eq. (1) it says
"altering the sensitive attribute while keeping everything else constant", which is the
gap, not Eq. (1).
PAPER vs RELEASED CODE: the released notebook's DPD is |mean of p_m - p_f| (our
|signed_gap|); its EOD is the same within y = 0 and within y = 1, the larger of the two.
PAPER: section 1.1 offers DEO as the remedy for DPD's fault in case 1; there it is large
for a model that never looks at s, too. Only the gap is 0.

    python metrics.py       # Figure 1 in numbers
"""
import warnings

import numpy


def rate(hits, of, what):
    """Returns the share of `hits` in the rows of the mask `of`.

    NaN, with a warning, if it is empty: 0 would make "no data" look perfectly fair.
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

    This is the SUM over y; fairlearn's `equalized_odds_difference` is the maximum,
    counts an empty cell as 0 where this is NaN, and rejects text labels.
    """
    total = 0.
    for k in (0, 1):
        men = rate(yhat, (s == 0) & (y == k), f"s=0, y={k}")
        women = rate(yhat, (s == 1) & (y == k), f"s=1, y={k}")
        total += abs(men - women)
    return total


def evaluate(p, y, s):
    """p (N, 2): P(y=1) asked as a man and as a woman; y, s (N,) -> dict for Table 3.

    The answer yhat is 1 where p > 1/2, asked as the person's own sex. If any p is NaN,
    every metric is, with a warning: NaN > 1/2 is False, so such a model would look like
    one that answers 0 to everybody, which is perfectly fair.
    """
    p, y, s = numpy.asarray(p, float), numpy.asarray(y), numpy.asarray(s)
    as_man, as_woman = p.T                                      # (N,) each
    own = numpy.where(s == 0, as_man, as_woman)
    yhat = own > .5
    change = as_man - as_woman                                  # p_m - p_f
    flipped = (as_man > .5) != (as_woman > .5)
    found = {
        "acc": (yhat == y).mean(),
        "dpd": dpd(yhat, s),
        "deo": deo(yhat, y, s),
        "gap": abs(change).mean(),
        "signed_gap": change.mean(),
        "flip": flipped.mean(),
        "positives": yhat.mean(),
    }
    if numpy.isnan(p).any():
        warnings.warn("predictions are NaN: every metric is undefined", stacklevel=2)
        return dict.fromkeys(found, float("nan"))
    return {name: float(value) for name, value in found.items()}


def of_people(p, people):
    """`evaluate` of the answers p (N, 2) about N of adult.py's people."""
    return evaluate(p, [x.y for x in people], [x.s for x in people])


# ------------------------------------------------------------------ the lesson

def figure_1(s_shapes_x, model_uses_s, n=200_000, seed=0):
    """Returns the metrics of a model in a world: case 1 or case 2 of Figure 1.

    In both worlds y depends only on X. In the paper's figure the model always uses s.
    NOT IN THE PAPER: a model that does not, for comparison.
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
    print("\nIn case 1 the model that never looks at s has a gap of 0, but a DPD of "
          f"{innocent['dpd']:.2f}\nand a DEO of {innocent['deo']:.2f}, because men and "
          "women differ in X.\nIn case 2 all three metrics are 0 for it.")
    print("\nnow try: halve X for women: score x * (1 - model_uses_s * asked_as / 2).\n"
          "Which metrics notice?")


if __name__ == "__main__":
    lesson()
