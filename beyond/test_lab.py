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
SIZES = {"rows": 16, "test_people": 16, "rounds": 1, "phi_steps": 8, "draws": 1,
         "budget": 5, "models": ("not-trained", "cda", "robust")}


@pytest.fixture(scope="module")
def notebook():
    return json.loads(LAB.read_text("utf-8"))


@pytest.fixture(scope="module")
def cells(notebook):
    """{id: source} of the code cells; without matplotlib those that do not draw."""
    pictures, found = importlib.util.find_spec("matplotlib"), {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and (pictures or "plt" not in source):
            found[cell["id"]] = source
    return found


@pytest.fixture(scope="module")
def ran(cells):
    """All cells in order, with small sizes -> their namespace, {id: what it printed}"""
    namespace, printed = {"__name__": "__main__"}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(LAB.parent)                                # where Jupyter starts
        patch.setattr("sys.path", list(sys.path))
        patch.setenv("MPLBACKEND", "Agg")
        for name, source in cells.items():
            with contextlib.redirect_stdout(io.StringIO()) as printed[name]:
                exec(compile(source, name, "exec"), namespace)
            if name == "sizes":
                namespace.update(SIZES)
    return namespace, {name: text.getvalue() for name, text in printed.items()}


def test_every_cell_runs_and_its_outputs_are_stored(notebook, ran):
    """In order; those that depend on no size and no model are what the cell prints."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    drawn = 0
    for cell in code:
        stored = "".join("".join(x.get("text", "")) for x in cell["outputs"])
        drawn += any("image/png" in x.get("data", {}) for x in cell["outputs"])
        if cell["id"] in ran[1]:
            printed = ran[1][cell["id"]]
            assert bool(stored) == bool(printed), cell["id"]
            if cell["id"] in ("metrics", "figure-3", "write-gumbel-code", "steps"):
                assert stored == printed, "execute the notebook again"
        assert max(map(len, "".join(cell["source"]).splitlines())) <= 88
    assert drawn == 4


def test_phi_climbs_and_the_distance_closes_the_gap(ran):
    namespace, _ = ran
    assert namespace["climbed"][-1] > 1.2 * namespace["climbed"][0]
    assert set(namespace["table"]) == set(SIZES["models"])
    assert namespace["p"].shape == (16, 2) and namespace["m"]["gap"] == 0


def test_compare_tells_the_answer_from_wrong_ones(notebook, ran, capsys):
    answers = "".join(notebook["cells"][-1]["source"])
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
def test_an_edit(cells, ran, name, old, new, checks):
    assert cells[name].count(old) == 1
    namespace = {**ran[0], "re": re}
    exec(cells[name].replace(old, new), namespace)
    assert eval(checks, namespace)
