"""What changes with the step: the learning rate and tau. Pure functions of the step, so that resuming is trivial."""

import math

SCHEDULES = ("cosine", "onecycle", "constant")


def lr_factor(step: int, steps: int, warmup_steps: int = 0, schedule: str = "cosine", min_factor: float = 0.0) -> float:
    """The learning rate at ``step`` (counted from 0) as a multiple of its peak.

    Args:
        step: optimiser steps done before this one.
        steps: of the whole run.
        warmup_steps: linear rise from 0; the first step already moves. Not used by ``"onecycle"``.
        schedule: ``"cosine"`` falls to ``min_factor`` along half a cosine; ``"onecycle"`` rises for 30 % of the run
            from 1/25 and falls to 1e-4, both along half a cosine (Smith and Topin 2019, arXiv 1708.07120, as in torch);
            ``"constant"`` stays.
        min_factor: where ``"cosine"`` ends.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "onecycle":
        peak = 0.3 * steps
        if step < peak:
            return _half_cosine(1 / 25, 1.0, step / peak)
        return _half_cosine(1.0, 1e-4, (step - peak) / max(steps - peak, 1))
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return _half_cosine(1.0, min_factor, (step - warmup_steps) / max(steps - warmup_steps, 1))


def tau_factor(step: int, tau_warmup_steps: int) -> float:
    """The share of tau in force at ``step``: a linear rise from 0 over ``tau_warmup_steps``, then 1."""
    return 1.0 if tau_warmup_steps <= 0 else min(1.0, step / tau_warmup_steps)


def _half_cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(t, 0.0), 1.0)))
