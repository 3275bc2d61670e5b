"""NOT IN THE PAPER: a finished run's models, measured again or asked about others.

    python -m beyond.finished runs/NAME                     # the same numbers again?
    python -m beyond.finished predict runs/NAME people.csv  # ask about other people

    from beyond import finished                             # the same in Python
    model, row, results = finished.load_run("runs/NAME")    # robust FairCon, merged
"""
import pathlib
import sys

import adult
import lora
import metrics
import train
from adult import InputError
from beyond import report, runs, tasks
from beyond.load import load_model

SHOWN = ("acc", "dpd", "deo", "gap", "flip")


# ------------------------------------------------------------------ reading it

def load_run(folder, key="robust", seed=None, model_path=None, device="auto",
             dtype=None, task=None):
    """A model of a finished run, adapter merged -> (LanguageModel, its row, the run).

    model_path, task: where the base model, and the task's JSON file, are now, if not
    where they were. dtype: another than the run's. Raises InputError.
    """
    folder = pathlib.Path(folder)
    results = read_run(folder)
    row = find_row(results, folder, key, seed)
    name, trained_in, *_ = results["config"]["model"]
    tasks.of_run(results, task)
    chat = results["config"].get("chat", False)                  # older runs: no field
    model = load_model(model_path or name, dtype or trained_in, device, chat)
    if model.sha256 != results["model"]["sha256"]:
        raise InputError(f"{model_path or name} is not the model of {folder} (another "
                         "sha256); give the one it was made with.")
    if "history" in row:
        lora.load(model.model, folder / f"{key}-{row['seed']}" / "adapter")
        lora.merge(model.model)
    return model, row, results


def find_row(results, folder, key, seed):
    """The row of one model and seed (None: the first). Raises InputError."""
    for row in results["rows"]:
        if row["key"] == key and seed in (None, row["seed"]):
            return row
    keys = dict.fromkeys(row["key"] for row in results["rows"])
    which = key if seed is None else f"{key} of seed {seed}"
    raise InputError(f"{folder} holds no {which}; it holds {', '.join(keys)}.")


PATH = (str, type(None))
SHAPE = {                     # what is read of results.json
    "config": {"table": int, "prompt_only": bool, "model": [str], "rows": int,
               "bpc": float, "test_rows": int, "shots": int, "data": PATH,
               "task": PATH},
    "model": {"sha256": str}, "data": {"sha256": dict},
    "rows": [{"key": str, "seed": int}]}


def read_run(folder):
    """results.json of a finished run of Table 3; it may be anybody's.

    Raises InputError. A row's key becomes part of a path: "../x" is refused.
    """
    path = pathlib.Path(folder) / "results.json"
    results = runs.read_json(path)
    for part, shape in SHAPE.items():
        if not runs.fits(results.get(part), shape):
            raise InputError(f"{path} has no {part} as this program writes it; it is "
                             "another's, or an older one's: run again.")
    for row in results["rows"]:
        if pathlib.PurePath(row["key"]).name != row["key"]:
            raise InputError(f"{path} has the key {row['key']!r}; it is not a file of "
                             "this program.")
    if results["config"]["table"] != 3 or results["config"]["prompt_only"]:
        raise InputError(f"{folder} holds no models; give a run of Table 3.")
    return results


def load_data(results, data=None, task=None):
    """The data of a run -> adult.Adult; InputError if it is another.

    data, task: where its files are now, if not where they were.
    """
    config = results["config"]
    loaded = tasks.load(task or config.get("task"), data or config.get("data"))
    if list(loaded.sha256.values()) != list(results["data"]["sha256"].values()):
        raise InputError(f"the data ({loaded.source}) is not the run's "
                         f"({results['data'].get('source')}): another sha256; give the "
                         "run's files with --data, its task with --task.")
    return loaded


# ------------------------------------------------------------------ the commands

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["predict"]:
        predict(argv[1:])
    else:
        measure_again(argv)


def parser_of(prog, description):
    parser = runs.Parser(prog=prog, description=description)
    parser.add_argument("run", help="the run's folder, such as runs/default")
    parser.add_argument("--task", metavar="FILE.json", help="where its task is now")
    parser.add_argument("--model", metavar="DIR", help="where its base model is now")
    parser.add_argument("--device", default="auto")
    return parser


def measure_again(argv):
    """Measure a finished run's models again. InputError if a number differs."""
    parser = parser_of("beyond.finished", "Measure the models of a finished run again, "
                       "on its own test rows. (`predict --help`: ask about others.)")
    parser.add_argument("--data", metavar="PATH", help="where its data is now")
    parser.add_argument("--models", nargs="+", metavar="KEY", help="only these")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="measure in another one than the run's, and print means")
    args = parser.parse_args(argv)
    results, different, rows = read_run(args.run), 0, []
    config = results["config"]
    data = load_data(results, args.data, args.task)
    for key in args.models or ():
        find_row(results, args.run, key, None)
    runs.say(line("model", "seed", SHOWN) + "   largest change")
    for row in results["rows"]:
        key, seed = row["key"], row["seed"]
        if args.models and key not in args.models:
            continue
        if not runs.fits(row, dict.fromkeys(SHOWN, float)):
            raise InputError(f"{args.run} has no numbers {SHOWN} of {key}.")
        model, _, _ = load_run(args.run, key, seed, args.model, args.device,
                               args.dtype, args.task)
        test = adult.split(data, config["rows"], config["bpc"], config["test_rows"],
                           seed).test
        again = metrics.of_people(train.answers_of(model, key, test), test)
        rows.append({"key": key, "seed": seed, **again})
        changes = [abs(again[name] - row[name]) for name in SHOWN]
        different += max(changes) != 0
        numbers = line(key, seed, [f"{again[name]:.4f}" for name in SHOWN])
        runs.say(f"{numbers}   {max(changes):.1e}")
    if args.dtype:
        show_means(rows)
    elif different:
        raise InputError(f"{different} models do not give the saved numbers exactly: "
                         "another machine or library, if the changes are small.")
    else:
        runs.say(f"these numbers of {len(rows)} models came out again, exactly "
                 "(no prompt; `python -m beyond.attacks` repeats attacks)")


def line(key, seed, cells):
    return f"{key:<16} {seed:<6} " + "  ".join(f"{cell:>9}" for cell in cells)


def show_means(rows):
    seeds = {row["seed"] for row in rows}
    for key, means in report.summary(rows).items():
        cells = [report.cell(means[name], len(seeds)) for name in SHOWN]
        runs.say(line(key, "mean", cells))


def predict(argv):
    """Ask a finished run's model about the people of a CSV file."""
    parser = parser_of("beyond.finished predict", "Ask a model of a finished run about "
                       "the people of a CSV file, each as a man and as a woman (p_m, "
                       "p_f). Their labels need not be known.")
    parser.add_argument("people", help="Adult's columns: see beyond/people.py")
    parser.add_argument("--key", default="robust", help="a model of Table 3 (robust)")
    parser.add_argument("--seed", type=runs.seed, metavar="N", help="(the run's first)")
    parser.add_argument("--out", metavar="FILE", type=pathlib.Path,
                        help="all answers (runs/NAME/MODEL-SEED/PEOPLE-answers.csv)")
    args = parser.parse_args(argv)
    task = tasks.of_run(read_run(args.run), args.task)
    people = tasks.read(args.people, task, labelled=False)
    model, row, _ = load_run(args.run, args.key, args.seed, args.model, args.device,
                             task=args.task)
    place = pathlib.Path(args.run) / f"{args.key}-{row['seed']}"
    out = args.out or place / f"{pathlib.Path(args.people).stem}-answers.csv"
    if out.resolve() == pathlib.Path(args.people).resolve():
        raise InputError(f"{out} holds the people; give another --out.")
    p = train.answers_of(model, args.key, people)                        # (N, 2)
    runs.write_people(out.resolve(), people, p)          # a link's file, not the link
    print(" row     p_m       p_f   who")
    for i, (person, (p_m, p_f)) in enumerate(zip(people[:20], p), 1):
        known = dict(zip(adult.COLUMNS, person.values))
        first = adult.COLUMNS[adult.SEX]
        others = [known[name] for name in adult.ATTRIBUTES if name != first]
        who = ", ".join([known[first], *others])
        print(f"{i:>4}  {p_m:6.3f}    {p_f:6.3f}   {who:.60}")
    print(f"P(y = 1) by {args.key}, seed {row['seed']}; all {len(people)} are in "
          f"{out}")


if __name__ == "__main__":
    with runs.one_sentence("beyond.finished"):
        main()
