"""Maps as files: one file of numbers, one overlay picture per image and method."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from svit_utils.files import replacing
from svit_utils.show.pictures import overlay, to_rgb

_MARK = "svit_utils overlay"  # in the PNG's text, to know a former one by


def export_maps(
    path: str | Path, maps: Mapping[str, Tensor], images: Tensor | None = None, metadata: dict[str, Any] | None = None
) -> list[Path]:
    """Write `maps` to `path` (.safetensors or .npz); with `images`, PNG overlays into a folder of that name beside it.

    Overlays that an earlier call wrote into that folder are removed; they carry a mark, and nothing else is touched.

    Returns the files written, the numbers first; that file appears complete or not at all. Raises ValueError for
    another ending, no maps, or another number of maps than of images.

    Args:
        images: [B, 3, H, W] in [0, 1], for display (undo the normalisation first).
        metadata: anything JSON can hold; written as `metadata_json`, a field of the safetensors header or an array of
            the npz.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"maps are written as .safetensors or .npz, got {path.name!r}")
    if not maps:
        raise ValueError("no maps to write")
    note = json.dumps(metadata or {}, default=str)
    tensors = {name: value.detach().cpu().contiguous() for name, value in maps.items()}
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, str(partial), metadata={"metadata_json": note})
        else:
            arrays = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays, metadata_json=np.array(note))  # type: ignore[arg-type]
    for former in path.with_suffix("").glob("[0-9][0-9][0-9][0-9]_*.png"):
        if _is_ours(former):
            former.unlink()
    return [path] if images is None else [path, *_overlays(path.with_suffix(""), tensors, images)]


def _is_ours(path: Path) -> bool:
    """Whether a PNG carries the mark of `_overlays`; not for what cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == _MARK
    except (OSError, ValueError, SyntaxError):
        return False


def _overlays(folder: Path, maps: Mapping[str, Tensor], images: Tensor) -> list[Path]:
    """A PNG per map and image, the map laid over the image; heads are averaged for the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text("Software", _MARK)
    scale, written = 4 if images.shape[-1] < 128 else 1, []
    for name, value in maps.items():
        heats = value.float().mean(dim=1) if value.ndim == 4 else value.float()  # [B, h, w]
        if len(heats) != len(images):
            raise ValueError(f"{name} holds {len(heats)} maps for {len(images)} images")
        for index, (image, heat) in enumerate(zip(images, heats, strict=True)):
            written.append(folder / f"{index:04d}_{name}.png")
            overlay(to_rgb(image), heat.numpy(), scale=scale).save(written[-1], pnginfo=mark)
    return written
