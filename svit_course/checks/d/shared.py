"""Reading a few numbers, or lists of arrays, that an answer returned."""

from __future__ import annotations

from typing import Any

import numpy as np

from svit_course.question import Wrong


def numbers(value: Any, what: str, names: str, count: int = 2) -> np.ndarray:
    """Plain numbers, as an array [count]; ``what`` they are and their ``names`` are for the message.

    Raises:
        Wrong: they are not numbers, or not so many.
    """
    if value is None:
        raise Wrong(f"{what} is None: does the function end without `return`?")
    try:
        found = np.asarray(value, dtype=float).reshape(-1) if not isinstance(value, str) else np.zeros(0)
    except (TypeError, ValueError):
        raise Wrong(f"{what} should be {count} numbers, {names}; not all that came are numbers") from None
    if len(found) != count:
        raise Wrong(f"{what} should be {count} numbers, {names}; it has {len(found)}")
    return found


def same_lists(a: list[Any], b: list[Any]) -> bool:
    """Equally many arrays, and equal ones."""
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
