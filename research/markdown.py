"""The recorded results as Markdown, each number read from its row; what was not run says so. For results/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from research.plans import EXPERIMENTS, Run
from svit_utils.files import read_rows
from svit_utils.records import Row, correct_by_run, run_rows
from svit_utils.referee import compare, paired_bootstrap

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
    return with_interval(interval.mean, interval.low, interval.high)


def with_interval(mean: float, low: float, high: float, factor: float = 100, digits: int = 1) -> str:
    """``-2.1 [-3.0, -1.2]``: the three numbers times ``factor``, by default shares as points."""
    mean, low, high = (factor * value for value in (mean, low, high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def budget(rows: Iterable[Row], rate: bool = True) -> str:
    """What the runs were given: "150 steps of 64 images, learning rate 0.0005"; without the rate where it varies."""
    given = sorted({(row["steps"], row["batch_size"], row["lr"] if rate else "") for row in rows})
    text = [f"{steps} steps of {batch} images" + f", learning rate {lr}" * rate for steps, batch, lr in given]
    return " or ".join(text)


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
    """One line per run: validation accuracy, by which is chosen, and test accuracy, which is reported.

    Each sparse run is compared with the dense one of its seed twice: at the same rate, and at that which suits dense.
    """
    rows, bits = run_rows("deit_cifar10", folder), correct_by_run("deit_cifar10", folder)
    if not rows:
        return []
    lines = [
        "| tau | introduced | lr | seed | validation, % | test, % | minus dense at the same rate, points "
        "| minus dense at its better rate, points | cut, % |",
        "| --- " * 9 + "|",
    ]
    dense = {(row["lr"], row["seed"]): name for name, row in rows.items() if not row["threshold"]}
    better = own_rate(rows, *DENSE)
    for name, row in rows.items():
        others = [] if not row["threshold"] else [dense.get((rate, row["seed"]), "") for rate in (row["lr"], better)]
        minus = [difference(bits.get(other), bits.get(name)) for other in others] or ["", ""]
        cells = [row["threshold"] or "dense", _introduced(row), row["lr"], row["seed"], percent(row["val_accuracy"])]
        cells += [percent(row["test_accuracy"]), *minus, percent(row["cut_sparsity"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


DENSE, FROM_THE_FIRST_STEP, WARMED_UP = ("", ""), ("0.01", "from the first step"), ("0.01", "warmed up")


def _introduced(row: Row) -> str:
    return "" if not row["threshold"] else "warmed up" if float(row["tau_warmup"]) else "from the first step"


def of_kind(rows: Mapping[str, Row], threshold: str, introduced: str, rate: str | None = None) -> dict[str, Row]:
    """The rows of one tau, by name, at one learning rate or at all."""
    found = {name: row for name, row in rows.items() if (row["threshold"], _introduced(row)) == (threshold, introduced)}
    return {name: row for name, row in found.items() if rate in (None, row["lr"])}


def own_rate(rows: Mapping[str, Row], threshold: str, introduced: str) -> str:
    """The learning rate with the highest mean validation accuracy over the seeds; empty where nothing was run."""
    rates = sorted({row["lr"] for row in of_kind(rows, threshold, introduced).values()})

    def validated(rate: str) -> float:
        of_rate = of_kind(rows, threshold, introduced, rate).values()
        return float(np.mean([float(row["val_accuracy"]) for row in of_rate]))

    return max(rates, key=validated, default="")


def deit_sentence(folder: Path) -> str:
    """tau = 0.01 against dense, each at its own learning rate, over the seeds: with both intervals."""
    rows, bits = run_rows("deit_cifar10", folder), correct_by_run("deit_cifar10", folder)
    parts = []
    for kind in (FROM_THE_FIRST_STEP, WARMED_UP):
        rates = [own_rate(rows, *kind), own_rate(rows, *DENSE)]
        runs = [of_kind(rows, *which, rate) for which, rate in zip((kind, DENSE), rates, strict=True)]
        sparse, dense = ({row["seed"]: bits[name].astype(float) for name, row in found.items()} for found in runs)
        seeds = sorted(sparse.keys() & dense.keys())
        if len(seeds) > 1:
            found = compare(*(np.stack([of[seed] for seed in seeds]) for of in (sparse, dense)))
            crossed, student = (_interval(i.low, i.high) for i in (found.images, found.seeds) if i is not None)
            parts.append(
                f"{kind[1]} (rate {rates[0]}) minus dense (rate {rates[1]}) {100 * found.mean:+.1f} points, {crossed} "
                f"by the crossed bootstrap over seeds and images, {student} by Student's t over {len(seeds)} seeds"
            )
    tried = sorted({row["lr"] for row in rows.values()}, key=float)
    return (
        "tau 0.01 against dense, each at the rate that was better on validation images: " + "; ".join(parts) + ". "
        f"No rates but {' and '.join(tried)} were tried."
        if parts
        else ""
    )


def _interval(low: float, high: float) -> str:
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def vit56_table(folder: Path) -> list[str]:
    """Dense and sparse, trained from scratch with the same budget."""
    rows, bits = run_rows("vit56_cifar10", folder), correct_by_run("vit56_cifar10", folder)
    if not rows:
        return []
    lines = ["| run | test accuracy, % | minus dense, points | cut, % |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        minus = "" if not row["threshold"] else difference(bits.get("dense"), bits.get(name))
        cells = (name, percent(row["test_accuracy"]), minus, percent(row["cut_sparsity"]))
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
    return f"{with_interval(row['mean'], row['low'], row['high'], 1, 3)} {row['result']}"


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
        "with all families and an erratum on how maps were scored: [study/PLAN.md](study/PLAN.md). "
        f"Recorded {values('date')} on {values('device')} with torch {values('torch')}, timm {values('timm')}; "
        f"commits {values('commit')}."
    )
