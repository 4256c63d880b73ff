from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.notebooks.notebook_functions import extract_function


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    cells = [
        new_code_cell("%matplotlib inline\nfrom math import sqrt as root\nraise SystemExit('never run')"),
        new_code_cell("FACTOR = 3\ndef helper(x: Undefined) -> Undefined:\n    return FACTOR * x"),
        new_code_cell("def taught(x):\n    return helper(x)"),
        new_code_cell("def taught(x):\n    return helper(x) + 1\n\nalias = root"),
    ]
    path = tmp_path / "x.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_takes_the_definition_and_what_it_needs(chapter: Path) -> None:
    assert extract_function(chapter, "taught", needs=["FACTOR", "helper"])(2) == 7
    assert extract_function(chapter, "taught", needs=["FACTOR", "helper"], occurrence=0)(2) == 6
    assert extract_function(chapter, "taught", {"helper": lambda x: -x})(2) == -1


def test_an_import_or_an_alias_is_not_a_definition(chapter: Path) -> None:
    with pytest.raises(LookupError, match="defines 'root' 0 times"):
        extract_function(chapter, "root")
    with pytest.raises(LookupError, match="no `def`"):
        extract_function(chapter, "alias", {"root": abs})
    with pytest.raises(LookupError, match="defines 'taught' 2 times"):
        extract_function(chapter, "taught", occurrence=2)
