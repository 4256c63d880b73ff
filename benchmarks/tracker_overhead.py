"""What watching costs: a forward pass with and without `TokenSparsityTracker`, in one run.

    python benchmarks/tracker_overhead.py [--repeats 15] [--out results/bench]

Prints the ratio of medians and writes a row per model with provenance. Run it while nothing else does.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from svit_utils import TokenSparsityTracker, sparsify
from svit_utils.models import create_model
from svit_utils.provenance import provenance

MODELS = (("small_vit", 56, 32), ("deit_tiny_patch16_224", 224, 8))


def milliseconds(function: object, repeats: int) -> list[float]:
    """Wall-clock times of ``repeats`` calls after two warm ones."""
    times = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        function()  # type: ignore[operator]
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return times


def measure(name: str, size: int, batch: int, repeats: int) -> dict[str, object]:
    """One model's row: median milliseconds with and without the tracker, alternating, and their ratio."""
    torch.manual_seed(0)
    model = create_model(name, img_size=size).eval()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("qkv.weight")):
        parameter.data.mul_(4)  # random attention is flat, and every row would be empty
    sparsify(model, 0.01)
    images = torch.randn(batch, 3, size, size)
    tracker = TokenSparsityTracker(model)

    def plain() -> None:
        with torch.no_grad():
            model(images)

    def tracked() -> None:
        with tracker:
            plain()

    without, with_ = [], []
    for _ in range(3):  # alternating blocks, so that a slow minute hits both
        without += milliseconds(plain, repeats)
        with_ += milliseconds(tracked, repeats)
    row = {"model": name, "img_size": size, "batch": batch, "repeats": 3 * repeats}
    row |= {"plain_ms": round(statistics.median(without), 2), "tracked_ms": round(statistics.median(with_), 2)}
    row["ratio"] = round(statistics.median(with_) / statistics.median(without), 3)
    deciles = statistics.quantiles(with_, n=10)
    row |= {"tracked_p10_ms": round(deciles[0], 2), "tracked_p90_ms": round(deciles[-1], 2)}
    row |= {"rows_empty": round(tracker.summary().empty_rate, 3)}
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    args = parser.parse_args()
    rows = []
    for name, size, batch in MODELS:
        row = measure(name, size, batch, args.repeats)
        print(f"{name} at {size} px: {row['plain_ms']} ms plain, {row['tracked_ms']} ms tracked, ratio {row['ratio']}")
        rows.append({**row, **provenance(seed=0)})
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "tracker_overhead.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
