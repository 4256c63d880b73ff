"""Small models of every timm family with a token grid, on non-square images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def sharpened(model: nn.Module) -> nn.Module:
    """Query and key weights scaled, so that at tau = 0.03 rows are partly cut; a head that matters."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "qkv", None) is not None and isinstance(module.qkv, nn.Linear):
                module.qkv.weight[: 2 * module.qkv.out_features // 3] *= 12
            elif isinstance(getattr(module, "q_proj", None), nn.Linear):
                module.q_proj.weight *= 12
                module.k_proj.weight *= 12
        nn.init.normal_(model.head.weight, std=0.2)
    return model.eval()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        model = VisionTransformer(**SMALL)
    elif name == "distilled":
        model = timm.create_model(
            "deit_tiny_distilled_patch16_224",
            img_size=(32, 48),
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=3,
            num_classes=5,
        )
    elif name == "registers":
        model = VisionTransformer(**SMALL, reg_tokens=4, no_embed_class=True)
    elif name == "mean":
        model = VisionTransformer(**SMALL, class_token=False, global_pool="avg")
    elif name == "siglip":
        model = VisionTransformer(**SMALL, class_token=False, global_pool="map")
    elif name == "eva":
        model = Eva(**SMALL, use_rot_pos_emb=True, use_abs_pos_emb=True, qkv_fused=False)
    else:
        raise KeyError(name)
    return sharpened(model)


@pytest.fixture
def family() -> Callable[[str], nn.Module]:
    """Builds a family by name: the same weights on each call."""
    return build


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
