"""Stands in a submission's sandbox where `svit_course` would be: given cells import `check` and `hint` from it.

The checks themselves are not there; the tests are asked from outside.
"""


class Wrong(AssertionError):
    """As in the notebook; nothing raises it here."""


def check(*_answers: object, **_cases: object) -> None:
    """Does nothing."""


def hint(*_question: object) -> None:
    """Does nothing."""
