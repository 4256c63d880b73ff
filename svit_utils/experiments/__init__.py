"""The recorded experiments: their designs, the program that runs them, and the check that reruns a row of each."""

from svit_utils.experiments.designs import DESIGNS, Arm, Design, get_design
from svit_utils.experiments.run import run_arm, run_design

__all__ = ["DESIGNS", "Arm", "Design", "get_design", "run_arm", "run_design"]
