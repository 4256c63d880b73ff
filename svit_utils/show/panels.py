"""The panels that the explorers put together. Drawn with PIL rather than matplotlib: a few milliseconds a picture."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from svit_utils.explain.grid import TokenGrid
from svit_utils.show.pictures import colour_map

_SIDE = 240  # pixels along the longer side of a panel, about
_INK, _PAPER, _ACCENT = (17, 17, 17), (250, 250, 250), (213, 94, 0)


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    """matplotlib's own DejaVu Sans: PIL's built-in font has no Greek."""
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _cell(grid: TokenGrid) -> int:
    """Side of a patch in a panel, in whole pixels."""
    return max(1, _SIDE // max(grid.size))


def _mark(panel: Image.Image, grid: TokenGrid, token: int) -> Image.Image:
    """Outline the patch of `token`; a prefix token has none."""
    if token >= grid.num_prefix:
        row, column = divmod(token - grid.num_prefix, grid.width)
        cell, draw = _cell(grid), ImageDraw.Draw(panel)
        left, top, right, bottom = column * cell - 1, row * cell - 1, (column + 1) * cell, (row + 1) * cell
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(255, 255, 255))
        draw.rectangle((left, top, right, bottom), outline=_ACCENT, width=2)
    return panel


def image_panel(rgb: np.ndarray, grid: TokenGrid, token: int) -> Image.Image:
    """The image uint8 [H, W, 3] with the patch of the query `token` outlined."""
    size = (_cell(grid) * grid.width, _cell(grid) * grid.height)
    return _mark(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC), grid, token)


def weights_panel(weights: np.ndarray, grid: TokenGrid, token: int, top: float) -> Image.Image:
    """The weights [N] of the patches in colour from 0 to `top`, on a square-root scale that leaves small ones visible.

    Exact zeros are grey with a stroke, so that they are not taken for small weights.
    """
    cell = _cell(grid)
    patches = weights[grid.num_prefix :].reshape(grid.size)
    coloured = colour_map(np.sqrt(np.clip(patches / max(top, 1e-12), 0, 1))).repeat(cell, 0).repeat(cell, 1)
    tile = np.full((cell, cell, 3), 236, dtype=np.uint8)
    tile[np.arange(cell), np.arange(cell)[::-1]] = 190
    zeros = (patches == 0).repeat(cell, 0).repeat(cell, 1)[..., None]
    return _mark(Image.fromarray(np.where(zeros, np.tile(tile, (*grid.size, 1)), coloured)), grid, token)


def row_panel(p: np.ndarray, tau: float, grid: TokenGrid) -> Image.Image:
    """The row p [N] in falling order on a logarithmic axis, with tau across: kept keys in blue, cut keys in grey."""
    # As large as the image, and large enough for an axis where the grid is one long strip of patches.
    width, height = (max(_cell(grid) * side, _SIDE // 2) for side in (grid.width, grid.height))
    panel = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(panel)
    left, bottom, low = 48, height - 20, 1e-5  # room for the axes; the smallest value drawn

    def y(value: float) -> float:
        return min(bottom, bottom * np.log(max(value, low)) / np.log(low))  # rounding may put `low` below the axis

    for decade in (1e-1, 1e-2, 1e-3, 1e-4):
        draw.line((left, y(decade), width, y(decade)), fill=(225, 225, 225))
        draw.text((2, y(decade) - 8), f"{decade:g}", fill=_INK, font=_font(13))
    order = np.sort(p)[::-1]
    edges = np.linspace(left + 1, width, len(order) + 1).astype(int)  # whole pixels, or gaps would look like data
    for x, end, value in zip(edges[:-1], edges[1:], order, strict=True):
        colour = (0, 114, 178) if value > tau else (190, 190, 190)
        draw.rectangle((x, y(float(value)), max(end - 1, x), bottom), fill=colour)
    if tau > 0:
        draw.line((left, y(tau), width, y(tau)), fill=_ACCENT, width=2)
    draw.text((left, bottom + 3), "keys, by falling p", fill=_INK, font=_font(13))
    return panel


def compose(panels: dict[str, Image.Image], lines: list[str]) -> Image.Image:
    """Panels side by side, each under its title, and below them lines of text."""
    gap, head, line = 12, 26, 22
    width = sum(panel.width for panel in panels.values()) + gap * (len(panels) + 1)
    height = head + max(panel.height for panel in panels.values()) + 2 * gap + line * len(lines)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = gap
    for title, panel in panels.items():
        draw.text((x, 3), title, fill=_INK, font=_font(15))
        canvas.paste(panel, (x, head))
        x += panel.width + gap
    y = height - line * len(lines) - 4
    for number, text in enumerate(lines):
        draw.text((gap, y + line * number), text, fill=_INK, font=_font(15))
    return canvas
