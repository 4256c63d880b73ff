"""c3: a context manager that cuts a model for the length of a block."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from svit_course.checks.c.shared import cut_logits, judge_names, logits, pictures, step, vit
from svit_course.judging import array, close, compare
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils import sparsify


class Trouble(RuntimeError):
    """Something goes wrong in the block."""


class Stopped(KeyboardInterrupt):
    """Somebody presses Ctrl-C in the block."""


RAISED: dict[str, type[BaseException]] = {"an error": Trouble, "an interrupt": Stopped}
NO_MANAGER = re.compile(r"is not an iterator|context manager protocol|__enter__|generator didn't (?:yield|stop)")


def probe(case: Case, cut_for_a_while: Any) -> Seen:
    """See `run_blocks`; a function that is no context manager is refused with a sentence."""
    try:
        return run_blocks(case, cut_for_a_while)
    except (TypeError, AttributeError, RuntimeError) as error:
        if not NO_MANAGER.search(str(error)):
            raise
        raise Wrong(
            f"this is no context manager ({type(error).__name__}: {error}): `yield` the names once, where the block "
            "runs, in place of `return`, and keep `@contextmanager` above the function"
        ) from error


def run_blocks(case: Case, cut_for_a_while: Any) -> Seen:
    """A block, inside another one where the case has an ``outer`` tau; ``body`` says what happens in it."""
    model, x, body = vit(case), pictures(case), case["body"]
    seen: Seen = {"before": logits(model, x), "came out": "nothing"}
    held = list(model.parameters())

    def enter(tau: float) -> AbstractContextManager[Any]:
        return cut_for_a_while(model, tau)  # type: ignore[no-any-return]

    with enter(case["outer"]) if "outer" in case else torch.no_grad():
        try:
            with enter(case["tau"]) as names:
                seen["names"], seen["inside"] = names, logits(model, x)
                if body == "step":
                    step(held)
                if body in RAISED:
                    raise RAISED[body]("something goes wrong in the block")
        except (Trouble, Stopped) as error:
            seen["came out"] = type(error).__name__
        seen["after inner"] = logits(model, x)
    return {**seen, "after": logits(model, x), "keys": list(model.state_dict())}


def judge(case: Case, seen: Seen) -> None:
    """Inside the block the model is cut; however the block ends, it is afterwards what it was."""
    model, body, tau = vit(case), case["body"], case["tau"]
    keys = list(model.state_dict())
    dense, cut = cut_logits(case, 0.0), cut_logits(case, tau)
    still_dense = "inside the block the model is still dense: convert before the yield"
    compare(array(seen, "inside", "the output inside"), cut, "the output inside the block", [(dense, still_dense)])
    names = list(sparsify(model, tau).converted)
    judge_names(seen["names"], names, "`as` in `with cut_for_a_while(...) as names`")
    if seen["came out"] != (RAISED[body].__name__ if body in RAISED else "nothing"):
        raise Wrong(
            "an exception in the block never comes out of it: restore, and let it pass (try/finally, no except)"
        )
    if seen["keys"] != keys:
        raise Wrong("after the block the state_dict has other keys")
    if "outer" in case:
        judge_outer(case, seen, dense, cut)
    if body == "step":
        judge_step(case, seen, dense)
    else:
        judge_dense_again(case, seen, cut)


def judge_outer(case: Case, seen: Seen, dense: np.ndarray, cut: np.ndarray) -> None:
    """After the inner one of two blocks the outer tau is back."""
    own = f"after the inner block (tau = {case['tau']}) the outer tau = {case['outer']} should be back"
    mistakes = [
        (cut, f"{own}, and the inner one is still there"),
        (dense, f"{own}, and the model is dense: note at entry which modules were cut, and at what tau"),
    ]
    what = "the output after the inner block"
    compare(array(seen, "after inner", what), cut_logits(case, case["outer"]), what, mistakes)


def judge_step(case: Case, seen: Seen, dense: np.ndarray) -> None:
    """A training step inside the block stays."""
    mistakes = [
        (dense, "a training step inside the block is undone: put back the class, not the weights"),
        (cut_logits(case, case["tau"], stepped=True), "after the block the model is still cut"),
    ]
    what = "the output after the block"
    compare(array(seen, "after", what), cut_logits(case, 0.0, stepped=True), what, mistakes)


def judge_dense_again(case: Case, seen: Seen, cut: np.ndarray) -> None:
    """After the block the output is that from before, bit for bit."""
    after, body = array(seen, "after", "the output after the block"), case["body"]
    if np.array_equal(after, seen["before"]):
        return
    if close(after, seen["before"]):
        raise Wrong("after the block the output is the dense one to rounding, not bit for bit: use restore")
    if close(after, cut):
        when = f"after {body} in the block" if body in RAISED else "after the block"
        kind = " (an interrupt is no Exception: finally catches it, `except Exception` does not)"
        raise Wrong(
            f"{when} the model is still cut: restore in `finally`, which runs however the block ends"
            + (kind if body == "an interrupt" else "")
        )
    compare(after, seen["before"], "the output after the block")
    raise Wrong("the output after the block is not that from before, bit for bit")


QUESTION = Question(
    name="c3",
    answers=("cut_for_a_while",),
    cases=(
        {"what": "a block that ends well", "model": "ViT", "seed": 1, "tau": 0.09375, "body": "nothing"},
        {"what": "a block that ends in an error", "model": "ViT", "seed": 2, "tau": 0.09375, "body": "an error"},
        {
            "what": "a block inside another",
            "model": "ViT",
            "seed": 3,
            "tau": 0.09375,
            "outer": 0.15625,
            "body": "nothing",
        },
        {"what": "an interrupt", "model": "ViT", "seed": 4, "tau": 0.09375, "body": "an interrupt"},
        {"what": "a training step inside the block", "model": "ViT", "seed": 5, "tau": 0.09375, "body": "step"},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "A function with @contextmanager and one yield: what stands before the yield runs at entry, what stands after "
        "it at the end of the block.",
        "An exception in the block comes up at the yield. Only what is in `finally` runs then: try: yield names, "
        "finally: restore(model).",
        "For nested blocks note {module: module.tau} of the modules that are cut already, before convert. In finally: "
        "restore(model), and then give these their class and their tau back.",
    ),
    section="chapter 2, section 2.8",
)
