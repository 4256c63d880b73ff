"""Chapter 10 writes out the plan's rule and how a difference is read; they are the package's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from research.markdown import difference
from research.study import tables
from research.verdict.line import sentence
from svit_utils.files import read_rows
from svit_utils.paths import results_dir
from svit_utils.records import correct_by_run
from svit_utils.referee import compare, paired_bootstrap
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "10"
SIDES = ("higher", "lower", "open")


@pytest.mark.parametrize("better", [None, {"a": "lower"}, {"a": "lower", "b": "lower"}])
@pytest.mark.parametrize("compared_with", [1, 2])
def test_the_rule_in_every_case(compared_with: int, better: dict[str, str] | None) -> None:
    by_hand = extract_function(CHAPTER, "verdict_by_hand")
    answers = list(itertools.product(SIDES, repeat=compared_with))
    said = set()
    for a, b in itertools.product(answers, repeat=2):
        results = {"a": list(a), "b": list(b)}
        said.add(by_hand(results, better))
        assert by_hand(results, better) == tables.verdict(results, better), results
    assert said == {"holds", "does not hold", "open"}


def test_the_rule_on_known_cases() -> None:
    by_hand = extract_function(CHAPTER, "verdict_by_hand")
    assert by_hand({"energy": ["higher", "higher"], "iou": ["open", "higher"]}) == "holds"
    assert by_hand({"energy": ["higher", "open"]}) == "open"  # not better than the displayed map
    assert by_hand({"energy": ["higher", "lower"]}) == "does not hold"  # better than dense, worse than displayed
    assert by_hand({"energy": ["higher", "higher"], "iou": ["open", "lower"]}) == "open"  # the scores disagree
    assert by_hand({"infidelity": ["lower"]}, {"infidelity": "lower"}) == "holds"


def test_a_difference_is_written_as_in_the_summary() -> None:
    written = extract_function(CHAPTER, "written")
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.7
    interval = paired_bootstrap(b.astype(float), a.astype(float))
    assert written(interval) == difference(a, b) == sentence(interval, 100, 1)
    assert written(interval, 1, 3) == sentence(interval)


def test_the_gap_is_the_recorded_one() -> None:
    """Seeds and pictures are paired as in the second study's own tables."""
    scope = {"np": np, "compare": compare, "right": correct_by_run("second")}
    gap = extract_function(CHAPTER, "gap", scope)
    recorded = {
        (row["setting"], row["steps"]): row for row in read_rows(results_dir() / "second" / "tables" / "margins.csv")
    }
    found, row = gap("sparse", 450), recorded["sparse", "450"]
    assert [found.mean, found.wider.low, found.wider.high] == pytest.approx(
        [float(row[name]) for name in ("mean", "low", "high")], rel=1e-3
    )


def test_the_rule_says_something_of_a_map_that_is_only_drawn() -> None:
    """The control of 10.2: lower than dense in one score, and the same as itself, is enough for "does not hold"."""
    by_hand = extract_function(CHAPTER, "verdict_by_hand")
    with_itself = {"energy": ["higher", "open"], "iou": ["lower", "open"], "ap": ["open", "open"]}
    assert by_hand(with_itself) == tables.verdict(with_itself) == "does not hold"
    assert by_hand({"energy": ["higher", "open"], "ap": ["open", "open"]}) == "open"
