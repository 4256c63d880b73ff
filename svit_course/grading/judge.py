"""Where our own code looks at what strangers made: it reads their notebooks, and judges what their answers returned.

In a sandbox because a notebook can be made to cost gigabytes and an array to cost minutes; no code of theirs runs here.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from svit_course import Wrong, masters, notebooks, question, questions
from svit_course.grading import probes, reading
from svit_course.question import ASSIGNMENTS, decide, prepared
from svit_course.sandbox import wire

LEFT_OUT = "…"
STOPS, NOT_ASKED = "it stops with an error", "the answer returned something that the question does not ask for"
MOST, LONGEST = 200, 1000  # texts that an answer returns; characters of a message
_NUMBERS = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?|\b(?:nan|inf)\b", re.IGNORECASE)


# What is left of a comparison without its numbers, and what says more.
_SAYS_NOTHING = {
    rf"^(.+) is {LEFT_OUT}(?: at \[?{LEFT_OUT}.*?)? and should be {LEFT_OUT}$": (
        r"\1 is not what it should be on this input, and no usual mistake explains it: make such an input, and compare "
        "with the formula step by step"
    ),
    rf"^(.+) has shape .*, expected .*{LEFT_OUT}.*$": (
        r"\1 has another shape than the question asks for: is a number in the code that it could read from its input?"
    ),
}


def prepare(_setup: dict[str, Any]) -> Judge:
    """Load every assignment's checks."""
    for assignment in ASSIGNMENTS:
        questions(assignment)
    return Judge()


class Judge:
    """Has no state: whatever a message leads to, the next one is answered the same."""

    def answer(self, asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """One message: ``read`` a notebook, ``prepare`` a case, or decide on what was seen of a ``case``.

        ``quiet`` may be left out: nothing is quoted then.
        """
        if "read" in asked:
            return self._read(asked["read"], data)
        if "raised" in asked:
            return {"wrong": unquoted(asked["raised"], asked["question"])}, b""
        about, case = question(asked["question"]), self._case(asked)
        if "prepare" in asked:
            # What a judge alone needs to know stays here.
            sent = {key: None if key == "best" else value for key, value in prepared(about, case).items()}
            return {}, wire.encode(sent).encode()
        try:
            seen = wire.decode(data)
            decide(about, case, seen if isinstance(seen, dict) else {})
        except Wrong as wrong:
            quiet = asked.get("quiet", True)
            return {"wrong": ours(str(wrong), seen, about.name) if quiet else str(wrong)[:4000]}, b""
        except ValueError:
            return {"wrong": f"{about.name}, {case['what']}: what it returns cannot be read"}, b""
        return {}, b""

    @staticmethod
    def _case(asked: Mapping[str, Any]) -> Mapping[str, Any]:
        if not asked["hidden"]:
            return question(asked["question"]).cases[asked["number"]]
        cells = _master(asked["question"][0])
        return hidden(cells, asked["question"])[asked["number"]]

    @staticmethod
    def _read(assignment: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        original = notebooks.read(masters.master(assignment))
        try:
            cells, notes = reading.read(data, original)
        except ValueError as error:
            return {"wrong": str(error)[:300]}, b""
        return {}, wire.encode({"cells": [vars(cell) for cell in cells], "notes": notes}).encode()


@cache
def _master(assignment: str) -> tuple[masters.Cell, ...]:
    return tuple(masters.read_cells(masters.master(assignment)))


def hidden(cells: Sequence[masters.Cell], name: str) -> list[dict[str, Any]]:
    """The hidden cases of a question."""
    return next((masters.hidden_cases(cell) for cell in cells if cell.id == f"{name}-hidden"), [])


# ------------------------------------------------------------------------------------------------ messages


def ours(text: str, seen: Any, name: str) -> str:
    """A judge's sentence without anything that the submission has chosen, which knew the hidden case by then.

    A sentence that stands in the checks as it is stays. Of others numbers are left out, every text that was returned,
    and what a judge that failed says about itself.
    """
    begin, colon, rest = text.partition(": ")
    if rest in _written(name[0]):
        return text
    rest = re.sub(r"(?<=does not ask for) \(.*", "", rest[:LONGEST], flags=re.DOTALL)
    texts = set(itertools.islice(_texts(seen), MOST + 1))
    if len(texts) > MOST:  # no answer has so many; to look for each takes long
        return f"{begin}: {NOT_ASKED}"
    for said in sorted(texts, key=len, reverse=True):
        for form in (said, repr(said)[1:-1]):
            rest = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", LEFT_OUT, rest) if form.strip() else rest
    stripped = _NUMBERS.sub(LEFT_OUT, rest)
    if not re.search(r"[^\W\d_]", stripped):  # a probe's sentence, which came back with what was seen
        stripped = unquoted(text.partition(": ")[2], name)
    for pattern, instead in _SAYS_NOTHING.items():
        stripped = re.sub(pattern, instead, stripped)
    rest = stripped
    return begin + colon + re.sub(rf"{LEFT_OUT}(?:\W{{0,4}}{LEFT_OUT})+", LEFT_OUT, rest)


@cache
def _written(assignment: str) -> set[str]:
    """The texts in the source of an assignment's checks."""
    here, found = notebooks.ROOT / "svit_course", set[str]()
    for path in [here / "judging.py", *(here / "checks" / assignment).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def unquoted(text: str, name: str) -> str:
    """What a probe said on a hidden case, if it is one of the probes' own sentences, without what they quote."""
    if len(text) > LONGEST:
        return STOPS
    for sentence in _sentences(name[0]):
        answers = question(name).answers
        if found := re.fullmatch("(.*?)".join(map(re.escape, sentence)), text, flags=re.DOTALL):
            filled = [said if said in (*answers, " or ".join(answers)) else LEFT_OUT for said in found.groups()]
            return "".join(piece + said for piece, said in zip(sentence, [*filled, ""], strict=True))
    return STOPS


@cache
def _sentences(assignment: str) -> list[list[str]]:
    """The sentences in the source of the probes, each as the pieces between what is filled in; the longest first."""
    found = []
    for source in probes.sources(assignment).values():
        for node in ast.walk(ast.parse(source)):
            parts: Iterable[Any] = node.values if isinstance(node, ast.JoinedStr) else [node]
            pieces = [""]
            for part in parts:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    pieces[-1] += part.value
                else:
                    pieces.append("")
            if sum(map(len, pieces)) > 12:
                found.append(pieces)
    return sorted(found, key=lambda pieces: -sum(map(len, pieces)))
