"""The lab's cells run and do what the lab says; its stored outputs are not stale.

The outputs are made by Jupyter's nbclient, in this folder, with PYTHONWARNINGS=ignore:

    import nbclient, nbformat
    lab = nbformat.read("lab.ipynb", 4)
    nbclient.NotebookClient(lab, record_timing=False, coalesce_streams=True).execute()
    nbformat.write(lab, "lab.ipynb")
"""
import contextlib
import importlib.util
import io
import json
import pathlib
import re
import sys

import pytest

LAB = pathlib.Path(__file__).with_name("lab.ipynb")
NOTEBOOK = json.loads(LAB.read_text("utf-8"))["cells"]
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK
         if cell["cell_type"] == "code"}
SIZES = {"rows": 16, "test_people": 16, "rounds": 1, "phi_steps": 8, "draws": 1,
         "budget": 5, "models": ("not-trained", "cda", "robust")}


@pytest.fixture(scope="module")
def ran():
    """All cells in order, with small sizes -> their namespace, {id: what it printed}

    Without matplotlib those that do not draw.
    """
    pictures = importlib.util.find_spec("matplotlib")
    namespace, printed = {"__name__": "__main__"}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(LAB.parent)                                # where Jupyter starts
        patch.setattr("sys.path", list(sys.path))
        patch.setenv("MPLBACKEND", "Agg")
        for name, source in CELLS.items():
            if pictures or "plt" not in source:
                with contextlib.redirect_stdout(io.StringIO()) as text:
                    exec(compile(source, name, "exec"), namespace)
                printed[name] = text.getvalue()
            if name == "sizes":
                namespace.update(SIZES)
    return namespace, printed


def test_every_cell_runs_and_its_outputs_are_stored(ran):
    """In order; those that depend on no size and no model are what the cell prints."""
    code = [cell for cell in NOTEBOOK if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        name = cell["id"]
        stored = "".join("".join(x.get("text", "")) for x in cell["outputs"])
        if name in ran[1]:
            assert bool(stored) == bool(ran[1][name]), name
        if name in ("metrics", "figure-3", "write-gumbel-code", "steps"):
            assert stored == ran[1][name], "execute the notebook again"
        assert max(map(len, CELLS[name].splitlines())) <= 88
    assert json.dumps(NOTEBOOK).count('"image/png"') == 4


def test_phi_climbs_and_the_distance_closes_the_gap(ran):
    namespace, _ = ran
    assert namespace["climbed"][-1] > 1.2 * namespace["climbed"][0]
    assert set(namespace["table"]) == set(SIZES["models"])
    assert namespace["p"].shape == (16, 2) and namespace["m"]["gap"] == 0


def test_compare_tells_the_answer_from_wrong_ones(ran, capsys):
    answers = "".join(NOTEBOOK[-1]["source"])
    code = re.search(r"```python\n(.*?)```", answers, re.S)[1]
    namespace = dict(ran[0])
    for old, new, said in (("", "", ["right", "right"]),
                           ("soft.detach()", "soft.detach() * 2", ["wrong", "right"]),
                           ("/ tau", "", ["right", "wrong"]),
                           ("- soft.detach() + soft", "", ["right", "wrong"]),
                           ("logits + noise", "logits", ["wrong", "wrong"])):
        assert old in code
        exec(code.replace(old, new), namespace)
        namespace["compare"](namespace["my_gumbel_softmax"])
        assert re.findall("right|wrong", capsys.readouterr().out) == said


@pytest.mark.parametrize("name, old, new, checks", [
    ("metrics", "strength = 1 ", "strength = .2 ", "m['gap'] < .1"),
    ("shots", "b, rng)  ", "b, rng, counterbalance=True)  ",
     "len(re.findall('Female.*\\nlabel: 1', shots(1., 0))) == 4"),
    ("climb", "questions, sign)", "questions, -1)", "climbed[-1] < climbed[0]")])
def test_an_edit(ran, name, old, new, checks):
    assert CELLS[name].count(old) == 1
    namespace = {**ran[0], "re": re}
    exec(CELLS[name].replace(old, new), namespace)
    assert eval(checks, namespace)
