"""The recorded experiments: their designs, the program that runs them, and the check that reruns a row of each."""

from research.arms import DESIGNS, Arm, Design, get_design
from research.run import run_arm, run_design

__all__ = ["DESIGNS", "Arm", "Design", "get_design", "run_arm", "run_design"]
