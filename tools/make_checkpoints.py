"""``make checkpoints``: train every shipped checkpoint again, into data/checkpoints, and record the runs in results/.

Runs that are recorded already are skipped; ``--repeat`` does them all again. On two cores this takes a few hours.
"""

from __future__ import annotations

import argparse
import sys

from research.plans import EXPERIMENTS
from research.training import run_experiment


def main(argv: list[str] | None = None) -> int:
    """Do the runs that ship a checkpoint: the dense start first, since the others start from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", action="store_true", help="train again what is recorded already")
    args = parser.parse_args(argv)
    for experiment in EXPERIMENTS.values():
        if shipped := [run.name for run in experiment.runs if run.save_as is not None]:
            run_experiment(experiment, only=shipped, repeat=args.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
