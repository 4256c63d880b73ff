"""What the card can do at best, measured: a large matrix product and a large copy. Other rates are put beside these."""

from __future__ import annotations

import torch

from benchmarks.gpu.plan import Plan, Row
from benchmarks.gpu.timing import median_ms

MATRIX, PRODUCT, COPY = "bf16 matrix product", "TFLOP/s", "copy, bytes read and written"


def rows(plan: Plan) -> list[Row]:
    """Rows of ``card.csv``: quantity, value, unit."""
    side, numbers = (8192, 2**30) if not plan.small else (128, 2**16)
    a, b = (torch.randn(side, side, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms([lambda: a @ b], plan.device)["median_ms"]
    source = torch.randn(numbers, device=plan.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = median_ms([lambda: target.copy_(source)], plan.device)["median_ms"]
    found = [
        {"quantity": MATRIX, "value": round(2 * side**3 / product / 1e9, 1), "unit": PRODUCT, "note": f"{side} a side"},
        {"quantity": COPY, "value": round(4 * numbers / copied / 1e6, 1), "unit": "GB/s", "note": f"{numbers} numbers"},
    ]
    if plan.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts = {"memory, MiB": about.total_memory // 2**20, "multiprocessors": about.multi_processor_count}
        facts["L2 cache, MiB"] = round(getattr(about, "L2_cache_size", 0) / 2**20)
        found += [{"quantity": name, "value": value, "unit": "", "note": ""} for name, value in facts.items()]
    for row in found:
        print(f"{row['quantity']}: {row['value']} {row['unit']}", flush=True)
    return found


def peak_tflops(rows: list[Row], size: str) -> float | None:
    """The matrix product's rate out of ``card.csv``; None where it was not measured."""
    values = [float(r["value"]) for r in rows if r["quantity"] == MATRIX and r.get("size", size) == size]
    return values[-1] if values else None
