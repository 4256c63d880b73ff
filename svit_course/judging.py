"""What judges share: compare with the expected array, and if it differs look for the mistake that explains it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from svit_course.question import Seen, Wrong

# What a known mistake would give, and the sentence that names it.
Mistake = tuple[Any, str]


def array(seen: Seen, key: str, what: str) -> np.ndarray:
    """The array under ``key``; ``what`` is the name that the student knows it by.

    Raises:
        Wrong: there is no array; the message says what came instead.
    """
    value = seen.get(key)
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bool | int | float):
        return np.asarray(value)
    if value is None:
        raise Wrong(f"{what} is None: does the function end without `return`?")
    came = value if isinstance(value, str) else type(value).__name__
    raise Wrong(f"{what} should be an array or a tensor, and is {came}")


def close(got: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> bool:
    """Same shape, and equal to rounding; NaN is equal to nothing."""
    got, expected = np.asarray(got), np.asarray(expected)
    return got.shape == expected.shape and bool(np.allclose(got, expected, rtol=rtol, atol=atol))


def compare(
    got: np.ndarray,
    expected: Any,
    what: str,
    mistakes: Iterable[Mistake] = (),
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Do nothing where ``got`` is ``expected``.

    Args:
        what: the name of the result in the message.
        mistakes: those to look for, the likeliest first. A generator computes only as many as it takes.

    Raises:
        Wrong: with the sentence of the first mistake that explains ``got``; else shape, NaN, or the largest difference.
    """
    expected = np.asarray(expected)
    if close(got, expected, rtol, atol):
        return
    for candidate, sentence in mistakes:
        # A mistake that changes nothing in this case explains nothing.
        if close(got, candidate, rtol, atol) and not close(candidate, expected, rtol, atol):
            raise Wrong(sentence)
    if got.shape != expected.shape:
        raise Wrong(f"{what} has shape {got.shape}, expected {expected.shape}")
    if not np.isfinite(got.astype(float)).all() and np.isfinite(expected.astype(float)).all():
        raise Wrong(f"{what} contains NaN or infinity: is something divided by zero, or exponentiated before shifting?")
    far = np.abs(got.astype(float) - expected.astype(float))
    place = tuple(int(i) for i in np.unravel_index(np.nanargmax(far), far.shape)) if far.ndim else ()
    at = f" at {list(place)}" if place else ""
    raise Wrong(f"{what} is {float(got[place]):.6g}{at} and should be {float(expected[place]):.6g}")


def no_nan(got: np.ndarray, expected: Any, sentence: str) -> None:
    """
    Raises:
        Wrong: with the sentence, where ``got`` has the right shape and NaN in it.
    """
    if got.shape == np.shape(expected) and np.isnan(got).any():
        raise Wrong(sentence)


def unchanged(before: Any, after: Any, what: str) -> None:
    """
    Raises:
        Wrong: the function has written into its argument.
    """
    if not np.array_equal(np.asarray(before), np.asarray(after), equal_nan=True):
        raise Wrong(f"it changed its input {what} in place: the caller still needs it. Work on a new array")


def untouched(seen: Seen, **inputs: Any) -> None:
    """`unchanged` for several inputs: ``untouched(seen, q=q, k=k)`` compares ``seen["q"]`` with ``q``, and so on.

    Raises:
        Wrong: the function has written into one of them.
    """
    for name, before in inputs.items():
        unchanged(before, seen[name], name)


def not_renormalised(r: np.ndarray) -> str:
    """The sentence for weights ``r`` [..., M] that were cut and not divided by their rows' sums."""
    sums = r.sum(axis=-1)
    example = float(sums[sums > 0].min()) if (sums > 0).any() else 0.0
    return f"your rows sum to {example:.2f}: did you renormalise after the cut?"
