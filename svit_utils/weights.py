"""Weights as safetensors files: written whole or not at all, loaded strictly."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svit_utils.attention import sparse_modules
from svit_utils.files import replacing

log = logging.getLogger(__name__)
SPARSE_NOTE = "sparse_layers"  # in a file's metadata: how many attention modules of the saved model were sparse


class WeightsError(ValueError):
    """Weights that are missing, damaged, or of another model; the message says which and what to do."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and DistributedDataParallel; any other model as it is."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names in the unwrapped model, of which parts may have been compiled, too."""
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a model's state_dict, or named tensors, to a safetensors file; an old one is replaced whole or not at all.

    Only tensors are saved, under the names of the unwrapped model. Those of a sparse model are the dense model's, but
    for learned thresholds: tau, warm-up and normaliser are not among them. `svit_utils.models.save_trained` keeps them.
    """
    state = _plain(unwrap(model).state_dict() if isinstance(model, nn.Module) else model)
    if isinstance(model, nn.Module):
        metadata = {**sparse_note(model), **(metadata or {})}
    with replacing(path) as partial:  # cloned, since safetensors refuses tensors that share memory
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, partial, dict(metadata or {}))
    return Path(path)


def sparse_note(model: nn.Module) -> dict[str, str]:
    """What a file of weights says of the cut, for which `load_weights` looks; nothing for a dense model."""
    return {SPARSE_NOTE: str(count)} if (count := len(sparse_modules(model))) else {}


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file strictly into ``model``, in the model's own dtype.

    A warning is logged where a sparse model was saved and ``model`` is dense: then it computes something else.
    The model, and the one that was saved, may be wrapped by ``torch.compile`` or DistributedDataParallel.

    Raises:
        WeightsError: missing or damaged file, or one of another model; the message names the first difference.
    """
    state, model = read_state(path), unwrap(model)
    names = {name.replace("_orig_mod.", ""): name for name in model.state_dict()}
    if difference := state_difference(_plain(model.state_dict()), state):
        raise WeightsError(f"{Path(path).name} holds another model than {type(model).__name__}: tensors {difference}")
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    with safe_open(path, framework="pt") as file:
        sparse = SPARSE_NOTE in (file.metadata() or {})
    if sparse and not sparse_modules(model):
        log.warning(
            "%s was saved from a model with sparse attention, and this %s is dense: the weights alone bring no cut. "
            "load_trained does, for a file of save_trained; else call sparsify",
            Path(path).name,
            type(model).__name__,
        )


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file by their names in the unwrapped model; raises as `load_weights`."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}")
    try:
        return _plain(load_file(path))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path.name} is damaged ({error}); fetch or train it again") from error


def state_difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """How ``other`` differs from ``own`` in names and shapes, with the first of each kind; "" where it does not."""
    missing, unknown = sorted(set(own) - set(other)), sorted(set(other) - set(own))
    shapes = [
        f"{name}, {tuple(other[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in other and own[name].shape != other[name].shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    return ", ".join(f"{len(found)} {kind} (first: {found[0]})" for kind, found in kinds.items() if found)
