"""What the two widgets show, as pure functions: compute once, then answer any question about it at once, and draw it.

The picture of a widget and its static twin come from the same function, so a notebook can check in a compared cell
what a slider would show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from svit_utils.attention import sparse_modules, sparsified
from svit_utils.explain.grid import TokenGrid, token_grid
from svit_utils.explain.maps import attention_maps
from svit_utils.show.style import colour_map, to_rgb

__all__ = [
    "AttentionData",
    "Survivors",
    "ThresholdData",
    "attention_explorer_data",
    "attention_picture",
    "threshold_explorer_data",
    "threshold_picture",
]

_SIDE = 240  # pixels of each panel
_INK, _PAPER, _ACCENT, _CUT = (17, 17, 17), (250, 250, 250), (213, 94, 0), (150, 150, 150)


@dataclass(frozen=True)
class Survivors:
    """One row of attention under one threshold: the formula alone, before any fallback."""

    kept: np.ndarray  # [N] bool: p > tau
    weights: np.ndarray  # [N] ReLU(p - tau) over its sum; all 0 in an empty row
    kept_mass: float  # sum of p over the survivors

    @property
    def count(self) -> int:
        return int(self.kept.sum())

    @property
    def empty(self) -> bool:
        """No key survives: the formula reads 0/0, and `empty_rows` decides."""
        return self.count == 0


@dataclass(frozen=True)
class ThresholdData:
    """Dense attention of one image, every layer, head and token: enough for any threshold, since supports are
    nested."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    probabilities: np.ndarray  # float32 [L, heads, N, N]
    layers: list[str]
    grid: TokenGrid

    def survivors(self, token: int, layer: int, head: int, tau: float) -> Survivors:
        """The row of `token` cut at `tau`.

        Raises:
            ValueError: an index out of range, or tau outside [0, 1).
        """
        _check_indices(self.probabilities.shape, layer, head, token)
        if not 0 <= tau < 1:
            raise ValueError(f"tau must lie in [0, 1), got {tau!r}")
        p = self.probabilities[layer, head, token]
        kept = p > tau
        remainder = np.where(kept, p - np.float32(tau), 0)
        total = remainder.sum()
        return Survivors(kept, remainder / total if total > 0 else remainder, float(p[kept].sum()))


@dataclass(frozen=True)
class AttentionData:
    """Dense and sparse attention of some images."""

    rgb: list[np.ndarray]  # uint8 [H, W, 3] per image
    dense: np.ndarray  # float32 [B, L, heads, N, N]
    sparse: np.ndarray  # the same, of the sparse model
    layers: list[str]
    grid: TokenGrid

    def rows(self, image: int, layer: int, head: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The weights [N] of one query, dense and sparse."""
        if not 0 <= image < len(self.rgb):
            raise ValueError(f"image must lie in 0 to {len(self.rgb) - 1}, got {image!r}")
        _check_indices(self.dense.shape[1:], layer, head, token)
        return self.dense[image, layer, head, token], self.sparse[image, layer, head, token]


def _check_indices(shape: tuple[int, ...], layer: int, head: int, token: int) -> None:
    for name, value, size in (("layer", layer, shape[0]), ("head", head, shape[1]), ("token", token, shape[2])):
        if not 0 <= value < size:
            raise ValueError(f"{name} must lie in 0 to {size - 1}, got {value!r}")


def _stack(maps: dict[str, Tensor]) -> np.ndarray:
    """Layer name -> [B, heads, N, N] to one array [B, L, heads, N, N]."""
    return torch.stack(list(maps.values()), dim=1).float().cpu().numpy()


def threshold_explorer_data(model: nn.Module, image: Tensor, display: Any | None = None) -> ThresholdData:
    """One forward pass of `image` [3, H, W] through the model with dense attention (a sparse model is cut at 0 for it).

    Args:
        display: the same image in [0, 1] for showing; without it a normalised image is stretched to its range.
    """
    if image.ndim != 3:
        raise ValueError(f"the explorer takes one image [3, H, W], got shape {tuple(image.shape)}")
    batch = image[None]
    grid = token_grid(model, batch)
    maps = _dense_maps(model, batch)
    return ThresholdData(to_rgb(image if display is None else display), _stack(maps)[0], list(maps), grid)


def _dense_maps(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    if sparse_modules(model):
        with sparsified(model, 0.0):
            return attention_maps(model, batch)
    return attention_maps(model, batch)


def attention_explorer_data(
    model: nn.Module,
    images: Tensor,
    sparse_model: nn.Module | None = None,
    *,
    threshold: float = 0.01,
    display: Any | None = None,
    **as_sparsify: Any,
) -> AttentionData:
    """Dense maps of `model` beside those of `sparse_model`, or of `model` itself cut at `threshold`, for images [B, 3,
    H, W]."""
    grid = token_grid(model, images)
    dense = _dense_maps(model, images)
    if sparse_model is None:
        with sparsified(model, threshold, **as_sparsify):
            sparse = attention_maps(model, images)
    else:
        sparse = attention_maps(sparse_model, images)
    shown = images if display is None else display
    return AttentionData([to_rgb(image) for image in shown], _stack(dense), _stack(sparse), list(dense), grid)


# --- drawing: PIL rather than matplotlib, a few milliseconds a picture ---


def token_name(token: int, grid: TokenGrid) -> str:
    """Words for a token: "prefix 0", or the row and column of its patch."""
    if token < grid.num_prefix:
        return "class token" if token == 0 else f"prefix token {token}"
    row, column = divmod(token - grid.num_prefix, grid.width)
    return f"patch row {row}, column {column}"


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    """matplotlib's own DejaVu Sans: PIL's built-in font has no Greek."""
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _size(grid: TokenGrid) -> tuple[int, int]:
    """(width, height) of a panel in pixels: whole pixels per patch, the longer side about `_SIDE`."""
    cell = max(1, _SIDE // max(grid.size))
    return cell * grid.width, cell * grid.height


def _panel_image(rgb: np.ndarray, grid: TokenGrid, token: int) -> Image.Image:
    """The image, the query's patch outlined."""
    panel = Image.fromarray(rgb).resize(_size(grid), Image.Resampling.BICUBIC)
    _mark(panel, grid, token)
    return panel


def _mark(panel: Image.Image, grid: TokenGrid, token: int) -> None:
    if token >= grid.num_prefix:
        row, column = divmod(token - grid.num_prefix, grid.width)
        cell = panel.width // grid.width
        box = (column * cell - 1, row * cell - 1, (column + 1) * cell, (row + 1) * cell)
        draw = ImageDraw.Draw(panel)
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=(255, 255, 255))
        draw.rectangle(box, outline=_ACCENT, width=2)


def _panel_weights(weights: np.ndarray, grid: TokenGrid, token: int, top: float) -> Image.Image:
    """Weights of the patches in colour from 0 to `top`, on a square-root scale that leaves small ones visible; exact
    zeros are grey with a stroke, so that they do not pass for small."""
    patches = weights[grid.num_prefix :].reshape(grid.size)
    cell = _size(grid)[0] // grid.width
    coloured = colour_map(np.sqrt(np.clip(patches / max(top, 1e-12), 0, 1))).repeat(cell, 0).repeat(cell, 1)
    tile = np.full((cell, cell, 3), 236, dtype=np.uint8)
    tile[np.arange(cell), np.arange(cell)[::-1]] = 190
    zeros = (patches == 0).repeat(cell, 0).repeat(cell, 1)[..., None]
    panel = Image.fromarray(np.where(zeros, np.tile(tile, (grid.height, grid.width, 1)), coloured))
    _mark(panel, grid, token)
    return panel


def _compose(panels: list[tuple[str, Image.Image]], lines: list[str]) -> Image.Image:
    gap, head, line = 12, 22, 18
    width = sum(p.width for _, p in panels) + gap * (len(panels) + 1)
    height = head + max(p.height for _, p in panels) + 2 * gap + line * len(lines)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = gap
    for title, panel in panels:
        draw.text((x, 4), title, fill=_INK, font=_font(13))
        canvas.paste(panel, (x, head))
        x += panel.width + gap
    y = height - line * len(lines) - 4
    for text in lines:
        draw.text((gap, y), text, fill=_INK, font=_font(13))
        y += line
    return canvas


def _panel_row(p: np.ndarray, tau: float, size: tuple[int, int]) -> Image.Image:
    """The row in falling order on a logarithmic axis, with tau across: survivors in blue, cut keys in grey."""
    width, height = size
    panel = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(panel)
    left, low = 34, 1e-5  # room for the axis; the smallest value drawn

    def y(value: float) -> float:
        return (height - 16) * np.log(max(value, low)) / np.log(low)

    for decade in (1e-1, 1e-2, 1e-3, 1e-4):
        draw.line((left, y(decade), width, y(decade)), fill=(225, 225, 225))
        draw.text((2, y(decade) - 7), f"{decade:g}", fill=_INK, font=_font(10))
    order = np.sort(p)[::-1]
    edges = np.linspace(left + 1, width, len(order) + 1).astype(int)  # whole pixels, or gaps would look like data
    for x, end, value in zip(edges[:-1], edges[1:], order, strict=True):
        colour = (0, 114, 178) if value > tau else (190, 190, 190)
        draw.rectangle((x, y(float(value)), max(end - 1, x), height - 16), fill=colour)
    if tau > 0:
        draw.line((left, y(tau), width, y(tau)), fill=_ACCENT, width=2)
    draw.text((left, height - 14), "keys, by falling p (log scale)", fill=_INK, font=_font(10))
    return panel


def threshold_picture(
    data: ThresholdData, token: int = 0, layer: int = 0, head: int = 0, tau: float = 0.01
) -> Image.Image:
    """The threshold explorer's picture: the query in the image, its row against tau, the weights of the survivors."""
    row = data.survivors(token, layer, head, tau)
    p = data.probabilities[layer, head, token]
    prefix = data.grid.num_prefix
    panels = [
        ("image and query", _panel_image(data.rgb, data.grid, token)),
        ("softmax row p and τ", _panel_row(p, tau, _size(data.grid))),
        (
            "weights after the cut",
            _panel_weights(row.weights, data.grid, token, float(row.weights[prefix:].max(initial=0))),
        ),
    ]
    return _compose(panels, threshold_lines(data, token, layer, head, tau))


def threshold_lines(data: ThresholdData, token: int, layer: int, head: int, tau: float) -> list[str]:
    """The picture in words."""
    row = data.survivors(token, layer, head, tau)
    where = f"{token_name(token, data.grid)}, {data.layers[layer]}, head {head}, τ = {tau:.4g}"
    if row.empty:
        return [where, f"no key of {len(row.kept)} survives: the formula reads 0/0, empty_rows decides"]
    return [where, f"{row.count} of {len(row.kept)} keys survive, with {row.kept_mass:.1%} of the attention"]


def attention_picture(
    data: AttentionData, image: int = 0, layer: int = 0, head: int = 0, token: int = 0
) -> Image.Image:
    """The attention explorer's picture: the query in the image, its dense and its sparse weights on one colour
    scale."""
    dense, sparse = data.rows(image, layer, head, token)
    prefix = data.grid.num_prefix
    top = float(max(dense[prefix:].max(), sparse[prefix:].max()))
    panels = [
        ("image and query", _panel_image(data.rgb[image], data.grid, token)),
        ("dense", _panel_weights(dense, data.grid, token, top)),
        ("sparse (struck: exactly 0)", _panel_weights(sparse, data.grid, token, top)),
    ]
    return _compose(panels, attention_lines(data, image, layer, head, token))


def attention_lines(data: AttentionData, image: int, layer: int, head: int, token: int) -> list[str]:
    """The picture in words."""
    _, sparse = data.rows(image, layer, head, token)
    where = f"image {image}, {token_name(token, data.grid)}, {data.layers[layer]}, head {head}"
    return [where, f"{int((sparse > 0).sum())} of {len(sparse)} keys have a weight in the sparse model"]
