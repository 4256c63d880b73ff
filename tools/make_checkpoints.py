"""``make checkpoints``: train every shipped checkpoint anew, into data/checkpoints, and record the runs in results/.

Runs that are recorded already are skipped; ``--anew`` repeats them all. On two cores this takes a few hours.
"""

from __future__ import annotations

import argparse
import sys

from research import DESIGNS, run_design


def main(argv: list[str] | None = None) -> int:
    """Run the arms that ship a checkpoint, design by design: the dense start first, since the others need it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="train again what is recorded already")
    args = parser.parse_args(argv)
    for design in DESIGNS.values():
        shipped = [arm.name for arm in design.arms if arm.save_as is not None]
        if shipped:
            run_design(design, only=shipped, anew=args.anew)
    return 0


if __name__ == "__main__":
    sys.exit(main())
