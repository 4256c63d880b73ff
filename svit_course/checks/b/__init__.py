"""Assignment b: the backward pass by hand, and tau's gradient."""

from svit_course.checks.b import b1, b2, b3, b4

QUESTIONS = (b1.QUESTION, b2.QUESTION, b3.QUESTION, b4.QUESTION)
