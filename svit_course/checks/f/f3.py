"""f3: a tau for each layer: the sparsest choice whose errors fit the budget."""

from __future__ import annotations

from typing import Any

from svit_course.checks.f.shared import draw_tables, judge_columns, picked_columns
from svit_course.judging import unchanged
from svit_course.question import Case, Question, Seen, Wrong


def probe(case: Case, choose_thresholds: Any) -> Seen:
    """The chosen taus, or the ValueError's text; and the tables and taus as they are afterwards."""
    error, sparsity = draw_tables(case)
    taus, raised, chosen = list(case["taus"]), None, None
    try:
        chosen = choose_thresholds(error, sparsity, taus, case["budget"])
    except ValueError as problem:
        if "best" in case:
            raise
        raised = str(problem)
    return {"chosen": chosen, "raised": raised, "error": error, "sparsity": sparsity, "taus": taus}


def judge(case: Case, seen: Seen) -> None:
    """A case without a ``best`` choice has none that fits."""
    error, sparsity = draw_tables(case)
    unchanged(error, seen["error"], "error_table")
    unchanged(sparsity, seen["sparsity"], "sparsity_table")
    unchanged(case["taus"], seen["taus"], "taus")
    if "best" in case:
        judge_columns(case, picked_columns(case, seen["chosen"], len(error)), error, sparsity)
    elif seen["raised"] is None:
        least = error.min(axis=1).sum()
        raise Wrong(
            f"the budget is exceeded: no choice holds {case['budget']:g} here, the least is {least:.4g}. Raise a "
            "ValueError instead of returning something"
        )


QUESTION = Question(
    name="f3",
    answers=("choose_thresholds",),
    cases=(
        {
            "what": "two layers by hand",
            "taus": [0.001, 0.01, 0.1],
            "error": [[0.02, 0.10, 0.30], [0.10, 0.25, 0.60]],
            "sparsity": [[0.2, 0.6, 0.9], [0.3, 0.5, 0.8]],
            "budget": 0.42,
            "best": 1.2,
        },
        {
            "what": "four layers, drawn",
            "seed": 30,
            "layers": 4,
            "taus": [0.0, 0.0025, 0.005, 0.01, 0.02],
            "budget": 0.36,
            "best": 2.053538,
            "fullest": 0.356657,
        },
        {
            "what": "a budget that is met exactly",
            "taus": [0.0, 0.01, 0.1],
            "budget": 0.5,
            "error": [[0.0, 0.125, 0.25], [0.0, 0.125, 0.25]],
            "sparsity": [[0.0, 0.3, 0.8], [0.0, 0.25, 0.6]],
            "best": 1.4,
            "strict": 1.05,
        },
        {
            "what": "an error that falls again at the largest tau",
            "taus": [0.0, 0.01, 0.1],
            "budget": 0.375,
            "error": [[0.0, 0.5, 0.1], [0.0, 0.125, 0.25]],
            "sparsity": [[0.0, 0.3, 0.8], [0.0, 0.25, 0.6]],
            "best": 1.4,
            "falls": 0,
        },
        {
            "what": "a budget that no choice holds",
            "taus": [0.01, 0.1],
            "budget": 0.25,
            "error": [[0.125, 0.5], [0.1875, 0.25]],
            "sparsity": [[0.5, 0.9], [0.4, 0.8]],
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Layers share one budget: what one spends, another cannot. How many choices have 4 layers and 6 taus?",
        "6 ** 4 = 1296: try them all. itertools.product(range(len(taus)), repeat=number of layers) lists them.",
        "For each choice add up error_table[l, j] over the layers; skip it above the budget (equal is allowed); keep "
        "the one with the largest sum of sparsity_table[l, j]. Return taus[j], not j.",
    ),
    section="chapter 2, section 2.9, and chapter 4, section 4.7",
)
