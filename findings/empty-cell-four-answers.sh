#!/usr/bin/env bash
# Five fairness metrics on one table in which no woman earns more: four answers
#
# Expected:  women's true positive rate is 0/0, so a difference of equalised odds is
#            NaN in every toolkit; or all count it as 0.
# Happens:   on the same twelve people (men: TPR 2/3, FPR 1/3; women: TPR 0/0, FPR 1/6)
#                fairlearn   equalized_odds_difference                     .667
#                AIF360      ClassificationMetric.equalized_odds_difference .167
#                AIF360      sklearn.metrics.average_odds_error            .417 (warns)
#                HolisticAI  average_odds_diff                            -.417
#                Aequitas    tpr                                           NaN
#            fairlearn and HolisticAI silently take 0/0 for 0, AIF360's sklearn part
#            with a warning (.417 is the mean of .667 and .167; the sign says that
#            women have less). AIF360's own metric takes the larger difference, FPR's
#            or TPR's, and a NaN in second place loses every comparison: the empty cell
#            is left out. In the mirrored table, where no woman earns less, the NaN
#            stands in first place, and the same function says NaN. And when the model
#            answers 0 to everybody, fairlearn and AIF360 say 0.0: fair.
# Matters:   small balanced test sets, and intersections of sex and race, have such
#            cells. Which toolkit is asked then decides whether a model passes.
# Instead:   count the people of each group and label first; report no number for an
#            empty cell. Name the toolkit and the function beside a figure.
# Seen with: fairlearn 0.15.0, aif360 0.6.1, holisticai 1.0.14, aequitas 1.1.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile fairlearn==0.15.0 aif360==0.6.1 \
    holisticai==1.0.14 aequitas==1.1.0 scikit-learn==1.9.1 pandas==2.3.3 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import importlib.metadata
import logging
import warnings

import numpy
import pandas

logging.disable(logging.WARNING)                 # AIF360 lists its optional parts
warnings.simplefilter("ignore")
from aequitas.group import Group
from aif360.datasets import BinaryLabelDataset
from aif360.metrics import ClassificationMetric
from aif360.sklearn.metrics import average_odds_error
from fairlearn.metrics import equalized_odds_difference
from holisticai.bias.metrics import average_odds_diff

for package in ("fairlearn", "aif360", "holisticai", "aequitas"):
    print(package, importlib.metadata.version(package))


def dataset(man, label):
    return BinaryLabelDataset(df=pandas.DataFrame({"man": man, "label": label}),
                              label_names=["label"], protected_attribute_names=["man"],
                              favorable_label=1, unfavorable_label=0)


def ask(y, yhat, man):
    """Five functions on one table -> {name: value}."""
    values = {"fairlearn": equalized_odds_difference(y, yhat, sensitive_features=man)}
    classified = ClassificationMetric(dataset(man, y), dataset(man, yhat),
                                      unprivileged_groups=[{"man": 0}],
                                      privileged_groups=[{"man": 1}])
    values["AIF360"] = classified.equalized_odds_difference()
    indexed = pandas.Series(y, index=pandas.Index(man, name="man"))
    values["AIF360 sklearn"] = average_odds_error(indexed, yhat, prot_attr="man",
                                                  priv_group=1)
    try:
        values["HolisticAI"] = average_odds_diff(man == 0, man == 1, yhat, y)
    except IndexError:
        values["HolisticAI"] = "IndexError"
    frame = pandas.DataFrame({"score": yhat, "label_value": y,
                              "sex": numpy.where(man == 1, "man", "woman")})
    table = Group().get_crosstabs(frame)[0].set_index("attribute_value")
    values["Aequitas, TPR of women"] = table.loc["woman", "tpr"]
    values["Aequitas, FPR of women"] = table.loc["woman", "fpr"]
    return values


man = numpy.array([1] * 6 + [0] * 6)
yhat = numpy.array([1, 1, 0, 1, 0, 0] + [1, 0, 0, 0, 0, 0])
men_earn = [1, 1, 1, 0, 0, 0]
tables = {"full": (numpy.array(men_earn + [1, 1, 1, 0, 0, 0]), yhat),
          "no woman earns more": (numpy.array(men_earn + [0] * 6), yhat),
          "no woman earns less": (numpy.array(men_earn + [1] * 6), yhat),
          "no woman earns more, all answers 0": (numpy.array(men_earn + [0] * 6),
                                                 0 * yhat)}
found = {name: ask(y, answers, man) for name, (y, answers) in tables.items()}
for name, values in found.items():
    print(f"\n{name}")
    for function, value in values.items():
        shown = value if value == "IndexError" else f"{value:6.3f}"
        print(f"    {function:<24} {shown}")


def same(value, wanted):
    return bool(numpy.isclose(value, wanted, atol=1e-9, equal_nan=True))


nan = float("nan")
full = found["full"]
assert all(same(abs(full[f]), 1 / 3) for f in
           ("fairlearn", "AIF360", "AIF360 sklearn", "HolisticAI")), "they agree here"
empty = found["no woman earns more"]
assert same(empty["fairlearn"], 2 / 3)
assert same(empty["AIF360"], 1 / 6), "the NaN is left out"
assert same(empty["AIF360 sklearn"], 5 / 12)
assert same(empty["HolisticAI"], -5 / 12)
assert same(empty["Aequitas, TPR of women"], nan)
mirrored = found["no woman earns less"]
assert same(mirrored["AIF360"], nan), "and here it is not"
assert same(mirrored["fairlearn"], 1 / 2)
constant = found["no woman earns more, all answers 0"]
assert constant["fairlearn"] == 0 and constant["AIF360"] == 0
assert same(constant["Aequitas, TPR of women"], nan)
PY
cd "$folder"
venv/bin/python run.py
echo "still so: an empty cell is .667, .167, .417, -.417 or NaN"
