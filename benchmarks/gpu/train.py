"""Training that a CPU cannot do, from pictures kept on the device, in runs that are written one by one.

Runs stand in the order of what they decide, seeds innermost, so that what fits into the budget can be used. A run is
begun only where its estimated time still fits, and is not done again where its row is there.
"""

from __future__ import annotations

import os

from benchmarks.gpu import deit, pack, planted, targets, throughput
from benchmarks.gpu.plan import Clock, Plan


def run(plan: Plan) -> None:
    """Train within the budget; write ``throughput.csv``, ``train.csv``, ``curves.csv`` and ``targets.csv``."""
    clock = Clock(plan.train_seconds)
    for folder in plan.packs:
        if (folder / f"{pack.WEIGHTS}.safetensors").is_file():
            os.environ.setdefault("SVIT_WEIGHTS_DIR", str(folder))
    data = deit.load(plan)
    if data is None:
        print("no CIFAR-10, neither in the data directory nor packed: its runs are left out")
    else:
        sizes = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in pack.SPLITS)
        print(f"{data.source}: {sizes} pictures on the device after {clock.spent():.0f} s", flush=True)
        throughput.run(plan, data.train, clock)
        deit.run(plan, data, clock)
        throughput.base(plan, data.train, clock)
    planted.run(plan, clock)
    print(f"trained for {clock.spent():.0f} s")
    targets.run(plan)
