"""``python -m research study``: train, score and compare what the analysis plan names, or what is missing of it."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--profile", default="full", help="full (results/study), deit (results/study_deit) or smoke (build/study-smoke)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these parts, such as train or localisation")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="score only these arms, such as dense-rho0-seed0")
    parser.add_argument("--tables", action="store_true", help="only write the tables anew from the recorded scores")


def run(args: argparse.Namespace) -> int:
    """Run the study; 0 when it is complete."""
    from research.study import get_study, run_study
    from research.study.tables import write_tables

    profile = get_study(args.profile)
    if args.tables:
        for path in write_tables(profile):
            print(path)
    else:
        print(run_study(profile, jobs=args.jobs, parts=args.parts, arms=args.arms))
    return 0
