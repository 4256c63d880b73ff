"""Assignment a: from softmax to thresholded attention, in NumPy and then in torch."""

from svit_course.checks.a import a1, a2, a3, a4

QUESTIONS = (a1.QUESTION, a2.QUESTION, a3.QUESTION, a4.QUESTION)
