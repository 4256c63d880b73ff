"""Training checkpoints that survive a kill at any moment.

A checkpoint is written beside the old one, flushed to the disk and then renamed over it; a rename is atomic, so there
is always one whole checkpoint. It holds everything the next step depends on: weights, optimiser, EMA, the three random
generators of every process, and the step, from which data order, learning rate and tau follow.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKPOINT = "checkpoint.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


def save_checkpoint(state: dict[str, Any], folder: Path) -> None:
    """Replace the checkpoint in ``folder`` by ``state``, whole or not at all."""
    partial = folder / f".{CHECKPOINT}.partial"
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / CHECKPOINT)


def remove_checkpoint(folder: Path) -> None:
    """Forget the run in ``folder``: what is found there later must not be the old one's checkpoint or weights."""
    for name in (CHECKPOINT, f".{CHECKPOINT}.partial", "best.safetensors", "last.safetensors"):
        (folder / name).unlink(missing_ok=True)


def load_checkpoint(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, or None when there is none.

    Raises:
        CheckpointError: damaged, or written by a run with another ``fingerprint``.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        recorded = state["fingerprint"]
    except (
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({type(error).__name__}); delete it to start again, or pass resume=False"
        ) from error
    if difference := _difference(recorded, fingerprint):
        raise CheckpointError(
            f"the checkpoint {path} belongs to another run: {difference}. Choose another "
            "out_dir, or pass resume=False to start again"
        )
    return state


def _check_sums(path: Path) -> None:
    """torch.save writes a zip file with checksums that torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def _difference(recorded: str, fingerprint: str) -> str:
    """The recorded entries in which two fingerprints differ, in words; empty when there is none."""
    old, new = json.loads(recorded), json.loads(fingerprint)
    return ", ".join(
        f"{name} was {old[name]} and is {new.get(name, 'absent')}"
        for name in sorted(old)
        if name not in new or old[name] != new[name]
    )


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, in types that ``weights_only`` loading accepts."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - timm's Mixup draws from it
    state = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
