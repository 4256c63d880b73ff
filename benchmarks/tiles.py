"""How many 64 x 64 tiles of the attention map hold no survivor, and could be skipped, against N and the share cut."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Plan, Row
from benchmarks.variants import LENGTHS, LOGITS, inputs

TILE = 64
TAUS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)


def rows(plan: Plan) -> list[Row]:
    """One head's map for each N, kind of logits and tau: share cut, share of tiles without survivor, and the tiles."""
    found = []
    for n in (65, 197) if plan.quick else LENGTHS:
        for logits in LOGITS:
            q, k, _ = inputs(n, logits=logits)
            probs = (q[0, 0] @ k[0, 0].T / q.shape[-1] ** 0.5).softmax(dim=-1)  # [N, N]
            for tau in TAUS:
                cut = float((probs <= tau).float().mean())
                row = {"n": n, "logits": logits, "tau": tau, "cut": round(cut, 5)}
                row["tiles_empty"] = round(float(empty_tiles(probs > tau).float().mean()), 5)
                # If each key survived by itself with the same probability: (share cut) ** (64 * 64).
                row["tiles_empty_by_chance"] = round(cut ** (TILE * TILE), 5)
                found.append(row)
        print(
            f"N {n:5d}: "
            + ", ".join(f"{r['logits']} {r['tiles_empty']:.2f}" for r in found if r["n"] == n and r["tau"] == plan.tau)
        )
    return found


def empty_tiles(survives: Tensor) -> Tensor:
    """True where a whole 64 x 64 tile of a map [N, M] has no True; the tiles at the edge may be smaller."""
    return F.max_pool2d(survives[None].float(), TILE, ceil_mode=True)[0] == 0
