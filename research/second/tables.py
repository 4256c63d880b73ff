"""The second study's comparisons, from its recorded scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from research.second.runs import LEARNED, PARTS, SEEDS
from research.study.store import read_images
from research.study.studies import Study
from svit_utils.files import read_rows
from svit_utils.records import correct_by_run, run_rows
from svit_utils.referee import Comparison, compare, holm, student_interval

ALPHA, MARGIN, RESAMPLES = 0.05, 0.01, 10_000  # MARGIN: in accuracy, 1 point
SPARSE_KINDS = ("warmup", "sparse", "top_k")
LOWER_TAUS = ("tau0.005", "tau0.0075", "tau0.0025")
OPERATORS = ("hard_cut", "clipped", "entmax15")
# Each map and what it is compared with: the dense model's own, and for attention that of the dense model drawn cut.
AGAINST = (("attention", "dense"), ("attention", "drawn"), ("rollout", "dense"), ("rollout", "drawn"))


@dataclass(frozen=True)
class Contrast:
    """A comparison: ``setting`` minus ``other`` (``"dense"``, ``"drawn"``: dense drawn cut, or a setting).

    ``measure`` is ``"accuracy"`` or a map, whose average precision is taken. ``minus_steps``: the same difference at so
    many steps is subtracted, which asks whether it changes with the budget.
    """

    family: str
    setting: str
    other: str
    measure: str
    steps: int = 450
    minus_steps: int | None = None


def contrasts() -> Iterator[Contrast]:
    """The plan's comparisons, family by family."""
    for steps in (150, 450):
        for kind in SPARSE_KINDS:
            yield Contrast("A gap", kind, "dense", "accuracy", steps)
    for kind in SPARSE_KINDS:
        yield Contrast("A closing", kind, "dense", "accuracy", 450, 150)
    for kind in SPARSE_KINDS:
        for measure, other in (*AGAINST, ("grad_cam", "dense")):
            yield Contrast("A maps", kind, other, measure)
    for kind in ("warmup", "sparse"):
        for measure in ("attention", "rollout"):
            yield Contrast("A maps closing", kind, "drawn", measure, 450, 150)
    for label in LOWER_TAUS:
        for measure, other in AGAINST:
            yield Contrast("B maps", label, other, measure)
    others = [label for label in LEARNED if label != "per_model"]
    for label in others:
        yield Contrast("C accuracy", label, "per_model", "accuracy")
    for label in others:
        for measure in ("attention", "rollout"):
            yield Contrast("C maps", label, "per_model", measure)
    for kind in OPERATORS:
        yield Contrast("D accuracy", kind, "warmup", "accuracy")
    for kind in OPERATORS:
        for measure in ("attention", "rollout"):
            yield Contrast("D maps", kind, "warmup", measure)


class Records:
    """The recorded accuracies and average precisions, picture by picture."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.correct = correct_by_run(study.experiment.name, study.out.parent)
        self.scored = {row["run"] for row in read_rows(study.out / "cells.csv") if row["part"] == "localisation"}
        self._files: dict[str, dict[str, np.ndarray]] = {}

    def values(self, setting: str, steps: int, seed: int, measure: str) -> np.ndarray | None:
        """[n], or None where it is not recorded."""
        name = f"{setting}-{steps}-seed{seed}"
        if measure == "accuracy":
            return self.correct[name].astype(float) if name in self.correct else None
        if name not in self.scored:
            return None
        if name not in self._files:
            self._files[name] = read_images(self.study.out / "images" / f"{name}-localisation.csv.gz")
        return self._files[name][f"{measure}:average_precision"]

    def pair(self, contrast: Contrast, steps: int, seed: int) -> np.ndarray | None:
        """[n], the difference at so many steps."""
        first = self.values(contrast.setting, steps, seed, contrast.measure)
        if contrast.other == "drawn":
            second = self.values(contrast.setting, steps, seed, f"{contrast.measure}_drawn")
        else:
            second = self.values(contrast.other, steps, seed, contrast.measure)
        return None if first is None or second is None else first - second

    def difference(self, contrast: Contrast, seeds: tuple[int, ...] = SEEDS) -> np.ndarray | None:
        """[S, n] over the seeds that are recorded; None without any."""
        found = []
        for seed in seeds:
            own = self.pair(contrast, contrast.steps, seed)
            if contrast.minus_steps is not None and own is not None:
                earlier = self.pair(contrast, contrast.minus_steps, seed)
                own = None if earlier is None else own - earlier
            if own is not None:
                found.append(own)
        return np.stack(found) if found else None


def against_zero(difference: np.ndarray) -> Comparison:
    """`compare` for a difference [S, n] that is already taken."""
    return compare(difference, np.zeros_like(difference), resamples=RESAMPLES)


def contrast_table(study: Study) -> pd.DataFrame:
    """Every comparison of the plan that the records allow; judged only where all seeds of its family are there."""
    records, rows = Records(study), []
    for contrast in contrasts():
        difference = records.difference(contrast)
        if difference is None:
            continue
        found = against_zero(difference)
        change = "" if contrast.minus_steps is None else f" minus {contrast.minus_steps}"
        rows.append(
            {
                "family": contrast.family,
                "setting": contrast.setting,
                "other": contrast.other,
                "measure": contrast.measure,
                "steps": f"{contrast.steps}{change}",
                "seeds": found.n_seeds,
                "images": found.n_images,
                "mean": found.mean,
                "low": found.wider.low,
                "high": found.wider.high,
                "p": found.p_value,
                "comparison": found,
            }
        )
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    table["p_holm"], table["result"] = np.nan, "incomplete"
    planned = pd.Series([contrast.family for contrast in contrasts()]).value_counts()
    for family, group in table.groupby("family", sort=False):
        if len(group) < planned[family] or (group["seeds"] < len(SEEDS)).any():
            continue  # the correction is for the whole family
        adjusted = holm(group["p"].to_numpy())
        table.loc[group.index, "p_holm"] = adjusted
        pairs = zip(group["comparison"], adjusted, strict=True)
        table.loc[group.index, "result"] = [found.verdict(p, ALPHA) for found, p in pairs]
    return table.drop(columns="comparison")


def margin_table(study: Study) -> pd.DataFrame:
    """Accuracy minus dense's, for every setting and budget: not inferior by more than a point, inferior, or open?"""
    records, rows = Records(study), []
    budgets = {(setting_of(name), int(row["steps"])) for name, row in _rows(study).items()}
    for setting, steps in sorted(budgets, key=lambda pair: (pair[1], pair[0])):
        if setting == "dense" or setting.startswith("start_"):
            continue
        difference = records.difference(Contrast("", setting, "dense", "accuracy", steps))
        if difference is None:
            continue
        found = against_zero(difference)
        row = {"setting": setting, "steps": steps, "seeds": found.n_seeds, "mean": found.mean}
        rows.append({**row, "low": found.wider.low, "high": found.wider.high, "result": non_inferior(found)})
    return pd.DataFrame(rows)


def non_inferior(found: Comparison) -> str:
    """Of a difference from dense: ``"not inferior"`` by more than the margin, ``"inferior"``, or ``"open"``."""
    if found.n_seeds < len(SEEDS) or found.wider.low <= -MARGIN <= found.wider.high:
        return "open"
    return "not inferior" if found.wider.low > -MARGIN else "inferior"


def setting_of(name: str) -> str:
    """``"tau0.005-450-seed3"`` to ``"tau0.005"``."""
    return name.rsplit("-", 2)[0] if name.count("-") >= 2 else name


def progress_table(study: Study) -> pd.DataFrame:
    """How many runs of each part, setting and budget are planned, and how many of them are recorded."""
    recorded = _rows(study)
    counts: dict[tuple[str, str, int], list[int]] = {}
    for part, planned in PARTS.items():
        for run in planned():
            place = (part, setting_of(run.name), run.profile.config.steps)
            done = counts.setdefault(place, [0, 0])
            done[0] += 1
            done[1] += run.name in recorded
    names = ("part", "setting", "steps", "planned", "recorded")
    return pd.DataFrame([dict(zip(names, (*place, *done), strict=True)) for place, done in counts.items()])


def _rows(study: Study) -> dict[str, dict[str, str]]:
    return run_rows(study.experiment.name, study.out.parent)


def setting_table(study: Study) -> pd.DataFrame:
    """Means over the seeds, with Student's interval, of accuracy, sparsity and average precision of the maps."""
    wanted = ("val_accuracy", "test_accuracy", "val_applied_sparsity", "val_cut_sparsity", "val_empty_rate")
    values: dict[tuple[str, int, str], list[float]] = {}
    for name, row in _rows(study).items():
        for column in wanted:
            if row.get(column):
                values.setdefault((setting_of(name), int(row["steps"]), column), []).append(float(row[column]))
    steps = {name: int(row["steps"]) for name, row in _rows(study).items()}
    for row in read_rows(study.out / "scores.csv"):
        if row["part"] in ("localisation", "validation") and not row["layer"] and row["run"] in steps:
            prefix = "val_" if row["part"] == "validation" else ""
            key = (setting_of(row["run"]), steps[row["run"]], f"{prefix}{row['map']}:{row['metric']}")
            values.setdefault(key, []).append(float(row["value"]))
    rows = []
    for (setting, budget, metric), found in values.items():
        low = high = np.nan
        if len(found) > 1:
            interval = student_interval(found)
            low, high = interval.low, interval.high
        what = {"setting": setting, "steps": budget, "metric": metric, "seeds": len(found)}
        rows.append({**what, "mean": float(np.mean(found)), "low": low, "high": high})
    return pd.DataFrame(rows)
