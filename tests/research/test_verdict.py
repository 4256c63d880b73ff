"""The ledger: how numbers become words, and that no verdict is stronger than the records it is written from."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from research.markdown import difference
from research.study import tables
from research.verdict import accuracy, second, shares
from research.verdict.line import (
    BOTH,
    OWN,
    PLAN,
    WORDS,
    Line,
    both_intervals,
    by_rule,
    given,
    level,
    quality,
    sentence,
)
from research.verdict.maps import GOOD_SIDE, picked
from research.verdict.page import PAGE, gap, tally, write_verdict
from research.verdict.sources import Sources
from research.verdict.summary import short_table, two_sentences
from svit_utils.files import read_rows, write_rows
from svit_utils.paths import results_dir
from svit_utils.referee import Interval, paired_bootstrap, student_interval

RESULTS = results_dir()
LEDGER = read_rows(RESULTS / "verdict" / "ledger.csv")
SIDES = ("higher", "lower", "open")


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(RESULTS)


def test_ledger_and_page_are_written_from_the_records(sources: Sources, tmp_path: Path) -> None:
    for path in write_verdict(sources, tmp_path):
        assert path.read_bytes() == (RESULTS / "verdict" / path.name).read_bytes(), "run `make results`"


def test_every_claim_of_the_page_has_its_lines_and_every_line_its_claim() -> None:
    claims = {row["claim"] for row in LEDGER}
    named = {name for claim in PAGE for name in claim.names}
    assert named <= claims
    # What the card does not say: noise as a yardstick, and the other ways to be sparse.
    assert claims - named == {shares.NOISE, "it is the threshold, not any sparsity"}
    page = read_rows(RESULTS / "verdict" / "page.csv")
    assert len(page) == len(PAGE) == 13
    assert all(row["verdicts"] and row["what was found"] and row["why"] for row in page)


def test_no_line_is_there_twice_and_each_has_its_budget() -> None:
    assert len({(row["claim"], row["where"]) for row in LEDGER}) == len(LEDGER) > 70
    untrained = ("ViT-Base", "CIFAR-10, ViT-Base", "a live small ViT", "CIFAR-10, DeiT-Tiny")
    budgets = ("DeiT-Tiny, and the small ViT from scratch",)  # named in what was measured
    for row in LEDGER:
        text = row["measured"] if row["where"] in budgets else row["where"]
        assert row["where"] in untrained or (" steps, rate " in text or " minus 150 steps, rate " in text), row
        assert row["rule"] in (PLAN, BOTH, OWN)


def test_no_verdict_is_stronger_than_its_data() -> None:
    for row in LEDGER:
        alone = "one pair" in row["measured"] or "one seed" in row["measured"]
        if alone:
            assert row["verdict"].startswith(("open", "holds in this pair", "described")), row
        if row["verdict"].startswith("not testable here") and "ViT-Base" in row["where"]:
            assert "not run" in row["measured"], row
        if row["claim"] == accuracy.MORE_ACCURATE and row["verdict"].startswith("holds"):
            pytest.fail(f"no comparison of accuracy is better: {row}")
    decided = [row for row in LEDGER if row["verdict"].split(" (")[0] in ("holds", "does not hold")]
    assert 15 < len(decided) < len(LEDGER) / 2


def test_a_line_says_one_of_five_words_and_whose_rule_it_is() -> None:
    assert Line("a", "b", "c", "open (one pair)", OWN).verdict.startswith(WORDS)
    with pytest.raises(ValueError, match="a verdict begins with"):
        Line("a", "b", "c", "perhaps", OWN)
    with pytest.raises(ValueError, match="a rule is"):
        Line("a", "b", "c", "holds", "mine")


def test_what_runs_were_given() -> None:
    rows = [{"steps": "450", "lr": rate} for rate in ("0.0003", "5e-05", "0.0003")]
    assert given(rows[:1]) == "450 steps, rate 0.0003"
    assert given(row for row in rows) == "450 steps, rate 5e-05 or 0.0003"
    assert given([]) == "not run"


def test_a_difference_is_written_as_in_the_tables() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.7
    interval = paired_bootstrap(b.astype(float), a.astype(float))
    assert sentence(interval, factor=100, digits=1) == difference(a, b)
    assert sentence({"mean": "0.25", "low": math.nan, "high": math.nan}, digits=2) == "+0.25 (one seed)"
    row = {"mean": -0.06, "crossed_low": -0.08, "crossed_high": -0.04, "student_low": -0.181, "student_high": 0.06}
    assert both_intervals(row, 100, 1) == "-6.0, crossed [-8.0, -4.0], Student's t [-18.1, +6.0]"
    assert level([0.881, 0.904]) == "88.1 and 90.4 %"
    found = student_interval([0.88, 0.89, 0.90])
    assert level([0.88, 0.89, 0.90]) == f"89.0 [{100 * found.low:.1f}, {100 * found.high:.1f}] %"


def test_quality_reads_the_good_side() -> None:
    for better in ("higher", "lower"):
        said = [quality({"result": side, "better": better}) for side in SIDES]
        assert said == (["better", "worse", "open"] if better == "higher" else ["worse", "better", "open"])


def table() -> pd.DataFrame:
    """Comparisons of two maps of two kinds of model with every kind of answer."""
    rows = []
    for family, metrics in (("localisation", tables.LOCALISATION_SCORES), ("faithfulness", tables.FAITHFULNESS_SCORES)):
        for index, (kind, name) in enumerate(itertools.product(("sparse", "warmup"), ("attention", "rollout"))):
            for count, metric in enumerate(metrics):
                for other in ("dense", "dense displayed"):
                    better = "lower" if metric in tables.LOWER_IS_BETTER else "higher"
                    result = "open" if other == "dense" and count else SIDES[(index + count) % 3]
                    rows.append((family, kind, other, name, metric, better, result))
    return pd.DataFrame(rows, columns=["family", "first", "second", "map", "metric", "better", "result"])


def test_verdicts_from_comparisons() -> None:
    """Picked and put to the rule, comparisons give what the study's own table of verdicts has."""
    found = Sources(Path("nowhere"))
    found.judged = table()  # in place of the file's
    written = tables.verdict_table(found.judged)
    assert len(written) == 8 and written["verdict"].nunique() > 1
    for row in written.itertuples():
        rows = picked(found, row.family, row.arm, row.map)
        assert len(rows) == row.comparisons and by_rule(rows) == row.verdict
    assert len(picked(found, "localisation", "sparse")) == 16


def test_without_an_object_a_right_answer_is_a_bad_sign() -> None:
    rows = pd.DataFrame({"map": ["swapped", "erased"], "result": ["open", "higher"]})
    assert by_rule(rows.assign(better=rows["map"].map(GOOD_SIDE)), "map") == "does not hold"


@pytest.mark.parametrize(
    ("cut", "applied", "said"),
    [
        ([0.88, 0.90], [0.85, 0.89], "does not hold as a number"),
        ([0.88], [0.72], "holds, roughly (by the applied share alone)"),
        ([0.72], [0.55], "holds, roughly (by the cut share alone)"),
        ([0.65], [0.65], "holds, roughly"),
    ],
)
def test_about_seventy(cut: list[float], applied: list[float], said: str) -> None:
    assert shares.about_seventy(cut, applied) == said


def test_a_sweep_loses_where_the_whole_interval_lies_below_zero() -> None:
    def swept(low: float, high: float, cut: float) -> accuracy.Swept:
        interval = Interval((low + high) / 2, low, high, 100)
        return accuracy.Swept({"cut_sparsity": str(cut)}, interval, None)

    sweep = accuracy.Sweep("here", "x", {0.005: swept(-0.02, 0.01, 0.66), 0.01: swept(-0.04, -0.01, 0.88)})
    assert sweep.losing() == [0.01] and sweep.losing(own=True) == []
    assert accuracy.nearest_to_seventy(sweep) == 0.005


def test_the_tally_counts_verdicts_and_leaves_the_second_study_out() -> None:
    found = [
        Line("a", "here", "", "holds", OWN),
        Line("a", "there", "", "open (one pair)", OWN),
        Line("b", "here", "", "open", OWN),
        Line("a", "there (second study)", "", "does not hold", OWN),
        Line("c", "here", "", "does not hold", OWN),
    ]
    assert tally(found, ("a", "b")) == "holds 1, open 2"


def second_folder(folder: Path, **changes: str) -> Sources:
    """A second study with one setting after 450 steps, whose family is complete unless ``changes`` say otherwise."""
    row = {"setting": "warmup", "steps": "450", "seeds": "5", "mean": "-0.02", "low": "-0.03", "high": "-0.012"}
    contrast = {"family": "A gap", **row, "other": "dense", "measure": "accuracy", "result": "lower"} | changes
    closing = {**contrast, "family": "A closing", "steps": "450 minus 150", "mean": "0.03", "low": "0.01"}
    closing |= {"high": "0.05", "result": "higher"}
    write_rows(folder / "second" / "tables" / "contrasts.csv", contrast, [contrast, closing])
    margin = {**row, "result": "inferior"} | {key: changes[key] for key in changes if key == "seeds"}
    write_rows(folder / "second" / "tables" / "margins.csv", margin, [margin])
    zeros = {"setting": "warmup", "steps": "450", "metric": "val_applied_sparsity", "mean": "0.84"}
    write_rows(folder / "second" / "tables" / "settings.csv", zeros, [zeros])
    return Sources(folder)


def test_a_family_that_is_not_complete_is_open(tmp_path: Path) -> None:
    (line,) = second.more_accurate(second_folder(tmp_path / "a"))
    assert (line.verdict, line.measured) == ("does not hold", "-2.0 [-3.0, -1.2] points, 5 seeds")
    (line,) = second.more_accurate(second_folder(tmp_path / "b", result="incomplete", seeds="4"))
    assert line.verdict.startswith("open")


def test_no_compromise_is_the_margin_of_the_plan(tmp_path: Path) -> None:
    (line,) = second.no_compromise(second_folder(tmp_path / "a"))
    assert line.verdict == "does not hold (more than 1 point below dense)" and line.measured.endswith("84 % zeros")
    (line,) = second.no_compromise(second_folder(tmp_path / "b", seeds="3"))
    assert line.verdict == "open (3 of 5 seeds)"


def test_a_deficit_that_shrinks_is_no_lead(tmp_path: Path) -> None:
    (line,) = second.gap_grows(second_folder(tmp_path / "a"))
    assert line.verdict == "described: no lead, but a deficit that shrinks"
    assert line.measured.startswith("+3.0 [+1.0, +5.0] points")


def test_parts_that_are_not_run_are_open(tmp_path: Path) -> None:
    found = second_folder(tmp_path)
    (line,) = second.ideal(found)
    assert line.verdict.startswith("open (part B") and "0.005" in line.verdict
    assert list(second.one_tau(found)) == [] and list(second.on_the_object(found)) == []
    with pytest.raises(ValueError, match="no row of 'sparse' at 450 steps with five seeds"):
        gap(found, "sparse", 450)


def test_the_summary_has_the_ledgers_numbers(sources: Sources) -> None:
    text, short = two_sentences(sources), short_table(sources)
    (line,) = (
        line for line in second.no_compromise(sources) if "450 steps" in line.where and "first step" in line.where
    )
    shown = line.measured.split(" points")[0]
    assert shown in text and shown in short
    assert text.count("\n\n") == 1 and len(short.splitlines()) <= 10
