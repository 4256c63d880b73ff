"""The second study in results/README.md: a line per setting, each number read from the study's tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from research.markdown import with_interval
from svit_utils.files import read_rows

SETTINGS = {
    "dense": "dense",
    "tau0.0025": "tau 0.0025, warmed up",
    "tau0.005": "tau 0.005 (= 1/N), warmed up",
    "tau0.0075": "tau 0.0075, warmed up",
    "warmup": "tau 0.01, warmed up",
    "sparse": "tau 0.01 from the first step",
    "warmup10": "tau 0.01, warmed up over 10 %",
    "warmup25": "tau 0.01, warmed up over 25 %",
    "distilled": "tau 0.01, taught by the dense model",
    "cap": "tau 0.01, empty_rows='cap'",
    "zero": "tau 0.01, empty_rows='zero'",
    "per_model": "one tau learned",
    "per_layer": "a tau learned per layer",
    "per_head": "a tau learned per head",
    "equal_layers": "a tau learned per layer, equal shares",
    "top_k": "the 21 largest keys",
    "hard_cut": "hard cut at 0.01",
    "clipped": "clipped softmax at 0.01",
    "entmax15": "1.5-entmax",
}
COLUMNS = ("setting", "steps", "seeds", "zeros, %", "test accuracy, %", "minus dense, points", "within a point?")
MAP_COLUMNS = ("map: AP minus dense", "minus dense drawn cut")


def second_table(folder: Path) -> list[str]:
    """The settings that are run, by steps, from ``second/tables`` in ``folder``; no line where nothing is."""
    tables = folder / "second" / "tables"
    found = {
        (row["setting"], int(row["steps"]), row["metric"]): row
        for row in read_rows(tables / "settings.csv")
        if row["setting"] in SETTINGS
    }
    margins = {(row["setting"], int(row["steps"])): row for row in read_rows(tables / "margins.csv")}
    maps = {
        (row["setting"], row["steps"], row["other"]): row
        for row in read_rows(tables / "contrasts.csv")
        if row["measure"] == "attention"
    }
    lines = []
    for steps in sorted({steps for _, steps, _ in found}):
        for setting, label in SETTINGS.items():
            accuracy = found.get((setting, steps, "test_accuracy"))
            if accuracy is None:
                continue
            zeros = found.get((setting, steps, "val_applied_sparsity"))
            margin = margins.get((setting, steps))
            cells = [label, str(steps), accuracy["seeds"], "" if zeros is None else f"{100 * float(zeros['mean']):.0f}"]
            cells += [f"{100 * float(accuracy['mean']):.1f}", "" if margin is None else interval(margin)]
            cells.append("" if margin is None else margin["result"])
            for other in ("dense", "drawn"):
                row = maps.get((setting, str(steps), other))
                cells.append("" if row is None else f"{interval(row, 1, 3)} {row['result']}")
            lines.append(cells)
    columns = (*COLUMNS, *MAP_COLUMNS) if maps else COLUMNS  # scored later than the runs are done
    rows = [columns, ["---"] * len(columns), *(cells[: len(columns)] for cells in lines)]
    return [f"| {' | '.join(cells)} |" for cells in rows] if lines else []


def interval(row: Mapping[str, str], *form: int) -> str:
    """`with_interval` of a row's mean, low and high."""
    mean, low, high = (float(row[name]) for name in ("mean", "low", "high"))
    return with_interval(mean, low, high, *form)


def second_sentence(folder: Path) -> str:
    """What the table's words mean, and what became of the choice."""
    settings = read_rows(folder / "second" / "tables" / "settings.csv")
    done = sum(int(row["seeds"]) for row in settings if row["metric"] == "test_accuracy")
    parts = [
        "3,000 test pictures that the first study has not seen; intervals: the wider of the crossed bootstrap's and "
        "Student's over seeds, 95 %. *Not inferior*: the interval lies above -1 point; *inferior*: below it; only five "
        "seeds are judged.",
        f"{done} of the 121 runs of the [plan](second/PLAN.md) are done.",
    ]
    if any(row["measure"] == "attention" for row in read_rows(folder / "second" / "tables" / "contrasts.csv")):
        parts.append("AP: average precision of the last layer's attention on the object, on the grid of the patches.")
    confirmed = read_rows(folder / "second" / "tables" / "confirmed.csv")
    if confirmed:
        results = {(row["measure"], row["other"]): row for row in confirmed}
        accuracy = results["accuracy", "dense"]
        maps = [results["attention", other]["result"] for other in ("dense", "drawn")]
        parts.append(
            f"Chosen on validation and confirmed with fresh seeds and pictures: "
            f"{SETTINGS.get(accuracy['setting'], accuracy['setting'])}, {interval(accuracy)} points, "
            f"{accuracy['result']}; its map against the dense map: {maps[0]}, against that drawn cut: {maps[1]}."
        )
    return " ".join(parts)
