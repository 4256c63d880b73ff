"""d4: choose tau on validation, report it on test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from svit_course.checks.d.shared import numbers, same_lists
from svit_course.judging import Mistake, compare
from svit_course.question import Case, Question, Seen, Wrong

Table = dict[float, list[float]]


def inputs(case: Case) -> tuple[Table, Table]:
    """Accuracies by tau, one for each seed: on validation, and on test."""
    validation = {float(tau): list(accuracies) for tau, accuracies, _ in case["rows"]}
    test = {float(tau): list(accuracies) for tau, _, accuracies in case["rows"]}
    return validation, test


def probe(case: Case, choose_tau: Any) -> Seen:
    """The choice, and both tables as they are afterwards."""
    validation, test = inputs(case)
    result = choose_tau(validation, test)
    return {"choice": result, "validation": list(validation.values()), "test": list(test.values())}


class Tables:
    """Both tables as arrays [taus]: the means over seeds, the best seeds, and the row that should be chosen."""

    def __init__(self, validation: Table, test: Table) -> None:
        self.taus = np.array(list(validation))
        self.on_val, self.on_test = (np.array([np.mean(t[tau]) for tau in self.taus]) for t in (validation, test))
        self.best_val, self.best_test = (np.array([max(t[tau]) for tau in self.taus]) for t in (validation, test))
        tied = self.on_val == self.on_val.max()
        self.tied = np.flatnonzero(tied)
        self.chosen = int(np.flatnonzero(self.taus == self.taus[tied].min())[0])

    def row(self, place: int, reported: float | None = None) -> np.ndarray:
        """(tau, test accuracy) of a row, or what else is ``reported``."""
        return np.array([self.taus[place], self.on_test[place] if reported is None else reported])


def mistakes(validation: Table, test: Table) -> Iterator[Mistake]:
    """(tau, test accuracy) of what is known to go wrong."""
    t = Tables(validation, test)
    top, chosen = int(t.on_test.argmax()), t.chosen
    snoop = (
        f"tau = {t.taus[top]:g} is best on the *test* images, {100 * t.on_test[top]:.1f} %. They may not choose: "
        "choose on validation, then report what the chosen tau has on test"
    )
    yield t.row(top), snoop
    yield t.row(top, t.on_val[top]), snoop
    best = int(t.best_test.argmax())
    yield t.row(best, t.best_test.max()), snoop + ". And a single run is not the mean over seeds"
    yield (
        t.row(chosen, t.on_test.max()),
        "the tau is chosen on validation, but the best test accuracy of all is reported: report the test accuracy of "
        "the chosen tau, whatever it is",
    )
    too_good = "the validation accuracy is reported: it is too good, having chosen. Report test's"
    yield t.row(chosen, t.on_val[chosen]), too_good
    yield t.row(chosen, t.best_test[chosen]), "the best seed on test is reported: report the mean over the seeds"
    tau = float(t.taus[chosen])
    lucky = test[tau][int(np.argmax(validation[tau]))]
    one = "one seed's test accuracy is reported, of the one best on validation: report the mean over the seeds"
    yield t.row(chosen, lucky), one
    for place in t.tied:
        if place != chosen:
            yield t.row(int(place)), "two taus tie on validation: take the smaller, which cuts less"
    single = "chosen by the best single run: compare means over the seeds. A lucky seed is no merit"
    yield t.row(int(t.best_val.argmax())), single
    yield t.row(int(t.on_val.argmin())), "the worst on validation is chosen"
    yield t.row(chosen)[::-1], "the order is tau, then its test accuracy"
    index = np.array([chosen, t.on_test[chosen]])
    yield index, "that is the position of the tau in the table: return the tau itself"


def judge(case: Case, seen: Seen) -> None:
    """The tables are left alone; validation has chosen, and the mean over seeds on test is reported."""
    validation, test = inputs(case)
    for name, table in (("validation", validation), ("test", test)):
        if not same_lists(seen[name], list(table.values())):
            raise Wrong(f"it changed its input {name} in place: the caller still needs it")
    choice = seen["choice"]
    if isinstance(choice, list) and len(choice) == 2 and isinstance(choice[1], list | np.ndarray):
        raise Wrong("the second value is a list, one accuracy per seed: return its mean, one number")
    got, right = numbers(choice, "the result", "the chosen tau and what it reports"), Tables(validation, test)
    expected = right.row(right.chosen)
    compare(got, expected, "(tau, test accuracy)", mistakes(validation, test), rtol=1e-9, atol=1e-9)


QUESTION = Question(
    name="d4",
    answers=("choose_tau",),
    cases=(
        {
            "what": "validation and test disagree",
            "rows": [
                [0.0025, [0.950, 0.952, 0.951], [0.958, 0.957, 0.963]],
                [0.005, [0.960, 0.958, 0.959], [0.951, 0.955, 0.953]],
                [0.01, [0.895, 0.981, 0.890], [0.890, 0.921, 0.912]],
            ],
        },
        {"what": "a tie on validation", "rows": [[0.01, [0.75, 0.5], [0.5, 0.5]], [0.005, [0.5, 0.75], [0.5, 0.75]]]},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Two tables, two purposes. Which one may the function look at before it has chosen?",
        "The mean over the seeds for each tau in `validation`; the tau with the largest; the mean of test[that tau].",
        "max(sorted(validation), key=lambda tau: mean of validation[tau]): max keeps the first of equals, and sorted "
        "puts the smaller tau first. A dict may come in any order.",
    ),
    section="chapter 4, sections 4.2 (validation chooses, test reports) and 4.7",
)
