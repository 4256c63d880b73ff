"""The recorded results as Markdown, each number read from its row; what was not run says so. For the README."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from research.plans import EXPERIMENTS, Run
from svit_utils.files import read_rows
from svit_utils.records import Row, correct_by_run, run_rows
from svit_utils.referee import paired_bootstrap

MAPS = {"attention": "class attention", "rollout": "rollout", "grad_cam": "Grad-CAM"}
KINDS = {"sparse": "tau 0.01 from the first step", "warmup": "tau 0.01, warmed up"}
SCORES = {"energy_in_mask": "energy in the object", "average_precision": "average precision"}


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
        "| run | seed | test accuracy, % | minus dense, points | cut, % | rows empty, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    pairs, sweep = EXPERIMENTS["planted_pairs"].runs, EXPERIMENTS["planted_sweep"].runs
    dense = {run.profile.config.seed: run.name for run in pairs if run.kind == "dense"}
    parts = ((pairs, "dense"), (pairs, "warmup"), (sweep, "sparse"), (sweep, "warmup"))
    for run in (run for part, kind in parts for run in part if run.kind == kind):
        seed, label = run.profile.config.seed, _label(run)
        row = rows.get(run.name)
        if row is None:
            lines.append(f"| {label} | {seed} | not run | | | |")
            continue
        minus = "" if run.kind == "dense" else difference(bits.get(dense[seed]), bits.get(run.name))
        cells = (label, str(seed), percent(row["test_accuracy"]), minus, percent(row["cut_sparsity"]))
        lines.append(f"| {' | '.join(cells)} | {percent(row['empty_rate'])} |")
    return lines


def _label(run: Run) -> str:
    how = {"dense": "dense", "sparse": "tau {} from the first step", "warmup": "tau {}, warmed up"}
    return how[run.kind].format(run.threshold)


def deit_table(folder: Path) -> list[str]:
    """One line per run: validation accuracy, by which is chosen, and test accuracy, which is reported."""
    rows, bits = run_rows("deit_cifar10", folder), correct_by_run("deit_cifar10", folder)
    if not rows:
        return []
    lines = [
        "| tau | introduced | lr | seed | validation, % | test, % | minus dense, points | cut, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    dense = {(row["lr"], row["seed"]): name for name, row in rows.items() if not row["threshold"]}
    for name, row in rows.items():
        other = dense.get((row["lr"], row["seed"]), "")
        how = "" if not row["threshold"] else "warmed up" if float(row["tau_warmup"]) else "from the first step"
        minus = "" if name == other else difference(bits.get(other), bits.get(name))
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
    lines = ["| run | steps | test accuracy, % | minus dense, points | cut, % |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        minus = "" if not row["threshold"] else difference(bits.get("dense"), bits.get(name))
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
        f'Sparse runs: `empty_rows="{modes}"`. Recorded {values("date")} on {values("device")} with torch '
        f"{values('torch')}, timm {values('timm')}; commits {', '.join(sorted(commits))}; "
        "intervals: 95 %, paired bootstrap over the test images; differences are rounded after subtracting."
    )


def study_table(folder: Path) -> list[str]:
    """Per kind of model and map: two localisation scores against dense and against dense displayed, and the verdict."""
    path = folder / "study" / "tables" / "contrasts.csv"
    if not path.is_file():
        return []
    contrasts = pd.read_csv(path, keep_default_na=False, dtype={"mean": float, "low": float, "high": float})
    verdicts = pd.read_csv(folder / "study" / "tables" / "verdicts.csv")
    judged = contrasts[contrasts["family"] == "localisation"]
    heads = [f"{name}, {against}" for name in SCORES.values() for against in ("− dense", "− dense displayed")]
    lines = [f"| model | map | {' | '.join(heads)} | more on the object? |", "| --- " * (len(heads) + 3) + "|"]
    for kind, map_name in judged[["first", "map"]].drop_duplicates().itertuples(index=False):
        against_dense = judged.query("first == @kind and map == @map_name")
        cells = [_cell(against_dense, metric, second) for metric in SCORES for second in ("dense", "dense displayed")]
        said = verdicts.query("family == 'localisation' and arm == @kind and map == @map_name")["verdict"].iloc[0]
        lines.append(f"| {KINDS.get(kind, kind)} | {MAPS.get(map_name, map_name)} | {' | '.join(cells)} | {said} |")
    return lines


def _cell(contrasts: pd.DataFrame, metric: str, second: str) -> str:
    rows = contrasts.query("metric == @metric and second == @second")
    if rows.empty:
        return ""
    row = rows.iloc[0]
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['result']}"


def study_sentence(folder: Path) -> str:
    """How much the table rests on, and where it comes from."""
    cells = read_rows(folder / "study" / "cells.csv")
    contrasts = pd.read_csv(folder / "study" / "tables" / "contrasts.csv")
    judged = contrasts[contrasts["family"] == "localisation"]

    def values(column: str) -> str:
        return ", ".join(sorted({cell[column] for cell in cells}))

    return (
        f"{judged['seeds'].max()} seeds, {judged['images'].max():,} test pictures; differences with the wider of two "
        "95 % intervals (crossed bootstrap over seeds and pictures, Student's t over seeds). *higher*, *lower*, *open*:"
        f" after Holm's correction for the family's {len(judged)} comparisons, which can leave open "
        "what an interval alone excludes. *displayed*: the dense model's map drawn through the threshold. The plan, "
        "with all families: [results/study/PLAN.md](results/study/PLAN.md). "
        f"Recorded {values('date')} on {values('device')} with torch {values('torch')}, timm {values('timm')}; "
        f"commits {values('commit')}."
    )
