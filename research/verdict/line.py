"""A line of the ledger, and the words in which numbers stand in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svit_utils.records import verdict
from svit_utils.referee import Interval, student_interval

#: What a verdict may begin with.
WORDS = ("holds", "does not hold", "open", "not testable here", "described")
#: Whose rule led from the numbers to the verdict: the study's plan, its comparisons with the chapter's last step, or
#: the chapter alone.
PLAN, BOTH, OWN = "plan", "plan, chapter", "chapter"
HOW = {"sparse": "from the first step", "warmup": "warmed up"}
MAPS = {"attention": "attention", "rollout": "rollout", "grad_cam": "Grad-CAM"}
SCORES = {
    "pointing_game": "pointing",
    "energy_in_mask": "energy",
    "iou_at_mask_area": "IoU",
    "average_precision": "AP",
    "deletion": "deletion",
    "insertion": "insertion",
    "road": "ROAD",
    "infidelity": "infidelity",
    "max_sensitivity": "max-sensitivity",
    "background_swapped": "share on the ground",
    "accuracy": "accuracy",
    "on_distractors": "share on the distractors",
}
ENDS = ("mean", "low", "high")
#: The verdict on a single comparison.
SINGLE = {"better": "holds", "worse": "does not hold", "open": "open"}


@dataclass(frozen=True)
class Line:
    """One sentence of the card beside what was recorded.

    Attributes:
        claim: the sentence.
        where: data, model, steps, learning rate and how the threshold was introduced.
        measured: the numbers, with their intervals.
        verdict: begins with one of `WORDS`.
        rule: `PLAN`, `BOTH` or `OWN`.

    Raises:
        ValueError: a verdict or a rule of another kind.
    """

    claim: str
    where: str
    measured: str
    verdict: str
    rule: str

    def __post_init__(self) -> None:
        if not self.verdict.startswith(WORDS):
            raise ValueError(f"a verdict begins with {', '.join(WORDS)}, got {self.verdict!r}")
        if self.rule not in (PLAN, BOTH, OWN):
            raise ValueError(f"a rule is {PLAN!r}, {BOTH!r} or {OWN!r}, got {self.rule!r}")


def given(rows: Iterable[Mapping[str, str]]) -> str:
    """What runs were trained with: "150 steps, rate 0.0005"; several budgets or rates with "or"."""
    rows = list(rows)
    steps, rates = (" or ".join(sorted({row[key] for row in rows}, key=float)) for key in ("steps", "lr"))
    return f"{steps} steps, rate {rates}" if rows else "not run"


def sentence(row: Mapping[str, Any] | Interval, factor: float = 1, digits: int = 3) -> str:
    """``-0.071 [-0.081, -0.060]``: mean, low and high of a row or an interval, times ``factor``, signs shown."""
    found = (row.mean, row.low, row.high) if isinstance(row, Interval) else [row[name] for name in ENDS]
    mean, low, high = (factor * float(value) for value in found)
    if math.isnan(low):
        return f"{mean:+.{digits}f} (one seed)"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def both_intervals(row: Mapping[str, Any], factor: float = 1, digits: int = 3) -> str:
    """``-6.0, crossed [-8.0, -4.1], Student's t [-18.1, +6.0]`` of a row with a mean and both intervals."""
    mean, *ends = (
        f"{factor * float(row[name]):+.{digits}f}"
        for name in ("mean", "crossed_low", "crossed_high", "student_low", "student_high")
    )
    return f"{mean}, crossed [{ends[0]}, {ends[1]}], Student's t [{ends[2]}, {ends[3]}]"


def level(values: Sequence[float], factor: float = 100, unit: str = " %") -> str:
    """Shares of several runs: "89.0 [88.7, 89.4] %" by Student's t; the shares themselves for one run or two."""
    if len(values) < 3:
        return " and ".join(f"{factor * value:.1f}" for value in values) + unit
    found = student_interval(values)
    return f"{factor * found.mean:.1f} [{factor * found.low:.1f}, {factor * found.high:.1f}]{unit}"


def seeds(row: Mapping[str, Any]) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{row['seeds']} seed" + ("" if int(row["seeds"]) == 1 else "s")


def quality(row: Mapping[str, Any]) -> str:
    """What a comparison says of its first side: "better", "worse" or "open"."""
    if row["result"] == "open":
        return "open"
    return "better" if row["result"] == row["better"] else "worse"


def named(row: Mapping[str, Any]) -> str:
    """A comparison in words: the score, and what is subtracted."""
    return f"{SCORES[row['metric']]} minus {row['second']}"


def by_rule(rows: Any, key: str = "metric") -> str:
    """The plan's rule for comparisons (a table with the columns ``key``, result and better)."""
    parts = dict(list(rows.groupby(key, sort=False)))
    return verdict(
        {name: list(part["result"]) for name, part in parts.items()},
        {name: part["better"].iloc[0] for name, part in parts.items()},
    )
