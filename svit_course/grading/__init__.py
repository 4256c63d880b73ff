"""Grading: find what was handed in (`submissions`), run it (`runs`), write what came out (`reports`, `feedback`)."""
