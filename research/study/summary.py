"""The study in Markdown, each number read from its tables; what was not run says so."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

NAMES = {"attention": "class attention", "rollout": "rollout", "grad_cam": "Grad-CAM"}
ARMS = {"sparse": "tau 0.01 from the first step", "warmup": "tau 0.01, warmed up"}
SHOWN = {"energy_in_mask": "energy in the object", "average_precision": "average precision"}


def study_table(folder: Path) -> list[str]:
    """Per arm and map: two localisation scores against dense and against dense displayed, and the plan's verdict."""
    path = folder / "study" / "tables" / "contrasts.csv"
    if not path.is_file():
        return []
    contrasts = pd.read_csv(path, keep_default_na=False, dtype={"mean": float, "low": float, "high": float})
    verdicts = pd.read_csv(folder / "study" / "tables" / "verdicts.csv")
    judged = contrasts[contrasts["family"] == "localisation"]
    heads = [f"{name}, {against}" for name in SHOWN.values() for against in ("− dense", "− dense displayed")]
    lines = [f"| arm | map | {' | '.join(heads)} | more on the object? |", "| --- " * (len(heads) + 3) + "|"]
    for arm, map_name in judged[["first", "map"]].drop_duplicates().itertuples(index=False):
        cells = []
        for metric in SHOWN:
            for second in ("dense", "dense displayed"):
                cells.append(_cell(judged, arm, map_name, metric, second))
        said = verdicts.query("family == 'localisation' and arm == @arm and map == @map_name")["verdict"].iloc[0]
        lines.append(f"| {ARMS.get(arm, arm)} | {NAMES.get(map_name, map_name)} | {' | '.join(cells)} | {said} |")
    return lines


def _cell(table: pd.DataFrame, arm: str, map_name: str, metric: str, second: str) -> str:
    rows = table.query("first == @arm and map == @map_name and metric == @metric and second == @second")
    if rows.empty:
        return ""
    row = rows.iloc[0]
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] {row['result']}"


def study_sentence(folder: Path) -> str:
    """How much the table rests on, and where it comes from."""
    cells = pd.read_csv(folder / "study" / "cells.csv", dtype=str, keep_default_na=False)
    contrasts = pd.read_csv(folder / "study" / "tables" / "contrasts.csv")
    judged = contrasts[contrasts["family"] == "localisation"]

    def values(column: str) -> str:
        return ", ".join(sorted(set(cells[column])))

    return (
        f"{judged['seeds'].max()} seeds, {judged['images'].max():,} test pictures; differences with the wider of two "
        "95 % intervals (crossed bootstrap over seeds and pictures, Student's t over seeds). *higher*, *lower*, *open*:"
        f" after Holm's correction for the family's {len(judged)} comparisons, which can leave open "
        "what an interval alone excludes. *displayed*: the dense model's map drawn through the threshold. The plan, "
        "with all families: [results/study/PLAN.md](results/study/PLAN.md). "
        f"Recorded {values('date')} on {values('device')} with torch {values('torch')}, timm {values('timm')}; "
        f"commits {values('commit')}."
    )
