"""Models by name: `small_vit` and timm's, with new or pretrained weights."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from svit_utils.paths import weights_dir
from svit_utils.weights import WeightsError, read_state, state_difference

log = logging.getLogger(__name__)

SMALL_VIT = "small_vit"


def create_model(
    name: str, num_classes: int | None = None, img_size: int | None = None, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """Build a dense model. A warning is logged where weights are new (the head's) or changed (position embeddings).

    Args:
        name: ``"small_vit"`` (56 px, patch 4: 14 x 14 tokens and a class token, N = 197 as in ViT-Base/16 at 224 px;
            width 96, depth 4, 3 heads) or a timm name.
        num_classes: number of outputs, if not the model's own (10 for small_vit); a pretrained head of another size is
            replaced by a new one.
        img_size: pixels along a side, if not the model's own size.
        pretrained: load ``$SVIT_WEIGHTS_DIR/<name>.safetensors`` if it exists, else let timm download weights. They are
            adapted to another image size, patch size or number of channels as timm does it.
        **kwargs: passed to timm.

    Raises:
        WeightsError: pretrained weights neither found nor downloadable, damaged, or of another model.
        ValueError: unknown name, or arguments that the model cannot take.
    """
    for what, value, least in ("img_size", img_size, 1), ("num_classes", num_classes, 0):
        if value is not None and value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    if img_size is not None:
        kwargs["img_size"] = img_size
    if name == SMALL_VIT:
        if pretrained:
            raise ValueError(f"{SMALL_VIT} has no pretrained weights; use load_embedded for the shipped checkpoints")
        size = kwargs.setdefault("img_size", 56)
        if size % 4:
            raise ValueError(
                f"{SMALL_VIT} cuts images into patches of 4 pixels: img_size must be a multiple of 4, got {size}"
            )
        classes = 10 if num_classes is None else num_classes
        about = pretrained_config(SMALL_VIT) | {"input_size": (3, size, size), "num_classes": classes}
        shape = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
        return build("vit_tiny_patch16_224", pretrained_cfg=about, num_classes=classes, **{**shape, **kwargs})
    if not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}: use {SMALL_VIT!r} or a timm name (timm.list_models() lists them)")
    try:
        if pretrained:
            return _pretrained(name, num_classes, kwargs)
        return build(name, **_given(num_classes), **kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:  # timm's models refuse each in their own way
        if "'img_size'" in str(error) and not pretrained_config(name).get("fixed_input_size", True):
            del kwargs["img_size"]  # a convolutional network takes any size
            return create_model(name, num_classes, None, pretrained, **kwargs)
        raise ValueError(f"timm cannot build {name} with {kwargs}: {error or type(error).__name__}") from error


def pretrained_config(name: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of a model by name, `small_vit` included; {} for a name that timm does not know."""
    if name == SMALL_VIT:
        about = {"input_size": (3, 56, 56), "fixed_input_size": True, "num_classes": 10, "crop_pct": 1.0}
        return about | {"first_conv": "patch_embed.proj", "classifier": "head"}
    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {} if found is None else found.to_dict() | {"has_weights": found.has_weights or _local(name) is not None}


def _local(name: str) -> Path | None:
    """The file of pretrained weights in ``SVIT_WEIGHTS_DIR``, if there is one."""
    path = (weights_dir() or Path()) / f"{name}.safetensors"
    return path if weights_dir() is not None and path.is_file() else None


def _pretrained(name: str, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """The model with local weights, else with those that timm downloads; raises as `create_model`."""
    size = kwargs.get("img_size")
    if (local := _local(name)) is not None:
        model = _from_file(name, local, {k: v for k, v in kwargs.items() if k != "img_size"})
        own = model.num_classes
        if size is not None:
            resize(model, size)
        if num_classes not in (None, own):
            model.reset_classifier(num_classes)  # type: ignore[operator]
    else:
        with torch.random.fork_rng(devices=[]):
            before = 0 if size is None else _positions(build(name))
        try:
            model = build(name, pretrained=True, **_given(num_classes), **kwargs)
        except Exception as error:  # timm passes on whatever its hub client raises
            raise WeightsError(
                f"no pretrained weights for {name}: not found in SVIT_WEIGHTS_DIR ({weights_dir() or 'not set'}), and "
                f"the download failed ({type(error).__name__}). Put {name}.safetensors, with timm's key names, into a "
                "folder and set SVIT_WEIGHTS_DIR to it."
            ) from error
        own = model.pretrained_cfg["num_classes"]  # type: ignore[index]
        _say_resampled(model, before)
    if num_classes and num_classes != own:
        log.warning("%s: the head of %d classes is new (random); the pretrained one has %d", name, num_classes, own)
    return model


def _given(num_classes: int | None) -> dict[str, int]:
    return {} if num_classes is None else {"num_classes": num_classes}


def _from_file(name: str, path: Path, kwargs: dict[str, Any]) -> nn.Module:
    """The model with the weights of a file, which timm adapts where ``kwargs`` give another patch size or channels."""
    model, state = build(name, **kwargs), read_state(path)
    if not (difference := state_difference(model.state_dict(), state)):
        model.load_state_dict(state)
        return model
    before = state["pos_embed"].shape[1:-1].numel() if "pos_embed" in state else 0
    try:
        model = build(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **kwargs)
    except Exception as error:  # timm raises whatever its loader meets
        what = f"{name} with {kwargs}" if kwargs else name
        raise WeightsError(f"{path.name} holds another model than {what}: tensors {difference}") from error
    model.pretrained_cfg.pop("state_dict")  # type: ignore[operator, union-attr]
    _say_resampled(model, before)
    return model


def _positions(model: nn.Module) -> int:
    """The number of position embeddings; 0 for a model without."""
    found = getattr(model, "pos_embed", None)
    return found.shape[1:-1].numel() if isinstance(found, torch.Tensor) else 0


def _say_resampled(model: nn.Module, before: int) -> None:
    if before and (after := _positions(model)) != before:
        log.warning("%s: position embeddings resampled from %d tokens to %d", type(model).__name__, before, after)


def resize(model: nn.Module, img_size: int) -> None:
    """Change the model's image size in place; timm resamples the position embeddings, which is logged as a warning.

    Raises:
        ValueError: a model that takes one image size only, or not this one.
    """
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"{type(model).__name__} takes its weights' own image size only; leave img_size out")
    before = _positions(model)
    try:
        model.set_input_size(img_size=img_size)  # type: ignore[operator]
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{type(model).__name__} cannot take images of {img_size} px: {error}") from error
    _say_resampled(model, before)


def build(name: str, **arguments: Any) -> nn.Module:
    """`timm.create_model`; older versions do not keep the arguments on the model, which `save_trained` needs."""
    model = timm.create_model(name, **arguments)
    if not hasattr(model, "_model_args"):
        model._model_args = {k: v for k, v in arguments.items() if k not in ("pretrained", "pretrained_cfg")}
    return model
