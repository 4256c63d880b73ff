"""The study's tables, from its recorded scores and nothing else: the same rows give the same bytes.

``means.csv``: every score of every arm, over its seeds. ``contrasts.csv``: the comparisons of the plan
(results/study/PLAN.md), with intervals, corrected p-values and what they say. ``verdicts.csv``: what follows for each
kind of map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from research.study.maps import DISPLAYED, MATCHED, MODEL_MAPS
from research.study.profiles import StudyProfile
from svit_utils.records import verdict
from svit_utils.referee import compare, holm, student_interval

LOCALISATION = ("pointing_game", "energy_in_mask", "iou_at_mask_area", "average_precision")
FAITHFULNESS = ("deletion", "insertion", "road", "infidelity", "max_sensitivity")
CONTROLS = ("hard_cut", "top_k", "entmax15", "sparsemax")
ALPHA = 0.05
# Scores for which less is better, as they stand in the contrasts; right answers without the object are the ground's.
LOWER_IS_BETTER = ("infidelity", "max_sensitivity", "background_swapped", "erased accuracy")


@dataclass(frozen=True)
class Contrast:
    """One comparison: ``first`` minus ``second``, each a (kind, map); ``judged`` ones are corrected and decided."""

    family: str
    rho: float
    part: str
    first: tuple[str, str]
    second: tuple[str, str]
    metric: str
    judged: bool = True


def contrasts() -> Iterator[Contrast]:
    """The plan's comparisons, family by family; those that are only described come last."""
    # Each kind of map against the dense model's, and those of attention also against it displayed as if cut.
    pairs = [*((name, name) for name in MODEL_MAPS), *DISPLAYED.items()]
    for kind in ("sparse", "warmup"):
        for name, other in pairs:
            for metric in LOCALISATION:
                yield Contrast("localisation", 0.0, "localisation", (kind, name), ("dense", other), metric)
    for kind in ("sparse", "warmup"):
        for name, other in pairs:
            # A displayed map has no recipe to explain noisy images with, hence no max-sensitivity.
            for metric in FAITHFULNESS if other == name else FAITHFULNESS[:-1]:
                yield Contrast("faithfulness", 0.0, "faithfulness", (kind, name), ("dense", other), metric)
    for kind in ("sparse", "warmup"):
        yield Contrast("accuracy", 0.0, "background", (kind, "own"), ("dense", "own"), "accuracy")
    for kind in ("sparse", "warmup"):
        for variant in ("swapped", "erased", "distractors"):
            yield Contrast("background", 0.9, "background", (kind, variant), ("dense", variant), "accuracy")
        for name in MODEL_MAPS:
            yield Contrast("background", 0.9, "background", (kind, name), ("dense", name), "background_swapped")
    for kind in CONTROLS:
        for name in MODEL_MAPS:
            for metric in LOCALISATION:
                yield Contrast("alternatives", 0.0, "localisation", (kind, name), ("sparse", name), metric)
        yield Contrast("alternatives", 0.0, "background", (kind, "own"), ("sparse", "own"), "accuracy")
    described = Contrast("matched", 0.0, "localisation", ("sparse", "attention"), ("dense", MATCHED), "", False)
    for metric in LOCALISATION:
        yield replace(described, metric=metric)
    described = replace(described, family="at rho 0.9", rho=0.9)
    for kind in ("sparse", "warmup"):
        for name, other in pairs:
            for metric in LOCALISATION:
                yield replace(described, first=(kind, name), second=("dense", other), metric=metric)
    described = replace(described, family="alternatives against dense", rho=0.0)
    for kind in CONTROLS:
        for name in MODEL_MAPS:
            for metric in LOCALISATION:
                yield replace(described, first=(kind, name), second=("dense", name), metric=metric)
        accuracy = replace(described, part="background", metric="accuracy")
        yield replace(accuracy, first=(kind, "own"), second=("dense", "own"))


class Recorded:
    """The scores per image of a study: `of` gives those of one arm, map and metric."""

    def __init__(self, profile: StudyProfile) -> None:
        from research.study.run import arm_kind

        self.folder = profile.out / "images"
        self.arms = {(arm_kind(arm), arm.rho, arm.seed): arm.name for arm in profile.design.arms}
        self._files: dict[Path, dict[str, np.ndarray]] = {}

    def seeds(self, kind: str, rho: float, part: str) -> list[int]:
        """Seeds whose cell is recorded."""
        names = {seed: name for (k, r, seed), name in self.arms.items() if (k, r) == (kind, rho)}
        return sorted(seed for seed, name in names.items() if self._path(name, part).is_file())

    def of(self, kind: str, rho: float, seed: int, part: str, name: str, metric: str) -> np.ndarray:
        """[n], the score as the contrasts use it: see the plan for the label-free ones."""
        from research.study.run import read_images

        path = self._path(self.arms[kind, rho, seed], part)
        if path not in self._files:
            self._files[path] = read_images(path)
        columns = self._files[path]
        score = columns[f"{name}:{metric}"]
        if metric not in RELATIVE:
            return score
        return RELATIVE[metric](score, columns[f"random:{metric}"])

    def _path(self, arm: str, part: str) -> Path:
        return self.folder / f"{arm}-{part}.csv.gz"


# Probabilities and logits of two models are not on one scale: each score is taken against a random map's on the model.
RELATIVE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "deletion": lambda score, random: random - score,
    "insertion": lambda score, random: score - random,
    "road": lambda score, random: score - random,
    "infidelity": lambda score, random: np.log10(np.maximum(score, 1e-12) / np.maximum(random, 1e-12)),
}


def contrast_table(profile: StudyProfile) -> pd.DataFrame:
    """Every comparison that the recorded cells allow."""
    store, rows = Recorded(profile), []
    for contrast in contrasts():
        (kind, name), (other, shown) = contrast.first, contrast.second
        common = set(store.seeds(kind, contrast.rho, contrast.part)) & set(
            store.seeds(other, contrast.rho, contrast.part)
        )
        seeds = sorted(common)
        if not seeds:
            continue
        try:
            a = np.stack([store.of(kind, contrast.rho, s, contrast.part, name, contrast.metric) for s in seeds])
            b = np.stack([store.of(other, contrast.rho, s, contrast.part, shown, contrast.metric) for s in seeds])
        except KeyError:  # a part of a study that has no such map
            continue
        result = compare(a, b, resamples=profile.resamples)
        rows.append(
            {
                "family": contrast.family,
                "rho": contrast.rho,
                "first": kind,
                "second": f"{other} {shown.removeprefix(name + '_')}" if shown != name else other,
                "map": name,
                "metric": contrast.metric,
                "better": "lower"
                if {contrast.metric, f"{name} {contrast.metric}"} & set(LOWER_IS_BETTER)
                else "higher",
                "seeds": result.n_seeds,
                "images": result.n_images,
                "mean": result.mean,
                "low": result.wider.low,
                "high": result.wider.high,
                "p": result.p_value,
                "judged": contrast.judged,
                "comparison": result,
            }
        )
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["p_holm"], table["result"] = np.nan, ""
    for _, group in table[table["judged"]].groupby("family", sort=False):
        adjusted = holm(group["p"].to_numpy())
        table.loc[group.index, "p_holm"] = adjusted
        table.loc[group.index, "result"] = [
            row.verdict(p, ALPHA) for row, p in zip(group["comparison"], adjusted, strict=True)
        ]
    return table.drop(columns=["comparison", "judged"])


def mean_table(profile: StudyProfile) -> pd.DataFrame:
    """Mean over seeds of every score that is not of one layer or head, with Student's interval."""
    path = profile.out / "scores.csv"
    scores = pd.read_csv(path, dtype=str, keep_default_na=False)
    scores = scores[(scores["head"] == "") & (scores["layer"] == "")]
    scores["value"] = scores["value"].astype(float)
    rows: list[dict[str, Any]] = []
    for keys, group in scores.groupby(["part", "rho", "kind", "map", "metric"], sort=False):
        values = group["value"].to_numpy()
        row = dict(zip(("part", "rho", "kind", "map", "metric"), keys, strict=True))
        row |= {"seeds": len(values), "mean": values.mean(), "low": np.nan, "high": np.nan}
        if len(values) > 1:
            interval = student_interval(values)
            row |= {"low": interval.low, "high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)


def verdict_table(table: pd.DataFrame) -> pd.DataFrame:
    """`verdict` of "object-focused" (localisation) and "faithful" for each map of the two sparse arms."""
    if table.empty:
        return pd.DataFrame()
    rows: list[dict[str, Any]] = []
    for family in ("localisation", "faithfulness"):
        part = table[table["family"] == family]
        for (kind, name), group in part.groupby(["first", "map"], sort=False):
            results = {metric: list(g["result"]) for metric, g in group.groupby("metric", sort=False)}
            better = {metric: g["better"].iloc[0] for metric, g in group.groupby("metric", sort=False)}
            counts = group["result"].value_counts()
            rows.append(
                {
                    "family": family,
                    "arm": kind,
                    "map": name,
                    "comparisons": len(group),
                    **{side: int(counts.get(side, 0)) for side in ("higher", "lower", "open")},
                    "verdict": verdict(results, better),
                }
            )
    return pd.DataFrame(rows)


def tables(profile: StudyProfile) -> dict[str, pd.DataFrame]:
    """All tables by file name."""
    found = contrast_table(profile)
    return {"means": mean_table(profile), "contrasts": found, "verdicts": verdict_table(found)}


def write_tables(profile: StudyProfile, out: Path | None = None) -> list[Path]:
    """Write `tables` as CSV into ``tables/`` of the study, or of ``out``; four significant digits."""
    folder = (profile.out if out is None else out) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables(profile).items():
        paths.append(folder / f"{name}.csv")
        table.to_csv(paths[-1], index=False, float_format="%.4g", lineterminator="\n")
    return paths
