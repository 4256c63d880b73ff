"""Where the time of the fast backend goes: the share of each operation, by PyTorch's profiler."""

from __future__ import annotations

from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention import call, direction
from benchmarks.measure import Plan, Row
from benchmarks.variants import fast_backend, inputs, variants

LEAST = 0.01  # operations with a smaller share of the time are put together


def rows(plan: Plan) -> list[Row]:
    """Per length and direction: each operation's share of the time spent in operations, and how often it ran."""
    torch.set_num_threads(plan.threads[0])
    name = fast_backend(plan.device)
    activity = ProfilerActivity.CUDA if plan.device == "cuda" else ProfilerActivity.CPU
    found = []
    for n in (65,) if plan.quick else (197, 577, 2049):
        for grad in (False, True):
            attention = variants(plan.tau, n, plan.device, grad)[name]
            function = partial(call, attention, *inputs(n, grad=grad, device=plan.device))
            function()
            with profile(activities=[activity]) as profiler:
                for _ in range(5):
                    function()
            own = {e.key: (_microseconds(e, plan.device), e.count) for e in profiler.key_averages()}
            total = sum(time for time, _ in own.values())
            common = {"n": n, "direction": direction(grad), "variant": name, "threads": plan.threads[0]}
            common |= {"device_type": plan.device, "ms_per_call": round(total / 5e3, 3)}
            large = {key: value for key, value in own.items() if value[0] >= LEAST * total}
            others = [value for key, value in own.items() if key not in large]
            rest = (sum(time for time, _ in others), sum(count for _, count in others))
            for key, (time, count) in sorted(large.items(), key=lambda item: -item[1][0]) + [("all others", rest)]:
                row = {**common, "operation": key, "share": round(time / total, 4), "runs_per_call": count / 5}
                found.append(row)
            print(f"N {n} {direction(grad)}: " + ", ".join(f"{r['operation']} {r['share']:.0%}" for r in found[-6:]))
    return found


def _microseconds(event: object, device: str) -> float:
    return float(getattr(event, "self_device_time_total" if device == "cuda" else "self_cpu_time_total"))
