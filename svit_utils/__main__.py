"""The command line: ``python -m svit_utils doctor | train | evaluate | explain``.

Each command's module is imported only when that command, or its help, is asked for, so that ``doctor`` runs where the
other commands' libraries cannot be imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

import svit_utils

COMMANDS = {
    "doctor": "versions, device, data and weights found, and what to do about what is wrong",
    "train": "train or fine-tune a model, dense or sparse",
    "evaluate": "accuracy and sparsity of a checkpoint",
    "explain": "attention maps, rollout and Grad-CAM of a checkpoint, exported as files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    parser = argparse.ArgumentParser(
        prog="python -m svit_utils",
        description="SelectiveViT: thresholded attention for timm Vision Transformers.",
        epilog="`python -m svit_utils COMMAND --help` says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"svit_utils {svit_utils.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen and name != "doctor":
            module = importlib.import_module(f"svit_utils.cli.{name}")
            module.add_arguments(command)
    options = parser.parse_args(arguments)
    if module is None:
        from svit_utils.cli import doctor

        return doctor.run()
    return int(module.run(options))


if __name__ == "__main__":
    sys.exit(main())
