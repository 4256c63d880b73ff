"""Tables of the recorded experiments in Markdown, each number read from its row; what was not run says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from research.arms import SEEDS, SWEEP
from svit_utils.records import Row, correct_by_run, run_rows
from svit_utils.referee import paired_bootstrap


def percent(value: str | float) -> str:
    """A share as per cent with one decimal; empty where there is none."""
    return "" if value == "" else f"{100 * float(value):.1f}"


def difference(a: np.ndarray | None, b: np.ndarray | None) -> str:
    """b - a in points with its 95 % interval, paired over images; empty unless both were run."""
    if a is None or b is None:
        return ""
    interval = paired_bootstrap(b.astype(float), a.astype(float))
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def planted_table(folder: Path) -> list[str]:
    """Dense and sparse pairs per seed, then tau by tau; the interval is over the 2,000 test images."""
    rows = run_rows("planted_pairs", folder) | run_rows("planted_sweep", folder)
    bits = correct_by_run("planted_pairs", folder) | correct_by_run("planted_sweep", folder)
    if not rows:
        return []
    lines = [
        "| arm | seed | test accuracy, % | minus dense, points | cut, % | rows empty, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    arms = [(f"dense-seed{s}", "dense", s) for s in SEEDS]
    arms += [(f"sparse-seed{s}", "tau 0.01, warmed up", s) for s in SEEDS]
    arms += [("tau0.01-no-warmup", "tau 0.01 from the first step", 0)]
    arms += [(f"tau{tau}", f"tau {tau}, warmed up", 0) for tau in SWEEP]
    for name, label, seed in arms:
        row = rows.get(name)
        if row is None:
            lines.append(f"| {label} | {seed} | not run | | | |")
            continue
        minus = "" if name.startswith("dense") else difference(bits.get(f"dense-seed{seed}"), bits.get(name))
        cells = (label, str(seed), percent(row["test_accuracy"]), minus, percent(row["cut_sparsity"]))
        lines.append(f"| {' | '.join(cells)} | {percent(row['empty_rate'])} |")
    return lines


def deit_table(folder: Path) -> list[str]:
    """One line per arm: validation accuracy, by which is chosen, and test accuracy, which is reported."""
    rows, bits = run_rows("deit_cifar10", folder), correct_by_run("deit_cifar10", folder)
    if not rows:
        return []
    lines = [
        "| tau | introduced | lr | seed | validation, % | test, % | minus dense, points | cut, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        dense = f"dense-lr{float(row['lr']):.0e}-seed{row['seed']}"
        how = "" if not row["threshold"] else "warmed up" if float(row["tau_warmup"]) else "from the first step"
        minus = "" if name == dense else difference(bits.get(dense), bits.get(name))
        cells = (row["threshold"] or "dense", how, row["lr"], row["seed"], percent(row["val_accuracy"]))
        lines.append(
            f"| {' | '.join(cells)} | {percent(row['test_accuracy'])} | {minus} | {percent(row['cut_sparsity'])} |"
        )
    return lines


def vit56_table(folder: Path) -> list[str]:
    """Dense and sparse, trained from scratch with the same budget."""
    rows, bits = run_rows("vit56_cifar10", folder), correct_by_run("vit56_cifar10", folder)
    if not rows:
        return []
    lines = ["| arm | steps | test accuracy, % | minus dense, points | cut, % |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        minus = "" if name == "dense" else difference(bits.get("dense"), bits.get(name))
        cells = (name, row["steps"], percent(row["test_accuracy"]), minus, percent(row["cut_sparsity"]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def provenance_line(rows: list[Row]) -> str:
    """Where the rows come from, in a sentence."""

    def values(key: str) -> str:
        return ", ".join(sorted({row[key] for row in rows}))

    modes = values("empty_rows")
    commits = {row["commit"] + (" with uncommitted changes" if row["dirty"] == "True" else "") for row in rows}
    return (
        f'Sparse arms: `empty_rows="{modes}"`. Recorded {values("date")} on {values("device")} with torch '
        f"{values('torch')}, timm {values('timm')}; commits {', '.join(sorted(commits))}; "
        "intervals: 95 %, paired bootstrap over the test images; differences are rounded after subtracting."
    )
