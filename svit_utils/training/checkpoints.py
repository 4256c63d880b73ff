"""Training checkpoints that survive a kill at any moment.

A checkpoint is written beside the old one, flushed to the disk and then renamed over it; a rename is atomic, so there
is always one whole checkpoint. It holds everything the next step depends on: weights, optimiser, averaged weights, the
random generators of every process, and the step, from which data order, learning rate and tau follow.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zipfile
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from svit_utils.attention import Normaliser, sparse_modules
from svit_utils.attention.normalisers import ThresholdedSoftmax
from svit_utils.files import replacing
from svit_utils.training.config import TrainConfig

CHECKPOINT = "checkpoint.pt"
# What torch.load raises, depending on where the damage is.
DAMAGED = (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, UnpicklingError, BadZipFile)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


def save_checkpoint(state: dict[str, Any], folder: Path) -> None:
    """Replace the checkpoint in ``folder`` by ``state``, whole or not at all."""
    with replacing(folder / CHECKPOINT) as partial, open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left."""
    for partial in folder.glob(f".{CHECKPOINT}.*.partial"):
        partial.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Remove an earlier run's checkpoint and weights, which would otherwise be taken for those of the new one."""
    for name in (CHECKPOINT, "best.safetensors", "last.safetensors"):
        (folder / name).unlink(missing_ok=True)


def fingerprint(model: nn.Module, config: TrainConfig, images: int, processes: int) -> str:
    """What must be the same for a checkpoint to fit, as JSON: model, thresholds, starting weights, recipe, data size.

    Args:
        model: as it starts, before the first step.
        config: its recipe; what does not change the result (how often to log, say) is left out.
        images: in the training set.
        processes: that share each step.
    """
    recipe = {k: v for k, v in asdict(config).items() if k not in ("checkpoint_every", "log_every", "num_workers")}
    shapes = "".join(f"{name}{tuple(p.shape)}" for name, p in model.state_dict().items())
    sparse = {name: _attention(module.normaliser) for name, module in sparse_modules(model).items()}
    digest = hashlib.sha256((shapes + json.dumps(sparse)).encode()).hexdigest()[:12]
    start = hashlib.sha256()
    for value in model.state_dict().values():
        start.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    content = {
        "model": f"{type(model).__name__}-{digest}",
        "start": f"weights-{start.hexdigest()[:12]}",
        "images": images,
        "processes": processes,
        **recipe,
    }
    return json.dumps(content, sort_keys=True)


def _attention(normaliser: Normaliser) -> str:
    """Which attention a module has; of the thresholded softmax only its settings, as in the oldest checkpoints."""
    if isinstance(normaliser, ThresholdedSoftmax):
        return f"{normaliser.empty_rows} {normaliser.threshold.extra_repr()}"
    return repr(normaliser)


def load_checkpoint(folder: Path, expected: str) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, or None when there is none.

    Raises:
        CheckpointError: damaged, or written by a run with another fingerprint than ``expected``.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        recorded = state["fingerprint"]
    except DAMAGED as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({type(error).__name__}); delete it to start again, or pass resume=False"
        ) from error
    if difference := _difference(recorded, expected):
        raise CheckpointError(
            f"the checkpoint {path} belongs to another run: {difference}. Choose another "
            "out_dir, or pass resume=False to start again"
        )
    return state


def _check_sums(path: Path) -> None:
    """torch.save writes a zip file with checksums that torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise BadZipFile(f"wrong checksum of {damaged}")


def _difference(recorded: str, expected: str) -> str:
    """Which recorded entries differ between two fingerprints, as a sentence; empty when none does."""
    old, new = json.loads(recorded), json.loads(expected)
    return ", ".join(
        f"{name} was {old[name]} and is {new.get(name, 'absent')}"
        for name in sorted(old)
        if name not in new or old[name] != new[name]
    )


def random_state() -> dict[str, Any]:
    """The state of the three generators, in types that torch's ``weights_only`` loading accepts."""
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
