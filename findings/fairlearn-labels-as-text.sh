#!/usr/bin/env bash
# fairlearn: answers written as Adult writes them, ">50K", are perfectly fair
#
# Expected:  `demographic_parity_difference` of a rule that says ">50K" to every man
#            and to no woman is 1, however the two answers are written; or an error for
#            text.
# Happens:   it is 0.0, the value of a perfectly fair model, without error or warning:
#            an answer counts as positive when it equals the number 1. Probabilities
#            meet the same fate (.9 for every man and .1 for every woman: 0.0), and so
#            do "1" and "0" read from a file as text. On the same answers the ratio is
#            NaN and `equalized_odds_difference` raises.
# Matters:   Adult's label is text, and a language model's answers are text. A report
#            of the difference alone shows a fair model.
# Instead:   compare with the positive answer before the call; look at the ratio (or at
#            `selection_rate` by group): NaN or 0 for everybody says that nothing was
#            counted. `selection_rate(..., pos_label=">50K")` inside a MetricFrame
#            works.
# Seen with: fairlearn 0.15.0, scikit-learn 1.9.1, pandas 2.3.3, numpy 2.4.6.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile fairlearn==0.15.0 \
    scikit-learn==1.9.1 pandas==2.3.3 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import math
import warnings

import fairlearn
import numpy
from fairlearn.metrics import (MetricFrame, demographic_parity_difference,
                               demographic_parity_ratio, equalized_odds_difference,
                               selection_rate)

print("fairlearn", fairlearn.__version__)
warnings.simplefilter("error")                   # a warning would end the script
sex = numpy.array(["Male"] * 4 + ["Female"] * 4)
earns = numpy.array([1, 1, 0, 0, 1, 1, 0, 0])
says = (sex == "Male").astype(int)               # 1 to every man, 0 to every woman

spellings = {"numbers 0, 1": (earns, says), "booleans": (earns == 1, says == 1)}
for no, yes in (("<=50K", ">50K"), ("0", "1"), ("no", "yes")):
    spellings[f"text {no}, {yes}"] = (numpy.where(earns == 1, yes, no),
                                      numpy.where(says == 1, yes, no))
spellings["probabilities .1, .9"] = (earns, numpy.where(says == 1, .9, .1))

print("answers                  difference   ratio   equalised odds")
for name, (y, yhat) in spellings.items():
    difference = demographic_parity_difference(y, yhat, sensitive_features=sex)
    ratio = demographic_parity_ratio(y, yhat, sensitive_features=sex)
    try:
        odds = equalized_odds_difference(y, yhat, sensitive_features=sex)
    except ValueError:
        odds = "ValueError"
    print(f"{name:<24} {difference:10.1f} {ratio:7.1f}   {odds}")
    if name in ("numbers 0, 1", "booleans"):
        assert difference == 1 and ratio == 0 and odds == 1
    else:
        assert difference == 0 and math.isnan(ratio) and odds == "ValueError", name

y, yhat = spellings["text <=50K, >50K"]


def share_of_positives(y_true, y_pred):
    return selection_rate(y_true, y_pred, pos_label=">50K")


frame = MetricFrame(metrics=share_of_positives, y_true=y, y_pred=yhat,
                    sensitive_features=sex)
print("with pos_label:", frame.difference())
assert frame.difference() == 1
PY
"$folder/venv/bin/python" "$folder/run.py"
echo "still so: the difference of an unfair rule is 0.0 when its answers are text"
