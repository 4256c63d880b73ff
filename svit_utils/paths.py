"""Where things lie: data, weights, the embedded checkpoints and the recorded results. Nothing here creates anything.

In the repository (an editable install, or the repository as working folder) the checkpoints lie in ``data/checkpoints``
and the results in ``results``; in an installed wheel, both lie inside the package, under ``_embedded``.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def repo_root() -> Path | None:
    """The repository this package is imported from, or None when it runs from an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def data_dir() -> Path:
    """The data directory, which need not exist: ``$SVIT_DATA_DIR``, else ``data/`` of the repository, or of the working
    folder where there is none."""
    named = os.environ.get("SVIT_DATA_DIR")
    return Path(named).expanduser() if named else (repo_root() or Path.cwd()) / "data"


def weights_dir() -> Path | None:
    """The folder with local weights ``<timm name>.safetensors``: ``$SVIT_WEIGHTS_DIR``, or None when it is not set."""
    named = os.environ.get("SVIT_WEIGHTS_DIR")
    return Path(named).expanduser() if named else None


def checkpoints_dir() -> Path:
    """The checkpoints this project trained and ships (safetensors, each with a card)."""
    return _embedded("data/checkpoints", "checkpoints")


def results_dir() -> Path:
    """The recorded experiments (CSV and JSON with provenance)."""
    return _embedded("results", "results")


def _embedded(in_repository: str, in_package: str) -> Path:
    root = repo_root()
    return root / in_repository if root is not None else _PACKAGE / "_embedded" / in_package
