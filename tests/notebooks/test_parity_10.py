"""Chapter 10 writes out the plan's rule and how a difference is read; they are the package's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from research.markdown import difference
from research.study import tables
from svit_utils.referee import paired_bootstrap
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "10"
SIDES = ("higher", "lower", "open")
SCOPE = {"math": math, "np": np, "pd": pd, "paired_bootstrap": paired_bootstrap, "SIDES": SIDES}


@pytest.mark.parametrize("better", [None, {"a": "lower"}, {"a": "lower", "b": "lower"}])
@pytest.mark.parametrize("compared_with", [1, 2])
def test_the_rule_in_every_case(compared_with: int, better: dict[str, str] | None) -> None:
    by_hand = extract_function(CHAPTER, "verdict_by_hand", SCOPE)
    answers = list(itertools.product(SIDES, repeat=compared_with))
    said = set()
    for a, b in itertools.product(answers, repeat=2):
        results = {"a": list(a), "b": list(b)}
        said.add(by_hand(results, better))
        assert by_hand(results, better) == tables.verdict(results, better), results
    assert said == {"holds", "does not hold", "open"}


def test_the_rule_on_known_cases() -> None:
    by_hand = extract_function(CHAPTER, "verdict_by_hand", SCOPE)
    assert by_hand({"energy": ["higher", "higher"], "iou": ["open", "higher"]}) == "holds"
    assert by_hand({"energy": ["higher", "open"]}) == "open"  # not better than the displayed map
    assert by_hand({"energy": ["higher", "lower"]}) == "does not hold"  # better than dense, worse than displayed
    assert by_hand({"energy": ["higher", "higher"], "iou": ["open", "lower"]}) == "open"  # the scores disagree
    assert by_hand({"infidelity": ["lower"]}, {"infidelity": "lower"}) == "holds"


def table() -> pd.DataFrame:
    """Comparisons of three maps with every kind of answer."""
    rows = []
    for family, metrics in (("localisation", tables.LOCALISATION_SCORES), ("faithfulness", tables.FAITHFULNESS_SCORES)):
        for index, (kind, name) in enumerate(itertools.product(("sparse", "warmup"), ("attention", "rollout"))):
            for count, metric in enumerate(metrics):
                for second in ("dense", "dense displayed"):
                    better = "lower" if metric in tables.LOWER_IS_BETTER else "higher"
                    result = "open" if second == "dense" and count else SIDES[(index + count) % 3]
                    rows.append((family, kind, second, name, metric, better, result))
    return pd.DataFrame(rows, columns=["family", "first", "second", "map", "metric", "better", "result"])


def test_verdicts_from_comparisons() -> None:
    """`pick`, `by_score` and the rule together give what `verdict_table` writes."""
    frame = table()
    scope = SCOPE | {"judged": frame}
    pick = extract_function(CHAPTER, "pick", scope)
    by_score = extract_function(CHAPTER, "by_score", scope)
    by_hand = extract_function(CHAPTER, "verdict_by_hand", scope)
    written = tables.verdict_table(frame)
    assert len(written) == 8 and written["verdict"].nunique() > 1
    for row in written.itertuples():
        rows = pick(row.family, row.arm, row.map)
        assert len(rows) == row.comparisons
        assert by_hand(*by_score(rows)) == row.verdict
    assert len(pick("localisation", "sparse")) == 16


def test_a_difference_is_written_as_in_the_summary() -> None:
    sentence = extract_function(CHAPTER, "sentence", SCOPE)
    as_row = extract_function(CHAPTER, "as_row", SCOPE)
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.7
    interval = paired_bootstrap(b.astype(float), a.astype(float))
    assert sentence(as_row(interval), factor=100, digits=1) == difference(a, b)
    assert sentence({"mean": 0.25, "low": math.nan, "high": math.nan}, digits=2) == "+0.25 (one seed)"


def test_what_runs_were_given() -> None:
    given = extract_function(CHAPTER, "given", SCOPE)
    rows = [{"steps": "450", "lr": rate} for rate in ("0.0003", "5e-05", "0.0003")]
    assert given(rows[:1]) == "450 steps, rate 0.0003"
    assert given(row for row in rows) == "450 steps, rate 5e-05 or 0.0003"
    assert given([]) == "not run"


def test_both_intervals_of_a_row() -> None:
    both = extract_function(CHAPTER, "both_intervals", SCOPE)
    row = {"mean": -0.06, "crossed_low": -0.08, "crossed_high": -0.04, "student_low": -0.181, "student_high": 0.06}
    assert both(row, 100, 1) == "-6.0, crossed [-8.0, -4.0], Student's t [-18.1, +6.0]"


def test_the_rule_says_something_of_a_map_that_is_only_drawn() -> None:
    """The control of 10.5: lower than dense in one score, and the same as itself, is enough for "does not hold"."""
    by_hand = extract_function(CHAPTER, "verdict_by_hand", SCOPE)
    with_itself = {"energy": ["higher", "open"], "iou": ["lower", "open"], "ap": ["open", "open"]}
    assert by_hand(with_itself) == tables.verdict(with_itself) == "does not hold"
    assert by_hand({"energy": ["higher", "open"], "ap": ["open", "open"]}) == "open"


def test_one_pair() -> None:
    one_pair = extract_function(CHAPTER, "one_pair", SCOPE)
    sparse, dense = np.array([True, False] * 50), np.array([True] * 100)
    interval = one_pair(sparse, dense)
    assert interval.mean == -0.5 and -0.62 < interval.low < interval.high < -0.38
    assert one_pair(None, dense) is None and one_pair(sparse, None) is None


def test_quality_reads_the_good_side() -> None:
    quality = extract_function(CHAPTER, "quality", SCOPE)
    for better in ("higher", "lower"):
        said = [quality({"result": side, "better": better}) for side in SIDES]
        assert said == (["better", "worse", "open"] if better == "higher" else ["worse", "better", "open"])


def test_turned_makes_more_better() -> None:
    scope = SCOPE | {"GOOD_SIDE": {"swapped": "higher", "erased": "lower"}}
    turned = extract_function(CHAPTER, "turned", scope)
    rows = pd.DataFrame(
        [
            ("localisation", "attention", "higher", 1.0, 0.5, 1.5),
            ("faithfulness", "attention", "lower", 1.0, 0.5, 1.5),
            (
                "background",
                "erased",
                "higher",
                1.0,
                0.5,
                1.5,
            ),  # the table says higher; without an object, less is better
            ("background", "swapped", "higher", 1.0, 0.5, 1.5),
        ],
        columns=["family", "map", "better", "mean", "low", "high"],
    )
    found = turned(rows)
    assert found["mean"].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert found["low"].tolist() == [0.5, -1.5, -1.5, 0.5]
    assert found["high"].tolist() == [1.5, -0.5, -0.5, 1.5]
    assert rows["mean"].tolist() == [1.0] * 4
