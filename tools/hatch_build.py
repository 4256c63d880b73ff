"""Build hook: put the embedded checkpoints and the recorded results into the wheel.

They live in ``data/checkpoints`` and ``results`` of the repository. In the wheel they become
``svit_utils/_embedded/checkpoints`` and ``svit_utils/_embedded/results``, where :mod:`svit_utils.paths` looks for them.
An editable install reads the repository itself, so nothing is copied there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIED = {
    "data/checkpoints": ("checkpoints", {".safetensors", ".json", ".md"}),
    "results": ("results", {".csv", ".json", ".md"}),
}


class EmbeddedFiles(BuildHookInterface):
    """Adds the files of `CARRIED` to a wheel; hatchling finds the class through pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        for folder, (name, suffixes) in CARRIED.items():
            for path in sorted((root / folder).rglob("*")):
                if path.is_file() and path.suffix in suffixes:
                    target = Path("svit_utils/_embedded") / name / path.relative_to(root / folder)
                    build_data["force_include"][str(path)] = target.as_posix()
