"""The referee's study: train the arms of results/study/PLAN.md, score their maps, compare, and say what came out."""

from research.study.profiles import PROFILES, StudyProfile, get_study
from research.study.run import run_study

__all__ = ["PROFILES", "StudyProfile", "get_study", "run_study"]
