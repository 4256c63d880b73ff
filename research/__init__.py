"""What made ``results/``: the plans of all runs, their training, the study of the maps, the check that runs repeat.

Not part of the wheel; ``python -m research --help`` lists the commands.
"""
