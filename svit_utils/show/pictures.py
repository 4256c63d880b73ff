"""Tensors and maps as pictures of bytes: conversion, colour, and a map laid over its image."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from svit_utils.show.style import CMAP

#: "cat" is a photograph by Stéfan van der Walt (CC0), "fox" was drawn for this book.
EXAMPLES = {"cat": "cat.jpg", "fox": "fox.png"}

#: Where the fox ends, as corners (x, y) of a polygon in pixels. The cat fills its picture.
_FOX: list[tuple[int, int]] = [
    *((58, 31), (91, 60), (113, 58), (129, 60), (163, 31), (160, 76), (169, 88), (170, 103), (160, 119), (143, 139)),
    *((154, 152), (163, 171), (180, 163), (194, 147), (201, 140), (208, 143), (212, 153), (210, 163), (204, 176)),
    *((190, 187), (171, 197), (172, 206), (160, 213), (139, 217), (100, 217), (76, 213), (65, 203), (66, 185)),
    *((71, 162), (77, 149), (84, 142), (62, 121), (50, 103), (52, 90), (61, 75)),
]


def example_mask(name: str = "fox") -> np.ndarray:
    """The object of an example picture, bool [224, 224]; ValueError for one whose object has no outline in it."""
    if name != "fox":
        raise ValueError(f"the example picture 'fox' has an outline, got {name!r}")
    mask = Image.new("1", (224, 224))
    ImageDraw.Draw(mask).polygon(_FOX, fill=1)
    return np.asarray(mask)


def example_picture(name: str = "cat") -> Image.Image:
    """A picture that comes with the package, 224 x 224; ValueError for a name that is not in `EXAMPLES`."""
    if name not in EXAMPLES:
        raise ValueError(f"no example picture {name!r}; there are: {', '.join(EXAMPLES)}")
    with Image.open(Path(__file__).parent / "examples" / EXAMPLES[name]) as picture:
        return picture.convert("RGB")


def as_array(values: Any, dtype: Any = None) -> np.ndarray:
    """A tensor (on any device, with or without gradient) or anything array-like as a NumPy array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=dtype)


def to_rgb(image: Any) -> np.ndarray:
    """[3, H, W] or [H, W, 3], tensor or array, in [0, 1] or bytes -> uint8 [H, W, 3].

    Values outside [0, 1] (a normalised image) are stretched from their minimum to their maximum: good to look at, not
    to measure. Raises ValueError for another rank.
    """
    array = as_array(image)
    if array.dtype == np.uint8:
        array = array / 255.0
    if array.ndim != 3:
        raise ValueError(f"an image is [3, H, W] or [H, W, 3], got shape {array.shape}")
    if array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    array = array.astype(np.float32)
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        array = (array - array.min()) / max(float(array.max() - array.min()), 1e-12)
    return (array.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def normalised(heat: Any) -> np.ndarray:
    """[h, w] -> float32 in [0, 1] by its own minimum and maximum; a constant map gives 0 throughout."""
    array = as_array(heat, np.float32)
    low, high = float(array.min()), float(array.max())
    return np.zeros_like(array) if high <= low else (array - low) / (high - low)


def colour_map(values: np.ndarray) -> np.ndarray:
    """[...] in [0, 1] -> uint8 [..., 3] in the colours of `CMAP`."""
    return (matplotlib.colormaps[CMAP](values)[..., :3] * 255 + 0.5).astype(np.uint8)


def overlay(rgb: np.ndarray, heat: Any, *, alpha: float = 0.6, scale: int = 1) -> Image.Image:
    """A map [h, w], stretched to its own range, in colour over the grey image uint8 [H, W, 3].

    `alpha` is the opacity of the map, in [0, 1]; the picture is enlarged `scale` times.
    """
    height, width = rgb.shape[0] * scale, rgb.shape[1] * scale
    grey = Image.fromarray(rgb).convert("L").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    large = Image.fromarray(normalised(heat)).resize((width, height), Image.Resampling.BILINEAR)
    return Image.blend(grey, Image.fromarray(colour_map(np.asarray(large))), alpha)
