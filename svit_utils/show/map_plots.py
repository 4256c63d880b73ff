"""Figures of maps over images, each a matplotlib `Figure` with a text that describes it, see `alt_of`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from svit_utils.show.display import with_alt
from svit_utils.show.pictures import as_array, overlay, to_rgb
from svit_utils.show.style import CMAP, COLOURS, styled_figure


def _without_ticks(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def explanation_grid(
    images: Any, maps: Mapping[str, Any], *, labels: Sequence[str] | None = None, masks: Any | None = None
) -> Figure:
    """A row per image [B, 3, H, W] in [0, 1]: the image, then each method's map laid over it.

    Args:
        maps: name -> [B, h, w], else ValueError; each map is stretched to its own range, so colours compare places, not
            strengths.
        labels: a text per image, at its left.
        masks: [B, H, W] boolean, drawn as an outline.
    """
    for name, value in maps.items():
        if value.ndim != 3 or len(value) != len(images):
            raise ValueError(f"map {name!r} must be [{len(images)}, h, w], got shape {tuple(value.shape)}")
    known = {"grad_cam": "Grad-CAM", "layer_grad_cam": "LayerGradCam", "attention": "attention, last layer"}
    rows, titles = len(images), ["image", *(known.get(name, name.replace("_", " ")) for name in maps)]
    with styled_figure(1.9 * len(titles), 1.9 * rows + 0.6) as figure:
        axes = figure.subplots(rows, len(titles), squeeze=False)
        for r in range(rows):
            rgb = to_rgb(images[r])
            scale = max(1, 224 // rgb.shape[0])
            pictures = [rgb, *(np.asarray(overlay(rgb, value[r], scale=scale)) for value in maps.values())]
            for c, (axis, picture) in enumerate(zip(axes[r], pictures, strict=True)):
                # One coordinate system for all columns, so that the outline fits pictures of any resolution.
                axis.imshow(picture, extent=(0, rgb.shape[1], rgb.shape[0], 0), interpolation="nearest")
                _without_ticks(axis)
                if r == 0:
                    axis.set_title(titles[c])
                if c == 0 and labels is not None:
                    axis.set_ylabel(labels[r])
                if masks is not None:
                    mask = np.asarray(masks[r], dtype=float)
                    y, x = (np.arange(side) + 0.5 for side in mask.shape)
                    axis.contour(x, y, mask, levels=[0.5], colors=COLOURS["vermilion"], linewidths=1.4)
        figure.supxlabel("each map stretched to its own range: dark low, bright high", fontsize=9)
    text = f"{rows} image{'s' if rows > 1 else ''}, one per row, each followed by the maps of {', '.join(titles[1:])} "
    text += "laid over it in colour, bright where the map is high"
    return with_alt(figure, text + ("." if masks is None else "; the object's outline is drawn in orange."))


def dense_beside_sparse(image: Any, dense: Any, sparse: Any, *, title: str = "") -> Figure:
    """One query's attention per head: dense above, sparse below, weights of exactly zero crossed out.

    Takes the image [3, H, W] in [0, 1] and two times the weights [heads, h, w] of the same query; ValueError for other
    shapes. The two maps of a head share one square-root colour scale.
    """
    dense, sparse = as_array(dense, float), as_array(sparse, float)
    if dense.shape != sparse.shape or dense.ndim != 3:
        raise ValueError(f"dense and sparse must both be [heads, h, w], got {dense.shape} and {sparse.shape}")
    heads = len(dense)
    with styled_figure(1.9 * (heads + 1) + 0.8, 4.3) as figure:
        axes = figure.subplots(2, heads + 1)
        axes[0, 0].set_title("image")
        for row, name, values in zip(axes, ("dense", "sparse"), (dense, sparse), strict=True):
            row[0].imshow(to_rgb(image))
            row[0].set_ylabel(name)
            for h, axis in enumerate(row[1:]):
                top = max(dense[h].max(), sparse[h].max(), 1e-12)
                axis.imshow(values[h], norm=PowerNorm(0.5, vmin=0, vmax=top), cmap=CMAP, interpolation="nearest")
                axis.set_xlabel(f"{(values[h] == 0).mean():.0%} zero")
                # On a colour scale alone, zeros look like small weights.
                y, x = np.nonzero(values[h] == 0)
                axis.scatter(x, y, marker="x", s=5, linewidths=0.5, color="#BBBBBB")
        for h, axis in enumerate(axes[0, 1:]):
            axis.set_title(f"head {h}")
        for axis in axes.flat:
            _without_ticks(axis)
        figure.supxlabel("one square-root colour scale per head; crosses: exactly 0", fontsize=9)
        if title:
            figure.suptitle(title)
    text = f"Attention of one query over the patches in {heads} heads: dense weights in the upper row, thresholded "
    text += "weights in the lower row, on the same image and colour scale; weights of exactly zero are crossed out."
    return with_alt(figure, text)
