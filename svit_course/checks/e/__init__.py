"""Assignment e: rollout, Grad-CAM on tokens, and their scores against masks."""

from svit_course.checks.e import e1, e2, e3, e4

QUESTIONS = (e1.QUESTION, e2.QUESTION, e3.QUESTION, e4.QUESTION)
