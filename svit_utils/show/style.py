"""One look for all pictures: safe for colour-blind readers, readable on a dark page, with a text for those who do not
see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from PIL import Image

__all__ = [
    "CMAP",
    "COLOURS",
    "alt_of",
    "figure_png",
    "figure_with_alt",
    "image_png",
    "image_with_alt",
    "overlay",
    "styled",
    "to_rgb",
    "with_alt",
]

CMAP = "cividis"  # perceptually uniform, and made for colour-vision deficiency

# Okabe and Ito's palette (2008), in the order in which its colours differ most.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}

_RC: dict[str, Any] = {
    # Opaque and light, so that dark text stays readable on a dark page.
    "figure.facecolor": "#FAFAFA",
    "savefig.facecolor": "#FAFAFA",
    "axes.facecolor": "#FFFFFF",
    "text.color": "#111111",
    "axes.labelcolor": "#111111",
    "xtick.color": "#111111",
    "ytick.color": "#111111",
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "image.cmap": CMAP,
    "axes.prop_cycle": cycler(color=[c for name, c in COLOURS.items() if name != "yellow"]),
}


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib's settings for the body, and as they were afterwards."""
    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]
        yield


def with_alt(figure: Figure, alt: str) -> Figure:
    """Attach the text that stands for the figure; `figure_with_alt` shows both."""
    if not alt.strip():
        raise ValueError("a figure needs a text that says what it shows")
    figure.svit_alt = alt  # type: ignore[attr-defined]
    return figure


def alt_of(figure: Figure) -> str:
    """The text attached to a figure, or an empty one."""
    return getattr(figure, "svit_alt", "")


def figure_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG bytes, on its opaque background."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def image_png(image: Image.Image) -> bytes:
    """A PIL image as PNG bytes, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _display(png: bytes, alt: str) -> None:
    """Show PNG bytes with an alternative text, as one `image/png` output.

    The text goes with it three times, for no reader takes it from the same place: in the output's metadata, which
    nbconvert's templates read; as `text/plain`, for terminals and diffs; and in a paragraph only screen readers meet,
    for JupyterLab, which gives an image output no text.
    """
    from html import escape

    from IPython.display import display

    display(
        {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": f"[Figure: {alt}]"},
        raw=True,
        metadata={"image/png": {"alt": alt, "needs_background": "light"}},
    )
    hidden = (
        "position:absolute;width:1px;height:1px;margin:-1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"
    )
    display(
        {"text/html": f'<p class="svit-alt" style="{hidden}">Figure: {escape(alt)}</p>', "text/plain": ""},
        raw=True,
    )


def figure_with_alt(figure: Figure, alt: str | None = None, dpi: int = 100) -> None:
    """Display a figure in a notebook as PNG with its text (`alt`, or the one attached), and close it."""
    text = alt or alt_of(figure)
    if not text:
        raise ValueError("figure_with_alt needs a text that says what the figure shows")
    _display(figure_png(figure, dpi), text)
    import matplotlib.pyplot as plt

    plt.close(figure)


def image_with_alt(image: Image.Image, alt: str) -> None:
    """Display a PIL picture (a widget's static twin) in a notebook as PNG with its text."""
    if not alt.strip():
        raise ValueError("image_with_alt needs a text that says what the picture shows")
    _display(image_png(image), alt)


def to_rgb(image: Any) -> np.ndarray:
    """[3, H, W] or [H, W, 3], tensor or array, in [0, 1] or bytes -> uint8 [H, W, 3].

    Values outside [0, 1] (a normalised image) are stretched from their minimum to their maximum: good to look at, not
    to measure.
    """
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
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
    array = np.asarray(heat.detach().cpu() if hasattr(heat, "detach") else heat, dtype=np.float32)
    low, high = float(array.min()), float(array.max())
    return np.zeros_like(array) if high <= low else (array - low) / (high - low)


def colour_map(values: np.ndarray) -> np.ndarray:
    """[..., ] in [0, 1] -> uint8 [..., 3] in the map `CMAP`."""
    return (matplotlib.colormaps[CMAP](values)[..., :3] * 255 + 0.5).astype(np.uint8)


def overlay(rgb: np.ndarray, heat: Any, *, alpha: float = 0.6, scale: int = 1) -> Image.Image:
    """A map [h, w] in colour over the grey image [H, W, 3] (uint8), `scale` times enlarged; the map is stretched to
    its own range."""
    height, width = rgb.shape[0] * scale, rgb.shape[1] * scale
    grey = Image.fromarray(rgb).convert("L").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    small = Image.fromarray(normalised(heat))
    large = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    return Image.blend(grey, Image.fromarray(colour_map(large)), alpha)
