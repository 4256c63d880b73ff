"""Maps that have not looked at the image: what any explanation must beat."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centre_maps", "random_maps", "uniform_maps"]


def random_maps(batch: int, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Independent uniform noise: [batch, H, W] in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *size, generator=generator)


def centre_maps(batch: int, size: tuple[int, int], *, sigma: float = 0.25) -> Tensor:
    """A Gaussian round the centre of every image: [batch, H, W]; `sigma` in units of each side's length.

    Photographers, and planted objects kept off the border, favour the centre: a map may score well by knowing only
    that.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma!r}")
    height, width = size
    y = (torch.arange(height) + 0.5) / height - 0.5  # [H], 0 at the centre
    x = (torch.arange(width) + 0.5) / width - 0.5  # [W]
    bump = torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2))  # [H, W]
    return bump.expand(batch, height, width).clone()


def uniform_maps(batch: int, size: tuple[int, int]) -> Tensor:
    """The map that says nothing: [batch, H, W] of ones."""
    return torch.ones(batch, *size)
