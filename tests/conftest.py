"""Every unit test starts from the same seeds, on one thread, and without the reader's own settings."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# These kill, fork, and make pipes. On Windows `os.kill` ends the process that it names, here pytest itself.
POSIX_ONLY = [
    "course/test_grade.py",
    "data/test_pictures.py",
    "grader/test_attacks.py",
    "grader/test_points.py",
    "grader/test_promises.py",
    "grader/test_routes.py",
    "training/test_one_folder.py",
    "training/test_processes.py",
    "training/test_resume.py",
    "training/test_signals.py",
]
collect_ignore = POSIX_ONLY if os.name == "nt" else []
# `make` started the tests, perhaps: the makes that tests start are none of its own, and do not inherit its settings.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(name, None)
# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, and an environment without SVIT_* settings: a test that needs one sets it."""
    for name in [name for name in os.environ if name.startswith("SVIT_") and name != "SVIT_ALONE"]:
        monkeypatch.delenv(name)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole book, built strictly: a warning, or a name that cannot be found, is an error."""
    from tools import book  # needs Sphinx, which the tests of the book look for

    out = tmp_path_factory.mktemp("book") / "site"
    book.build(out)
    return out


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts pytest in the background has it ignore Ctrl-C, and so would the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Property tests: the same examples on every run, and no deadline on a machine that others share.
    try:
        from hypothesis import settings
    except ImportError:  # the tests that need it say so themselves
        return
    settings.register_profile("svit", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("svit")
