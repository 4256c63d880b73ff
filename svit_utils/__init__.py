"""SelectiveViT's library: thresholded attention for timm Vision Transformers, and what is needed to test it.

Names are imported on first use, so that ``python -m svit_utils doctor`` runs where timm or torchvision cannot be.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from svit_utils.attention import (
        FixedThreshold,
        LearnableThreshold,
        RelativeThreshold,
        SparseAttention,
        TokenSparsityTracker,
        densify,
        sparsified,
        sparsify,
        thresholded_attention,
        thresholded_softmax,
    )
    from svit_utils.models import load_trained, save_trained

__version__ = "0.1.0"

__all__ = ["FixedThreshold", "LearnableThreshold", "RelativeThreshold", "SparseAttention", "TokenSparsityTracker"]
__all__ += ["densify", "load_trained", "save_trained", "sparsified", "sparsify"]
__all__ += ["thresholded_attention", "thresholded_softmax"]


if not TYPE_CHECKING:  # for a type checker every name would be there

    def __getattr__(name: str) -> Any:
        if name in __all__:
            home = "svit_utils.models" if name.endswith("_trained") else "svit_utils.attention"
            return getattr(importlib.import_module(home), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
