"""f1: how far the cut moves the logits of each image, relative to the dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.f.shared import Logits, draw_images, draw_model, judge_left_cut, lengths
from svit_course.judging import Mistake, array, close, compare, untouched
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention import sparse_modules


def probe(case: Case, output_error: Any) -> Seen:
    """The error, twice: the model has dropout, which a measurement in train mode would show."""
    model, images, taus = draw_model(case, dropout=0.4), draw_images(case), dict(case["taus"])
    model.train(bool(case.get("training")))
    error = output_error(model, taus, images)
    again = None if sparse_modules(model) else output_error(model, taus, images)
    return {
        "error": error,
        "again": again,
        "left": list(sparse_modules(model)),
        "mode": "training" if model.training else "eval",
        "images": images,
        "taus": [[layer, tau] for layer, tau in taus.items()],
    }


def mistakes(case: Case, dense: np.ndarray, cut: np.ndarray) -> Iterator[Mistake]:
    """Errors [B], given logits [B, classes]."""
    away, length = lengths(cut - dense), lengths(dense)
    yield (
        np.zeros_like(away),
        "0 everywhere, and the cut does change the outputs: are both calls dense, or both cut? "
        "(A negative layer counts from the end.)",
    )
    if case["taus"]:
        everywhere = Logits(case)(dict.fromkeys(range(case["depth"]), case["taus"][0][1]))
        named = "every layer is cut at the same tau: cut only the layers in the dict, each at its own tau"
        yield lengths(everywhere - dense) / length, named
    yield away, "the error is not relative: divide by the length of the *dense* logits of the same image"
    yield away / lengths(cut), "divided by the length of the cut logits: the dense ones are the yardstick"
    squared = "this is the square of the relative error: take the root of the sums of squares"
    yield (away / length) ** 2, squared
    absolute = np.abs(cut - dense).sum(1) / np.abs(dense).sum(1)
    yield absolute, "sums of absolute values: the question uses lengths, roots of sums of squares"
    with np.errstate(all="ignore"):
        single = np.abs((cut - dense) / dense).mean(axis=1)
    yield (
        single,
        "relative errors of single logits, averaged: a logit near 0 decides. Divide the lengths, once per image",
    )
    one_each = "the question asks for one number per image, [B]"
    yield (
        np.asarray(np.linalg.norm(cut - dense) / np.linalg.norm(dense)),
        f"averaged over the batch: this is one ratio for all images, and {one_each}: take norms over the classes",
    )
    yield np.asarray((away / length).mean()), f"averaged over the images already: {one_each}; f2 averages"
    mean = "divided by the mean length over the batch: each image has its own yardstick"
    yield away / length.mean(), mean
    batch = "divided by the length of the whole batch: each image has its own yardstick"
    yield away / np.linalg.norm(dense), batch
    across = np.sqrt(((cut - dense) ** 2).sum(axis=0)) / np.sqrt((dense**2).sum(axis=0))
    yield across, "the norm runs over the images: it runs over the classes, dim=1, and leaves one number per image"
    yield (
        (cut.argmax(1) != dense.argmax(1)).astype(float),
        "these are 0 and 1: the error asked for is how far the logits move, not whether the answer changes",
    )


def judge(case: Case, seen: Seen) -> None:
    """Model, images and taus are left as they were, the measurement is in eval mode, and the errors are right."""
    judge_left_cut(seen)
    untouched(seen, images=draw_images(case))
    if seen["taus"] != [list(pair) for pair in case["taus"]]:
        raise Wrong("it changed the dict of taus that it was given: the caller still needs it")
    mode = "training" if case.get("training") else "eval"
    if seen["mode"] != mode:
        raise Wrong(f"the model came in {mode} mode and is in {seen['mode']} mode afterwards: put it back as it was")
    got, again = array(seen, "error", "the result"), array(seen, "again", "the result of a second call")
    if got.shape == again.shape and not close(got, again):
        raise Wrong(
            "two calls give two different errors: the model is in train mode, and dropout draws again each time. "
            "Measure in eval mode, model.eval()"
        )
    logits = Logits(case)
    dense, cut = logits({}), logits(dict(case["taus"]))
    expected = lengths(cut - dense) / lengths(dense)
    compare(got, expected, "the error", mistakes(case, dense, cut), rtol=1e-4, atol=1e-6)


QUESTION = Question(
    name="f1",
    answers=("output_error",),
    cases=(
        {"what": "two layers at one tau", "seed": 1, "depth": 2, "images": 4, "taus": [[0, 0.08], [1, 0.08]]},
        {"what": "one layer of three, the others stay dense", "seed": 2, "depth": 3, "images": 5, "taus": [[1, 0.1]]},
        {
            "what": "a model that comes in training mode",
            "seed": 3,
            "depth": 2,
            "images": 3,
            "taus": [[0, 0.05], [1, 0.1]],
            "training": True,
        },
        {"what": "the last layer by its negative index", "seed": 4, "depth": 3, "images": 3, "taus": [[-1, 0.1]]},
        {"what": "no layer named", "seed": 5, "depth": 2, "images": 3, "taus": []},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Two forward passes, one dense and one cut, on the same images. Everything else is bookkeeping: mode, "
        "gradients, and how the model looks afterwards.",
        "`with sparsified(model, taus):` cuts the layers that the dict names and restores the model. Remember "
        "model.training, call model.eval(), and put it back with model.train(was).",
        "(cut - dense).norm(dim=1) / dense.norm(dim=1), with dense = model(images) outside the with block and "
        "cut = model(images) inside it, all under torch.no_grad().",
    ),
    section="chapter 2, sections 2.8 and 2.9",
)
