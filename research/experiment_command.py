"""``python -m research experiment``: run a recorded experiment, or what is missing of it."""

from __future__ import annotations

import argparse

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("name", nargs="?", help="the experiment; left out, the command lists them")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="run only these arms; all that are not recorded by default"
    )
    parser.add_argument("--threads", type=int, help="processor threads of torch; all by default")


def run(args: argparse.Namespace) -> int:
    """Run the experiment; 0 when it is complete."""
    from research import DESIGNS, get_design, run_design

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.name is None:
        for design in DESIGNS.values():
            print(f"{design.name}: {design.title}\n    {' '.join(arm.name for arm in design.arms)}")
        return 0
    print(run_design(get_design(args.name), only=args.arms))
    return 0
