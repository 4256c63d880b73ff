"""Models by name, and their weights: timm's, local ones, and the checkpoints that this repository ships."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from svit_utils.paths import checkpoints_dir, weights_dir

SMALL_VIT = "small_vit"


class WeightsError(ValueError):
    """Weights that are missing, damaged, or of another model; the message says which and what to do."""


def create_model(
    name: str, num_classes: int = 10, img_size: int | None = None, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """A dense model.

    Args:
        name: ``"small_vit"`` (56 px, patch 4: 14 x 14 tokens and a class token, N = 197 as in ViT-Base/16 at 224 px;
            width 96, depth 4, 3 heads) or a timm name.
        num_classes: outputs; a pretrained head of another size is replaced by a new one.
        img_size: pixels along a side, where the model's own is not wanted.
        pretrained: load ``$SVIT_WEIGHTS_DIR/<name>.safetensors`` if it is there, else what timm downloads.
        **kwargs: for timm.

    Raises:
        WeightsError: pretrained weights neither found nor downloadable, damaged, or of another model.
        ValueError: unknown name, or an img_size that `small_vit` cannot cut into patches.
    """
    if name == SMALL_VIT:
        if pretrained:
            raise ValueError(f"{SMALL_VIT} has no pretrained weights; use load_embedded for the shipped checkpoints")
        if img_size is not None and (img_size < 4 or img_size % 4):
            raise ValueError(
                f"{SMALL_VIT} cuts images into patches of 4 pixels: img_size must be a multiple of 4, got {img_size}"
            )
        return VisionTransformer(
            img_size=img_size or 56, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=num_classes, **kwargs
        )
    if not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}: use {SMALL_VIT!r} or a timm name (timm.list_models() lists them)")
    if img_size is not None:
        kwargs["img_size"] = img_size
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    folder = weights_dir()
    local = None if folder is None else folder / f"{name}.safetensors"
    if local is not None and local.is_file():
        resize = kwargs.pop("img_size", None)
        model = timm.create_model(name, **kwargs)
        load_weights(model, local)
        if resize is not None:
            _set_img_size(model, name, resize)
        if num_classes != model.num_classes:
            model.reset_classifier(num_classes)  # type: ignore[operator]
        return model
    try:
        return timm.create_model(name, num_classes=num_classes, pretrained=True, **kwargs)
    except Exception as error:  # timm passes on whatever its hub client raises
        raise WeightsError(
            f"no pretrained weights for {name}: not found in SVIT_WEIGHTS_DIR ({folder or 'not set'}), and the "
            f"download failed ({type(error).__name__}). Put {name}.safetensors, with timm's key names, into a folder "
            "and set SVIT_WEIGHTS_DIR to it."
        ) from error


def _set_img_size(model: nn.Module, name: str, img_size: int) -> None:
    """Resample the position embeddings, as timm does with weights that it downloads."""
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"{name} takes its weights' own image size only; leave img_size out")
    model.set_input_size(img_size=img_size)  # type: ignore[operator]


def load_embedded(name: str) -> nn.Module:
    """One of the shipped checkpoints as a dense `small_vit`, in eval mode; see data/README.md for the list.

    Raises:
        WeightsError: no such checkpoint, or a damaged one.
    """
    path = checkpoints_dir() / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in checkpoints_dir().glob("*.safetensors"))) or "none"
        raise WeightsError(f"no shipped checkpoint {name!r}; there are: {known}")
    model = create_model(SMALL_VIT)
    load_weights(model, path)
    return model.eval()


def save_weights(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> Path:
    """Write the state_dict as safetensors; an existing file is replaced whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    state = {name: value.detach().contiguous().cpu().clone() for name, value in model.state_dict().items()}
    save_file(state, partial, metadata=dict(metadata or {}))
    os.replace(partial, path)
    return path


def read_card(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata a checkpoint of ours carries: data, steps, seed, accuracy.

    Raises:
        WeightsError: missing or damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file strictly.

    Raises:
        WeightsError: missing or damaged file, or one of another model, with the first names or shapes that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path.name} is damaged ({error}); fetch or train it again") from error
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        details = []
        if missing:
            details.append(f"{len(missing)} missing (first: {missing[0]})")
        if unknown:
            details.append(f"{len(unknown)} unknown (first: {unknown[0]})")
        if shapes:
            k = shapes[0]
            details.append(
                f"{len(shapes)} of another shape (first: {k}, {tuple(state[k].shape)} for {tuple(own[k].shape)})"
            )
        raise WeightsError(
            f"{path.name} holds another model than {type(model).__name__}: tensors " + ", ".join(details)
        )
    with torch.no_grad():
        model.load_state_dict(state)
