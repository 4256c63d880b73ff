"""What the second study measures of one trained run: where its maps lie, its zeros by layer and head, its sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.plans import Run
from research.second.sinks import sink_table
from research.study.maps import CHUNK, class_rows, on_grid
from research.study.scores import Scores
from research.zeros import reachability_table
from svit_utils.attention import TokenSparsityTracker, sparse_modules
from svit_utils.data import PlantedShapes
from svit_utils.explain import attention_maps, grad_cam, rollout_matrix
from svit_utils.explain.grid import TokenGrid, token_grid
from svit_utils.referee import faithfulness_scores, localisation_scores

PICTURES = {"localisation": 1000, "sparsity": 200, "sinks": 200, "reachability": 50, "faithfulness": 50}
DRAWN = {"attention": "attention_drawn", "rollout": "rollout_drawn"}  # the dense model's maps, drawn cut


@dataclass(frozen=True)
class Scored:
    """A trained run, and for one that is not dense the dense model of the same seed and steps."""

    run: Run
    model: nn.Module
    dense: nn.Module | None = None


def drawn_cut(dense: dict[str, Tensor], sparse: nn.Module) -> list[Tensor]:
    """A dense model's weights [B, H, N, N], layer by layer, put through the sparse model's normalisers.

    The logarithm of a softmax is its scores up to a constant per row, which no normaliser of the study sees.
    """
    modules = sparse_modules(sparse)
    with torch.no_grad():
        return [modules[name].normaliser.weights(weights.clamp_min(1e-30).log()) for name, weights in dense.items()]


def views(layers: list[Tensor], model: nn.Module, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of all layers [B, H, N, N] to last-layer attention and rollout [B, h, w], and heads [B, L, H, h, w]."""
    heads = torch.stack([class_rows(model, grid, weights) for weights in layers], dim=1)  # [B, L, H, N]
    rolled = class_rows(model, grid, rollout_matrix(layers)[:, None]).squeeze(1)  # [B, N]
    return on_grid(heads[:, -1], grid).mean(dim=1), on_grid(rolled, grid), on_grid(heads, grid)


def own_maps(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The three maps [B, h, w] of a model on the images ``x`` [B, 3, H, W], by name, and its heads [B, L, H, h, w]."""
    attention, rolled, by_head = views(list(attention_maps(model, x).values()), model, token_grid(model, x))
    return {"attention": attention, "rollout": rolled, "grad_cam": grad_cam(model, x)}, by_head


def drawn_maps(dense: nn.Module, sparse: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The dense model's attention and rollout [B, h, w], drawn cut as the sparse model cuts, by name."""
    drawn = drawn_cut(attention_maps(dense, x), sparse)
    attention, rolled, _ = views(drawn, dense, token_grid(dense, x))
    return {DRAWN["attention"]: attention, DRAWN["rollout"]: rolled}


def localisation(scored: Scored, split: str = "test") -> Scores:
    """Four scores per picture for each map, on the grid of the patches; means for every layer and head."""
    scores = Scores()
    found: dict[tuple[str, str], list[Tensor]] = {}
    heads: dict[tuple[int, int], list[Tensor]] = {}
    seed = scored.run.test_seed if split == "test" else 0
    images, _, masks = PlantedShapes(split, seed=seed).batch(PICTURES["localisation"])[:3]
    for x, mask in zip(images.split(CHUNK), masks.split(CHUNK)):
        maps, by_head = own_maps(scored.model, x)
        if scored.dense is not None:
            maps |= drawn_maps(scored.dense, scored.model, x)
        for name, values in maps.items():
            for metric, result in localisation_scores(values, mask).items():
                found.setdefault((name, metric), []).append(result)
        for layer in range(by_head.shape[1]):
            for head in range(by_head.shape[2]):
                precision = localisation_scores(by_head[:, layer, head], mask)["average_precision"]
                heads.setdefault((layer, head), []).append(precision)
    for (name, metric), parts in found.items():
        scores.add_images(name, metric, torch.cat(parts))
    for (layer, head), parts in heads.items():
        scores.add("average_precision", torch.cat(parts).mean().item(), map="attention", layer=layer, head=head)
    return scores


def validation(scored: Scored) -> Scores:
    """As `localisation`, on validation pictures: what the choice of the version that holds may look at."""
    return localisation(scored, "val")


def sparsity(scored: Scored) -> Scores:
    """The tracker's columns by layer and head, on validation pictures; nothing for a dense model."""
    scores = Scores()
    images = PlantedShapes("val").batch(PICTURES["sparsity"]).images
    if not sparse_modules(scored.model):
        return scores
    with TokenSparsityTracker(scored.model) as tracker, torch.no_grad():
        for x in images.split(CHUNK):
            scored.model(x)
    table = tracker.table()
    columns = ("applied_sparsity", "cut_sparsity", "empty_rate", "kept_mass", "effective_support")
    scores.add_table(table[table["queries"] == "all"], (), columns, "tracker")
    return scores


def sinks(scored: Scored) -> Scores:
    """The heaviest column of each layer, see `research.second.sinks.sink_table`."""
    scores = Scores()
    images = PlantedShapes("test", seed=scored.run.test_seed).batch(PICTURES["sinks"]).images
    scores.add_table(sink_table(scored.model, images), (), ("share", "value_norm", "is_prefix"), "sink")
    if scored.dense is not None:
        table = sink_table(scored.dense, images, lambda maps: drawn_cut(maps, scored.model))
        scores.add_table(table, (), ("share", "value_norm", "is_prefix"), "sink_drawn")
    return scores


def reachability(scored: Scored) -> Scores:
    """The share of patches with a value path to the class token, with fallback rows and without."""
    scores = Scores()
    images = PlantedShapes("test", seed=scored.run.test_seed).batch(PICTURES["reachability"]).images
    for name, fallback in (("reach", True), ("reach_without_fallback", False)):
        table = reachability_table(scored.model, images, fallback=fallback)
        scores.add_table(table, ("depth", "residual"), ("reachable_share",), name)
    return scores


def faithfulness(scored: Scored) -> Scores:
    """What disturbing the picture says of the model's maps; the dense model's, drawn cut, disturb the dense model."""
    scores = Scores()
    x = PlantedShapes("test", seed=scored.run.test_seed).batch(PICTURES["faithfulness"]).images
    judged = [(scored.model, own_maps(scored.model, x)[0])]
    if scored.dense is not None:
        judged.append((scored.dense, drawn_maps(scored.dense, scored.model, x)))
    for model, maps in judged:
        with torch.no_grad():
            targets = model(x).argmax(dim=-1)
        for name, values in maps.items():
            for metric, result in faithfulness_scores(model, x, values, targets).items():
                scores.add_images(name, metric, result)
    return scores


PARTS = {
    "localisation": localisation,
    "validation": validation,
    "sparsity": sparsity,
    "sinks": sinks,
    "reachability": reachability,
    "faithfulness": faithfulness,
}
