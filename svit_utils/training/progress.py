"""What a run says while it goes: a bar in a terminal or notebook, else a plain line now and then."""

import sys
import time

from tqdm.auto import tqdm

EVERY_S = 60.0


class Reporter:
    """A bar where there is a terminal. In a batch job's log: the first step, each tenth of the run, and each minute.

    Args:
        done: steps that an earlier part of the run has done.
        steps: of the whole run.
        shown: False for silence.
        source: where the earlier part came from, for the first line.
    """

    def __init__(self, done: int, steps: int, shown: bool, source: str = "") -> None:
        self.done, self.steps, self.first = done, steps, done + 1
        self.started = self.said = time.monotonic()
        if shown and source:
            what = f"all {steps} steps are done" if done == steps else f"going on after step {done} of {steps}"
            self._print(f"{what}, from {source}")
        self.bar = tqdm(total=steps, initial=done, desc="train", disable=None if shown else True)
        self.plain = shown and self.bar.disable

    def step(self, loss: float) -> None:
        """One more step is done."""
        self.done += 1
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        tenth = self.done * 10 // self.steps > (self.done - 1) * 10 // self.steps
        now = time.monotonic()
        if self.plain and (self.done == self.first or tenth or now - self.said >= EVERY_S):
            self.said = now
            left = (now - self.started) / (self.done + 1 - self.first) * (self.steps - self.done)
            self._print(f"step {self.done} of {self.steps}, loss {loss:.3f}, about {left:.0f} s left")

    def close(self) -> None:
        """Remove the bar's claim on the terminal."""
        self.bar.close()

    @staticmethod
    def _print(text: str) -> None:
        print(f"train: {text}", file=sys.stderr, flush=True)
