"""d3: an interval over seeds, by Student's t."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from svit_course.checks.d.shared import numbers
from svit_course.judging import Mistake, compare, untouched
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.referee import student_interval


def inputs(case: Case) -> np.ndarray:
    """Right answers of one model minus the other's, [S, n]: -1, 0 or 1, with luck from seed to seed."""
    rng, shape = np.random.default_rng(case["data"]), (case["seeds"], case["n"])
    ease, luck = rng.normal(1.5, 2.0, case["n"]), rng.normal(0, case.get("luck", 0.4), (case["seeds"], 1))
    a = rng.random(shape) < 1 / (1 + np.exp(-(ease + case.get("shift", -0.6) + luck)))
    b = rng.random(shape) < 1 / (1 + np.exp(-ease))
    return a.astype(float) - b


def probe(case: Case, interval_over_seeds: Any) -> Seen:
    """The interval, or the refusal where there is one seed; and the differences as they are afterwards."""
    differences = inputs(case)
    try:
        with np.errstate(all="ignore"):
            result = interval_over_seeds(differences)
    except ValueError as error:
        if case["seeds"] > 1:
            raise
        return {"refused": str(error), "differences": differences}
    return {"interval": result, "differences": differences}


def mistakes(d: np.ndarray) -> Iterator[Mistake]:
    """(mean, low, high) of what is known to go wrong."""
    (runs, n), means = d.shape, d.mean(axis=1)
    mean, spread, root = float(means.mean()), float(means.std(ddof=1)), float(np.sqrt(runs))
    t, z = float(stats.t.ppf(0.975, runs - 1)), float(stats.norm.ppf(0.975))
    small = spread * np.sqrt((runs - 1) / runs)  # divided by S

    def around(half: float) -> np.ndarray:
        return np.array([mean, mean - half, mean + half])

    few = f"with {runs} seeds the factor is Student's t = {t:.2f}, not the normal {z:.2f}: three runs say little about "
    few += "their own spread. stats.t.ppf(0.975, S - 1)"
    yield around(z * spread / root), few
    yield around(1.96 * spread / root), few
    yield around(2 * spread / root), few
    yield (
        around(t * small / root),
        f"the spread is divided by S, not by S - 1: np.std has ddof=0 unless told; with {runs} seeds that is "
        f"{100 * (1 - small / spread):.0f} % too small. ddof=1",
    )
    yield around(z * small / root), f"two things: ddof=1 in the standard deviation; and {few}"
    yield around(t * spread / runs), "the standard deviation is divided by S: the standard error has sqrt(S)"
    yield around(t * spread), "that is the spread of single seeds: the mean's standard error is smaller, s / sqrt(S)"
    images = "divided by the root of the number of images: S seeds are the data here, sqrt(S)"
    yield around(t * spread / np.sqrt(n)), images
    yield around(t * spread / np.sqrt(n * runs)), "divided by sqrt(S n): the images are no further seeds, sqrt(S)"
    freedom = float(stats.t.ppf(0.975, runs))
    yield around(freedom * spread / root), "t with S degrees of freedom: the mean has used one up, S - 1"
    ninety = float(stats.t.ppf(0.95, runs - 1))
    yield (
        around(ninety * spread / root),
        "that is 90 %: 95 % in the middle leave 2.5 % on each side, stats.t.ppf(0.975, S - 1)",
    )
    yield around(t * spread**2 / root), "the variance is used where the standard deviation belongs"
    pooled = "the images are taken for seeds: average over the images of each seed first, axis=1, and take the S means "
    pooled += "as the data"
    for wrong in (student_interval(d.ravel()), student_interval(d.mean(axis=0))):
        yield np.array([wrong.mean, wrong.low, wrong.high]), pooled
    yield around(z * float(d.std()) / np.sqrt(d.size)), pooled
    yield around(z * float(d.std(ddof=1)) / np.sqrt(d.size)), pooled
    right = student_interval(means)
    yield np.array([right.low, right.mean, right.high]), "the order is mean, low, high"
    yield np.array([mean, right.high, right.low]), "low comes before high"


def judge(case: Case, seen: Seen) -> None:
    """One seed is refused; of several, (mean, low, high) are those of Student's t."""
    d = inputs(case)
    untouched(seen, differences=d)
    if len(d) == 1:
        if "refused" not in seen:
            raise Wrong(
                "one seed says nothing about the spread between seeds: raise ValueError, instead of a number or NaN"
            )
        return
    got = numbers(seen["interval"], "the result", "mean, low and high", 3)
    right = student_interval(d.mean(axis=1))
    compare(got, [right.mean, right.low, right.high], "(mean, low, high)", mistakes(d), rtol=1e-7, atol=1e-10)


QUESTION = Question(
    name="d3",
    answers=("interval_over_seeds",),
    cases=(
        {"what": "three seeds, 300 images", "data": 1, "seeds": 3, "n": 300},
        {"what": "five seeds, 120 images", "data": 2, "seeds": 5, "n": 120},
        {"what": "a single seed", "data": 3, "seeds": 1, "n": 100},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "How many numbers are the data? S, one per training run. Which axis holds the images?",
        "delta_s is the mean over the images of seed s. Then mean plus and minus t * s / sqrt(S), with the standard "
        "deviation s that divides by S - 1 (ddof=1).",
        "t = stats.t.ppf(0.975, S - 1): 12.7 for two seeds, 4.30 for three, 2.78 for five. For S < 2 raise ValueError.",
    ),
    section="chapter 4, section 4.2",
)
