"""What the scores share: arguments checked, cells of a map, the model's probability, seeds.

Images `x` are [B, C, H, W], normalised so that 0 is grey. Maps are [B, h, w] with h dividing H and w dividing W: each
cell stands for a patch of H/h by W/w pixels (h = H, w = W is a map by pixel). `targets` is a class, one class per
image, or None for what the model predicts on the clean image.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svit_utils.exclusive import exclusive
from svit_utils.explain import model_state
from svit_utils.explain.model_state import Targets


def check_images(x: Tensor) -> None:
    """Raises ValueError unless `x` is a floating-point [B, C, H, W] with B at least 1."""
    if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"images must be a floating-point tensor [B, C, H, W] with B at least 1, got {got}")


def check_maps(maps: Tensor, x: Tensor | None = None) -> Tensor:
    """`maps` [B, h, w] in float64 on the CPU; with images `x`, checked to fit them.

    Raises ValueError for another rank, NaN, infinity, or cells that are not whole patches of the images.
    """
    maps = torch.as_tensor(maps).detach().cpu().double()
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"maps must be [B, h, w], got shape {tuple(maps.shape)}")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps must be finite: NaN or infinity found")
    if x is not None:
        check_images(x)
        if len(maps) != len(x) or x.shape[-2] % maps.shape[-2] or x.shape[-1] % maps.shape[-1]:
            allowed = "[B, h, w] with h dividing H and w dividing W of the images [B, C, H, W]"
            raise ValueError(f"maps must be {allowed}, got maps {tuple(maps.shape)} for images {tuple(x.shape)}")
    return maps


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_tau(tau: float) -> None:
    """Raises ValueError unless `tau` lies in [0, 1)."""
    if not 0.0 <= tau < 1.0:  # false for NaN too
        raise ValueError(f"tau must lie in [0, 1), got {tau!r}")


def filled(x: Tensor, fill: float) -> Tensor:
    """A picture of `fill` throughout in the shape of `x`. Raises ValueError unless `fill` is finite."""
    if not math.isfinite(fill):
        raise ValueError(f"fill must be a finite value in the units of the normalised images, got {fill!r}")
    return x.new_full((), fill).expand_as(x)


def explained_classes(model: nn.Module, x: Tensor, targets: Targets, batch_size: int) -> Tensor:
    """The class explained for each of the clean images, [B] int64 on the CPU.

    Raises ValueError as `svit_utils.explain.model_state.explained_classes` does.
    """
    check_count("batch_size", batch_size)
    with torch.no_grad():
        if targets is None:
            parts = [model_state.explained_classes(model(part), None, len(part)) for part in x.split(batch_size)]
            return torch.tensor([target for part in parts for target in part])
        return torch.tensor(model_state.explained_classes(model(x[:1]).expand(len(x), -1), targets, len(x)))


def probability(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability of each image's class: [B], float64 on the CPU."""
    return model(images).cpu().double().softmax(dim=-1).gather(1, classes[:, None]).squeeze(1)


def to_pixels(cells: Tensor, x: Tensor) -> Tensor:
    """[B, h, w] -> [B, H, W] of the images `x`: every pixel gets the value of its cell."""
    height, width = x.shape[-2] // cells.shape[-2], x.shape[-1] // cells.shape[-1]
    return cells.repeat_interleave(height, dim=-2).repeat_interleave(width, dim=-1)


def places(maps: Tensor, seed: int) -> Tensor:
    """Each cell's place when an image's cells are sorted from the highest (0) to the lowest (h * w - 1): [B, h, w].

    Ties are broken at random, in each image by itself: by storage order, a blank map would be a sweep from the top
    left, which on pictures with the object in the middle is better or worse than chance.
    """
    flat = maps.flatten(1)  # [B, n]
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.rand(flat.shape, generator=generator, dtype=torch.float64).argsort(dim=1)  # [B, n]
    order = flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return shuffle.gather(1, order).argsort(dim=1).view_as(maps)


def scaled_by_peak(maps: Tensor) -> Tensor:
    """`maps` [B, ...] divided by each map's largest absolute value, so that no scale costs precision; zeros stay."""
    peak = maps.abs().amax(dim=tuple(range(1, maps.ndim)), keepdim=True)
    return maps / torch.where(peak > 0, peak, torch.ones_like(peak))


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator, from which other libraries draw, and restores its state afterwards.

    Threads that do so take turns.
    """
    with exclusive(torch.default_generator), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the generators of every GPU, for good.
        torch.default_generator.manual_seed(seed)
        yield
