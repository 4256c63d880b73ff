"""Where tiles of queries overtake the formula on a CPU: what ``backend="auto"`` goes by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.attention import call, direction
from benchmarks.measure import Plan, Row, in_turn
from svit_utils.attention import thresholded_attention

LENGTHS = (33, 65, 81, 101, 129, 145, 197)
PAIRS = (3, 6, 12, 24, 48, 192, 1536)  # batch size times heads
HEADS, WIDTH = 3, 64


def rows(plan: Plan) -> list[Row]:
    """The time of the tiled backend by that of the formula, one thread, for each N, number of pairs and direction."""
    torch.set_num_threads(1)
    found = []
    for grad in (False, True):
        for n in (65, 129) if plan.quick else LENGTHS:
            line = []
            for pairs in (3, 24) if plan.quick else PAIRS:
                q, k, v = inputs(n, pairs, grad)
                attend = {
                    name: partial(thresholded_attention, threshold=plan.tau, backend=name)
                    for name in ("tiled", "reference")
                }
                ways: dict[str, Callable[[], object]] = {
                    name: partial(call, attention, q, k, v) for name, attention in attend.items()
                }
                times = {name: sorted(taken) for name, taken in in_turn(ways, plan).items()}
                median = {name: taken[len(taken) // 2] for name, taken in times.items()}
                row = {"n": n, "pairs": pairs, "direction": direction(grad), "tau": plan.tau}
                row |= {f"{name}_ms": round(value, 4) for name, value in median.items()}
                found.append({**row, "ratio": round(median["tiled"] / median["reference"], 3)})
                line.append(f"{found[-1]['ratio']:5.2f}")
            print(f"N {n:4d} {direction(grad):17s} " + " ".join(line), flush=True)
    return found


def inputs(n: int, pairs: int, grad: bool) -> list[torch.Tensor]:
    """q, k, v [pairs / 3, 3, N, 64]; logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(pairs // HEADS, HEADS, n, WIDTH, generator=generator) for _ in range(3))
    return [x.requires_grad_(grad) for x in (2 * q, k, v)]
