"""NOT IN THE PAPER: runs the lab as Jupyter would, and keeps its outputs.

    python -m beyond.lab       # lab.ipynb anew: no Jupyter, but matplotlib is needed

The cells run one after the other in one namespace. What a cell prints, its pictures and
the value of a last expression (unless a semicolon ends it) are stored in the notebook.
If a cell raises, the notebook stays as it was.
"""
import ast
import base64
import contextlib
import importlib.util
import io
import json
import os
import pathlib

from adult import InputError
from beyond import runs

LAB = pathlib.Path(__file__).with_name("lab.ipynb")
DPI = 60
SIZES = "parameters"          # the tag of the cell with the sizes, as papermill has it


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(cells, sizes=()):
    """Run code cells; yields the namespace and a cell's outputs, as nbformat has them.

    sizes: {name: value}, which replaces what the cell tagged SIZES says: a test is
    quicker with smaller ones.
    """
    namespace = {"__name__": "__main__"}
    for n, cell in enumerate(cells, 1):
        yield namespace, outputs_of("".join(cell["source"]), n, namespace)
        if SIZES in cell["metadata"].get("tags", ()):
            namespace.update(sizes)


def outputs_of(source, n, namespace):
    """Run the n-th cell -> its outputs."""
    body, value, printed = ast.parse(source).body, None, io.StringIO()
    shown = isinstance(body[-1], ast.Expr) and not source.endswith(";")
    last = ast.Expression(body.pop().value) if shown else None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {n}", "exec"), namespace)
        if last:
            value = eval(compile(last, f"cell {n}", "eval"), namespace)
    outputs = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    outputs += pictures(namespace.get("plt"))
    if value is not None:
        data = {"text/plain": [repr(value)]}
        outputs.append({"output_type": "execute_result", "execution_count": n,
                        "data": data, "metadata": {}})
    return outputs


def pictures(plt):
    """Close the open figures -> outputs with them. plt: pyplot, or None."""
    outputs = []
    for number in plt.get_fignums() if plt else ():
        png = io.BytesIO()
        plt.figure(number).savefig(png, dpi=DPI, bbox_inches="tight",
                                   metadata={"Software": None})
        plt.close(number)
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def main():
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the pictures need matplotlib: `pip install matplotlib`.")
    os.environ["MPLBACKEND"] = "Agg"               # draws to files, not to a screen
    os.chdir(LAB.parent)                                # where Jupyter starts
    notebook = runs.read_json(LAB)
    cells, kept = code_cells(notebook), []
    for n, (_, outputs) in enumerate(execute(cells), 1):
        runs.say(f"  cell {n} of {len(cells)}")
        kept.append(outputs)
    for n, (cell, outputs) in enumerate(zip(cells, kept), 1):
        cell.update(execution_count=n, outputs=outputs)
    runs.write(LAB, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    with runs.one_sentence("beyond.lab"):
        main()
