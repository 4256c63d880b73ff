"""The commands of `python -m svit_utils`: each module has `add_arguments(parser)` and `run(options)`."""
