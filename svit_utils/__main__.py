"""The command line: ``python -m svit_utils doctor | train | evaluate | explain``.

Each command's module is imported only when that command, or its help, is asked for, so that ``doctor`` runs where the
other commands' libraries cannot be imported.
"""

import argparse
import importlib
import io
import sys
from collections.abc import Collection, Sequence

import svit_utils

COMMANDS = {
    "doctor": "versions, device, data and weights found, and what to do about what is wrong",
    "train": "train or fine-tune a model, dense or sparse",
    "evaluate": "accuracy and sparsity of a checkpoint",
    "explain": "attention maps, rollout and Grad-CAM of a checkpoint, exported as files",
}


def parser(filled: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The commands, those named in ``filled`` with their options: only their modules are imported."""
    whole = argparse.ArgumentParser(
        prog="python -m svit_utils",
        description="SelectiveViT: thresholded attention for timm Vision Transformers.",
        epilog="`python -m svit_utils COMMAND --help` says more about a command.",
    )
    whole.add_argument("--version", action="version", version=f"svit_utils {svit_utils.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in filled and name != "doctor":
            importlib.import_module(f"svit_utils.cli.{name}").add_arguments(command)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file of Windows' may have no τ: then "?" and no end
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser(arguments[:1]).parse_args(arguments)
    module = importlib.import_module(f"svit_utils.cli.{options.command}")
    return int(module.run() if options.command == "doctor" else module.run(options))


if __name__ == "__main__":
    sys.exit(main())
