"""The model whose rows the explorers' tests cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer


@pytest.fixture(scope="session")
def sharp_vit() -> Callable[[int], VisionTransformer]:
    """Of so many blocks, with attention sharp enough that a threshold leaves some keys and takes others."""

    def make(depth: int) -> VisionTransformer:
        torch.manual_seed(0)
        shape = {"img_size": (32, 48), "patch_size": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
        model = VisionTransformer(depth=depth, **shape).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight[:48] *= 12
        return model

    return make
