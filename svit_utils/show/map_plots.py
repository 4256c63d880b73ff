"""Figures of maps over images, each a matplotlib `Figure` with a text that describes it, see `alt_of`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from svit_utils.show.display import with_alt
from svit_utils.show.pictures import as_array, normalised, overlay, to_rgb
from svit_utils.show.style import CMAP, COLOURS, styled_figure


def _without_ticks(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def _draw(axis: Any, value: Any, height: int, width: int, *, over: np.ndarray | None) -> None:
    """A picture [3, H, W], or a map [h, w] stretched to its own range: beside its picture, or laid over `over`."""
    if value.ndim == 3:
        value = to_rgb(value)
    elif over is not None:
        value = np.asarray(overlay(over, value, scale=max(1, 224 // height)))
    else:
        value = normalised(value)
    # One coordinate system for all columns, so that the outline fits pictures of any resolution.
    axis.imshow(value, extent=(0, width, height, 0), interpolation="nearest", vmin=0, vmax=1, cmap=CMAP)
    _without_ticks(axis)


def _outline(axis: Any, mask: Any) -> None:
    """The outline of a mask [H, W]."""
    filled = as_array(mask, float)
    y, x = (np.arange(side) + 0.5 for side in filled.shape)
    axis.contour(x, y, filled, levels=[0.5], colors=COLOURS["vermilion"], linewidths=1.4)


def explanation_grid(
    images: Any,
    maps: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    masks: Any | None = None,
    beside: bool = False,
) -> Figure:
    """A row per image [B, 3, H, W] in [0, 1]: the image, then each method's map laid over it.

    Args:
        maps: name -> [B, h, w], or pictures [B, 3, H, W]; else ValueError. Each map is stretched to its own range, so
            colours compare places, not strengths.
        labels: a text per image, at its left.
        masks: [B, H, W] boolean, drawn as an outline.
        beside: draw the maps beside the image, patch by patch, so that its brightness does not show through.
    """
    for name, value in maps.items():
        if value.ndim not in (3, 4) or len(value) != len(images):
            raise ValueError(f"map {name!r} must be [{len(images)}, h, w], got shape {tuple(value.shape)}")
    known = {"grad_cam": "Grad-CAM", "layer_grad_cam": "LayerGradCam", "attention": "attention, last layer"}
    rows, titles = len(images), ["image", *(known.get(name, name.replace("_", " ")) for name in maps)]
    with styled_figure(1.9 * len(titles), 1.9 * rows + 0.6) as figure:
        axes = figure.subplots(rows, len(titles), squeeze=False)
        for r in range(rows):
            rgb = to_rgb(images[r])
            for c, (axis, value) in enumerate(zip(axes[r], [images[r], *(m[r] for m in maps.values())], strict=True)):
                _draw(axis, value, *rgb.shape[:2], over=None if beside else rgb)
                if r == 0:
                    axis.set_title(titles[c])
                if c == 0 and labels is not None:
                    axis.set_ylabel(labels[r])
                if masks is not None:
                    _outline(axis, masks[r])
        if any(value.ndim == 3 for value in maps.values()):
            figure.supxlabel("each map stretched to its own range: dark low, bright high", fontsize=9)
    text = f"{rows} image{'s' if rows > 1 else ''}, one per row, each followed by the maps of {', '.join(titles[1:])} "
    text += f"{'beside' if beside else 'laid over'} it in colour, bright where the map is high"
    return with_alt(figure, text + ("." if masks is None else "; the object's outline is drawn in orange."))


def dense_beside_sparse(image: Any, dense: Any, sparse: Any, *, title: str = "") -> Figure:
    """One query's attention per head, dense above and sparse below: `attention_rows` of two."""
    return attention_rows(image, {"dense": dense, "sparse": sparse}, title=title)


def attention_rows(image: Any, rows: Mapping[str, Any], *, mask: Any | None = None, title: str = "") -> Figure:
    """One query's attention per head, a row per way to get it, beside the picture and on one colour scale.

    Args:
        image: [3, H, W] in [0, 1].
        rows: name -> the weights [heads, h, w] of the same query, of one shape; else ValueError. The colour scale is a
            square root, which leaves small weights visible; weights of exactly zero are crossed out.
        mask: [H, W] boolean, drawn as an outline.
    """
    weights = {name: as_array(values, float) for name, values in rows.items()}
    shapes = {values.shape for values in weights.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(f"{', '.join(rows) or 'the rows'} must be [heads, h, w] of one shape, got {sorted(shapes)}")
    ((heads, *_),), (height, width) = shapes, to_rgb(image).shape[:2]
    top = max(values.max() for values in weights.values())
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(top), 1e-12))
    with styled_figure(1.75 * (heads + 1) + 0.6, 1.95 * len(rows) + 0.5) as figure:
        axes = figure.subplots(len(rows), heads + 1, squeeze=False)
        for row, (name, values) in zip(axes, weights.items(), strict=True):
            _draw(row[0], as_array(image), height, width, over=None)
            row[0].set_ylabel(name)
            for axis, heat in zip(row[1:], values, strict=True):
                drawn = axis.imshow(heat, extent=(0, width, height, 0), norm=norm, cmap=CMAP, interpolation="nearest")
                axis.set_xlabel(f"{(heat == 0).mean():.0%} zero")
                # On a colour scale alone, zeros look like small weights.
                y, x = np.nonzero(heat == 0)
                x, y = (x + 0.5) * width / heat.shape[1], (y + 0.5) * height / heat.shape[0]
                axis.scatter(x, y, marker="x", s=5, linewidths=0.5, color="#BBBBBB")
                _without_ticks(axis)
            if mask is not None:
                for axis in row:
                    _outline(axis, mask)
        for h, axis in enumerate(axes[0, 1:]):
            axis.set_title(f"head {h}")
        axes[0, 0].set_title("image")
        figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=30, label="weight (square-root scale); crosses: exactly 0")
        figure.suptitle(title)
    zeros = ", ".join(f"{name} {(values == 0).mean():.0%}" for name, values in weights.items())
    text = f"Attention of one query over the patches in {heads} heads, a row each for {', '.join(rows)}, beside the "
    return with_alt(figure, f"{text}image and on one colour scale; crossed out as exactly zero: {zeros}.")
