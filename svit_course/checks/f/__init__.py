"""Assignment f: a threshold for each layer, chosen to an error budget."""

from svit_course.checks.f import f1, f2, f3, f4

QUESTIONS = (f1.QUESTION, f2.QUESTION, f3.QUESTION, f4.QUESTION)
