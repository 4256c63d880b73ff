"""Several threads may use one model: whoever changes it for a while has it alone, and puts it back.

Maps, scores, trackers and evaluations set flags and hooks on the model that they are given. What they hold is not the
model as an object but its modules and parameters: a wrapper, a part, and another model with the same backbone wait for
each other, and models that share nothing do not. Nothing is stored in the model. A plain ``model(x)`` waits for nobody,
and computes with what is in force at that moment, such as a cut that another thread has made for a while.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

PATIENCE = 10.0  # seconds for which the thread that has the model may be seen to wait for something itself
_LOOK_AGAIN = 0.5  # seconds


class ModelInUseError(RuntimeError):
    """Another thread has the model, and will not give it back; the message says which one, and what to do."""


@dataclass(eq=False)
class _Place:
    """A place in the line for some modules and parameters, or, once it is granted, the use of them."""

    owner: threading.Thread
    parts: dict[int, object]  # by id; kept here, so that no other object gets the id meanwhile
    name: str
    block: bool  # the caller's own code runs meanwhile, and not only ours
    queues: bool = True  # behind those who came before, too, and not only behind those who have a part already
    granted: bool = False


_changed = threading.Condition()  # guards the line
_line: list[_Place] = []


@contextmanager
def exclusive(*things: Any, block: bool = False) -> Iterator[None]:
    """Have models, or other objects, alone for the length of a ``with``; other threads wait, in the order they came.

    The same thread may enter again.

    Args:
        things: modules, of which all parts are meant, or any other objects.
        block: whether the caller's own code runs inside, as in ``with sparsified(model):``.

    Raises:
        ModelInUseError: waiting is in vain: two threads wait for each other, or the one that has the model has ended,
            or does nothing but wait inside its ``with`` block.
    """
    place = _Place(threading.current_thread(), _parts(things), type(things[0]).__name__, block)
    try:
        _wait_for(place)
        yield
    finally:
        with _changed:
            if place in _line:
                _line.remove(place)
            _changed.notify_all()


def exclusively(function: F) -> F:
    """Decorator of a function whose first argument is a model: it has the model alone while it runs."""

    @wraps(function)
    def alone(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with exclusive(model):
            return function(model, *args, **kwargs)

    return alone  # type: ignore[return-value]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for the body of the ``with``, with the model alone; each module's own flag comes back after it.

    So a part that somebody keeps in evaluation mode while the rest is trained stays in it.
    """
    with exclusive(model):
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def in_this_thread(hook: F) -> F:
    """A forward hook that does nothing where another thread calls the module, say for a prediction."""
    own = threading.get_ident()

    @wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        # A backward pass has threads of its own, in which gradient checkpointing calls the module again.
        if threading.get_ident() == own or torch._C._current_graph_task_id() != -1:
            return hook(*args, **kwargs)
        return None

    return called  # type: ignore[return-value]


def _parts(things: tuple[Any, ...]) -> dict[int, object]:
    """The objects themselves, and the modules and parameters inside, by id."""
    found: dict[int, object] = {}
    left = list(things)
    while left:
        thing = left.pop()
        if thing is None or id(thing) in found:
            continue
        found[id(thing)] = thing
        if isinstance(thing, nn.Module):  # copies, since another thread may be changing the dictionaries
            left += [*list(thing._modules.values()), *list(thing._parameters.values())]
    return found


def _wait_for(place: _Place) -> None:
    """Join the line, and return when nobody else has a part of what is asked for."""
    with _changed:
        # Who has something already must not queue behind those who may be waiting for it.
        place.queues = not any(other.granted for other in _line if other.owner is place.owner)
        _line.append(place)
        idle_since = None
        while blocking := _blocking(place):
            holder = next((other for other in blocking if other.granted), blocking[0])
            said = f"{place.name} is in use by thread {holder.owner.name}, which"
            if place.owner in _waited_for(blocking):
                raise ModelInUseError(f"{said} waits for this thread: let both take their models in the same order")
            if not holder.owner.is_alive():
                raise ModelInUseError(f"{said} has ended inside a `with` block: close the generator that holds it")
            idle_since = (idle_since or time.monotonic()) if _idles(holder) else None
            if idle_since is not None and time.monotonic() - idle_since > PATIENCE:
                raise ModelInUseError(
                    f"{said} only waits inside its `with` block, perhaps for this very thread: enter the block in each "
                    "thread, or change the model before the threads start (sparsify) and back after they end (densify)"
                )
            _changed.wait(_LOOK_AGAIN)
        place.granted = True


def _blocking(place: _Place) -> list[_Place]:
    """Those in the line whom ``place`` has to wait for."""
    found, ahead = [], place.queues
    for other in list(_line):
        ahead = ahead and other is not place
        if other.owner is not place.owner and (other.granted or ahead) and other.parts.keys() & place.parts.keys():
            found.append(other)
    return found


def _waited_for(blocking: list[_Place]) -> set[threading.Thread]:
    """The threads that have to go on before those of ``blocking`` can."""
    found: set[threading.Thread] = set()
    left = [place.owner for place in blocking]
    while left:
        owner = left.pop()
        if owner not in found:
            found.add(owner)
            waiting = [place for place in list(_line) if place.owner is owner and not place.granted]
            left += [other.owner for place in waiting for other in _blocking(place)]
    return found


def _idles(holder: _Place) -> bool:
    """Whether the thread that has the model runs the caller's code in a ``with`` block, which waits for something."""
    innermost = [place for place in list(_line) if place.owner is holder.owner][-1]
    frame = sys._current_frames().get(holder.owner.ident or 0)
    if not (innermost.granted and innermost.block) or frame is None:
        return False
    return os.path.basename(frame.f_code.co_filename) in ("threading.py", "selectors.py")  # a pool, an event loop


def _after_fork() -> None:
    """A forked process has only the thread that forked, and what that thread has."""
    global _changed
    _changed = threading.Condition()
    _line[:] = [place for place in _line if place.owner is threading.current_thread()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
