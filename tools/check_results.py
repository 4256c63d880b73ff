"""``make check-results``: repeat the small rows of each results file; exit 1 if a value lies outside its band."""

from __future__ import annotations

import sys

from research.check import check_experiment
from research.plans import EXPERIMENTS


def main() -> int:
    """Print a line per small row; what cannot be checked here, for want of data or weights, does not fail."""
    words = {True: "within its band", False: "OUTSIDE ITS BAND", None: "not checked"}
    failed = 0
    for experiment in EXPERIMENTS.values():
        for check in check_experiment(experiment):
            failed += check.passed is False
            print(f"{check.experiment}/{check.run}: {words[check.passed]}: {check.message}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
