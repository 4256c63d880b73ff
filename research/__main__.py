"""The command line: ``python -m research experiment | study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from research import experiment_command, study_command

COMMANDS = {"experiment": experiment_command, "study": study_command}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m research", description="Make, or complete, what results/ holds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__, description=module.__doc__))
    options = parser.parse_args(argv)
    return int(COMMANDS[options.command].run(options))


if __name__ == "__main__":
    sys.exit(main())
