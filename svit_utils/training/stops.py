"""Ctrl-C and SIGTERM: noted while a step is under way, heeded between two steps, where a checkpoint can be written."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

WORKERS_STAY_S = 10


class Stopped(KeyboardInterrupt):
    """A run that ended on a signal; the message says at which step, and from where it can go on.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """While the ``with`` block runs, the first SIGINT or SIGTERM is noted in ``number`` and does nothing else.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, and where a signal is ignored (as SIGINT
    of a command in a shell's background), all stays as it was.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if self.number is not None:
                raise KeyboardInterrupt("stopped in the middle of a step")
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
        self.number = number


def outlast_signals(_worker: int) -> None:
    """For a DataLoader's workers, which a terminal or batch system signals too: the step under way needs them.

    Ctrl-C is the main process's business. After SIGTERM, with which the main process ends them too, they stay a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKERS_STAY_S))
