"""Assignment c: surgery on a timm model: another forward, there and back, and a map."""

from svit_course.checks.c import c1, c2, c3, c4

QUESTIONS = (c1.QUESTION, c2.QUESTION, c3.QUESTION, c4.QUESTION)
