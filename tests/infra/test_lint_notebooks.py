from __future__ import annotations

import copy
import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from svit_course.notebooks import KERNEL
from tools.lint_notebooks import main, problems


def page(**changes):
    output = new_output("stream", name="stdout", text="3\n")
    notebook = new_notebook(
        metadata=copy.deepcopy(KERNEL), cells=[new_code_cell("print(3)", execution_count=1, outputs=[output])]
    )
    for name, value in changes.items():
        notebook.cells[0][name] = value
    return notebook


def found(notebook, folder: Path) -> list[str]:
    nbformat.write(notebook, folder / "x.ipynb")
    return list(problems(folder / "x.ipynb"))


def test_a_clean_notebook(tmp_path: Path) -> None:
    assert found(page(), tmp_path) == []
    assert main([str(tmp_path / "x.ipynb")]) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"execution_count": None}, "execution counts"),
        ({"execution_count": 2}, "execution counts"),
        ({"source": "  "}, "empty"),
        ({"outputs": [new_output("stream", name="stdout", text="in /home/somebody/x")]}, "local path: /home/somebody"),
        (
            {"outputs": [new_output("execute_result", {"text/plain": "'C:\\Users\\me'"}, execution_count=1)]},
            "local path",
        ),
    ],
)
def test_each_problem_is_named(tmp_path: Path, changes: dict, says: str) -> None:
    [problem] = found(page(**changes), tmp_path)
    assert says in problem
    assert main([str(tmp_path / "x.ipynb")]) == 1


def test_damaged_and_stateful_notebooks(tmp_path: Path) -> None:
    (tmp_path / "x.ipynb").write_text("{", encoding="utf-8")
    assert "not a valid notebook" in next(problems(tmp_path / "x.ipynb"))
    notebook = page()
    notebook.metadata["widgets"] = {}
    assert "widget state" in found(notebook, tmp_path)[0]


def other_version(notebook: dict) -> None:
    notebook["metadata"]["language_info"]["version"] = "3.12.1"


def without_display_name(notebook: dict) -> None:
    notebook["metadata"]["kernelspec"]["display_name"] = "Python 3"


def other_order(notebook: dict) -> None:
    notebook["metadata"] = dict(reversed(notebook["metadata"].items()))


@pytest.mark.parametrize("layout", [{"indent": 1}, {"indent": 2, "ensure_ascii": False}])
@pytest.mark.parametrize("change", [other_version, without_display_name, other_order])
@pytest.mark.parametrize("end", ["", "\n"])
def test_what_jupyterlab_would_change_is_named_and_mended(tmp_path: Path, change, layout: dict, end: str) -> None:
    path = tmp_path / "x.ipynb"
    notebook = page(outputs=[], source="# τ")
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    wanted, content = path.read_bytes(), json.loads(nbformat.writes(notebook))
    change(content)
    path.write_text(json.dumps(content, **layout) + end, encoding="utf-8")
    [problem] = problems(path)
    assert "JupyterLab would" in problem and "--fix" in problem
    assert main(["--fix", str(path)]) == 0
    assert path.read_bytes() == wanted
