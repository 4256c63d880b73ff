"""``python -m benchmarks``: measure, write ``results/bench/``, and print the targets with what was measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks import accuracy, attention, crossover, parts, targets, tiles, tracker, vit
from benchmarks.measure import Plan, write

SECTIONS = {
    "attention": attention,
    "crossover": crossover,
    "parts": parts,
    "vit": vit,
    "accuracy": accuracy,
    "tiles": tiles,
    "tracker_overhead": tracker,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    whole = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What the cut costs. Nothing else should run."
    )
    whole.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    whole.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    whole.add_argument(
        "--threads", type=int, nargs="+", help="CPU threads: first alone, last for whole models (1 and all)"
    )
    whole.add_argument("--tau", type=float, default=0.01)
    whole.add_argument("--seconds", type=float, default=20.0, help="per group of things that are compared")
    whole.add_argument(
        "--quick", action="store_true", help="smallest sizes and few calls: that it runs, not what it takes"
    )
    whole.add_argument("--out", type=Path, default=Path("results/bench"))
    return whole


def main() -> None:
    """Run the sections one after the other, each written as soon as it is complete."""
    args = parser().parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    plan = Plan(
        device=args.device,
        threads=tuple(args.threads) if args.threads else tuple(dict.fromkeys((1, cores))),
        tau=args.tau,
        seconds=0.2 if args.quick else args.seconds,
        most=3 if args.quick else Plan.most,
        quick=args.quick,
    )
    if plan.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: PyTorch sees no GPU here")
    folder = args.out if plan.device == "cpu" else args.out / "gpu"
    for name in args.only:
        print(f"== {name}", flush=True)
        write(name, SECTIONS[name].rows(plan), folder)
    if all((folder / f"{name}.csv").exists() for name in targets.FILES):
        found = targets.rows(folder)
        write("targets", found, folder)
        print("\n" + targets.printed(found))


if __name__ == "__main__":
    main()
