"""Static plots. Each returns a matplotlib `Figure` with a text attached; `figure_with_alt` shows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from svit_utils.show.style import CMAP, COLOURS, overlay, styled, to_rgb, with_alt

__all__ = [
    "CARD_TABLE",
    "accuracy_vs_sparsity",
    "card_comparison",
    "dense_beside_sparse",
    "explanation_grid",
    "row_threshold",
    "sparsity_heatmaps",
    "training_curves",
]

#: Top-1 accuracy in per cent on CIFAR-10 at 224 px, as the published card claims it; not reproduced here.
CARD_TABLE = pd.DataFrame(
    {
        "epoch": [10, 30, 50, 70],
        "ViT-Base": [80.65, 83.01, 84.62, 85.47],
        "SelectiveViT": [81.77, 86.02, 87.89, 89.11],
    }
)

_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _title(name: str) -> str:
    known = {"grad_cam": "Grad-CAM", "layer_grad_cam": "LayerGradCam", "attention": "attention, last layer"}
    return known.get(name, name.replace("_", " "))


def explanation_grid(
    images: Any,
    maps: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    masks: Any | None = None,
    alt: str | None = None,
) -> Figure:
    """A row per image: the image, then each method's map laid over it.

    Args:
        images: [B, 3, H, W] in [0, 1].
        maps: name -> [B, h, w]; every map is stretched to its own range, so colours compare places, not strengths.
        labels: a text per image, at its left.
        masks: [B, H, W] boolean, drawn as an outline.
    """
    for name, value in maps.items():
        if value.ndim != 3 or len(value) != len(images):
            raise ValueError(f"map {name!r} must be [{len(images)}, h, w], got shape {tuple(value.shape)}")
    rows, columns = len(images), 1 + len(maps)
    with styled():
        figure = _figure(1.9 * columns, 1.9 * rows + 0.6)
        axes = figure.subplots(rows, columns, squeeze=False)
        for r in range(rows):
            rgb = to_rgb(images[r])
            pictures = [rgb] + [
                np.asarray(overlay(rgb, value[r], scale=max(1, 224 // rgb.shape[0]))) for value in maps.values()
            ]
            for c, (axis, picture, title) in enumerate(
                zip(axes[r], pictures, ["image", *map(_title, maps)], strict=True)
            ):
                # One coordinate system for all columns, so that the outline fits pictures of any resolution.
                axis.imshow(picture, extent=(0, rgb.shape[1], rgb.shape[0], 0), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
                if r == 0:
                    axis.set_title(title)
                if c == 0 and labels is not None:
                    axis.set_ylabel(labels[r])
                if masks is not None:
                    _outline(axis, np.asarray(masks[r]))
        figure.supxlabel("each map stretched to its own range: dark low, bright high", fontsize=9)
        text = (
            f"{rows} image{'s' if rows > 1 else ''}, one per row, each followed by the maps of "
            f"{', '.join(map(_title, maps))} laid over it in colour, bright where the map is high"
            + ("; the object's outline is drawn in orange." if masks is not None else ".")
        )
    return with_alt(figure, alt or text)


def _outline(axis: Any, mask: np.ndarray) -> None:
    height, width = mask.shape
    axis.contour(
        np.arange(width) + 0.5,
        np.arange(height) + 0.5,
        mask.astype(float),
        levels=[0.5],
        colors=COLOURS["vermilion"],
        linewidths=1.4,
    )


def dense_beside_sparse(image: Any, dense: Any, sparse: Any, *, title: str = "", alt: str | None = None) -> Figure:
    """One query's attention per head, dense above, sparse below; exact zeros hatched.

    Args:
        image: [3, H, W] in [0, 1].
        dense, sparse: [heads, h, w] weights of the same query; both rows of a head share one
            square-root colour scale.
    """
    dense, sparse = (np.asarray(m.detach().cpu() if hasattr(m, "detach") else m, dtype=float) for m in (dense, sparse))
    if dense.shape != sparse.shape or dense.ndim != 3:
        raise ValueError(f"dense and sparse must both be [heads, h, w], got {dense.shape} and {sparse.shape}")
    heads = len(dense)
    with styled():
        figure = _figure(1.9 * (heads + 1) + 0.8, 4.3)
        axes = figure.subplots(2, heads + 1)
        for r, (name, values) in enumerate((("dense", dense), ("sparse", sparse))):
            axes[r, 0].imshow(to_rgb(image))
            axes[r, 0].set_ylabel(name)
            if r == 0:
                axes[r, 0].set_title("image")
            for h in range(heads):
                axis = axes[r, h + 1]
                top = max(dense[h].max(), sparse[h].max(), 1e-12)
                axis.imshow(values[h], norm=PowerNorm(0.5, vmin=0, vmax=top), cmap=CMAP, interpolation="nearest")
                axis.set_xlabel(f"{(values[h] == 0).mean():.0%} zero")
                if r == 0:
                    axis.set_title(f"head {h}")
                _hatch_zeros(axis, values[h])
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
        figure.supxlabel("one square-root colour scale per head; crosses: exactly 0", fontsize=9)
        if title:
            figure.suptitle(title)
    return with_alt(
        figure,
        alt
        or f"Attention of one query over the patches in {heads} heads: dense weights in the upper row, thresholded "
        "weights in the lower row, on the same image and colour scale; weights of exactly zero are crossed out.",
    )


def _hatch_zeros(axis: Any, values: np.ndarray) -> None:
    """Small crosses on exact zeros: on a colour scale alone they look like small weights."""
    y, x = np.nonzero(values == 0)
    axis.scatter(x, y, marker="x", s=5, linewidths=0.5, color="#BBBBBB")


def sparsity_heatmaps(
    table: pd.DataFrame,
    columns: Sequence[str] = ("cut_sparsity", "applied_sparsity", "empty_rate"),
    *,
    queries: str = "all",
    alt: str | None = None,
) -> Figure:
    """Layers x heads pictures of a `TokenSparsityTracker`'s table, one per column, all on the scale 0 to 1.

    Raises:
        ValueError: a column or query set the table does not have.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}: it has {', '.join(map(str, table.columns))}")
    chosen = table[table["queries"] == queries]
    if chosen.empty:
        raise ValueError(
            f"the table has no rows for queries={queries!r}: it has {', '.join(sorted(set(table['queries'])))}"
        )
    layers = list(dict.fromkeys(chosen["layer"]))
    heads = sorted(set(chosen["head"]))
    with styled():
        figure = _figure(1.6 + len(columns) * (1.2 + 0.45 * len(heads)), 1.5 + 0.42 * len(layers))
        axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
        image: Any = None
        for axis, column in zip(axes, columns, strict=True):
            values = chosen.pivot(index="layer", columns="head", values=column).loc[layers].to_numpy()
            image = axis.imshow(values, vmin=0, vmax=1, cmap=CMAP, aspect="auto")
            axis.grid(False)
            axis.set_xticks(range(len(heads)), [str(h) for h in heads])
            axis.set_xlabel("head")
            axis.set_title(column.replace("_", " "))
            if values.size <= 150:
                for (r, c), value in np.ndenumerate(values):
                    axis.text(
                        c,
                        r,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if value < 0.55 else "black",
                    )
        axes[0].set_yticks(range(len(layers)), [name.replace(".attn", "") for name in layers])
        axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(axes), label="share")
    names = ", ".join(column.replace("_", " ") for column in columns)
    return with_alt(
        figure,
        alt
        or f"Heat maps of {names} by layer and head ({queries} queries), on one scale from 0 to 1, values written in.",
    )


def accuracy_vs_sparsity(rows: pd.DataFrame, *, dense: float | None = None, alt: str | None = None) -> Figure:
    """Accuracy against sparsity, a point per threshold with its interval.

    Args:
        rows: columns `sparsity` and `accuracy` (shares), and where known `low`, `high` (interval of the accuracy),
            `label` (written beside the point), `series` (one colour and marker each).
        dense: accuracy of the dense model, drawn as a line across.
    """
    missing = {"sparsity", "accuracy"} - set(rows.columns)
    if missing:
        raise ValueError(f"rows need the columns sparsity and accuracy, missing: {', '.join(sorted(missing))}")
    with styled():
        figure = _figure(6.0, 4.0)
        axis = figure.subplots()
        groups = list(rows.groupby("series", sort=False)) if "series" in rows else [("", rows)]
        for index, (name, group) in enumerate(groups):
            group = group.sort_values("sparsity")
            error = None
            if {"low", "high"} <= set(group.columns):
                error = 100 * np.abs(np.stack([group["accuracy"] - group["low"], group["high"] - group["accuracy"]]))
            axis.errorbar(
                100 * group["sparsity"].to_numpy(),
                100 * group["accuracy"].to_numpy(),
                yerr=error,
                marker=_MARKERS[index % len(_MARKERS)],
                linestyle=_STYLES[index % len(_STYLES)],
                capsize=3,
                label=str(name) or None,
            )
            if "label" in group:
                for _, row in group.iterrows():
                    axis.annotate(
                        str(row["label"]),
                        (100 * row["sparsity"], 100 * row["accuracy"]),
                        xytext=(5, 6),
                        textcoords="offset points",
                        fontsize=8,
                    )
        if dense is not None:
            axis.axhline(100 * dense, color="#444444", linewidth=1, linestyle=(0, (4, 3)), label="dense")
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel("entries of attention cut (%)")
        axis.set_ylabel("accuracy (%)")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    return with_alt(
        figure,
        alt
        or "Accuracy in per cent against the share of attention entries cut, a point per threshold"
        + (" with its interval" if {"low", "high"} <= set(rows.columns) else "")
        + ("; a dashed line marks the dense model." if dense is not None else "."),
    )


def card_comparison(ours: pd.DataFrame | None = None, *, alt: str | None = None) -> Figure:
    """The card's two curves, and ours beside them where a run was made.

    Args:
        ours: columns `epoch`, `accuracy` (per cent), `series`, and where known `low`, `high`. None or empty: the plot
            says "not tested".
    """
    with styled():
        figure = _figure(6.4, 4.0)
        axis = figure.subplots()
        for name, colour in (("ViT-Base", COLOURS["black"]), ("SelectiveViT", COLOURS["vermilion"])):
            axis.plot(
                CARD_TABLE["epoch"], CARD_TABLE[name], color=colour, marker="o", linestyle=":", label=f"card: {name}"
            )
        tested = ours is not None and len(ours) > 0
        if tested:
            colours = [COLOURS[c] for c in ("blue", "orange", "green", "purple", "sky")]
            for index, (name, group) in enumerate(ours.groupby("series", sort=False)):  # type: ignore[union-attr]
                group = group.sort_values("epoch")
                error = None
                if {"low", "high"} <= set(group.columns):
                    error = np.abs(np.stack([group["accuracy"] - group["low"], group["high"] - group["accuracy"]]))
                axis.errorbar(
                    group["epoch"],
                    group["accuracy"],
                    yerr=error,
                    capsize=3,
                    color=colours[index % len(colours)],
                    marker=_MARKERS[(index + 1) % len(_MARKERS)],
                    linestyle="-",
                    label=f"ours: {name}",
                )
        else:
            axis.text(0.98, 0.04, "ours: not tested", transform=axis.transAxes, ha="right", va="bottom", style="italic")
        axis.set_xlabel("epoch")
        axis.set_ylabel("top-1 accuracy on CIFAR-10 (%)")
        axis.legend(fontsize=9)
    return with_alt(
        figure,
        alt
        or "The published card's accuracy over epochs 10 to 70, ViT-Base dotted black and SelectiveViT dotted red"
        + (", with our own runs as solid lines." if tested else "; our own run is marked as not tested."),
    )


def row_threshold(probabilities: Any, tau: float, *, title: str = "", alt: str | None = None) -> Figure:
    """What a threshold does to one row: its probabilities in falling order with tau across, and the weights that
    follow.

    Args:
        probabilities: [N], non-negative, sum 1.
    """
    p = np.sort(np.asarray(probabilities, dtype=float))[::-1]
    if p.ndim != 1 or (p < 0).any() or abs(p.sum() - 1) > 1e-3:
        raise ValueError(
            f"probabilities must be one row [N] that sums to 1, got shape {p.shape} with sum {p.sum():.4g}"
        )
    kept = p > tau
    remainder = np.maximum(p - tau, 0)
    weights = remainder / remainder.sum() if kept.any() else np.zeros_like(p)
    rank = np.arange(1, len(p) + 1)
    with styled():
        figure = _figure(8.0, 3.2)
        left, right = figure.subplots(1, 2, sharey=False)
        left.bar(
            rank[kept],
            p[kept],
            color=COLOURS["blue"],
            width=1.0,
            label=f"kept: {kept.sum()} keys, mass {p[kept].sum():.2f}",
        )
        left.bar(rank[~kept], p[~kept], color="#B5B5B5", width=1.0, label=f"cut: {(~kept).sum()} keys")
        left.axhline(tau, color=COLOURS["vermilion"], linewidth=1.4, label=f"$\\tau$ = {tau:g}")
        left.axhline(1 / len(p), color="#444444", linewidth=1, linestyle="--", label=f"1/N = {1 / len(p):.4f}")
        left.set_ylim(0, max(1.25 * p[0], (1.25 if kept.any() else 1.9) * tau))  # room for the legend
        if not kept.any():
            right.set_ylim(0, 1)
        left.set_title("softmax row p")
        left.set_ylabel("weight")
        left.legend(fontsize=8)
        right.bar(rank, weights, color=COLOURS["blue"], width=1.0)
        right.set_title("after the cut: ReLU(p - τ) / sum" if kept.any() else "no key survives: 0/0")
        for axis in (left, right):
            axis.set_xlabel("key, by falling probability")
        if title:
            figure.suptitle(title)
    return with_alt(
        figure,
        alt
        or "Left: one attention row as bars in falling order, the keys above the threshold line in blue, those below "
        "in grey. Right: the weights after subtracting the threshold and dividing by the sum; cut keys have none.",
    )


def training_curves(
    runs: Mapping[str, pd.DataFrame], columns: Sequence[str] = ("loss", "accuracy"), *, alt: str | None = None
) -> Figure:
    """Metrics over steps, a panel per column, a line per run.

    Args:
        runs: label -> data with a column `step` and any of `columns`; empty cells (a metric not taken at that step)
            are skipped.
    """
    with styled():
        figure = _figure(4.4 * len(columns), 3.4)
        axes = figure.subplots(1, len(columns), squeeze=False)[0]
        for axis, column in zip(axes, columns, strict=True):
            for index, (label, data) in enumerate(runs.items()):
                if "step" not in data:
                    raise ValueError(f"run {label!r} has no column 'step': it has {', '.join(map(str, data.columns))}")
                if column in data:
                    points = data[["step", column]].dropna()
                    axis.plot(
                        points["step"],
                        points[column],
                        label=label,
                        linestyle=_STYLES[index % len(_STYLES)],
                        marker=_MARKERS[index % len(_MARKERS)] if len(points) <= 30 else None,
                        markersize=4,
                    )
            axis.set_xlabel("step")
            axis.set_ylabel(column.replace("_", " "))
        axes[0].legend()
    names = " and ".join(column.replace("_", " ") for column in columns)
    return with_alt(figure, alt or f"{names} over training steps, a line for each of {', '.join(runs)}.")
