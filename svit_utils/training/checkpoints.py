"""Training checkpoints that survive a kill at any moment.

A checkpoint is written beside the old one, flushed to the disk and then renamed over it; a rename is atomic, so there
is always one whole checkpoint. It holds everything the next step depends on: weights, optimiser, averaged weights, the
random generators of every process, and the step, from which data order, learning rate and tau follow.
"""

import json
import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from svit_utils.files import replacing
from svit_utils.training.fingerprint import difference
from svit_utils.training.outputs import writing

CHECKPOINT = "checkpoint.pt"
WRITTEN = (CHECKPOINT, "best.safetensors", "last.safetensors", "metrics.csv")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


def save_checkpoint(state: dict[str, Any], folder: Path) -> None:
    """Replace the checkpoint in ``folder`` by ``state``, whole or not at all; `OutputError` where the disk is full."""
    path = folder / CHECKPOINT
    kept = " The checkpoint before it is kept." if path.exists() else ""
    with writing(path, kept), replacing(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left; only for who holds the folder's lock."""
    for name in WRITTEN:
        for partial in folder.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Remove an earlier run's checkpoint and weights, which would otherwise be taken for those of the new one."""
    for name in WRITTEN[:3]:
        with writing(folder / name):
            (folder / name).unlink(missing_ok=True)


def load_checkpoint(folder: Path, expected: str) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, or None when there is none.

    Raises:
        CheckpointError: damaged, or written by a run with another fingerprint than ``expected``.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    if not path.is_file():  # to open a named pipe would wait for ever
        raise CheckpointError(f"{path} is not a file: remove it, or choose another out_dir")
    with refusing(path):
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(state)
        differs = difference(state["fingerprint"], expected)
    if differs:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another run: {differs}. Choose another "
            "out_dir, or pass resume=False to start again"
        )
    return state


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or malformed checkpoint leads to into `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch.load and what it unpickles may raise anything
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {reason}); delete it to start again, or pass "
            "resume=False"
        ) from error


def checkpoint_step(folder: Path) -> int | None:
    """The step of the checkpoint in ``folder``; None where there is none that can be read."""
    try:
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)
        return int(state["run"]["step"])
    except Exception:  # see `refusing`
        return None


def _check_sums(path: Path) -> None:
    """torch.save writes a zip file with checksums that torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise BadZipFile(f"wrong checksum of {damaged}")


def _check_content(state: Any) -> None:
    """Raise ValueError or TypeError unless the parts are there and of the right kinds."""
    kinds: dict[str, Any] = {
        "fingerprint": str,
        "model": dict,
        "optimiser": dict,
        "ema": (dict, type(None)),
        "run": dict,
    }
    kinds |= {"ema": (dict, type(None)), "random": (list, tuple), "sample": (dict, type(None))}
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}")
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            if name == "sample" and name not in state:
                continue  # an older one, of which the fingerprint will say more
            raise TypeError(f"its {name!r} is {'missing' if name not in state else type(state[name]).__name__}")
    if not isinstance(json.loads(state["fingerprint"]), dict):
        raise TypeError("its fingerprint is not one")
    for name in ("model", "ema"):
        for key, value in (state[name] or {}).items():
            if not isinstance(value, torch.Tensor) or (value.is_floating_point() and not bool(value.isfinite().all())):
                raise ValueError(f"{key} of its {name} is not a finite tensor")


def check_optimiser(saved: dict[str, Any], own: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    """Raise ValueError unless the optimiser's state fits; what torch does not check itself is the tensors' shapes."""
    groups = [[list(group["params"]) for group in state["param_groups"]] for state in (saved, own)]
    if groups[0] != groups[1] or not isinstance(saved["state"], dict):
        raise ValueError("its optimiser has other parameters")
    for index, values in saved["state"].items():
        if set(values) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"its optimiser keeps {sorted(map(str, values))} of parameter {index}")
        for name, value in values.items():
            shape = () if name == "step" else tuple(parameters[index].shape)
            if tuple(value.shape) != shape or not bool(value.isfinite().all()):
                raise ValueError(f"{name} of its optimiser does not fit parameter {index}")


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
