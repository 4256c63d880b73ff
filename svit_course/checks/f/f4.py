"""f4: choose on validation, report on test, whichever way it falls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from svit_course.checks.f.shared import draw_tables, judge_columns, picked_columns, total
from svit_course.judging import array, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong

Tables = tuple[np.ndarray, np.ndarray]  # errors and sparsities, [layers, taus] each
KEYS = ("taus", "validation_error", "test_error", "test_sparsity", "kept")


def inputs(case: Case) -> dict[str, Tables]:
    """Validation and test tables that disagree, and another test set that is kinder."""
    validation, test = draw_tables(case), draw_tables(case, "test_seed")
    return {"validation": validation, "test": test, "kinder": (0.4 * validation[0], test[1][::-1].copy())}


def probe(case: Case, choose_and_report: Any) -> Seen:
    """Two reports that differ in the test tables alone, and all tables as they are afterwards."""
    seen: Seen = {}
    for test in ("test", "kinder"):
        splits = {name: {"error": e, "sparsity": s} for name, (e, s) in inputs(case).items()}
        seen[test] = choose_and_report(splits["validation"], splits[test], list(case["taus"]), case["budget"])
        seen[f"{test}-tables"] = [splits[name][kind] for name in ("validation", test) for kind in ("error", "sparsity")]
    return seen


def judge(case: Case, seen: Seen) -> None:
    """The tables are left alone, the test tables choose nothing, the choice is good, its numbers are right."""
    splits = inputs(case)
    error, sparsity = splits["validation"]
    columns = {}
    for test in ("test", "kinder"):
        names = ("validation['error']", "validation['sparsity']", "test['error']", "test['sparsity']")
        for name, before, after in zip(names, (*splits["validation"], *splits[test]), seen[f"{test}-tables"]):
            unchanged(before, after, name)
        report = seen[test]
        if not isinstance(report, dict) or not set(KEYS) <= set(report):
            came = f"a dict with {', '.join(report)}" if isinstance(report, dict) else type(report).__name__
            raise Wrong(f"the report should be a dict with {', '.join(KEYS)}, and is {came}")
        columns[test] = picked_columns(case, report["taus"], len(error))
    if (columns["test"] != columns["kinder"]).any():
        raise Wrong(
            "the taus change when nothing but the test tables changes: the test set is used for choosing tau. Choose "
            "on validation, and read the test tables once the taus stand"
        )
    for test in ("test", "kinder"):
        judge_columns(case, columns[test], error, sparsity)
        judge_numbers(case, seen[test], columns[test], splits["validation"], splits[test])


def judge_numbers(case: Case, report: Mapping[str, Any], columns: np.ndarray, validation: Tables, test: Tables) -> None:
    """What is reported of the columns that were chosen."""
    layers, reported = len(columns), dict(report)
    spent, on_test, cut = total(validation[0], columns), total(test[0], columns), total(test[1], columns) / layers
    mean = "this is the mean over the layers: the budget is for the sum, so report the sum"
    from_validation = "this is the number of the validation tables: the report is about the test tables"
    share = "this is the sum over the layers: report the mean, a share between 0 and 1"
    for name, right, mistakes in (
        ("validation_error", spent, [(on_test, "validation_error comes from the test tables"), (spent / layers, mean)]),
        ("test_error", on_test, [(spent, from_validation), (on_test / layers, mean)]),
        ("test_sparsity", cut, [(cut * layers, share), (total(validation[1], columns) / layers, from_validation)]),
    ):
        compare(array(reported, name, name), right, name, mistakes)
    kept = on_test <= case["budget"]
    if report["kept"] not in (True, False):
        raise Wrong(f"kept should be True or False, and is {report['kept']!r}")
    if bool(report["kept"]) != kept:
        held = "holds" if kept else "does not hold"
        raise Wrong(
            f"kept is {report['kept']}, and on test the budget {held} ({on_test:.4g}, allowed are {case['budget']:g}). "
            "Say so either way: compare test_error with the budget, not validation_error"
        )


QUESTION = Question(
    name="f4",
    answers=("choose_and_report",),
    cases=(
        {
            "what": "four layers, and a test set that disagrees",
            "seed": 60,
            "test_seed": 160,
            "layers": 4,
            "taus": [0.0, 0.0025, 0.005, 0.01, 0.02],
            "budget": 0.37,
            "best": 2.105859,
        },
        {
            "what": "three layers, a test set on which the budget holds",
            "seed": 63,
            "test_seed": 163,
            "layers": 3,
            "taus": [0.0, 0.0025, 0.005, 0.01, 0.02],
            "budget": 0.3,
            "best": 1.252035,
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Which of the four tables may the choice see? Which only after it?",
        "choose_thresholds gets the two validation tables. Its taus are then looked up in the tables of both sets.",
        "columns = [list(taus).index(t) for t in chosen]; test['error'][range(len(columns)), columns].sum() is "
        "test_error, and kept is test_error <= budget, whichever way it falls.",
    ),
    section="chapter 4, section 4.2, validation chooses, test reports",
)
