"""Maps that know nothing of the model: what any explanation must beat. Only `edge_maps` looks at the image."""

import torch
from torch import Tensor
from torch.nn import functional as F


def random_maps(batch: int, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Independent uniform noise: [batch, H, W] in [0, 1)."""
    return torch.rand(batch, *size, generator=torch.Generator().manual_seed(seed))


def centre_maps(batch: int, size: tuple[int, int], *, sigma: float = 0.25) -> Tensor:
    """A Gaussian round the centre of every image: [batch, H, W]; `sigma` > 0 in units of each side's length.

    Photographers favour the centre, and so do planted objects kept off the border: a map may score well by that alone.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma!r}")
    height, width = size
    y = (torch.arange(height) + 0.5) / height - 0.5  # [H], 0 at the centre
    x = (torch.arange(width) + 0.5) / width - 0.5  # [W]
    bump = torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2))  # [H, W]
    return bump.expand(batch, height, width).clone()


def edge_maps(images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Sobel gradient magnitude of the grey images [B, 3, H, W]: [B, H, W] per pixel, float32, 0 or more.

    With `size` (h, w), the mean of each cell of such a grid, [B, h, w]: beside a model's maps, give their token grid.

    A map that does no better than an edge detector may be one (Adebayo et al. 2018, arXiv:1810.03292). Grey is the mean
    of the channels, so normalised images will do. A ramp that rises by s per pixel gives s; a step of height h, h / 2
    on both its sides; the reflected border is no edge. Raises ValueError for another shape or sides below 2 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 2:
        raise ValueError(f"images must be [B, 3, H, W] with H, W of at least 2 pixels, got {tuple(images.shape)}")
    grey = F.pad(images.detach().float().mean(dim=1), (1, 1, 1, 1), mode="reflect")  # [B, H+2, W+2]
    # Smoothed one way, differenced the other: as a 3 x 3 convolution, rounding leaves even areas not quite 0.
    rows = (grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]) / 4  # [B, H, W+2]
    columns = (grey[..., :-2] + 2 * grey[..., 1:-1] + grey[..., 2:]) / 4  # [B, H+2, W]
    edges = torch.hypot((rows[..., 2:] - rows[..., :-2]) / 2, (columns[:, 2:] - columns[:, :-2]) / 2)
    return edges if size is None else F.adaptive_avg_pool2d(edges[:, None], size).squeeze(1)


def uniform_maps(batch: int, size: tuple[int, int]) -> Tensor:
    """The map that says nothing: [batch, H, W] of ones."""
    return torch.ones(batch, *size)
