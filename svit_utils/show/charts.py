"""Charts of numbers. Each function returns a matplotlib `Figure` with a text that describes it, see `alt_of`."""

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


def _marks(index: int) -> dict[str, Any]:
    """Marker and line of series number `index`."""
    return {"marker": "os^DvPX"[index % 7], "linestyle": ("-", "--", "-.", ":")[index % 4]}


def _check_columns(what: str, table: pd.DataFrame, needed: Iterable[str]) -> None:
    for column in needed:
        if column not in table.columns:
            raise ValueError(f"{what} has no column {column!r}: it has {', '.join(map(str, table.columns))}")


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
        for axis, column in zip(axes, columns, strict=True):
            values = chosen.pivot(index="layer", columns="head", values=column).loc[layers].to_numpy()
            axis.imshow(values, vmin=0, vmax=1, cmap=CMAP, aspect="auto")
            axis.grid(False)
            axis.set_xticks(range(len(heads)), [str(h) for h in heads])
            axis.set(xlabel="head", title=_spoken([column]))
            if values.size <= 150:
                for (r, c), value in np.ndenumerate(values):
                    ink = "white" if value < 0.55 else "black"
                    axis.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axes[0].set_yticks(range(len(layers)), [name.replace(".attn", "") for name in layers])
        axes[0].set_ylabel("layer")
        figure.colorbar(axes[0].images[0], ax=list(axes), label="share")
    text = f"Heat maps of {_spoken(columns)} by layer and head ({queries} queries), on one scale from 0 to 1, "
    return with_alt(figure, text + "values written in.")


def accuracy_vs_sparsity(rows: pd.DataFrame, *, dense: float | None = None) -> Figure:
    """Accuracy against sparsity, a point per threshold with its interval.

    Args:
        rows: columns `sparsity` and `accuracy` (shares; else ValueError), and where known `low`, `high` (interval of
            the accuracy), `label` (written beside the point), `series` (one colour and marker each).
        dense: accuracy of the dense model (a share), drawn as a line across.
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
        axis.set(xlabel="entries of attention cut (%)", ylabel="accuracy (%)")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    text = "Accuracy in per cent against the share of attention entries cut, a point per threshold"
    text += " with its interval" if {"low", "high"} <= set(rows.columns) else ""
    return with_alt(figure, text + ("." if dense is None else "; a dashed line marks the dense model."))


def card_comparison(ours: pd.DataFrame | None = None) -> Figure:
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
        axis.set(xlabel="epoch", ylabel="top-1 accuracy on CIFAR-10 (%)")
        axis.legend(fontsize=9)
    text = "The published card's accuracy over epochs 10 to 70, ViT-Base dotted black and SelectiveViT dotted red"
    text += ", with our own runs as solid lines." if runs else "; our own run is marked as not tested."
    return with_alt(figure, text)


def training_curves(runs: Mapping[str, pd.DataFrame], columns: Sequence[str] = ("loss", "accuracy")) -> Figure:
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
            axis.set(xlabel="step", ylabel=_spoken([column]))
        axes[0].legend()
    text = f"{_spoken(columns, ' and ')} over training steps, a line for each of {', '.join(runs)}."
    return with_alt(figure, text)


def forest(intervals: Mapping[str, Any], *, xlabel: str, title: str = "", scale: float = 100) -> Figure:
    """A line per interval, from `low` to `high` with a mark at `mean`, and 0 drawn across.

    An interval that contains 0 is a blue dot, one that excludes it an orange diamond; a key under the plot says so.

    Args:
        intervals: label -> anything with `mean`, `low` and `high`, such as an `Interval`; ValueError if there is none.
        xlabel: what is measured, with its unit.
        scale: factor of every number; 100 makes percentage points of a difference of shares.
    """
    if not intervals:
        raise ValueError("a forest plot needs at least one interval, got none")
    spoken, key = [], {}
    with styled_figure(7.0, 1.8 + 0.32 * len(intervals)) as figure:
        axis = figure.subplots()
        for row, (label, interval) in enumerate(intervals.items()):
            mean, low, high = (scale * value for value in (interval.mean, interval.low, interval.high))
            hue, mark, says = ("vermilion", "D", "excludes 0") if low > 0 or high < 0 else ("blue", "o", "contains 0")
            axis.plot([low, high], [row, row], color=COLOURS[hue], linewidth=2)
            (key[says],) = axis.plot(mean, row, mark, color=COLOURS[hue])
            spoken.append(f"{label} {mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        axis.axvline(0, color="#444444", linewidth=1)
        axis.set_yticks(range(len(intervals)), list(intervals))
        axis.invert_yaxis()
        figure.suptitle(title, fontsize=11)  # over labels and axes, as xlabel is below both: there they have room
        figure.legend(key.values(), key.keys(), title=xlabel, title_fontsize=10, loc="outside lower center", ncols=2)
    return with_alt(figure, f"Intervals around a line at zero, {xlabel}: {'; '.join(spoken)}.")


def comparison_forest(
    table: pd.DataFrame, *, xlabel: str, title: str = "", scale: float = 100, margin: float | None = None
) -> Figure:
    """Comparisons of a study as intervals around 0, under headings; filled where decided, hollow where open.

    Args:
        table: a row per comparison with the columns `group` (a heading), `label` (a line under it), `series` (a colour
            and marker each), `mean`, `low`, `high` and `result`; ValueError for a missing column or no row. "higher",
            "lower", "inferior" and "not inferior" are decided; anything else is open, also where 0 is excluded.
        xlabel: what is measured, with its unit.
        scale: factor of every number; 100 makes percentage points of a difference of shares.
        margin: where a dashed line is drawn, in the axis' units: what a setting may lose and still be "not inferior".
    """
    _check_columns("the table", table, ("group", "label", "series", "mean", "low", "high", "result"))
    if table.empty:
        raise ValueError("a forest plot needs at least one comparison, got none")
    series, spoken, ticks, y = list(dict.fromkeys(table["series"])), [], {}, 0.0
    step = max(1.0, 0.3 + 0.26 * len(series))  # from line to line
    colours = [COLOURS[name] for name in ("blue", "vermilion", "green", "purple", "black")]
    looks = {name: (colours[index % 5], "osD^v"[index % 5]) for index, name in enumerate(series)}
    count = table["group"].nunique() + step * len(table[["group", "label"]].drop_duplicates())
    with styled_figure(5.4, 1.3 + 0.27 * count) as figure:
        axis = figure.subplots()
        axis.axvline(0, color="#444444", linewidth=1)
        if margin is not None:
            axis.axvline(margin, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
        for group, part in table.groupby("group", sort=False):
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            place = {"transform": axis.get_yaxis_transform(), "va": "center", "bbox": paper}
            axis.text(0.01, y, str(group), fontweight="bold", **place)  # type: ignore[arg-type]
            spoken.append(f"{group}:")
            for label, rows in part.groupby("label", sort=False):
                y += step
                ticks[y] = str(label)
                for _, row in rows.iterrows():
                    here = y + 0.26 * (series.index(row["series"]) - (len(series) - 1) / 2)
                    mean, low, high = (scale * row[name] for name in ("mean", "low", "high"))
                    decided = row["result"] in ("higher", "lower", "inferior", "not inferior")
                    colour, marker = looks[row["series"]]
                    axis.plot([low, high], [here, here], color=colour, linewidth=1.6)
                    axis.plot(mean, here, marker, color=colour, markersize=5.5, mfc=colour if decided else "white")
                    said = row["result"] if decided else "open"
                    spoken.append(f"{label}, {row['series']} {mean:+.1f} [{low:+.1f}, {high:+.1f}] {said};")
            y += (1 + step) / 2
        for name, (colour, marker) in looks.items():
            axis.plot([], [], marker, color=colour, label=name)
        axis.plot([], [], "o", color="#444444", mfc="white", label="hollow: open")
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.set(xlabel=xlabel, ylim=(y - 0.3, -0.6))
        figure.legend(loc="outside upper center", ncols=3, fontsize=9, title=title or None, columnspacing=1)
    return with_alt(figure, f"Intervals around a line at zero, {xlabel}, by {', '.join(series)}. {' '.join(spoken)}")
