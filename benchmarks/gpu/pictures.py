"""Pictures that stay on the device as uint8: crops, flips, resizing and normalisation happen there, a batch at a time.

They are what `svit_utils.data.cifar10(img_size=..., augment=...)` makes with Pillow one by one: a crop after padding by
an eighth, a flip, Pillow's bicubic enlargement with its rounding to whole levels, normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_matrix(before: int, after: int, device: torch.device | str = "cpu") -> Tensor:
    """[after, before]: the rows of Pillow's bicubic resizing along one side (the kernel with a = -1/2)."""
    if before == after:
        return torch.eye(before, device=device)
    columns = torch.eye(before)[None, None]  # each a picture with one bright column
    wide = F.interpolate(columns, size=(before, after), mode="bicubic", align_corners=False, antialias=True)
    return wide[0, 0].T.contiguous().to(device)


@dataclass
class Pictures:
    """A set of small pictures and their labels on a device.

    Attributes:
        images: uint8 [n, 3, s, s].
        labels: int64 [n].
        size: side of what `batch` gives, in pixels.
        mean, std: per channel, of values in [0, 1].
        augment: whether `batch` crops and flips at random when it is given a generator.
    """

    images: Tensor
    labels: Tensor
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    augment: bool = False

    def __post_init__(self) -> None:
        device = self.images.device
        self._resize = resize_matrix(self.images.shape[-1], self.size, device)
        shape = (3, 1, 1)
        self._scale = (255 * torch.tensor(self.std, device=device)).reciprocal().view(shape)
        self._shift = (torch.tensor(self.mean, device=device) / torch.tensor(self.std, device=device)).view(shape)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Pictures ``index`` [b], normalised, float32 [b, 3, size, size], and their labels [b].

        Args:
            index: on the pictures' device.
            generator: of the crops and flips, on the same device; None leaves the pictures as they are.
        """
        x = self.images[index]
        if self.augment and generator is not None:
            x = crop_and_flip(x, generator)
        x = x.float()
        if self.size != x.shape[-1]:
            x = (x @ self._resize.T).round_().clamp_(0, 255)  # along the rows first, to whole levels, as Pillow does
            x = (self._resize @ x).round_().clamp_(0, 255)
        return x.mul_(self._scale).sub_(self._shift), self.labels[index]


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture of x [b, 3, s, s] shifted by up to an eighth of its side, black outside, and mirrored or not."""
    b, _, s, _ = x.shape
    pad, device = s // 8, x.device
    corner = torch.randint(2 * pad + 1, (2, b, 1), generator=generator, device=device)
    mirror = torch.rand(b, 1, generator=generator, device=device) < 0.5
    along = torch.arange(s, device=device)
    rows = corner[0] + along  # [b, s]
    columns = corner[1] + torch.where(mirror, s - 1 - along, along)
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    which = torch.arange(b, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def indices(n: int, batch: int, steps: int, seed: int) -> Tensor:
    """The pictures of each step [steps, batch]: permutations of all n, one after the other; the same on any device."""
    g = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // n)
    return torch.cat([torch.randperm(n, generator=g) for _ in range(epochs)])[: steps * batch].view(steps, batch)
