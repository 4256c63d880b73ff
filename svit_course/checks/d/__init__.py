"""Assignment d: fine-tune a dense and a sparse model and compare them fairly."""

from svit_course.checks.d import d1, d2, d3, d4

QUESTIONS = (d1.QUESTION, d2.QUESTION, d3.QUESTION, d4.QUESTION)
