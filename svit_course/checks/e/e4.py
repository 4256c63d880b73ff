"""e4: the control: dense rows drawn through the threshold, and the class token's map with and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from svit_course.checks.e.shared import double, draw_rows
from svit_course.judging import Mistake, array, compare, no_nan, not_renormalised, untouched
from svit_course.question import Case, Question, Seen
from svit_utils.explain import displayed


def inputs(case: Case) -> np.ndarray:
    """float32 [B, H, N, N]: written out, or drawn; ``flat`` rows are uniform, so that no key there exceeds tau."""
    if "weights" in case:
        return np.array(case["weights"], dtype=np.float32)
    tokens = case["tokens"]
    weights = draw_rows(case, (case["batch"], case["heads"], tokens, tokens), np.random.default_rng(case["seed"]))
    for batch, head, query in case.get("flat", ()):
        weights[batch, head, query] = 1 / tokens
    return weights.astype(np.float32)


def probe(case: Case, drawn_through: Any, attention_map: Any) -> Seen:
    """The drawn rows, the map without and with tau, and the weights as they are afterwards."""
    weights, tau, prefix = torch.from_numpy(inputs(case)), case["tau"], case["prefix"]
    seen = {"rows": drawn_through(weights, tau), "plain": attention_map(weights, prefix)}
    return {**seen, "drawn": attention_map(weights, prefix, tau), "weights": weights}


def class_row(weights: np.ndarray, prefix: int) -> np.ndarray:
    """The class token's row [B, patches], mean over the heads."""
    return np.asarray(weights[:, :, 0, prefix:].mean(axis=1))


def row_mistakes(p: np.ndarray, tau: float) -> Iterator[Mistake]:
    """Of drawn_through, [B, H, N, N]."""
    expected, zeros = (displayed(double(p), tau, empty_rows=mode).numpy() for mode in ("dense", "zero"))
    r, hard = np.maximum(p - tau, 0), np.where(p > tau, p, 0)
    empty = r.sum(axis=-1, keepdims=True) == 0
    with np.errstate(all="ignore"):
        hard = np.where(empty, p, hard / hard.sum(axis=-1, keepdims=True))
        columns = np.where(r.sum(axis=-2, keepdims=True) > 0, r / r.sum(axis=-2, keepdims=True), p)
        by_matrix = r / r.sum(axis=(-1, -2), keepdims=True)
    yield p, "drawn_through: nothing is cut"
    bare = "drawn_through: " + not_renormalised(r)
    yield r, bare
    yield np.where(empty, p, r), bare
    yield hard, "drawn_through: survivors keep their whole p: the threshold is subtracted, ReLU(p - tau)"
    yield zeros, "drawn_through: a row without survivors becomes zeros: here it stays as it is"
    yield (
        np.where(empty.any(), p, expected),
        "drawn_through: because one row is empty all stay as they are: decide for each row, with torch.where",
    )
    yield columns, "drawn_through: divided by the sums of the columns: each *row* sums to 1, dim=-1"
    yield by_matrix, "drawn_through: divided by the sum of the matrix: each row has its own sum, dim=-1"


def map_mistakes(weights: np.ndarray, prefix: int) -> Iterator[Mistake]:
    """Of attention_map [B, patches], given the weights that it should show."""
    row = class_row(weights, prefix)
    left = "attention_map: a prefix token is left in the map: leave out the first `prefix`"
    yield class_row(weights, 0), left
    one_left = f"attention_map: {prefix} prefix tokens come first here, and you leave out 1"
    yield class_row(weights, 1), one_left
    yield row * weights.shape[1], "attention_map: the heads are summed: take their mean"
    apart = weights[:, :, 0, prefix:]
    yield apart, "attention_map: the heads are still apart: take their mean, dim=1"
    yield apart[:, 0], "attention_map: this is head 0 alone: take the mean of the heads"
    column = weights.mean(axis=1)[:, prefix:, 0]
    yield column, "attention_map: this is the class token's *column*: asked is its row"
    queries = weights.mean(axis=1).mean(axis=1)[:, prefix:]
    yield queries, "attention_map: the mean over all queries: asked is query 0"
    yield apart.max(axis=1), "attention_map: the heads are fused by their maximum: take their mean"
    one = "attention_map: only the first picture's row: take query 0 of every picture and head, weights[:, :, 0]"
    yield row[:1], one
    yield row[0], one
    yield (
        row / row.sum(axis=-1, keepdims=True),
        "attention_map: divided once more at the end: what goes to the prefix is left out, so the map sums to less "
        "than 1",
    )


def drawn_mistakes(p: np.ndarray, tau: float, prefix: int) -> Iterator[Mistake]:
    """Of attention_map with tau, [B, patches]: the steps in another order, then those of any map."""
    yield (
        class_row(p, prefix),
        "attention_map: tau changes nothing: draw the rows through the threshold where tau is given",
    )
    yield (
        displayed(double(p.mean(axis=1)), tau).numpy()[:, 0, prefix:],
        "attention_map: the heads are averaged before the cut. The operator cuts each head's row, and the control has "
        "to do the same: cut first, average then",
    )
    patches = p[:, :, 0, prefix:]
    cut = np.maximum(patches - tau, 0)
    with np.errstate(all="ignore"):
        total = cut.sum(axis=-1, keepdims=True)
        early = np.where(total > 0, cut / total, patches).mean(axis=1)
    yield (
        early,
        "attention_map: the prefix is left out before the cut, so the rows are divided by another sum. The operator "
        "cuts the whole row: cut first, leave out the prefix then",
    )
    yield from map_mistakes(displayed(double(p), tau).numpy(), prefix)


def judge(case: Case, seen: Seen) -> None:
    """The weights are left alone; then the rows, the plain map, and the map drawn through the threshold."""
    weights, tau, prefix = inputs(case), case["tau"], case["prefix"]
    untouched(seen, weights=weights)
    p, right = weights.astype(np.float64), displayed(double(weights), tau).numpy()
    rows = array(seen, "rows", "drawn_through's result")
    no_nan(rows, p, "drawn_through: NaN in a row without survivors, 0/0. Such a row is drawn as it is")
    compare(rows, right, "drawn_through's result", row_mistakes(p, tau), rtol=1e-4)
    what = "attention_map without tau"
    compare(array(seen, "plain", what), class_row(p, prefix), what, map_mistakes(p, prefix), rtol=1e-4)
    what = "attention_map with tau"
    compare(array(seen, "drawn", what), class_row(right, prefix), what, drawn_mistakes(p, tau, prefix), rtol=1e-4)


QUESTION = Question(
    name="e4",
    answers=("drawn_through", "attention_map"),
    cases=(
        {
            "what": "one class row in two heads, by hand",
            "tau": 0.25,
            "prefix": 1,
            "weights": [
                [[[0.5, 0.375, 0.125], [0.5, 0.5, 0], [0, 0, 1]], [[0.125, 0.375, 0.5], [0.5, 0.5, 0], [0, 0, 1]]]
            ],
        },
        {"what": "two pictures, three heads", "tau": 0.1, "prefix": 1, "seed": 6, "batch": 2, "heads": 3, "tokens": 8},
        {
            "what": "class rows without survivors",
            "tau": 0.15,
            "prefix": 1,
            "seed": 7,
            "batch": 2,
            "heads": 2,
            "tokens": 10,
            "flat": [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 4]],
        },
        {
            "what": "a class token and two registers",
            "tau": 0.1,
            "prefix": 3,
            "seed": 8,
            "batch": 2,
            "heads": 2,
            "tokens": 9,
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "drawn_through is the operator without its softmax: the rows are probabilities already.",
        "Subtract, clip at 0, divide by the row's sum; where that sum is 0 the row stays. attention_map: which comes "
        "first, the cut, the mean over heads, or leaving out the prefix? What does the operator see?",
        "r = (weights - tau).relu(), z = r.sum(dim=-1, keepdim=True); torch.where(z > 0, r / z.clamp_min(1e-12), "
        "weights). Then rows = weights[:, :, 0]; if tau is not None: rows = drawn_through(rows, tau); "
        "rows.mean(dim=1)[:, prefix:].",
    ),
    section="chapter 8, section 8.5, and chapter 5, section 5.3",
)
