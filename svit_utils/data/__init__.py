"""Data: PlantedShapes (generated, embedded), CIFAR-10 (found or downloaded) and folders of pictures.

Names are imported on first use: PlantedShapes needs torch only, the other two need torchvision.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "PlantedShapes": "planted_shapes",
    "PlantedBatch": "planted_shapes",
    "Difficulty": "planted_shapes",
    "DIFFICULTIES": "planted_shapes",
    "cifar10": "cifar",
    "image_folder": "folders",
    "normalisation": "transforms",
    "DataNotFoundError": "errors",
    "DamagedDataError": "errors",
}

__all__ = [
    "DIFFICULTIES",
    "DamagedDataError",
    "DataNotFoundError",
    "Difficulty",
    "PlantedBatch",
    "PlantedShapes",
    "cifar10",
    "image_folder",
    "normalisation",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"svit_utils.data.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
