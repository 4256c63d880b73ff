"""Where a package is missing that only a part of this needs, one sentence says which, and how to get it."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
from torch import nn

from svit_course import __main__ as course

FIND = importlib.util.find_spec


@pytest.mark.parametrize(
    ("command", "package"), [(c, package) for c, needed in course.NEEDED.items() for package in needed]
)
def test_the_lecturers_commands(command: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else FIND(name))
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert course.main([command]) == 2
    told = capsys.readouterr().err
    assert (
        told == f"python -m svit_course {command} needs {package}, which is not installed: pip install -e '.[course]'\n"
    )


def test_the_explorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "svit_utils.show.widgets", raising=False)
    with pytest.raises(ImportError, match=r"^the explorers need the package ipywidgets: pip install ipywidgets$"):
        importlib.import_module("svit_utils.show.widgets")


@pytest.mark.parametrize("normaliser", ["entmax15", "sparsemax"])
def test_other_sparse_attentions(normaliser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    from svit_utils import sparsify

    monkeypatch.setitem(sys.modules, "entmax", None)
    model: nn.Module = timm.create_model("test_vit")
    before = [type(module) for module in model.modules()]
    with pytest.raises(ImportError, match=r"^entmax15 and sparsemax need the package entmax: pip install entmax$"):
        sparsify(model, normaliser=normaliser)
    assert [type(module) for module in model.modules()] == before, "nothing is converted"
