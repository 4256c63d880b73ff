"""The coursework's checks, as the notebooks under ``notebooks/assignments/`` call them.

from svit_course import check, hint
"""

from svit_course.question import ASSIGNMENTS, Question, Wrong, check, hint, question, questions

__all__ = ["ASSIGNMENTS", "Question", "Wrong", "check", "hint", "question", "questions"]
