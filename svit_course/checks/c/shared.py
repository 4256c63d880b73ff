"""Tiny timm models, and what the library makes of them.

The library keeps tau in float32, so the cases have taus that float32 holds exactly: multiples of 1/64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from svit_course.question import Case, Wrong
from svit_utils import sparsify


class Stranger(Attention):
    """A subclass whose forward nobody has read."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


_KINDS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "ViT": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "normalised": (VisionTransformer, {"qk_norm": True}),
    "pooled": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "stranger": (VisionTransformer, {"attn_layer": Stranger}),
}


def vit(case: Case) -> nn.Module:
    """A tiny timm model with uneven attention, in float64 and eval mode, every attention fused as timm has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        if case["model"] == "Swin":
            window = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1,), "num_heads": (2,)}
            return SwinTransformer(**window, window_size=4, num_classes=5).eval()
        kind, options = _KINDS[case["model"]]
        size = {"img_size": tuple(case.get("pixels", (32, 32))), "patch_size": 8, "embed_dim": 24, "num_heads": 3}
        model = kind(**size, depth=case.get("depth", 2), num_classes=5, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.qkv.weight.mul_(case.get("gain", 10.0))
                module.fused_attn = True
    return model.double().eval()


def pictures(case: Case) -> Tensor:
    """[2, 3, H, W] in float64."""
    generator = torch.Generator().manual_seed(case["seed"] + 1000)
    return torch.randn(2, 3, *case.get("pixels", (32, 32)), generator=generator, dtype=torch.float64)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """[B, classes], without gradients."""
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def step(parameters: list[nn.Parameter]) -> None:
    """What an optimiser does: change the parameters that it holds. Here each becomes 0.9 of itself."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.9)


def cut_logits(case: Case, tau: float, *, stepped: bool = False, **options: Any) -> np.ndarray:
    """The library's answer: logits of the case's model, after a `step` or not, sparsified at tau (0: left dense)."""
    model = vit(case)
    if stepped:
        step(list(model.parameters()))
    if tau:
        sparsify(model, tau, **options)
    return np.asarray(logits(model, pictures(case)).numpy())


def judge_names(got: Any, expected: list[str], what: str) -> None:
    """
    Raises:
        Wrong: ``got``, which the student's ``what`` returns, is not the list of module names expected.
    """
    if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
        raise Wrong(f"{what} should return the list of the names of the converted modules, and returns {got!r}")
    if got == expected:
        return
    if not got:
        raise Wrong(f"{what} returns no names; converted should be {', '.join(expected)}")
    raise Wrong(f"{what} names {', '.join(got)}; it should name {', '.join(expected)}, as model.named_modules() does")
