"""What was graded, kept as a file for each submission, so that marks by hand can be added without grading again."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

from svit_course.grading.runs import Graded, Mark
from svit_course.grading.submissions import Submission
from svit_utils.files import write_file

FOLDER = "graded"


def save(graded: Graded, out: Path) -> None:
    """Write ``<out>/graded/<student>/<assignment>.json``. Marks by hand are not in it: they stand in by_hand.csv."""
    content = dataclasses.asdict(graded)
    content["submission"]["path"] = str(graded.submission.path)
    content["pictures"] = {
        name: [base64.b64encode(data).decode() for data in pictures] for name, pictures in graded.pictures.items()
    }
    path = out / FOLDER / graded.submission.student / f"{graded.submission.assignment}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content).encode())


def saved(out: Path) -> list[Graded]:
    """Everything that was graded into a folder, in order.

    Raises:
        ValueError: nothing was, or a file cannot be read.
    """
    found = []
    for path in sorted((out / FOLDER).glob("*/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            about = Submission(**{**content.pop("submission"), "path": path})
            marks = [Mark(**mark) for mark in content.pop("marks")]
            pictures = {name: list(map(base64.b64decode, each)) for name, each in content.pop("pictures").items()}
            found.append(Graded(about, marks, pictures=pictures, **content))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}): grade this submission again") from error
    if not found:
        raise ValueError(f"nothing was graded in {out} yet: first make grade SUBMISSIONS=folder")
    return found
