"""Charts of numbers. Each function returns a matplotlib `Figure` with a text that describes it, or `alt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from svit_utils.show.display import with_alt
from svit_utils.show.style import CMAP, COLOURS, styled_figure

#: Top-1 accuracy in per cent on CIFAR-10 at 224 px, as the published card claims it; not reproduced here.
CARD_TABLE = pd.DataFrame(
    {"epoch": [10, 30, 50, 70], "ViT-Base": [80.65, 83.01, 84.62, 85.47], "SelectiveViT": [81.77, 86.02, 87.89, 89.11]}
)

_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _marks(index: int) -> dict[str, Any]:
    """Marker and line of series number `index`."""
    return {"marker": _MARKERS[index % len(_MARKERS)], "linestyle": _STYLES[index % len(_STYLES)]}


def _check_columns(what: str, table: pd.DataFrame, needed: Iterable[str]) -> None:
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise ValueError(f"{what} has no column {missing[0]!r}: it has {', '.join(map(str, table.columns))}")


def _spoken(columns: Iterable[str], joined: str = ", ") -> str:
    return joined.join(column.replace("_", " ") for column in columns)


def _error_bars(axis: Any, points: pd.DataFrame, x: str, *, scale: float = 1, **style: Any) -> None:
    """`accuracy` over the column `x`, both times `scale`, with a bar from `low` to `high` where the table has them."""
    points = points.sort_values(x)
    bars = None
    if {"low", "high"} <= set(points.columns):
        bars = scale * np.abs(np.stack([points["accuracy"] - points["low"], points["high"] - points["accuracy"]]))
    axis.errorbar(scale * points[x].to_numpy(), scale * points["accuracy"].to_numpy(), yerr=bars, capsize=3, **style)


def sparsity_heatmaps(
    table: pd.DataFrame,
    columns: Sequence[str] = ("cut_sparsity", "applied_sparsity", "empty_rate"),
    *,
    queries: str = "all",
    alt: str | None = None,
) -> Figure:
    """Layers by heads, a panel for each of `columns` of a `TokenSparsityTracker`'s table, all on the scale 0 to 1.

    Raises ValueError for a column or query set that the table does not have.
    """
    _check_columns("the table", table, columns)
    chosen = table[table["queries"] == queries]
    if chosen.empty:
        known = ", ".join(sorted(set(table["queries"])))
        raise ValueError(f"the table has no rows for queries={queries!r}: it has {known}")
    layers, heads = list(dict.fromkeys(chosen["layer"])), sorted(set(chosen["head"]))
    size = (1.6 + len(columns) * (1.2 + 0.45 * len(heads)), 1.5 + 0.42 * len(layers))
    with styled_figure(*size) as figure:
        axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
        image: Any = None
        for axis, column in zip(axes, columns, strict=True):
            values = chosen.pivot(index="layer", columns="head", values=column).loc[layers].to_numpy()
            image = axis.imshow(values, vmin=0, vmax=1, cmap=CMAP, aspect="auto")
            axis.grid(False)
            axis.set_xticks(range(len(heads)), [str(h) for h in heads])
            axis.set_xlabel("head")
            axis.set_title(_spoken([column]))
            if values.size <= 150:
                for (r, c), value in np.ndenumerate(values):
                    ink = "white" if value < 0.55 else "black"
                    axis.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axes[0].set_yticks(range(len(layers)), [name.replace(".attn", "") for name in layers])
        axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(axes), label="share")
    text = f"Heat maps of {_spoken(columns)} by layer and head ({queries} queries), on one scale from 0 to 1, "
    return with_alt(figure, alt or text + "values written in.")


def accuracy_vs_sparsity(rows: pd.DataFrame, *, dense: float | None = None, alt: str | None = None) -> Figure:
    """Accuracy against sparsity, a point per threshold with its interval.

    Args:
        rows: columns `sparsity` and `accuracy` (shares), and where known `low`, `high` (interval of the accuracy),
            `label` (written beside the point), `series` (one colour and marker each).
        dense: accuracy of the dense model (a share), drawn as a line across.

    Raises ValueError for a missing column.
    """
    _check_columns("the table", rows, ("sparsity", "accuracy"))
    with styled_figure(6.0, 4.0) as figure:
        axis = figure.subplots()
        groups = list(rows.groupby("series", sort=False)) if "series" in rows else [("", rows)]
        for index, (name, group) in enumerate(groups):
            _error_bars(axis, group, "sparsity", scale=100, label=str(name) or None, **_marks(index))
            if "label" in group:
                for _, row in group.iterrows():
                    place = (100 * row["sparsity"], 100 * row["accuracy"])
                    axis.annotate(str(row["label"]), place, xytext=(5, 6), textcoords="offset points", fontsize=8)
        if dense is not None:
            axis.axhline(100 * dense, color="#444444", linewidth=1, linestyle=(0, (4, 3)), label="dense")
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel("entries of attention cut (%)")
        axis.set_ylabel("accuracy (%)")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    text = "Accuracy in per cent against the share of attention entries cut, a point per threshold"
    text += " with its interval" if {"low", "high"} <= set(rows.columns) else ""
    text += "; a dashed line marks the dense model." if dense is not None else "."
    return with_alt(figure, alt or text)


def card_comparison(ours: pd.DataFrame | None = None, *, alt: str | None = None) -> Figure:
    """The published card's two curves, and our own beside them where a run was made.

    `ours` has the columns `epoch`, `accuracy` (per cent), `series`, and where known `low`, `high`; None or empty, the
    plot says "not tested".
    """
    with styled_figure(6.4, 4.0) as figure:
        axis = figure.subplots()
        for model, colour in (("ViT-Base", "black"), ("SelectiveViT", "vermilion")):
            style = {"label": f"card: {model}", "color": COLOURS[colour], "marker": "o", "linestyle": ":"}
            axis.plot(CARD_TABLE["epoch"], CARD_TABLE[model], **style)  # type: ignore[arg-type]
        runs = [] if ours is None else list(ours.groupby("series", sort=False))
        colours = [COLOURS[c] for c in ("blue", "orange", "green", "purple", "sky")]
        for index, (name, group) in enumerate(runs):
            marks = {**_marks(index + 1), "linestyle": "-", "color": colours[index % len(colours)]}
            _error_bars(axis, group, "epoch", label=f"ours: {name}", **marks)
        if not runs:
            axis.text(0.98, 0.04, "ours: not tested", transform=axis.transAxes, ha="right", va="bottom", style="italic")
        axis.set_xlabel("epoch")
        axis.set_ylabel("top-1 accuracy on CIFAR-10 (%)")
        axis.legend(fontsize=9)
    text = "The published card's accuracy over epochs 10 to 70, ViT-Base dotted black and SelectiveViT dotted red"
    text += ", with our own runs as solid lines." if runs else "; our own run is marked as not tested."
    return with_alt(figure, alt or text)


def row_threshold(probabilities: Any, tau: float, *, title: str = "", alt: str | None = None) -> Figure:
    """What a threshold does to one row: its probabilities in falling order with tau across, and the weights after it.

    Raises ValueError unless `probabilities` is [N], non-negative, with sum 1.
    """
    p = np.sort(np.asarray(probabilities, dtype=float))[::-1]
    if p.ndim != 1 or (p < 0).any() or abs(p.sum() - 1) > 1e-3:
        raise ValueError(f"probabilities must be one row [N] with sum 1, got shape {p.shape} with sum {p.sum():.4g}")
    kept, rank, blue = p > tau, np.arange(1, len(p) + 1), COLOURS["blue"]
    remainder = np.maximum(p - tau, 0)
    weights = remainder / remainder.sum() if kept.any() else np.zeros_like(p)
    with styled_figure(8.0, 3.2) as figure:
        left, right = figure.subplots(1, 2, sharey=False)
        label = f"kept: {kept.sum()} keys, mass {p[kept].sum():.2f}"
        left.bar(rank[kept], p[kept], color=blue, width=1.0, label=label)
        left.bar(rank[~kept], p[~kept], color="#B5B5B5", width=1.0, label=f"cut: {(~kept).sum()} keys")
        left.axhline(tau, color=COLOURS["vermilion"], linewidth=1.4, label=f"$\\tau$ = {tau:g}")
        left.axhline(1 / len(p), color="#444444", linewidth=1, linestyle="--", label=f"1/N = {1 / len(p):.4f}")
        left.set_ylim(0, max(1.25 * p[0], (1.25 if kept.any() else 1.9) * tau))  # room for the legend
        left.set_title("softmax row p")
        left.set_ylabel("weight")
        left.legend(fontsize=8)
        right.bar(rank, weights, color=blue, width=1.0)
        right.set_title("after the cut: ReLU(p - τ) / sum" if kept.any() else "no key survives: 0/0")
        if not kept.any():
            right.set_ylim(0, 1)
        for axis in (left, right):
            axis.set_xlabel("key, by falling probability")
        if title:
            figure.suptitle(title)
    text = "Left: one attention row as bars in falling order, the keys above the threshold line in blue, those below "
    text += "in grey. Right: the weights after subtracting the threshold and dividing by the sum; cut keys have none."
    return with_alt(figure, alt or text)


def training_curves(
    runs: Mapping[str, pd.DataFrame], columns: Sequence[str] = ("loss", "accuracy"), *, alt: str | None = None
) -> Figure:
    """Metrics over steps, a panel per column, a line per run.

    `runs` is label -> data with a column `step` (else ValueError) and any of `columns`; empty cells, of a metric not
    taken at that step, are skipped.
    """
    with styled_figure(4.4 * len(columns), 3.4) as figure:
        axes = figure.subplots(1, len(columns), squeeze=False)[0]
        for index, (label, data) in enumerate(runs.items()):
            _check_columns(f"run {label!r}", data, ["step"])
            for axis, column in zip(axes, columns, strict=True):
                if column in data:
                    points = data[["step", column]].dropna()
                    style = {**_marks(index), "markersize": 4, **({"marker": None} if len(points) > 30 else {})}
                    axis.plot(points["step"], points[column], label=label, **style)
        for axis, column in zip(axes, columns, strict=True):
            axis.set_xlabel("step")
            axis.set_ylabel(_spoken([column]))
        axes[0].legend()
    text = f"{_spoken(columns, ' and ')} over training steps, a line for each of {', '.join(runs)}."
    return with_alt(figure, alt or text)
