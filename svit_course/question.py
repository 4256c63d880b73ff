"""A question of the coursework, and how an answer to it is checked: run first, judged afterwards.

A question is asked in *cases*: plain data (seeds, shapes, numbers) from which inputs are made. Checking has two halves.

    probe(case, answer...) -> what was seen     calls the student's code, and decides nothing
    judge(case, seen)                           decides, and calls nothing of the student's

What is seen is arrays and plain values, so the halves can run in two processes: at grading the first runs in a sandbox
beside the student's code, the second outside it, where no code of the student's can change a verdict. In a notebook
both run in the kernel.
"""

from __future__ import annotations

import importlib
import re
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from svit_course import rule

Case = Mapping[str, Any]
Seen = dict[str, Any]
ASSIGNMENTS = ("a", "b", "c", "d", "e", "f")
# Judges seed torch's global generator to make their models. Graders judge in several threads, which share it.
_JUDGING = threading.Lock()


class Wrong(AssertionError):
    """The answer does not hold; the text names the likely mistake."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence, without the frames of the check."""
        return [f"Not yet. {self}"]


@dataclass(frozen=True)
class Question:
    """One coded question.

    Attributes:
        name: ``"a1"``: assignment and number.
        answers: the names that the answer defines, in the order in which ``probe`` takes them.
        cases: those of the visible check. Each is plain data; its ``"what"`` describes it in a message.
        probe: ``(case, *answers)`` -> what was seen: a dict of tensors, arrays, numbers, strings, or lists of them.
        judge: ``(case, seen)`` -> None, or raises `Wrong`. Arrays come as NumPy arrays.
        hints: a ladder: where to look, what to do, nearly how.
        section: where the book explains it, for example ``"chapter 1, section 1.2"``.
        prepare: case -> case with the inputs in it that only a reference can compute: the probe, which runs beside the
            student's code, is not to need one.
    """

    name: str
    answers: tuple[str, ...]
    cases: tuple[Case, ...]
    probe: Callable[..., Seen]
    judge: Callable[[Case, Seen], None]
    hints: tuple[str, ...]
    section: str
    prepare: Callable[[Case], Case] | None = None


def questions(assignment: str) -> tuple[Question, ...]:
    """The coded questions of an assignment, ``"a"`` to ``"f"``, in order.

    Raises:
        ValueError: there is no such assignment.
    """
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"there is no assignment {assignment!r}; there are {', '.join(ASSIGNMENTS)}")
    found: tuple[Question, ...] = importlib.import_module(f"svit_course.checks.{assignment}").QUESTIONS
    return found


def question(name: str) -> Question:
    """The question of that name.

    Raises:
        ValueError: there is none.
    """
    here = questions(name[:1]) if isinstance(name, str) and name[:1] in ASSIGNMENTS else ()
    for candidate in here:
        if candidate.name == name:
            return candidate
    known = ", ".join(q.name for q in here) or "a1, a2, …"
    raise ValueError(
        f"there is no question {name!r} with checks and hints; there are {known} (others are marked by hand)"
    )


def prepared(asked: Question, case: Case) -> Case:
    """The case as the probe takes it."""
    return case if asked.prepare is None else asked.prepare(case)


def ask(asked: Question, answers: Sequence[Any], case: Case) -> Seen:
    """The first half: run the answer on one case. What it raises comes out as `Wrong`, with a sentence.

    Raises:
        Wrong: the probe refuses the answer, or it raises; the message begins with question and case.
    """
    try:
        return {key: plain(value) for key, value in asked.probe(prepared(asked, case), *answers).items()}
    except Wrong as wrong:
        raise Wrong(f"{asked.name}, {case['what']}: {wrong}") from None
    except Exception as error:
        raise Wrong(f"{asked.name}, {case['what']}: {describe(error, asked.answers)}") from error


def decide(asked: Question, case: Case, seen: Seen) -> None:
    """The second half: judge what was seen. That may be anything, so a judge that fails on it means *wrong*, too.

    Of several threads one judges at a time.

    Raises:
        Wrong: the answer does not hold; the message begins with question and case.
    """
    try:
        with _JUDGING:
            asked.judge(case, seen)
    except Wrong as wrong:
        raise Wrong(f"{asked.name}, {case['what']}: {wrong}") from None
    except Exception as error:
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in seen.items())
        raise Wrong(
            f"{asked.name}, {case['what']}: the answer returned something of a kind that the question does not ask "
            f"for ({kinds or 'nothing'}; {type(error).__name__}: {error})"
        ) from error


def check(name: str, *answers: Any, cases: Sequence[Case] | None = None) -> None:
    """Check an answer here and now: ``check("a1", softmax)``. Prints a line if it holds.

    Args:
        name: of the question.
        answers: what it asks for, functions or values, in the order that the question names them.
        cases: other cases than the visible ones.

    Raises:
        Wrong: the answer does not hold, and the text names the case and the likely mistake; or it would be refused when
            it is graded, because it comes from a cell that takes from the library what the assignment forbids.
        ValueError: unknown question, or another number of answers.
    """
    asked = question(name)
    if len(answers) != len(asked.answers):
        raise ValueError(f"check({name!r}, ...) takes {', '.join(asked.answers)}, got {len(answers)} answers")
    if refused := rule.breach_in(name[0], asked.answers, rule.cells_run()):
        raise Wrong(f"{name}: {refused}")
    chosen = asked.cases if cases is None else tuple(cases)
    for case in chosen:
        decide(asked, case, ask(asked, answers, case))
    more = " When it is graded, hidden cases are added: other numbers, shapes and corners." if cases is None else ""
    print(f"{name}: {len(chosen)} of {len(chosen)} cases hold.{more}")


def hint(name: str, step: int = 1) -> None:
    """Print the hints of a question up to ``step``, from a nudge to nearly the answer.

    Raises:
        ValueError: unknown question, or no such step.
    """
    ladder = question(name).hints
    if not isinstance(step, int) or not 1 <= step <= len(ladder):
        raise ValueError(f"{name} has hints 1 to {len(ladder)}, got {step!r}")
    for number, text in enumerate(ladder[:step], 1):
        print(f"Hint {number} of {len(ladder)}: {text}")
    if step == len(ladder):
        print(f"Still stuck? Read {question(name).section}.")


# ------------------------------------------------------------------------------------------------ messages

_LOST_AXIS = re.compile(r"could not be broadcast together with shapes \(([\d, ]+)\) \(([\d, ]*)\)")
_MATRICES = re.compile(
    r"matmul: |core dimension|mat1 and mat2|to have the same .* in dimension|Expected size for first two"
)
_SHAPES = re.compile(
    r"shape|size|broadcast|dimension|mat1|index \d+ is out of bounds|einsum|reshape|axis", re.IGNORECASE
)


def describe(error: BaseException, answers: Sequence[str]) -> str:
    """A sentence for an exception in the student's code: what it says, and what usually causes it."""
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
    if isinstance(error, NotImplementedError):
        missing = _raised_in(error)
        if missing and missing not in answers:  # another answer, that this one calls
            return f"{missing}, which it needs, is not written yet"
        return f"{missing or ' or '.join(answers)} is not written yet"
    if "in-place operation" in said or "modified by an inplace" in said or "read-only" in said:
        return f"it changes a tensor in place that it must leave alone ({said}). Work on a new one"
    if "does not require grad" in said or "element 0 of tensors" in said:
        return f"no gradient comes through ({said}). Is there a detach(), a .data, a no_grad or NumPy on the way?"
    called = re.match(r"(?:\w+\.)*(\w+)\(\) (?:missing|takes|got)", str(error))
    if called and called.group(1) in (*answers, "__init__", "forward"):
        return f"it takes other arguments than the question gives ({said})"
    if "Can't call numpy() on Tensor that requires grad" in said:
        return f"the answer goes through NumPy, where there are no gradients ({said}). Stay in torch"
    if _SHAPES.search(said):
        lost = _LOST_AXIS.search(said)
        whole, part = ([int(n) for n in lost.group(k).split(",") if n.strip()] for k in (1, 2)) if lost else ([], [])
        if lost and part in (whole[:-1], [*whole[:-2], *whole[-1:]]):
            return f"it fails on inputs of this shape ({said}). A sum or a maximum has lost its axis: keepdims=True"
        if "at non-singleton dimension" in said:
            return (
                f"it fails on inputs of this shape ({said}). Does a sum or a maximum need keepdim=True, to line up "
                "with its rows? Or is a shape, or a number of tokens, written into the code?"
            )
        if _MATRICES.search(said):
            return (
                f"it fails on inputs of this shape ({said}). .T turns all axes around, swapaxes(-1, -2) the last two: "
                "is it that? Or is a shape, or a number of tokens, written into the code?"
            )
        return f"it fails on inputs of this shape ({said}). Is a shape, or a number of tokens, written into the code?"
    return f"it stops with {said}"


def _raised_in(error: BaseException) -> str:
    """The function or class of a cell in which the exception was raised; "" where it was raised elsewhere."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if "__file__" in frame.f_globals or str(frame.f_globals.get("__name__")).startswith("svit_"):
        return ""
    code = frame.f_code
    name = str(getattr(code, "co_qualname", code.co_name)).split(".")[0]  # Python 3.10 knows no qualified names
    if name != code.co_name or code.co_varnames[:1] not in (("self",), ("ctx",), ("cls",)):
        return name
    return type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else ""


def plain(value: Any) -> Any:
    """Tensors as NumPy arrays, arrays and plain values as they are; of everything else the name of its type."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy().copy()
    if isinstance(value, np.ndarray):
        return np.array(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"<{type(value).__name__}>"
