"""Programs for authors and maintainers, run from the root of the repository: ``python -m tools.walkthrough``."""
