from __future__ import annotations

from pathlib import Path

import pytest

from svit_course.notebooks import ROOT
from svit_utils import paths


def test_in_the_repository() -> None:
    assert paths.repo_root() == ROOT
    assert paths.checkpoints_dir() == ROOT / "data" / "checkpoints"
    assert paths.results_dir() == ROOT / "results"
    assert paths.data_dir() == ROOT / "data"
    assert paths.weights_dir() is None


def test_settings_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SVIT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SVIT_WEIGHTS_DIR", "~/weights")
    assert paths.data_dir() == tmp_path
    assert paths.weights_dir() == Path.home() / "weights"
    assert paths.checkpoints_dir() == ROOT / "data" / "checkpoints"  # the shipped ones stay where they are
