"""References that share nothing with the library: what fused attention computed, call by call, and its rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def tiny(**kwargs: Any) -> VisionTransformer:
    """A Vision Transformer of 16 patches whose attention is far from even, with a head that matters."""
    torch.manual_seed(0)
    return sharp(VisionTransformer(**{**TINY, **kwargs}))


def sharp(model: nn.Module) -> Any:
    """Every weight matrix drawn anew, large enough that no map is close to another one or to an even one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:  # layer scale starts near 0
                parameter.fill_(1)
            elif parameter.ndim >= 2:
                width = parameter[0].numel() if parameter.ndim == 2 or parameter.ndim == 4 else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.5 / width**0.5)
    return model.eval()


def pictures(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


class Calls(TorchFunctionMode):
    """Keeps softmax(q k^T scale), [B, H, N, M], of every call of PyTorch's fused attention, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[0].double(), args[1].double()
            self.weights.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1))
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The weights [B, H, N, M] of each call of fused attention in one forward pass."""
    with torch.no_grad(), Calls() as seen:
        model(x)
    return seen.weights


def rolled(maps: list[Tensor], image: int, residual: float = 0.5) -> np.ndarray:
    """The rollout [N, N] of one image: a product of matrices, each with its rows divided by their sums."""
    product = None
    for weights in maps:
        step = (1 - residual) * weights[image].double().mean(0).numpy() + residual * np.eye(weights.shape[-1])
        step = step / step.sum(axis=1, keepdims=True)
        product = step if product is None else step @ product
    assert product is not None
    return product


def check_rollout(got: Tensor, maps: list[Tensor], shares: Any, prefix: int, atol: float = 1e-5) -> None:
    """`got` [B, h, w] is what the head, with `shares` [N] or [B, N] of the tokens, takes from each patch by rollout."""
    shares = np.asarray(shares, dtype=float)
    for image in range(len(got)):
        rows = (shares if shares.ndim == 1 else shares[image]) @ rolled(maps, image)
        np.testing.assert_allclose(got[image].flatten().numpy(), rows[prefix:], atol=atol)


def even(tokens: list[int], count: int) -> np.ndarray:
    """Shares [count] of a head that reads these tokens, all alike."""
    shares = np.zeros(count)
    shares[tokens] = 1 / len(tokens)
    return shares


class Repeating(VisionTransformer):
    """One block in one place, called three times: "universal" and recurrent transformers."""

    def forward_features(self, x, **_):
        x = self._pos_embed(self.patch_embed(x))
        for _i in range(3):
            x = self.blocks[0](x)
        return self.norm(x)
