"""The parts of the study: what is measured of one trained model. Each takes a `Trained` and gives `Scores`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from research.distractors import distractor_mass, distractor_share
from research.nulls import sparsity_against_nulls
from research.study.maps import CHUNK, MODEL_MAPS, attention_views, baseline_maps, model_maps
from research.study.studies import Study
from research.training import SPARSITY
from research.zeros import normaliser_effect, reachability_table, value_path_certificate
from svit_utils.attention import TokenSparsityTracker, sparse_modules, sparsified
from svit_utils.data import PlantedShapes
from svit_utils.explain import attention_rollout, class_attention, grad_cam, layer_grad_cam, token_grid, upsample
from svit_utils.referee import (
    background_accuracy,
    background_mass,
    faithfulness_scores,
    localisation_scores,
    max_sensitivity,
    weight_randomisation,
)

TAU = 0.01


def as_recorded(maps: Tensor, masks: Tensor) -> Tensor:
    """Maps [B, h, w] as this study scored them against masks [B, H, W]: enlarged bilinearly to [B, H, W].

    That drives maxima to the border, and was a mistake (the erratum in results/study/PLAN.md). It stays here because
    the scores in results/study are of such maps; anything new is scored on the maps' own grid.
    """
    return upsample(maps, (masks.shape[-2], masks.shape[-1]))


@dataclass(frozen=True)
class Trained:
    """A trained run: its kind, model and test pictures, and for a dense one the ``sparse`` model with the same seed."""

    kind: str
    model: nn.Module
    test: Dataset
    partner: nn.Module | None = None

    @property
    def display_tau(self) -> float | None:
        """The tau that dense attention is also displayed through; None for the other kinds."""
        return TAU if self.kind == "dense" else None


@dataclass
class Scores:
    """``summary``: rows with map, layer, head, metric, value. ``images``: per-image scores, "map:metric" to [n]."""

    summary: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, metric: str, value: float, *, map: str = "", layer: Any = "", head: Any = "") -> None:
        """A number of the whole model, or of one map, layer or head."""
        self.summary.append({"map": map, "layer": layer, "head": head, "metric": metric, "value": float(value)})

    def add_images(self, map: str, metric: str, values: Tensor | np.ndarray) -> None:
        """A number per image, and its mean (over the images that have one) among the summary."""
        array = np.asarray(values, dtype=np.float64)
        self.images[f"{map}:{metric}"] = array
        self.add(metric, float(np.nanmean(array)), map=map)

    def add_table(self, table: Any, keys: tuple[str, ...], values: tuple[str, ...], name: str) -> None:
        """A data frame's columns ``values``; the columns ``keys`` beside layer and head go into the metric's name."""
        for row in table.to_dict(orient="records"):
            label = ":".join([name, *(str(row[key]) for key in keys)])
            for value in values:
                place = {key: row[key] for key in ("layer", "head") if key in row}
                self.add(f"{label}:{value}", row[value], **place)


def localisation(trained: Trained, study: Study) -> Scores:
    """Do the maps lie on the object? Four scores per image for each map, means for every layer and head."""
    scores = Scores()
    images, _, masks = PlantedShapes("test").batch(study.localisation)[:3]
    found: dict[tuple[str, str], list[Tensor]] = {}
    heads: dict[tuple[int, int, str], list[Tensor]] = {}
    worst = 0.0
    for x, mask in zip(images.split(CHUNK), masks.split(CHUNK)):
        views, rows = attention_views(trained.model, x, trained.display_tau, trained.partner)
        views["grad_cam"] = grad_cam(trained.model, x)
        if not found:  # the two libraries give one map; that they do is measured, and one of them is enough
            signed, captum = (recipe(trained.model, x, relu=False) for recipe in (grad_cam, layer_grad_cam))
            worst = float((signed - captum).abs().max() / signed.abs().max())
        for name, maps in views.items():
            for metric, values in localisation_scores(as_recorded(maps, mask), mask).items():
                found.setdefault((name, metric), []).append(values)
        for layer in range(rows.shape[1]):
            for head in range(rows.shape[2]):
                for metric, values in localisation_scores(as_recorded(rows[:, layer, head], mask), mask).items():
                    heads.setdefault((layer, head, metric), []).append(values)
    for (name, metric), parts in found.items():
        scores.add_images(name, metric, torch.cat(parts))
    for (layer, head, metric), parts in heads.items():
        scores.add(metric, torch.cat(parts).mean().item(), map="attention", layer=layer, head=head)
    scores.add("layer_grad_cam_difference", worst, map="grad_cam")
    return scores


def faithfulness(trained: Trained, study: Study) -> Scores:
    """What disturbing the image says of each map, the baselines' included."""
    scores = Scores()
    x = torch.stack([trained.test[index][0] for index in range(study.faithfulness)])
    maps = model_maps(trained.model, x, trained.display_tau)
    maps |= baseline_maps(x, token_grid(trained.model, x).size)
    with torch.no_grad():
        targets = trained.model(x).argmax(dim=-1)
    for name, values in maps.items():
        for metric, result in faithfulness_scores(trained.model, x, values, targets).items():
            scores.add_images(name, metric, result)
    for name, explain in recipes(targets=None).items():
        scores.add_images(name, "max_sensitivity", max_sensitivity(trained.model, x, explain, targets))
    return scores


def recipes(targets: Tensor | None) -> dict[str, Callable[..., Tensor]]:
    """The maps of `MODEL_MAPS` as (model, images, classes) -> [B, h, w]; the class is fixed by ``targets`` if given."""

    def of_class(model: nn.Module, x: Tensor, classes: Tensor | None = None) -> Tensor:
        return grad_cam(model, x, classes if targets is None else targets)

    found = {
        "attention": lambda model, x, classes=None: class_attention(model, x).mean(dim=1),
        "rollout": lambda model, x, classes=None: attention_rollout(model, x),
        "grad_cam": of_class,
    }
    assert tuple(found) == MODEL_MAPS
    return found


def background(trained: Trained, study: Study) -> Scores:
    """Accuracy as the background changes, and the share of each map on the background and on distractors."""
    scores = Scores()
    for variant, correct in background_accuracy(trained.model, images=study.background).items():
        scores.add_images(variant, "accuracy", correct)
    swapped = PlantedShapes("test", swap_background=True).batch(study.mass)
    plain = PlantedShapes("test").batch(study.mass)
    busy = PlantedShapes("test", distractors=4).batch(study.mass)
    for name, maps in model_maps(trained.model, swapped.images, trained.display_tau).items():
        scores.add_images(name, "background_swapped", background_mass(as_recorded(maps, swapped.masks), swapped.masks))
    for name, maps in model_maps(trained.model, busy.images, trained.display_tau).items():
        on = distractor_mass(as_recorded(maps, busy.masks), busy.images, plain.images, busy.masks)
        scores.add_images(name, "on_distractors", on)
    scores.add_images("uniform", "on_distractors", distractor_share(busy.images, plain.images, busy.masks))
    scores.add_images("uniform", "background_swapped", 1 - swapped.masks.flatten(1).double().mean(dim=1))
    return scores


def sparsity(trained: Trained, study: Study) -> Scores:
    """Sparsity against its nulls, and what a zero means. A dense model is looked at as if it were cut at tau."""
    scores = Scores()
    x = PlantedShapes("test").batch(study.sparsity).images
    sparse = bool(sparse_modules(trained.model))
    if trained.kind in ("dense", "sparse", "warmup", "hard_cut"):  # the others are not cut at tau
        table = sparsity_against_nulls(trained.model, x, TAU)
        values = ("cut_sparsity", "kept_mass", "effective_support", "empty_rate", "floor")
        scores.add_table(table, ("queries", "source"), values, "null")
    if sparse:
        certificate = value_path_certificate(trained.model, x)
        scores.add_table(certificate, (), ("rows_checked", "zeros_checked", "identical"), "value_path")
        scores.add_table(reachability_table(trained.model, x), ("depth", "residual"), ("reachable_share",), "reach")
        tracked(scores, trained.model, x)
    else:
        with sparsified(trained.model, TAU):
            tracked(scores, trained.model, x)
    if trained.kind in ("sparse", "warmup"):
        effect = normaliser_effect(trained.model, x)
        scores.add_table(effect, ("removed",), ("weight_change", "output_change", "rows"), "removal")
    return scores


def tracked(scores: Scores, model: nn.Module, x: Tensor) -> None:
    """Add the tracker's summary over the images ``x`` [B, 3, H, W]."""
    with TokenSparsityTracker(model) as tracker, torch.no_grad():
        for chunk in x.split(CHUNK):
            model(chunk)
    summary = tracker.summary()
    for name in SPARSITY:
        scores.add(f"tracker:{name}", getattr(summary, name))


def sanity(trained: Trained, study: Study) -> Scores:
    """Weights shuffled from the head downwards, block by block: does the map change?"""
    scores = Scores()
    x = PlantedShapes("test").batch(study.sanity).images
    with torch.no_grad():
        targets = trained.model(x).argmax(dim=-1)
    for name, explain in recipes(targets).items():
        check = weight_randomisation(trained.model, x, partial(explain, classes=None), mode="cascading")
        for stage, values in zip(check.stages, check.correlation, strict=True):
            scores.add("rank_correlation", values.mean().item(), map=name, layer=stage)
    return scores


PARTS: dict[str, Callable[[Trained, Study], Scores]] = {
    "localisation": localisation,
    "faithfulness": faithfulness,
    "background": background,
    "sparsity": sparsity,
    "sanity": sanity,
}


def baselines(study: Study) -> Scores:
    """Localisation of the maps that have not seen a model."""
    scores = Scores()
    images, _, masks = PlantedShapes("test").batch(study.localisation)[:3]
    size = (masks.shape[-2], masks.shape[-1])
    for name, maps in baseline_maps(images, (size[0] // 4, size[1] // 4)).items():
        for metric, values in localisation_scores(as_recorded(maps, masks), masks).items():
            scores.add_images(name, metric, values)
    return scores
