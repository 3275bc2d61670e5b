"""The lab runs, does what it says, and its stored outputs are those of its cells."""
import ast
import base64
import importlib.util
import json
import re
import sys
import warnings

import pytest

from beyond import lab, runs

SMALL = {"rows": 16, "test_people": 16, "rounds": 1, "phi_steps": 8, "draws": 1,
         "budget": 5, "models": ("not-trained", "cda", "robust")}
PICTURES = importlib.util.find_spec("matplotlib") is not None
OUTPUTS = {"stream": {"name", "text"}, "display_data": {"data", "metadata"},
           "execute_result": {"data", "metadata", "execution_count"}}


@pytest.fixture(scope="module")
def notebook():
    return runs.read_json(lab.LAB)


@pytest.fixture(scope="module")
def cells(notebook):
    """The code cells; without matplotlib those that do not draw."""
    if not PICTURES:
        warnings.warn("matplotlib is not installed: the cells that draw are left out")
    cells = lab.code_cells(notebook)
    return [cell for cell in cells if PICTURES or "plt." not in source(cell)]


@pytest.fixture(scope="module")
def ran(cells):
    """-> (the namespace that all cells leave, [each cell's outputs])"""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(lab.LAB.parent)
        patch.setattr("sys.path", list(sys.path))
        patch.setenv("MPLBACKEND", "Agg")
        for namespace, outputs in lab.execute(cells, SMALL):
            found.append(outputs)
    return namespace, found


def source(cell):
    return "".join(cell["source"])


def kinds(outputs):
    return [output["output_type"] for output in outputs]


def test_the_notebook_is_nbformat_4_5(notebook):
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert {"name", "display_name"} <= set(notebook["metadata"]["kernelspec"])
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in notebook["cells"]:
        wanted = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"outputs", "execution_count"}
        assert set(cell) == wanted and cell["cell_type"] in ("code", "markdown")
        assert isinstance(cell["metadata"], dict)
        assert source(cell).splitlines(True) == cell["source"]
    assert [lab.SIZES in cell["metadata"].get("tags", ())
            for cell in notebook["cells"]].count(True) == 1


def test_stored_outputs_are_nbformat_4_5(notebook):
    for n, cell in enumerate(lab.code_cells(notebook), 1):
        assert cell["execution_count"] == n, "python -m beyond.lab ran all, in order"
        for output in cell["outputs"]:
            kind = output["output_type"]
            assert set(output) == OUTPUTS[kind] | {"output_type"}
            if kind == "stream":
                assert output["name"] == "stdout"
                assert "".join(output["text"]).splitlines(True) == output["text"]
            elif kind == "display_data":
                png = base64.b64decode(output["data"]["image/png"], validate=True)
                assert png.startswith(b"\x89PNG") and len(png) < 40_000


def test_cells_fit_beside_the_paper(notebook):
    for cell in lab.code_cells(notebook):
        ast.parse(source(cell))
        assert max(map(len, source(cell).splitlines())) <= 88


def test_every_cell_runs_and_its_outputs_are_stored(cells, ran):
    _, found = ran
    assert len(found) == len(cells)
    for cell, outputs in zip(cells, found):
        assert kinds(outputs) == kinds(cell["outputs"]), cell["id"]
    drawn = [kinds(outputs).count("display_data") for outputs in found]
    assert sum(drawn) == (4 if PICTURES else 0)


def test_stored_outputs_are_not_stale(cells, ran):
    """Those that depend on no size and no model."""
    for cell, outputs in zip(cells, ran[1]):
        if cell["id"] in ("metrics", "figure-3", "write-gumbel-code", "steps"):
            assert outputs == cell["outputs"], "run python -m beyond.lab"


def test_phi_climbs_and_the_distance_closes_the_gap(ran):
    namespace, _ = ran
    assert namespace["climbed"][-1] > 1.2 * namespace["climbed"][0]
    assert set(namespace["table"]) == set(SMALL["models"])
    assert namespace["p"].shape == (16, 2) and namespace["m"]["gap"] == 0


def test_compare_tells_the_answer_from_wrong_ones(notebook, ran, capsys):
    answers = source(notebook["cells"][-1])
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
    cell, = [cell for cell in cells if cell["id"] == name]
    assert source(cell).count(old) == 1
    namespace = {**ran[0], "re": re}
    lab.outputs_of(source(cell).replace(old, new), 1, namespace)
    assert eval(checks, namespace)


# ------------------------------------------------------------------ beyond.lab

def notebook_of(*sources):
    return {"cells": [{"cell_type": "code", "source": [text], "metadata": {}}
                      for text in sources]}


def test_outputs_of_a_cell():
    namespace = {}
    outputs = lab.outputs_of("x = 2\nprint('a')\nprint('b')\nx + 1", 4, namespace)
    assert outputs == [
        {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]},
        {"output_type": "execute_result", "execution_count": 4,
         "data": {"text/plain": ["3"]}, "metadata": {}}]
    assert lab.outputs_of("x + 1;", 5, namespace) == []
    assert lab.outputs_of("print()", 6, namespace)[0]["text"] == ["\n"]


def test_sizes_replace_what_the_tagged_cell_says():
    cells = notebook_of("n = 100", "n")["cells"]
    cells[0]["metadata"]["tags"] = [lab.SIZES]
    (_, _), (namespace, outputs) = lab.execute(cells, {"n": 3})
    assert outputs[0]["data"]["text/plain"] == ["3"]


def test_the_command_writes_outputs_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(lab, "LAB", tmp_path / "lab.ipynb")
    monkeypatch.chdir(tmp_path)                                   # and back at the end
    draw = "import matplotlib.pyplot as plt\nplt.figure()\nplt.plot([1, 2]);"
    runs.write_json(lab.LAB, notebook_of("print('§')", draw))
    lab.main()
    first = lab.LAB.read_bytes()
    lab.main()
    assert lab.LAB.read_bytes() == first, "the same cells, the same file"
    text, picture = json.loads(first)["cells"]
    assert text["outputs"][0]["text"] == ["§\n"] and text["execution_count"] == 1
    assert kinds(picture["outputs"]) == ["display_data"]


def test_a_cell_that_raises_leaves_the_notebook_as_it_was(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(lab, "LAB", tmp_path / "lab.ipynb")
    monkeypatch.chdir(tmp_path)                                   # and back at the end
    runs.write_json(lab.LAB, notebook_of("print(1)", "1 / 0"))
    before = lab.LAB.read_bytes()
    with pytest.raises(ZeroDivisionError):
        lab.main()
    assert lab.LAB.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lab.ipynb"]
