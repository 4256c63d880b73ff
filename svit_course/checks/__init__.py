"""The checks: a folder for each assignment, a file for each question.

Every file holds the question's inputs, its probe (runs the student's code), its judge (decides), the mistakes that the
judge knows by name, and the `Question` itself with its cases and hints.
"""
