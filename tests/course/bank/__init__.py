"""Planted answers: wrong ones with the test and the message that have to catch them, and correct but unusual ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Planted:
    """A wrong answer.

    Attributes:
        name: what is wrong, for the test's id.
        question: which it answers.
        by: ``visible`` or ``hidden``, the first test that has to fail.
        message: a regular expression that its message has to match.
        code: replaces the answer; it sees what the cells before it define.
    """

    name: str
    question: str
    by: str
    message: str
    code: str


@dataclass(frozen=True)
class Unusual:
    """A correct answer that looks different, and gets full marks."""

    name: str
    question: str
    code: str
