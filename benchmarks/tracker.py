"""What watching costs: a forward pass of a sparse model with and without `TokenSparsityTracker`."""

from __future__ import annotations

import torch

from benchmarks.measure import Plan, Row, in_turn, summarised
from benchmarks.vit import model
from svit_utils import TokenSparsityTracker

MODELS = (("small_vit", 56, 32), ("deit_tiny_patch16_224", 224, 8))


def rows(plan: Plan) -> list[Row]:
    """A row per model, with the ratio of medians."""
    torch.set_num_threads(plan.threads[0])
    found = []
    for name, size, batch in MODELS[: 1 if plan.quick else None]:
        sparse = model(name, size, plan, spread=True, sparse=True).eval()
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(plan.device)
        tracker = TokenSparsityTracker(sparse)

        def plain(sparse=sparse, images=images) -> None:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                sparse(images)

        def tracked(plain=plain, tracker=tracker) -> None:  # type: ignore[no-untyped-def]
            with tracker:
                plain()

        summary = summarised(in_turn({"plain": plain, "tracked": tracked}, plan), "plain")
        for variant, row in summary.items():
            common = {"model": name, "img_size": size, "batch": batch, "variant": variant, "threads": plan.threads[0]}
            common |= {"device_type": plan.device, "rows_empty": round(float(tracker.summary().empty_rate), 3)}
            found.append({**common, **row})
        print(f"{name} at {size} px: tracked {summary['tracked']['ratio_to_plain']} x plain", flush=True)
    return found
