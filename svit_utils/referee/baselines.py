"""Maps that know nothing of the model, and all but one nothing of the image: what any explanation must beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["centre_maps", "edge_maps", "random_maps", "uniform_maps"]


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


def edge_maps(images: Tensor) -> Tensor:
    """Sobel gradient magnitude of the grey images: [B, 3, H, W] -> [B, H, W], float32, 0 or more.

    The one baseline that sees the image, and still no model: a map that does no better than an edge detector may be
    one (Adebayo et al. 2018, arXiv:1810.03292). Grey is the mean of the three channels, so that normalised images will
    do. In grey levels per pixel: a ramp that rises by s per pixel gives s, a step of height h gives h / 2 on the two
    pixels beside it. Reflected at the border, so that the picture's end is no edge.

    Raises:
        ValueError: images are not [B, 3, H, W] with sides of at least 2 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 2:
        raise ValueError(f"images must be [B, 3, H, W] with H, W of at least 2 pixels, got {tuple(images.shape)}")
    grey = F.pad(images.detach().float().mean(dim=1), (1, 1, 1, 1), mode="reflect")  # [B, H+2, W+2]
    # Smoothed one way, differenced the other: written as a 3 x 3 convolution, rounding leaves flat ground not quite 0.
    rows = (grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]) / 4  # [B, H, W+2]
    columns = (grey[..., :-2] + 2 * grey[..., 1:-1] + grey[..., 2:]) / 4  # [B, H+2, W]
    return torch.hypot((rows[..., 2:] - rows[..., :-2]) / 2, (columns[:, 2:] - columns[:, :-2]) / 2)


def uniform_maps(batch: int, size: tuple[int, int]) -> Tensor:
    """The map that says nothing: [batch, H, W] of ones."""
    return torch.ones(batch, *size)
