"""All maps of a batch at once, and their export: one file of numbers, one overlay picture per image and method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from svit_utils.explain.gradcam import grad_cam, layer_grad_cam
from svit_utils.explain.maps import class_attention
from svit_utils.explain.model_state import Targets
from svit_utils.explain.rollout import attention_rollout
from svit_utils.files import replacing

# (model, images, targets) -> maps. A new explanation is one line here.
METHODS: dict[str, Callable[[nn.Module, Tensor, Targets], Tensor]] = {
    "attention": lambda model, x, targets: class_attention(model, x).mean(dim=1),  # last layer, mean over heads
    "attention_heads": lambda model, x, targets: class_attention(model, x),  # the only one with heads: [B, H, h, w]
    "rollout": lambda model, x, targets: attention_rollout(model, x),
    "grad_cam": lambda model, x, targets: grad_cam(model, x, targets),
    "layer_grad_cam": lambda model, x, targets: layer_grad_cam(model, x, targets),
}


def explain_batch(
    model: nn.Module,
    x: Tensor,
    methods: Sequence[str] = ("attention", "rollout", "grad_cam", "layer_grad_cam"),
    targets: Targets = None,
) -> dict[str, Tensor]:
    """Maps of each of `methods` (names in `METHODS`) for images `x` [B, 3, H, W]: name -> [B, h, w] on the token grid.

    `attention_heads` gives [B, H, h, w]. Attention and rollout know no class; `targets` (default: the predicted
    classes) concerns the two Grad-CAMs. Raises ValueError for an unknown method, or where a method does.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: allowed are {', '.join(METHODS)}")
    return {method: METHODS[method](model, x, targets) for method in methods}


def export_maps(
    path: str | Path,
    maps: Mapping[str, Tensor],
    images: Tensor | None = None,
    metadata: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write `maps` to `path` (.safetensors or .npz); with `images`, PNG overlays into a folder of that name beside it.

    Returns the files written, the numbers first; that file appears complete or not at all. Raises ValueError for
    another ending, no maps, or another number of maps than of images.

    Args:
        images: [B, 3, H, W] in [0, 1], for display (undo the normalisation first).
        metadata: anything JSON can hold; in a safetensors header, or the array `metadata_json` of an npz.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"maps are written as .safetensors or .npz, got {path.name!r}")
    if not maps:
        raise ValueError("no maps to write")
    note = json.dumps(dict(metadata or {}), default=str)
    tensors = {name: value.detach().cpu().contiguous() for name, value in maps.items()}
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, str(partial), metadata={"metadata_json": note})
        else:
            arrays = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays, metadata_json=np.array(note))  # type: ignore[arg-type]
    return [path] if images is None else [path, *_overlays(path.with_suffix(""), tensors, images)]


def _overlays(folder: Path, maps: Mapping[str, Tensor], images: Tensor) -> list[Path]:
    """A PNG per map and image, the map laid over the image; heads are averaged for the picture."""
    from svit_utils.show.pictures import overlay, to_rgb

    folder.mkdir(parents=True, exist_ok=True)
    scale, written = 4 if images.shape[-1] < 128 else 1, []
    for name, value in maps.items():
        heats = value.float().mean(dim=1) if value.ndim == 4 else value.float()  # [B, h, w]
        if len(heats) != len(images):
            raise ValueError(f"{name} holds {len(heats)} maps for {len(images)} images")
        for index, (image, heat) in enumerate(zip(images, heats, strict=True)):
            written.append(folder / f"{index:04d}_{name}.png")
            overlay(to_rgb(image), heat.numpy(), scale=scale).save(written[-1])
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
