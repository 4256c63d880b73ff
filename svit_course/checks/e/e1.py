"""e1: attention rollout, with empty rows and prefix tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from svit_course.checks.e.shared import double, draw_rows
from svit_course.judging import Mistake, array, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.explain import rollout_matrix


def inputs(case: Case) -> list[np.ndarray]:
    """float32 [B, H, N, N] of each layer: written out, or drawn; ``empty`` queries lost all keys in ``in_heads``."""
    if "layers" in case:
        return [np.array(layer, dtype=np.float32) for layer in case["layers"]]
    rng, n = np.random.default_rng(case["seed"]), case["tokens"]
    drawn = []
    for depth in range(case["depth"]):
        layer = draw_rows(case, (case["batch"], case["heads"], n, n), rng)
        for query in case.get("empty", ()):
            layer[:, case["in_heads"], (query + depth) % n] = 0
        drawn.append(layer.astype(np.float32))
    return drawn


def probe(case: Case, rollout: Any) -> Seen:
    """The map, and the layers as they are afterwards."""
    layers = [torch.from_numpy(layer) for layer in inputs(case)]
    return {"map": rollout(layers, case["prefix"]), "layers": layers}


def mistakes(arrays: list[np.ndarray], prefix: int) -> Iterator[Mistake]:
    """Maps [B, patches], or what is returned in their place."""
    layers = [double(layer) for layer in arrays]
    matrix = rollout_matrix(layers).numpy()  # [B, N, N]
    bare = halved = identity = np.eye(matrix.shape[-1])  # products of steps whose rows are not divided by their sums
    for fused in (layer.numpy().mean(axis=1) for layer in layers):
        bare, halved = fused @ bare, (fused + identity) / 2 @ halved

    def row(of: Any) -> np.ndarray:
        return np.asarray(of)[:, 0, prefix:]

    right = row(matrix)
    yield row(rollout_matrix(layers[::-1])), "the product is in the wrong order: later layers multiply from the left"
    missing = "the identity is missing: half of every step is the residual connection, W / 2 + I / 2"
    yield row(rollout_matrix(layers, residual=0.0)), missing
    yield row(bare), missing + ". And the rows of an emptied query do not sum to 1"
    uneven = (
        "the steps' rows do not sum to 1, because a query that the threshold emptied leaves a row of less: divide each "
        "row by its own sum, in every layer, before you multiply"
    )
    yield row(halved), uneven
    yield row(halved) * 2 ** len(layers), uneven
    columns = rollout_matrix([layer.transpose(-1, -2) for layer in reversed(layers)]).numpy().swapaxes(-1, -2)
    yield row(columns), "the columns sum to 1: divide each *row* by its sum, sum(dim=-1, keepdim=True)"
    left = f"a prefix token is left in the map: it has {matrix.shape[-1]} tokens, leave out the first {prefix}"
    yield matrix[:, 0], left
    yield matrix[:, 0, 1:], f"{prefix} prefix tokens come first here, and you leave out 1: use `prefix`"
    one = "one row for the whole batch: the first picture's. Take the class token's row of *every* picture, [:, 0]"
    yield right[0], one
    yield right[:1], one
    yield np.broadcast_to(right[:1], right.shape), one
    yield matrix, "this is the whole matrix [B, N, N]: the map is the class token's row of it, without the prefix"
    column = "this is the class token's *column*, who reads it; asked is its row, whom it reads"
    yield matrix[:, prefix:, 0], column
    yield row(rollout_matrix(layers, "max")), "the heads are fused by their maximum: take their mean"
    yield row(rollout_matrix(layers[-1:])), "this is the last layer alone: multiply the steps of all layers"
    yield row(rollout_matrix(layers[:1])), "this is the first layer alone: multiply the steps of all layers"
    each = np.mean([rollout_matrix([layer]).numpy() for layer in layers], axis=0)
    yield row(each), "the layers are averaged: multiply them"
    yield (
        right / right.sum(axis=-1, keepdims=True),
        "divided once more at the end: what reached the prefix is left out, so the map sums to less than 1",
    )


def judge(case: Case, seen: Seen) -> None:
    """The list and its layers are left alone, and the map is the library's."""
    layers, prefix = inputs(case), case["prefix"]
    if len(seen["layers"]) != len(layers):
        raise Wrong("it changed the list `attentions`: the caller still needs it. Loop over it, without pop or reverse")
    for depth, layer in enumerate(layers):
        unchanged(layer, seen["layers"][depth], f"attentions[{depth}]")
    expected = rollout_matrix([double(layer) for layer in layers]).numpy()[:, 0, prefix:]
    compare(array(seen, "map", "the map"), expected, "the map", mistakes(layers, prefix), rtol=1e-4)


QUESTION = Question(
    name="e1",
    answers=("rollout",),
    cases=(
        {
            "what": "three tokens, two layers, by hand",
            "prefix": 1,
            "layers": [[[[[0, 1, 0], [0, 0, 1], [0, 0, 1]]]], [[[[0, 1, 0], [0, 1, 0], [1, 0, 0]]]]],
        },
        {
            "what": "two pictures, two heads, three layers",
            "prefix": 1,
            "seed": 1,
            "batch": 2,
            "heads": 2,
            "depth": 3,
            "tokens": 7,
        },
        {
            "what": "queries that the threshold emptied in one head",
            "prefix": 1,
            "seed": 2,
            "batch": 2,
            "heads": 2,
            "depth": 3,
            "tokens": 7,
            "empty": [0, 3],
            "in_heads": [1],
        },
        {
            "what": "a class token and two registers",
            "prefix": 3,
            "seed": 3,
            "batch": 2,
            "heads": 2,
            "depth": 2,
            "tokens": 8,
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "One step per layer: mean over the heads, half of it plus half the identity, each row divided by its sum.",
        "Tokens after block 2 are A2 (A1 x): a later layer stands on the left of the product so far. The map is the "
        "row of query 0, for every picture, without the first `prefix` keys.",
        "In the loop: step = step / step.sum(dim=-1, keepdim=True), then product = step if product is None else "
        "step @ product. At the end product[:, 0, prefix:].",
    ),
    section="chapter 5, section 5.4, with its known mistakes",
)
