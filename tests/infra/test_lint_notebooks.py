from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools.lint_notebooks import main, problems


def page(**changes):
    output = new_output("stream", name="stdout", text="3\n")
    notebook = new_notebook(cells=[new_code_cell("print(3)", execution_count=1, outputs=[output])])
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
