"""The study's tables, from its recorded scores and nothing else: the same rows give the same bytes.

``means.csv``: every score of every kind of model, over its seeds. ``contrasts.csv``: the comparisons of the plan
(results/study/PLAN.md), with intervals, corrected p-values and what they say. ``verdicts.csv``: what follows for each
kind of map. ``both_right.csv``: the plan's comparisons of maps on the pictures that both models get right, described.
``afterwards.csv``: comparisons that came to mind when the results were known; they judge nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from research.plans import CONTROLS
from research.rows import write_csvs
from research.study.maps import DISPLAYED, MATCHED, MODEL_MAPS
from research.study.store import images_path, read_images
from research.study.studies import Study
from svit_utils.records import correct_by_run, verdict
from svit_utils.referee import compare, holm, student_interval

# The comparisons of the analysis plan (results/study/PLAN.md). They stay as they are: a score added here would change
# what was decided before the runs, and the corrected p-values with it.
LOCALISATION_SCORES = ("pointing_game", "energy_in_mask", "iou_at_mask_area", "average_precision")
FAITHFULNESS_SCORES = ("deletion", "insertion", "road", "infidelity", "max_sensitivity")
ALPHA = 0.05
# Scores for which less is better. A right answer on a picture without its object was read off the background.
LOWER_IS_BETTER = ("infidelity", "max_sensitivity", "background_swapped", "on_distractors", "erased accuracy")


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
            for metric in LOCALISATION_SCORES:
                yield Contrast("localisation", 0.0, "localisation", (kind, name), ("dense", other), metric)
    for kind in ("sparse", "warmup"):
        for name, other in pairs:
            # A displayed map has no recipe to explain noisy images with, hence no max-sensitivity.
            for metric in FAITHFULNESS_SCORES if other == name else FAITHFULNESS_SCORES[:-1]:
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
            for metric in LOCALISATION_SCORES:
                yield Contrast("alternatives", 0.0, "localisation", (kind, name), ("sparse", name), metric)
        yield Contrast("alternatives", 0.0, "background", (kind, "own"), ("sparse", "own"), "accuracy")
    described = Contrast("matched", 0.0, "localisation", ("sparse", "attention"), ("dense", MATCHED), "", False)
    for metric in LOCALISATION_SCORES:
        yield replace(described, metric=metric)
    described = replace(described, family="at rho 0.9", rho=0.9)
    for kind in ("sparse", "warmup"):
        for name, other in pairs:
            for metric in LOCALISATION_SCORES:
                yield replace(described, first=(kind, name), second=("dense", other), metric=metric)
    described = replace(described, family="alternatives against dense", rho=0.0)
    for kind in CONTROLS:
        for name in MODEL_MAPS:
            for metric in LOCALISATION_SCORES:
                yield replace(described, first=(kind, name), second=("dense", name), metric=metric)
        accuracy = replace(described, part="background", metric="accuracy")
        yield replace(accuracy, first=(kind, "own"), second=("dense", "own"))


def afterwards() -> Iterator[Contrast]:
    """Comparisons that no plan named, in families of their own: described, whatever the corrected p-value says."""
    # Nothing is trained between these two: what the plan's rule says of them is no merit and no fault of training.
    for name, drawn in DISPLAYED.items():
        for metric in LOCALISATION_SCORES:
            yield Contrast("drawing alone", 0.0, "localisation", ("dense", drawn), ("dense", name), metric)
    pairs = [*((name, name) for name in MODEL_MAPS), *DISPLAYED.items()]
    for rho in (0.0, 0.9):
        for name in MODEL_MAPS:
            of_dense = Contrast("", rho, "background", ("dense", name), ("dense", "uniform"), "on_distractors")
            yield replace(of_dense, family=f"dense on distractors, rho {rho:g}")
            for kind in ("sparse", "warmup"):
                for other in (other for shown, other in pairs if shown == name):
                    family = f"sparse on distractors, rho {rho:g}"
                    yield replace(of_dense, family=family, first=(kind, name), second=("dense", other))


class ImageScores:
    """The recorded scores per image of a study."""

    def __init__(self, study: Study) -> None:
        self.study = study
        runs = study.experiment.runs
        self.names = {(run.kind, run.profile.rho, run.profile.config.seed): run.name for run in runs}
        self._files: dict[Path, dict[str, np.ndarray]] = {}

    def seeds(self, kind: str, rho: float, part: str) -> set[int]:
        """Seeds of the runs whose cell is recorded."""
        names = {seed: name for (k, r, seed), name in self.names.items() if (k, r) == (kind, rho)}
        return {seed for seed, name in names.items() if images_path(self.study, name, part).is_file()}

    def scores(self, kind: str, rho: float, seed: int, part: str, name: str, metric: str) -> np.ndarray:
        """[n], the score of the map ``name`` as the contrasts use it; see `RELATIVE` for the label-free ones."""
        path = images_path(self.study, self.names[kind, rho, seed], part)
        if path not in self._files:
            self._files[path] = read_images(path)
        columns = self._files[path]
        score = columns[f"{name}:{metric}"]
        if metric == "on_distractors":  # not a number where the object hides them all: the same pictures for any model
            score = score[~np.isnan(score)]
        if metric not in RELATIVE:
            return score
        return RELATIVE[metric](score, columns[f"random:{metric}"])

    def paired(self, contrast: Contrast) -> tuple[list[int], np.ndarray, np.ndarray] | None:
        """The seeds that both sides have, and their scores [S, n] each; None where there are none."""
        rho, part, metric = contrast.rho, contrast.part, contrast.metric
        (kind, name), (other, shown) = contrast.first, contrast.second
        seeds = sorted(self.seeds(kind, rho, part) & self.seeds(other, rho, part))
        if not seeds:
            return None
        try:
            a = np.stack([self.scores(kind, rho, seed, part, name, metric) for seed in seeds])
            b = np.stack([self.scores(other, rho, seed, part, shown, metric) for seed in seeds])
        except KeyError:  # this study has not scored such a map, or not with this score
            return None
        return seeds, a, b


# Probabilities and logits of two models are not on one scale: each score is taken against a random map's on the model.
RELATIVE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "deletion": lambda score, random: random - score,
    "insertion": lambda score, random: score - random,
    "road": lambda score, random: score - random,
    "infidelity": lambda score, random: np.log10(np.maximum(score, 1e-12) / np.maximum(random, 1e-12)),
}


BOTH = ("crossed_low", "crossed_high", "student_low", "student_high")


def contrast_table(study: Study) -> pd.DataFrame:
    """Every comparison of the plan that the recorded cells allow, with the wider of its two intervals."""
    return compared(study, contrasts()).drop(columns=["judged", *BOTH], errors="ignore")


def afterwards_table(study: Study) -> pd.DataFrame:
    """`afterwards`, with both intervals."""
    return compared(study, afterwards()).drop(columns=["judged", "low", "high"], errors="ignore")


def compared(study: Study, named: Iterable[Contrast]) -> pd.DataFrame:
    """The comparisons of ``named`` that the recorded cells allow; those that are judged are corrected by family."""
    recorded, rows, comparisons = ImageScores(study), [], []
    for contrast in named:
        found = recorded.paired(contrast)
        if found is None:
            continue
        _, a, b = found
        result = compare(a, b, resamples=study.resamples)
        rows.append(
            {
                **in_words(contrast),
                "seeds": result.n_seeds,
                "images": result.n_images,
                "mean": result.mean,
                "low": result.wider.low,
                "high": result.wider.high,
                "crossed_low": result.images.low,
                "crossed_high": result.images.high,
                "student_low": result.seeds.low if result.seeds else np.nan,
                "student_high": result.seeds.high if result.seeds else np.nan,
                "p": result.p_value,
                "judged": contrast.judged,
            }
        )
        comparisons.append(result)
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["p_holm"], table["result"] = np.nan, ""
    for _, group in table[table["judged"]].groupby("family", sort=False):
        adjusted = holm(group["p"].to_numpy())
        table.loc[group.index, "p_holm"] = adjusted
        table.loc[group.index, "result"] = [
            comparisons[index].verdict(p, ALPHA) for index, p in zip(group.index, adjusted, strict=True)
        ]
    return table


def in_words(contrast: Contrast) -> dict[str, Any]:
    """The comparison as the first columns of a table."""
    (kind, name), (other, shown), metric = contrast.first, contrast.second, contrast.metric
    return {
        "family": contrast.family,
        "rho": contrast.rho,
        "first": kind,
        "second": f"{other} {shown.removeprefix(name + '_')}" if shown != name else other,
        "map": name,
        "metric": metric,
        "better": "lower" if {metric, f"{name} {metric}"} & set(LOWER_IS_BETTER) else "higher",
    }


def both_right_table(study: Study) -> pd.DataFrame:
    """The plan's comparisons of maps once more, each seed on the test pictures that both of its models get right.

    A model that is right less often may have worse maps for that reason alone. ``pictures`` is the fewest of a seed,
    ``everywhere`` the mean over all pictures. The pictures left differ by seed, so the interval is Student's, over the
    seeds' means.
    """
    recorded, right, rows = ImageScores(study), correct_by_run(study.experiment.name, study.out.parent), []
    for contrast in contrasts():
        found = recorded.paired(contrast) if contrast.family in ("localisation", "faithfulness") else None
        if found is None:
            continue
        seeds, a, b = found
        runs = [
            [recorded.names[kind, contrast.rho, seed] for seed in seeds]
            for kind in (contrast.first[0], contrast.second[0])
        ]
        if not all(name in right for names in runs for name in names):
            continue
        both = np.logical_and(*(np.stack([right[name][: a.shape[1]] for name in names]) for names in runs))  # [S, n]
        if not both.any(axis=1).all():
            continue
        means = np.array([row[kept].mean() for row, kept in zip(a - b, both, strict=True)])  # [S]
        interval = student_interval(means) if len(means) > 1 else None
        rows.append(
            {
                **in_words(contrast),
                "seeds": len(seeds),
                "pictures": int(both.sum(axis=1).min()),
                "everywhere": float((a - b).mean()),
                "mean": float(means.mean()),
                "low": interval.low if interval else np.nan,
                "high": interval.high if interval else np.nan,
            }
        )
    return pd.DataFrame(rows)


def mean_table(study: Study) -> pd.DataFrame:
    """Mean over seeds of every score that is not of one layer or head, with Student's interval."""
    path = study.out / "scores.csv"
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
    """`verdict` of "object-focused" (localisation) and "faithful" for each map of the two kinds of sparse model."""
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


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """All tables by file name."""
    found, later = contrast_table(study), afterwards_table(study)
    named = {"means": mean_table(study), "contrasts": found, "verdicts": verdict_table(found)}
    described = {"both_right": both_right_table(study), "afterwards": later}
    return named | {name: table for name, table in described.items() if not table.empty}


def write_tables(study: Study, out: str | Path | None = None) -> list[Path]:
    """Write `tables` as CSV into ``tables/`` of the study, or of ``out``."""
    return write_csvs(tables(study), (study.out if out is None else Path(out)) / "tables")
