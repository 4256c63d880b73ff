"""The erratum of the first study: what enlarging maps bilinearly before they were scored did to its numbers.

The study's own models are not shipped. Scored here, in both ways, are the models that are: the dense start, and three
pairs of the recipes of `dense` and `warmup` (trained in fp32). See the section "Erratum" of results/study/PLAN.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from research.rows import origin
from research.study.maps import BASELINE_MAPS, DISPLAYED, MODEL_MAPS, baseline_maps, model_maps
from research.study.scores import TAU, as_recorded
from research.study.studies import get_study
from research.study.tables import LOCALISATION_SCORES, ImageScores, contrasts
from svit_utils import sparsify
from svit_utils.data import PlantedShapes
from svit_utils.files import read_rows, write_file, write_rows
from svit_utils.models import load_embedded
from svit_utils.paths import results_dir
from svit_utils.referee import compare, holm, localisation_scores

SEEDS = (0, 1, 2)
MODELS = ("planted_dense_start", *(f"planted_{kind}_seed{seed}" for seed in SEEDS for kind in ("dense", "sparse")))
NO_MODEL = "none"  # of the maps that have not seen one
WAYS = ("old", "new")  # enlarged bilinearly to the picture's pixels; on the grid of patches

Found = dict[tuple[str, str, str, str], np.ndarray]  # (model, map, score, way) to [n], a score per picture


def score_maps(models: Sequence[str] = (NO_MODEL, *MODELS), images: int = 1000) -> Found:
    """The four localisation scores of every map in both ways, on the first test pictures."""
    x, _, masks = PlantedShapes("test").batch(images)[:3]
    found: Found = {}
    for model in models:
        for name, maps in maps_of(model, x).items():
            for way, scored in zip(WAYS, (as_recorded(maps, masks), maps), strict=True):
                for score, values in localisation_scores(scored, masks).items():
                    found[model, name, score, way] = values.numpy()
    return found


def maps_of(name: str, x: Tensor) -> dict[str, Tensor]:
    """The maps of a shipped model on the images ``x`` [n, 3, H, W], or those that need none: name to [n, h, w]."""
    if name == NO_MODEL:
        return baseline_maps(x, (x.shape[-2] // 4, x.shape[-1] // 4))
    model: nn.Module = load_embedded(name)
    if "sparse" not in name:
        return model_maps(model, x, TAU)
    sparsify(model, TAU)
    return model_maps(model.eval(), x)


def mean_rows(found: Mapping[tuple[str, str, str, str], np.ndarray]) -> list[dict[str, Any]]:
    """``erratum.csv``: each mean over pictures as the study scored it (old), and by patch (new)."""
    places = dict.fromkeys(key[:3] for key in found)
    return [
        {"model": model, "map": name, "score": score}
        | {way: f"{found[model, name, score, way].mean():.4f}" for way in WAYS}
        for model, name, score in places
    ]


def markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The erratum's table from the rows of ``erratum.csv``: old and new mean by map, of models over the three pairs."""

    def cell(models: Sequence[str], name: str, score: str) -> str:
        chosen = [row for row in rows if (row["map"], row["score"]) == (name, score) and row["model"] in models]
        return " → ".join(f"{np.mean([float(row[way]) for row in chosen]):.3f}" for way in WAYS)

    lines = ["| map | pointing game | energy | IoU | average precision |", "| --- | --- | --- | --- | --- |"]
    named = [(f"no model: {name}", [NO_MODEL], name) for name in BASELINE_MAPS]
    views = (("dense", "dense", (*MODEL_MAPS, *DISPLAYED.values())), ("warmed up", "sparse", MODEL_MAPS))
    for label, kind, names in views:
        models = [f"planted_{kind}_seed{seed}" for seed in SEEDS]
        named += [(f"{label}: {name.replace('_', ' ')}", models, name) for name in names]
    for label, models, name in named:
        lines.append(f"| {label} | {' | '.join(cell(models, name, score) for score in LOCALISATION_SCORES)} |")
    return lines


def pair_rows(found: Mapping[tuple[str, str, str, str], np.ndarray], resamples: int) -> list[dict[str, Any]]:
    """``erratum_pairs.csv``: the plan's comparisons of warmed-up models with dense ones, on the shipped pairs.

    Differences over three seeds with the wider of the two intervals, in both ways; beside them what the study found
    with five seeds, scored the old way.
    """
    recorded = {
        (row["first"], row["map"], row["second"], row["metric"]): row for row in recorded_family("localisation")
    }
    rows = []
    for name, other in [*((name, name) for name in MODEL_MAPS), *DISPLAYED.items()]:
        for score in LOCALISATION_SCORES:
            second = "dense" if other == name else "dense displayed"
            row: dict[str, Any] = {"map": name, "second": second, "score": score}
            for way in WAYS:
                sparse, dense = (
                    np.stack([found[f"planted_{kind}_seed{seed}", shown, score, way] for seed in SEEDS])
                    for kind, shown in (("sparse", name), ("dense", other))
                )
                result = compare(sparse, dense, resamples=resamples)
                values = (result.mean, result.wider.low, result.wider.high)
                row |= {f"{way}_{key}": f"{v:.4f}" for key, v in zip(("mean", "low", "high"), values, strict=True)}
            was = recorded["warmup", name, second, score]
            rows.append(row | {f"study_{key}": was[key] for key in ("mean", "low", "high", "p_holm", "result")})
    return rows


def resampled_rows(resamples: int, streams: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """``erratum_resamples.csv``: the share of Grad-CAM on the ground, sparse minus dense, with more resamples.

    With 10,000 of them some fifty lie in the smaller tail, so that this p-value, which is near the line, depends on the
    random stream. The other p-values of its family are as recorded.
    """
    family = recorded_family("background")
    contrast = next(c for c in contrasts() if c.family == "background" and c.first == ("sparse", "grad_cam"))
    place = next(i for i, row in enumerate(family) if (row["first"], row["map"]) == contrast.first)
    pair = ImageScores(get_study("full")).paired(contrast)
    assert pair is not None, "recorded"
    rows = []
    for stream in streams:
        result = compare(*pair[1:], resamples=resamples, seed=stream)
        others = [result.p_value if i == place else float(row["p"]) for i, row in enumerate(family)]
        p_holm = float(holm(others)[place])
        rows.append(
            {"first": "sparse", "second": "dense", "map": "grad_cam", "metric": contrast.metric, "resamples": resamples}
            | {"stream": stream, "p": f"{result.p_value:.4g}", "p_holm": f"{p_holm:.4g}"}
            | {"result": result.verdict(p_holm)}
        )
    return rows


def recorded_family(family: str) -> list[dict[str, str]]:
    """The first study's comparisons of one family, as its tables have them."""
    return [row for row in read_rows(results_dir() / "study" / "tables" / "contrasts.csv") if row["family"] == family]


def write_erratum(out: Path | None = None, images: int = 1000) -> list[Path]:
    """Score, compare and write the three files, and their provenance, into ``results/study``, or ``out``."""
    folder = results_dir() / "study" if out is None else out
    found = score_maps(images=images)
    tables = {
        "erratum": mean_rows(found),
        "erratum_pairs": pair_rows(found, 10_000),
        "erratum_resamples": resampled_rows(200_000),
    }
    paths = [write_rows(folder / f"{name}.csv", rows[0], rows) for name, rows in tables.items()]
    return [*paths, write_file(folder / "erratum.json", json.dumps(origin(images=images), indent=2) + "\n")]
