"""NOT IN THE PAPER: does fairness survive when weights are rounded to few bits?

Only the blocks' weight matrices are rounded, after merging: W + B A. The embeddings
stay, as is usual (GPTQ, AWQ): where they are tied they also give the logits.

    python -m beyond.quantise               # a small matrix, rounded
    python -m beyond.quantise runs/NAME     # every model of a finished run of Table 3
"""
import pathlib
from contextlib import contextmanager

import torch

import adult
import metrics
import train
from beyond import attacks, finished, report, runs

FORMATS = {"float32": lambda W: W, "bf16": lambda W: W.bfloat16().float(),
           "int8": lambda W: rounded(W, 8), "int4": lambda W: rounded(W, 4),
           "int3": lambda W: rounded(W, 3)}
# --attacks: small, since each format of each model is attacked anew.
ATTACKS = {**attacks.SIZE, "climb": 10, "texts": 10, "chosen_on": 16, "test_rows": 100,
           "only": ("16 ", "full", "climb", "random", '"')}
TITLES = {"ACC": "acc", "gap": "gap", "given shots": "shots", "worst gap": "worst"}


def rounded(W, bits, group=32):
    """W (out, in) in few bits: every `group` weights of a row share a scale.

        scale = max |w| / (2^(bits-1) - 1)            the largest stays as it is
        w     becomes   scale * round(w / scale)      one of 2^bits - 1 values
    """
    parts = []
    for w in W.split(group, dim=1):                  # (out, group); the last: the rest
        scale = w.abs().amax(1, keepdim=True).clamp(1e-30) / (2 ** (bits - 1) - 1)
        parts.append(scale * (w / scale).round())
    return torch.cat(parts, 1)


@contextmanager
def quantised(model, name):
    """Inside this `with` the blocks' W are rounded; after it the very same are back."""
    inner = model.base_model.modules()                # without the layer of the logits
    originals = {m: m.weight.data for m in inner if isinstance(m, torch.nn.Linear)}
    try:
        for layer, W in originals.items():
            layer.weight.data = FORMATS[name](W)
        yield
    finally:
        for layer, W in originals.items():
            layer.weight.data = W


def measure(args, data, key, seed):
    """One model in every format, on its run's test rows; yields a row for each."""
    model, _, results = finished.load_run(
        args.run, key, seed, args.model, dtype="float32", task=args.task)
    config = results["config"]
    people = adult.split(data, config["rows"], config["bpc"], config["test_rows"], seed)
    people = people._replace(test=people.test[:args.test_rows])
    for name in FORMATS:
        with quantised(model.model, name):
            p = train.answers_of(model, key, people.test)
            row = metrics.of_people(p, people.test)
            shots = train.gap_given_shots(model, people, data, config, key, seed)
            row = {"key": key, "seed": seed, "format": name, **row, "shots": shots}
            if args.attacks and key in attacks.ATTACKED:
                found = attacks.attack(model, people, data, ATTACKS, seed)
                row["worst"] = found["worst"]
        yield row


def show(rows):
    """Models down, formats across; mean and spread over seeds."""
    seeds, columns = len({row["seed"] for row in rows}), {name: {} for name in FORMATS}
    for name, column in columns.items():
        means = report.summary([row for row in rows if row["format"] == name])
        for key in means:
            for title, x in TITLES.items():
                if x in means[key]:
                    column[f"{key:<18}{title}"] = report.cell(means[key][x], seeds)
    attacks.show_columns("", columns)


def lesson():
    W, before = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)), 0.
    print("a random W of 4 rows, rounded; error: |W - rounded| / |W|, row by row\n")
    for bits in (8, 4, 3):
        few = rounded(W, bits, group=32)
        error = (W - few).norm(dim=1) / W.norm(dim=1)
        print(f"{bits} bits   weights", " ".join(f"{w:5.2f}" for w in few[0, :4]),
              "...   error", " ".join(f"{x:.4f}" for x in error))
        assert (error > before).all(), "fewer bits, a larger error"
        before = error
    print("\nnow try: group=8 in `lesson`. How far do errors fall, and at what cost?")


def main(argv=None):
    parser = runs.Parser(prog="beyond.quantise", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="the run's folder; without it, a lesson")
    parser.add_argument("--data", metavar="PATH", help="where its data is now")
    parser.add_argument("--task", metavar="FILE.json", help="where its task is now")
    parser.add_argument("--model", metavar="DIR", help="where its base model is now")
    parser.add_argument("--models", nargs="+", metavar="KEY", help="only these rows")
    parser.add_argument("--attacks", action="store_true", help="small ones, too")
    parser.add_argument("--test-rows", type=runs.count, metavar="N", help="at most N")
    args = parser.parse_args(argv)
    if args.run is None:
        return lesson()
    folder, rows = pathlib.Path(args.run), []
    results, file = finished.read_run(folder), folder / "quantise.json"
    asked = {"test_rows": args.test_rows, "attacks": args.attacks}
    how = attacks.digest(folder, asked)
    data = finished.load_data(results, args.data, args.task)
    keys = args.models or [row["key"] for row in results["rows"]]
    for key, seed in attacks.models_of(results, args.run, keys):
        runs.say(f"  {key}, seed {seed}")
        rows += measure(args, data, key, seed)
        saved = attacks.with_earlier(file, how, rows)
        runs.write_json(file, {"config": {**asked, "how": how}, "rows": saved})
    show(saved)
    print(f"\nsaved in {file}")


if __name__ == "__main__":
    with runs.one_sentence("beyond.quantise"):
        main()
