"""Data: PlantedShapes (generated, nothing to download), CIFAR-10 (found or downloaded) and folders of pictures.

Names are imported on first use: PlantedShapes needs torch only, the other two need torchvision.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
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

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"svit_utils.data.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
