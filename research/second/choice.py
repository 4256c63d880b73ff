"""The version that holds: chosen on validation by the plan's rule, then confirmed once on fresh pictures and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from research.second.runs import FRESH_SEEDS, PARTS, SEEDS
from research.second.tables import MARGIN, Contrast, Records, against_zero, non_inferior, setting_of
from research.study.studies import Study
from svit_utils.files import read_rows
from svit_utils.records import run_rows
from svit_utils.referee import holm, student_interval

SPARSE_ENOUGH = 0.70  # applied sparsity, mean over layers, heads and seeds
NEAR = 0.002  # of the best mean accuracy: settings this close are told apart by their maps
BUDGET = 450  # steps


@dataclass(frozen=True)
class Candidate:
    """One setting on validation; means over the seeds, accuracy as the difference from dense of the same seed.

    ``attention``, ``dense`` and ``drawn`` are average precisions: of the setting's last-layer attention, of the dense
    model's, and of the dense model's drawn cut.
    """

    setting: str
    seeds: int
    applied_sparsity: float
    mean: float
    low: float
    high: float
    attention: float
    dense: float
    drawn: float

    @property
    def margin(self) -> float:
        """By how much the map beats the higher of its two controls."""
        return self.attention - max(self.dense, self.drawn)


def candidates(study: Study) -> list[Candidate]:
    """Every setting of A to C at 450 steps that is recorded with more than one seed, in the plan's order."""
    rows = run_rows(study.experiment.name, study.out.parent)
    precision = {
        (row["run"], row["map"]): float(row["value"])
        for row in read_rows(study.out / "scores.csv")
        if (row["part"], row["metric"], row["layer"]) == ("validation", "average_precision", "")
    }
    found = []
    for setting in settings():
        names = [(f"{setting}-{BUDGET}-seed{seed}", f"dense-{BUDGET}-seed{seed}") for seed in SEEDS]
        pairs = [pair for pair in names if all(name in rows for name in pair)]
        pairs = [pair for pair in pairs if all((name, "attention") in precision for name in pair)]
        if len(pairs) < 2:
            continue
        gap = [float(rows[own]["val_accuracy"]) - float(rows[dense]["val_accuracy"]) for own, dense in pairs]
        interval = student_interval(gap)
        sparsity = np.mean([float(rows[own]["val_applied_sparsity"]) for own, _ in pairs])
        maps = [np.mean([precision[own, "attention"] for own, _ in pairs])]
        maps += [np.mean([precision[dense, "attention"] for _, dense in pairs])]
        maps += [np.mean([precision[own, "attention_drawn"] for own, _ in pairs])]
        measured = np.array([sparsity, np.mean(gap), interval.low, interval.high, *maps])
        found.append(Candidate(setting, len(pairs), *measured.tolist()))
    return found


def settings() -> list[str]:
    """The sparse settings of A to C at 450 steps that are trained with more than one seed."""
    runs = [run for part in "ABC" for run in PARTS[part]() if run.kind != "dense"]
    at_budget = [setting_of(run.name) for run in runs if run.profile.config.steps == BUDGET]
    return [name for name in dict.fromkeys(at_budget) if at_budget.count(name) > 1]


def choose(found: list[Candidate]) -> Candidate | None:
    """The plan's rule; None where no setting is sparse enough."""
    eligible = [each for each in found if each.applied_sparsity >= SPARSE_ENOUGH]
    pool = [each for each in eligible if each.low > -MARGIN] or eligible
    if not pool:
        return None
    best = max(each.mean for each in pool)
    return max((each for each in pool if each.mean >= best - NEAR), key=lambda each: each.margin)


def choice_table(study: Study) -> pd.DataFrame:
    """The candidates; ``chosen`` is only said where every setting is there with all its seeds."""
    found = candidates(study)
    complete = [each.setting for each in found if each.seeds == len(SEEDS)] == settings()
    chosen = choose(found) if complete else None
    rows = [{**vars(each), "margin": each.margin, "chosen": "yes" if each is chosen else ""} for each in found]
    return pd.DataFrame(rows)


def confirmed_table(study: Study, setting: str) -> pd.DataFrame:
    """The confirmation: accuracy by the margin, attention against both controls; empty until all seeds are there.

    Args:
        study: of the confirmation's runs.
        setting: the chosen one.
    """
    records = Records(study)
    accuracy = records.difference(Contrast("", setting, "dense", "accuracy"), FRESH_SEEDS)
    maps = [records.difference(Contrast("", setting, other, "attention"), FRESH_SEEDS) for other in ("dense", "drawn")]
    found = [against_zero(each) for each in (accuracy, *maps) if each is not None and len(each) == len(FRESH_SEEDS)]
    if len(found) < 3:
        return pd.DataFrame()
    adjusted = [np.nan, *holm([each.p_value for each in found[1:]])]
    results = [non_inferior(found[0]), *(each.verdict(p) for each, p in zip(found[1:], adjusted[1:], strict=True))]
    return pd.DataFrame(
        {
            "setting": setting,
            "measure": ["accuracy", "attention", "attention"],
            "other": ["dense", "dense", "drawn"],
            "seeds": [each.n_seeds for each in found],
            "images": [each.n_images for each in found],
            "mean": [each.mean for each in found],
            "low": [each.wider.low for each in found],
            "high": [each.wider.high for each in found],
            "p_holm": adjusted,
            "result": results,
        }
    )
