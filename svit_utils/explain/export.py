"""All maps of a batch at once, and their export: one file of numbers, one overlay picture per image and method."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from svit_utils.explain.gradcam import grad_cam, layer_grad_cam
from svit_utils.explain.grid import unwrap
from svit_utils.explain.maps import class_attention
from svit_utils.explain.rollout import attention_rollout

__all__ = ["METHODS", "explain_batch", "export_maps", "load_maps"]

METHODS: dict[str, Callable[..., Tensor]] = {
    "attention": lambda model, x, targets: class_attention(model, x).mean(dim=1),  # last layer, mean over heads
    "attention_heads": lambda model, x, targets: class_attention(
        model, x
    ),  # the only one with a head dimension: [B, H, h, w]
    "rollout": lambda model, x, targets: attention_rollout(model, x),
    "grad_cam": lambda model, x, targets: grad_cam(model, x, targets),
    "layer_grad_cam": lambda model, x, targets: layer_grad_cam(model, x, targets),
}
DEFAULT_METHODS = ("attention", "rollout", "grad_cam", "layer_grad_cam")


def explain_batch(
    model: nn.Module,
    x: Tensor,
    methods: Sequence[str] = DEFAULT_METHODS,
    targets: int | Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """Maps of every method for images `x` [B, 3, H, W]: name -> [B, h, w] on the token grid (`attention_heads`: [B, H,
    h, w]).

    Attention and rollout know no class; `targets` (default: the predicted classes) concerns the two Grad-CAMs.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: allowed are {', '.join(METHODS)}")
    return {method: METHODS[method](unwrap(model), x, targets) for method in methods}


def export_maps(
    path: str | Path,
    maps: Mapping[str, Tensor],
    images: Tensor | None = None,
    metadata: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write `maps` to `path` (.safetensors or .npz) and, with `images`, PNG overlays into a folder of the same name
    beside it.

    Args:
        images: [B, 3, H, W] in [0, 1], for display (undo the normalisation first).
        metadata: anything JSON can hold; kept as text in a safetensors header, or as the array `metadata_json` in an
            npz.

    Returns:
        The files written, the numbers first. The file appears complete or not at all.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"maps are written as .safetensors or .npz, got {path.name!r}")
    if not maps:
        raise ValueError("no maps to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    note = json.dumps(dict(metadata or {}), default=str)
    tensors = {name: value.detach().cpu().contiguous() for name, value in maps.items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, str(temporary), metadata={"metadata_json": note})
        else:
            arrays = {
                name: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
                for name, value in tensors.items()
            }
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays, metadata_json=np.array(note))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    written = [path]
    if images is not None:
        from svit_utils.show.style import overlay, to_rgb

        folder = path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in tensors.items():
            flat = (
                value.float().mean(dim=1) if value.ndim == 4 else value.float()
            )  # heads averaged for the picture only
            if len(flat) != len(images):
                raise ValueError(f"{name} holds {len(flat)} maps for {len(images)} images")
            for index, (image, heat) in enumerate(zip(images, flat, strict=True)):
                target = folder / f"{index:04d}_{name}.png"
                overlay(to_rgb(image), heat.numpy(), scale=4 if image.shape[-1] < 128 else 1).save(target)
                written.append(target)
    return written


def load_maps(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what `export_maps` wrote: (maps, metadata)."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("metadata_json", "{}"))
            return {name: file.get_tensor(name) for name in list(file.keys())}, note
    with np.load(path, allow_pickle=False) as data:
        note = json.loads(str(data["metadata_json"]))
        return {name: torch.from_numpy(data[name]) for name in data.files if name != "metadata_json"}, note
