"""The checks: a folder for each assignment, a file for each question.

In every file stand, as far as the question needs them:

- ``inputs``: what the student's code is called with, made from a case;
- ``probe``: calls the student's code and returns what was seen;
- ``mistakes``: pairs of what a known mistake would give and the sentence for it, the likeliest first;
- ``judge``: decides, and names the mistake;
- ``QUESTION``: the cases of the visible test, the hints, and the section of the book.

What several questions of an assignment need is in its ``shared.py``.
"""
