"""The course: checks and hints for students, and the programs that build the course and grade it.

The notebooks under ``notebooks/assignments/`` begin with ``from svit_course import check, hint``. In them
``check("a1", softmax)`` says what is wrong with an answer, and ``hint("a1")`` helps on. Lecturers run ``python -m
svit_course build`` and ``python -m svit_course grade``.
"""

from svit_course.question import ASSIGNMENTS, Question, Wrong, check, hint, question, questions

__all__ = ["ASSIGNMENTS", "Question", "Wrong", "check", "hint", "question", "questions"]
