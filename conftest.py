"""Settings shared by the unit tests and by the chapters under ``pytest --nbval``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--nbval", default=False):
        return
    # The kernel is the Python that runs pytest, whatever kernels the reader has installed.
    config.option.nbval_current_env = config.option.nbval_kernel_name is None
    if config.option.nbval_sanitize_with is None:
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "notebooks" / "sanitize.cfg")
    # Stored outputs are those of the profile `cpu`, on every machine.
    os.environ["SVIT_PROFILE"] = "cpu"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A bare ``pytest --nbval`` is the chapters: unit tests and the assignments' masters are left to ``pytest``."""
    nbval = config.getoption("--nbval", default=False)
    if nbval and collection_path == ROOT / "notebooks" / "assignments":
        return True  # masters store no outputs to compare with; tests/course runs them
    bare = config.args_source is not pytest.Config.ArgsSource.ARGS
    if bare and nbval and collection_path.is_relative_to(ROOT / "tests"):
        return True
    return None
