"""f2: the mean error when one layer alone is cut, for each layer and tau."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from svit_course.checks.f.shared import Logits, draw_images, draw_model, judge_left_cut, lengths
from svit_course.judging import Mistake, array, compare, untouched
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention import sparse_modules


def probe(case: Case, sensitivity: Any) -> Seen:
    """The table, which modules are still cut, and images and taus as they are afterwards."""
    model, images, taus = draw_model(case), draw_images(case), list(case["taus"])
    try:
        errors = sensitivity(model, images, taus)
    except ValueError as error:
        if "unknown layer" not in str(error):
            raise
        raise Wrong(
            f"it asks for a layer that is not there ({error}). Is the number of layers written into the code?"
        ) from error
    return {"errors": errors, "left": list(sparse_modules(model)), "images": images, "taus": taus}


class Distances:
    """How far the logits of each image move, [layers, taus, B], when the layers ``cut(row)`` are cut in each row."""

    def __init__(self, case: Case) -> None:
        self.layers, self.taus, self.logits = range(case["depth"]), case["taus"], Logits(case)
        self.dense = self.logits({})
        self.length = lengths(self.dense)  # [B]

    def __call__(self, cut: Callable[[int], list[int]]) -> np.ndarray:
        return np.array([[self.moved(dict.fromkeys(cut(l), tau)) for tau in self.taus] for l in self.layers])

    def moved(self, taus: dict[int, float]) -> np.ndarray:
        """How far each image moves, [B]."""
        return lengths(self.logits(taus) - self.dense)


def mistakes(away: Distances, alone: np.ndarray) -> Iterator[Mistake]:
    """Tables [layers, taus]; ``alone`` are the right distances."""
    layers, relative = list(away.layers), alone / away.length
    expected = relative.mean(axis=-1)
    yield expected.T, "rows and columns are exchanged: [layers, taus]"
    columns = "the columns are sorted by tau: keep the order in which the taus are given"
    yield expected[:, np.argsort(away.taus)], columns
    piled = "layers pile up: in row l every layer up to l is cut. One at a time, the others dense"
    yield (away(lambda l: layers[: l + 1]) / away.length).mean(-1), piled
    at_once = "every layer is cut at once: one at a time, the others dense"
    yield (away(lambda l: layers) / away.length).mean(-1), at_once
    others = "the layer of the row is the only one that is *not* cut: it should be the only one that is"
    yield (away(lambda l: [k for k in layers if k != l]) / away.length).mean(-1), others
    yield relative.max(-1), "the largest error over the images: the question asks for the mean"
    yield np.median(relative, -1), "the median over the images: the question asks for the mean"
    yield relative.sum(-1), "the sum over the images: divide by their number"
    yield alone.mean(-1), "the errors are not relative: does f1 hold?"
    one = "one ratio for the whole batch: average the relative errors of the images"
    yield np.sqrt((alone**2).sum(-1)) / np.linalg.norm(away.length), one
    yield np.zeros_like(expected), "0 everywhere: is the model dense while you measure?"


def judge(case: Case, seen: Seen) -> None:
    """Model, images and taus are left as they were, and the table is right."""
    judge_left_cut(seen)
    untouched(seen, images=draw_images(case), taus=case["taus"])
    layers, taus = case["depth"], case["taus"]
    got = np.asarray(seen["errors"]) if isinstance(seen.get("errors"), list) else array(seen, "errors", "the table")
    if got.ndim == 2 and got.shape[1] == len(taus) and got.shape[0] != layers:
        raise Wrong(
            f"the table has {got.shape[0]} rows and the model {layers} layers: is the number of layers written "
            "into the code? Ask the model, len(model.blocks)"
        )
    away = Distances(case)
    alone = away(lambda l: [l])
    expected = (alone / away.length).mean(axis=-1)
    compare(got, expected, "the table", mistakes(away, alone), rtol=1e-4, atol=1e-6)


QUESTION = Question(
    name="f2",
    answers=("sensitivity",),
    cases=(
        {"what": "three layers, four taus", "seed": 4, "depth": 3, "images": 4, "taus": [0.0, 0.05, 0.1, 0.2]},
        {"what": "two layers, one tau", "seed": 5, "depth": 2, "images": 3, "taus": [0.1]},
        {"what": "five layers, taus in no order", "seed": 6, "depth": 5, "images": 3, "taus": [0.15, 0.03, 0.08]},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "You have output_error. What does the dict of taus look like when only layer 2 is cut?",
        "{2: tau}: the layers that the dict does not name stay dense. Two loops, layers outside, taus inside, and the "
        "mean over the images.",
        "For l in range(len(model.blocks)) and t in taus: output_error(model, {l: t}, images).mean(), put into a list "
        "of rows, one row per layer, and np.array around it.",
    ),
    section="chapter 2, section 2.9",
)
