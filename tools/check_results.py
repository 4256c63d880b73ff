"""``make check-results``: repeat one row of each results file at small size; exit 1 if one lies outside its band."""

from __future__ import annotations

import sys

from research.check import check_experiment
from research.plans import EXPERIMENTS


def main() -> int:
    """Print a line per results file; what cannot be checked here, for want of data or weights, does not fail."""
    words = {True: "within its band", False: "OUTSIDE ITS BAND", None: "not checked"}
    failed = 0
    for experiment in EXPERIMENTS.values():
        check = check_experiment(experiment)
        failed += check.passed is False
        print(f"{check.experiment}: {words[check.passed]}: {check.message}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
