"""d2: a paired bootstrap interval, of images or of groups of images.

A bootstrap is random, so an answer is right where chance leaves it room, and a wrong one is explained by the mistake
whose interval lies nearest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats

from svit_course.checks.d.shared import numbers
from svit_course.judging import Mistake, close, unchanged, untouched
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.referee import mean_interval, paired_bootstrap

REFERENCE = 40_000  # resamples of the interval that answers are compared with
SIDES = np.array([-1.0, 1.0])
NO_MINUS = re.compile(r"boolean subtract|with (?:two|a) bool tensor", re.IGNORECASE)

# ------------------------------------------------------------------------------------------------ inputs


def draw_groups(case: Case) -> np.ndarray | None:
    """The group of each image [n], or None: labels with gaps, in no order, groups of different size."""
    if "groups" not in case:
        return None
    rng, m = np.random.default_rng(case["data"] + 1000), case["groups"]
    share = np.asarray(rng.gamma(3.0, 1.0, m))
    member = np.concatenate([np.arange(m), rng.choice(m, case["n"] - m, p=share / share.sum())])
    return np.asarray(rng.permutation(7 * np.arange(m) + 3)[rng.permutation(member)])


def inputs(case: Case) -> tuple[Any, Any]:
    """a and b [n]: scores that share the images' ease; ``right``: whether answers are right; ``skew``: a long tail.

    In groups, a's advantage is the group's, and grows with its size.
    """
    rng, n, groups = np.random.default_rng(case["data"]), case["n"], draw_groups(case)
    ease, shift = rng.normal(0, case.get("ease", 1.0), n), case.get("shift", 0.0)
    if groups is not None:
        _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        shift = shift + (rng.normal(0, 1, len(sizes)) + 0.7 * sizes / sizes.mean())[member]
    if case.get("right"):
        chance_a, chance_b = (1 / (1 + np.exp(-(ease + case.get("base", 1.5) + extra))) for extra in (shift, 0.0))
        return rng.random(n) < chance_a, rng.random(n) < chance_b
    if case.get("skew"):
        return ease + rng.exponential(1.0, n) ** 3, ease
    return ease + shift + 0.6 * rng.standard_normal(n), ease + 0.6 * rng.standard_normal(n)


def probe(case: Case, paired_interval: Any) -> Seen:
    """The interval asked for; and short ones: twice with one seed, with another seed, and of a single resample."""
    a, b = inputs(case)
    groups = draw_groups(case)
    more = () if groups is None else (groups,)
    numpy_state = np.random.get_state()  # noqa: NPY002
    seen: Seen = {}
    try:
        with torch.random.fork_rng(devices=[]):
            for key, resamples, seed, luck in (
                ("interval", case["resamples"], case["seed"], 1),
                ("short", 200, case["seed"], 1),
                ("again", 200, case["seed"], 2),
                ("other_seed", 200, case["seed"] + 1, 1),
                ("one", 1, case["seed"], 1),
            ):
                torch.manual_seed(luck)
                np.random.seed(luck)  # noqa: NPY002
                seen[key] = paired_interval(a, b, resamples, seed, *more)
    except (TypeError, RuntimeError) as error:
        if not NO_MINUS.search(str(error)):
            raise
        raise Wrong(
            "a and b may hold True and False, which are not subtracted from one another: convert them to float first. "
            "(`^` and logical_xor, which the error recommends, say *whether* the models differ, and not which is right)"
        ) from error
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
    return {**seen, "a": a, "b": b, "groups": groups}


# ------------------------------------------------------------------------------------------------ what is expected


def by_group(d: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of ``d`` in each group, and the group's size, [m] each."""
    same = groups == np.unique(groups)[:, None]  # [m, n]
    return same @ d, same.sum(axis=1)


def ends(a: np.ndarray, b: np.ndarray, confidence: float = 0.95, groups: np.ndarray | None = None) -> np.ndarray:
    """The library's interval [2] of the mean of a - b."""
    settings: dict[str, Any] = {"confidence": confidence, "resamples": REFERENCE, "seed": 12345}
    if groups is None:
        interval = paired_bootstrap(a, b, **settings)
        return np.array([interval.low, interval.high])
    sums, sizes = by_group(a - b, groups)
    low, high = (sums / sizes).min() - 1e-9, (sums / sizes).max() + 1e-9
    # A share q of the ratios is below t where a share q of the means of sums - t * sizes is below 0.
    found = [
        optimize.brentq(
            lambda t, end=end: getattr(mean_interval(sums - t * sizes, **settings), end), low, high, xtol=1e-6
        )
        for end in ("low", "high")
    ]
    return np.array(found)


def accepted(a: np.ndarray, b: np.ndarray, resamples: int, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The widest and the narrowest interval [2] that chance explains.

    Of ``resamples`` means, the share below the 2.5 % point is itself random, with a standard error of
    sqrt(0.025 * 0.975 / resamples). Five of them, and the reference's own, are allowed, as quantiles.
    """
    share = 5 * np.sqrt(0.025 * 0.975 * (1 / resamples + 1 / REFERENCE))
    return ends(a, b, 0.95 + 2 * share, groups), ends(a, b, 0.95 - 2 * share, groups)


# ------------------------------------------------------------------------------------------------ mistakes


def image_mistakes(got: np.ndarray, a: np.ndarray, b: np.ndarray, resamples: int) -> Iterator[Mistake]:
    """Intervals [2] of mistakes with images that are drawn one by one; ``got`` is for the wording alone."""
    d, n = a - b, len(a)
    mean, error, z = float(d.mean()), float(d.std() / np.sqrt(n)), stats.norm.ppf(0.975)
    right, apart = ends(a, b), float(np.sqrt((a.var() + b.var()) / n))
    unpaired = mean + z * apart * SIDES
    paired = "one draw of indices per resample, used for a and for b"
    yield (
        unpaired,
        f"{np.ptp(got):.3g} wide where {np.ptp(right):.3g} is right: that is the *unpaired* bootstrap, which draws "
        f"the images of a and of b apart. Both answered the same images: {paired}",
    )
    yield ends(a, b, 0.90), "that is the 90 % interval: 95 % leave 2.5 % out at each end, not 5 %"
    yield ends(a, b, 0.9995), "far too wide: np.percentile wants 2.5 and 97.5, np.quantile 0.025 and 0.975"
    one = "mean plus and minus one standard error covers 68 %, and is no bootstrap: take percentiles"
    yield mean + error * SIDES, one
    yield (
        mean + z * error * SIDES,
        "that is the mean plus and minus 1.96 standard errors, the same on both sides. The bootstrap's percentiles "
        "follow the skewness: take the 2.5 % and the 97.5 % point of the resampled means",
    )
    single = "that is the spread of single images: take the percentiles of the resampled *means*"
    yield mean + z * d.std() * SIDES, single
    images = "these are percentiles of the images' differences: take those of resampled means"
    yield np.quantile(d, [0.025, 0.975]), images
    of_a = a.mean() + z * a.std() / np.sqrt(n) * SIDES
    yield of_a, f"that is the interval of a alone: resample a - b, {paired}"
    of_b = b.mean() + z * b.std() / np.sqrt(n) * SIDES
    yield of_b, f"that is the interval of b alone: resample a - b, {paired}"
    yield -right[::-1], "that is the interval of b - a: the question asks for a - b"
    yield (
        ends(np.abs(d), np.zeros(n)),
        "that is the interval of |a - b|, which says whether the models differ and not which is better: keep the "
        "sign (of right and wrong, as floats, 1 - 0 = 1 and 0 - 1 = -1; `^` loses it)",
    )
    yield 100 * right, "a hundred times too large: return a - b itself; percentage points are for the plot"
    yield right - mean, "the interval lies around 0: the mean of a - b is not taken off"
    yield (
        mean + z * error * np.sqrt(n / resamples) * SIDES,
        "each resample draws `resamples` images: it should draw n, as many as there are; `resamples` says how often",
    )


def group_mistakes(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> Iterator[Mistake]:
    """Intervals [2] of mistakes with groups. (The cases without groups come first, and look for the others.)"""
    d, n = a - b, len(a)
    sums, sizes = by_group(d, groups)
    m, mean, z = len(sums), d.mean(), stats.norm.ppf(0.975)
    yield (
        ends(a, b),
        "that is the interval for images drawn one by one: `groups` is not used. Images of a group stay together; "
        "draw groups, and each brings all its images",
    )
    alone = mean_interval(sums / sizes)
    yield (
        np.array([alone.low, alone.high]),
        "a small group counts as much as a large one: take the mean over all the *images* that were drawn, not the "
        "mean of the groups' means",
    )
    fixed = mean_interval(sums * m / n)
    yield (
        np.array([fixed.low, fixed.high]),
        f"the sum over the drawn images is divided by n = {n} each time: divide by how many images were drawn, "
        "which changes from resample to resample",
    )
    # Each group is there with the chance to be drawn at all, and then once.
    there = np.random.default_rng(1).random((20_000, m)) < 1 - (1 - 1 / m) ** m
    some = there[there.any(axis=1)]
    yield (
        np.quantile((some @ sums) / (some @ sizes), [0.025, 0.975]),
        "a group that is drawn twice counts once (a set, or `in`, forgets how often): it brings its images twice",
    )
    spread = [d[groups == g].std() for g in np.unique(groups)]
    within = float(np.sqrt((sizes * np.square(spread)).sum())) / n
    yield (
        mean + z * within * SIDES,
        "images are drawn within each group, so every group is always there: the groups themselves are drawn",
    )
    error = float(np.sqrt(np.square(sums - mean * sizes).sum())) / n  # of a ratio, to first order
    yield (
        mean + z * error * np.sqrt(m / n) * SIDES,
        f"each resample draws n = {n} groups: draw as many groups as there are, m = {m}",
    )


def why_not(got: np.ndarray, a: np.ndarray, b: np.ndarray, resamples: int, groups: np.ndarray | None) -> str:
    """The mistake whose interval lies nearest to ``got``, if it is near enough to be named."""
    if np.isnan(got).any():
        return "the interval is NaN" + ("" if groups is None else ": the labels of the groups may be any whole numbers")
    if got[0] > got[1]:
        return "the first number should be the lower end, the second the upper one"
    if np.ptp(got) < 1e-12:
        return "the interval has width 0: draw the images *with* replacement; in a permutation the mean never changes"
    known = list(image_mistakes(got, a, b, resamples) if groups is None else group_mistakes(a, b, groups))
    far = [np.abs(got - candidate).max() / np.ptp(candidate) for candidate, _ in known]
    nearest = int(np.argmin(far))
    if far[nearest] < 0.06:
        return known[nearest][1]
    right = ends(a, b, 0.95, groups)
    if float((a - b).mean()) - 8 * np.ptp(right) < got[0] <= got[1] < right[0]:
        return (
            f"[{got[0]:.4g}, {got[1]:.4g}] lies below the lower end of the right interval, {right[0]:.4g}, as a whole: "
            "np.percentile counts in per cent, 2.5 and 97.5; 0.025 and 0.975 are for np.quantile"
        )
    return (
        f"the interval is [{got[0]:.4g}, {got[1]:.4g}] and should be [{right[0]:.4g}, {right[1]:.4g}], give or take "
        f"what {resamples} resamples leave to chance"
    )


# ------------------------------------------------------------------------------------------------ judge


def judge(case: Case, seen: Seen) -> None:
    """The interval lies where chance explains it, follows from the seed, and is a bootstrap's."""
    given, groups = inputs(case), draw_groups(case)
    untouched(seen, a=given[0], b=given[1])
    if groups is not None:
        unchanged(groups, seen["groups"], "groups")
    a, b = (x.astype(float) for x in given)
    low, high = numbers(seen["interval"], "the interval", "low and high")
    outer, inner = accepted(a, b, case["resamples"], groups)
    slack = 1e-9
    if not (outer[0] - slack <= low <= inner[0] + slack and inner[1] - slack <= high <= outer[1] + slack):
        raise Wrong(why_not(np.array([low, high]), a, b, case["resamples"], groups))
    judge_seed(case, seen)
    judge_one(case, seen, a - b)


def judge_seed(case: Case, seen: Seen) -> None:
    """The interval follows from the seed, and from nothing else."""
    short, again = (numbers(seen[key], "the interval", "low and high") for key in ("short", "again"))
    if not np.array_equal(short, again):
        raise Wrong("two calls with the same seed give two intervals: draw from np.random.default_rng(seed)")
    if not case.get("right") and np.array_equal(short, numbers(seen["other_seed"], "the interval", "low and high")):
        raise Wrong("another seed gives the same interval to the last digit: are `seed`, and chance, used at all?")


def judge_one(case: Case, seen: Seen, d: np.ndarray) -> None:
    """A single resample has a single mean, which is not that of the images ``d`` themselves."""
    low, high = numbers(seen["one"], "the interval of one resample", "low and high")
    if not close(low, high, 1e-9, 1e-12):
        raise Wrong(
            "one resample has one mean, so resamples=1 should give low = high: is it a bootstrap, and `resamples` used?"
        )
    if close(low, d.mean(), 0, 1e-12) and np.ptp(d) > 0 and len(d) > 30 and not case.get("right"):
        raise Wrong(
            "the interval is built around the mean, with resamples=1 it is the mean itself: 1.96 standard errors to "
            "both sides are no percentiles. Take the 2.5 % and the 97.5 % point of the resampled means"
        )


QUESTION = Question(
    name="d2",
    answers=("paired_interval",),
    cases=(
        {"what": "scores of 200 images", "data": 3, "n": 200, "shift": 0.3, "resamples": 10000, "seed": 0},
        {
            "what": "right answers (bool) on 500 images",
            "data": 4,
            "n": 500,
            "right": True,
            "ease": 3.0,
            "shift": -0.8,
            "resamples": 2000,
            "seed": 5,
        },
        {
            "what": "20 images, one much unlike the others",
            "data": 6,
            "n": 20,
            "skew": True,
            "resamples": 10000,
            "seed": 1,
        },
        {"what": "150 images in 24 groups", "data": 7, "n": 150, "groups": 24, "resamples": 4000, "seed": 2},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Which images does a resample hold? Draw indices, n of n with replacement, and look both models' answers up. "
        "In groups, what is drawn is a group.",
        "Take the difference of each image first, d = a - b as floats (bool cannot be subtracted). Then a resample is "
        "d[indices].mean(), and pairing comes by itself.",
        "np.random.default_rng(seed).integers(0, n, (resamples, n)) are all the indices; d[indices].mean(axis=1) is "
        "one mean for each resample; np.quantile(means, [0.025, 0.975]) is the answer. With groups: the sum and the "
        "size of each group first, then draw m of m groups, and divide the sum of the drawn sums by that of the sizes.",
    ),
    section="chapter 4, section 4.1 (the groups are this question's own)",
)
