"""From a PIL picture to a normalised tensor, and back.

Every random choice is drawn from torch's generator, so seeding or restoring that generator repeats it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Normalisation = str | tuple[Sequence[float], Sequence[float]]

NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # timm's "inception" values: many of its ViTs were trained with these
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def normalisation(choice: Normalisation) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, by a name in ``NORMALISATIONS`` or a pair (mean, std) of three numbers.

    A timm model wants its own: ``(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])``. Raises ValueError for
    an unknown name, another number of channels, or a deviation that is not positive.
    """
    if isinstance(choice, str):
        if choice not in NORMALISATIONS:
            raise ValueError(f"normalise must be one of {list(NORMALISATIONS)} or a pair (mean, std), got {choice!r}")
        return NORMALISATIONS[choice]
    mean, std = (tuple(float(v) for v in part) for part in choice)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"(mean, std) must be three numbers each, std above 0, got {choice!r}")
    return mean, std


class PictureSet(Dataset):
    """The items ``indices`` (default: all) of ``source``, a torchvision data set, as (image, label).

    The pictures were normalised with ``normalise``, and can be shown again. ``targets`` lists the labels in order.
    """

    def __init__(self, source: Any, normalise: Normalisation, indices: Sequence[int] | None = None) -> None:
        self.source, self.indices = source, list(range(len(source)) if indices is None else indices)
        self._mean, self._std = (torch.tensor(part).view(3, 1, 1) for part in normalisation(normalise))
        self.classes: list[str] = list(source.classes)
        self.targets: list[int] = [source.targets[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[self.indices[index]]
        return image, int(label)

    def __repr__(self) -> str:
        return f"PictureSet({self.source.root}, {len(self)} images, {len(self.classes)} classes)"

    def denormalise(self, images: Tensor) -> Tensor:
        """Back to colours in [0, 1], for display."""
        return (images * self._std + self._mean).clamp(0, 1)


def small_picture_transform(
    native: int, img_size: int | None, augment: bool, normalise: Normalisation
) -> Callable[[Any], Tensor]:
    """For pictures of one small size (CIFAR): with ``augment`` a random crop, padded by an eighth, and a random flip;
    then resize (bicubic) to ``img_size``; then normalise. Cropping before resizing is much less work."""
    from torchvision import transforms as T

    steps: list[Any] = []
    if augment:
        steps += [T.RandomCrop(native, padding=native // 8), T.RandomHorizontalFlip()]
    if img_size is not None and img_size != native:
        steps.append(T.Resize((img_size, img_size), T.InterpolationMode.BICUBIC))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(*normalisation(normalise))])


def photograph_transform(
    img_size: int, augment: bool, normalise: Normalisation, crop_pct: float = 0.875
) -> Callable[[Any], Tensor]:
    """For photographs of any size: with ``augment`` a random resized crop and a random flip; else resize, then crop
    the centre, ``crop_pct`` of the side; then normalise."""
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    if augment:
        steps = [T.RandomResizedCrop(img_size, interpolation=bicubic), T.RandomHorizontalFlip()]
    else:
        steps = [T.Resize(round(img_size / crop_pct), bicubic), T.CenterCrop(img_size)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(*normalisation(normalise))])


def check_options(transform: object, img_size: int | None, augment: bool, normalise: Normalisation) -> Normalisation:
    """The pictures' normalisation, "none" with one's own transform; ValueError for options that would be ignored."""
    if transform is not None and augment:
        raise ValueError("give either transform or augment=True, not both: a transform of your own replaces everything")
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    return normalise if transform is None else "none"
