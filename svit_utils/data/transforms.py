"""From a PIL picture to a normalised tensor, and back.

Every random choice is drawn from torch's generator, so seeding or restoring that generator repeats it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")  # as timm knows them


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


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture before a model sees it. The fields are those of timm's ``pretrained_cfg``.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, for colours in [0, 1].
        interpolation: ``"bicubic"``, ``"bilinear"``, ``"nearest"``, ...
        crop_pct: share of the side that the crop of the centre keeps, in (0, 1].
        crop_mode: ``"center"``, ``"squash"`` or ``"border"``, as timm knows them.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = NORMALISATIONS["imagenet"][0]
    std: tuple[float, ...] = NORMALISATIONS["imagenet"][1]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        normalisation((self.mean, self.std))
        if min(self.size) < 1:
            raise ValueError(f"img_size must be at least 1 pixel, got {min(self.size)}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        for name, known in {"interpolation": INTERPOLATIONS, "crop_mode": ("center", "squash", "border")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def transform(self, augment: bool = False) -> Callable[[Any], Tensor]:
        """PIL picture in RGB -> float32 [3, height, width]: timm's, or with ``augment`` a random crop and flip."""
        from timm.data import create_transform
        from timm.data.transforms import str_to_interp_mode
        from torchvision import transforms as T

        if not augment:
            return create_transform((3, *self.size), **{k: v for k, v in vars(self).items() if k != "size"})
        way = str_to_interp_mode(self.interpolation)
        steps = [T.RandomResizedCrop(self.size, interpolation=way), T.RandomHorizontalFlip(), T.ToTensor()]
        return T.Compose([*steps, T.Normalize(self.mean, self.std)])

    def on_mask(self, mask: Any) -> Tensor:
        """A mask, bool [H, W] of a whole picture, as `transform` moves that picture: bool [height, width].

        The same steps of resizing and cropping, on the mask as grey values; True from half on. What is padded is False.
        """
        from PIL import Image

        picture = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
        for step in self.transform().transforms:  # type: ignore[attr-defined]
            if not hasattr(step, "size"):  # the first that does not move pixels
                break
            if hasattr(step, "fill"):
                step.fill = 0
            picture = step(picture)
        return torch.from_numpy(np.asarray(picture) >= 128)

    def denormalise(self, images: Tensor) -> Tensor:
        """Back to colours in [0, 1], for display."""
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def preprocessing(
    model: Any = None,
    card: Mapping[str, Any] | None = None,
    *,
    img_size: int | None = None,
    normalise: Normalisation | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """How ``model`` wants its pictures: the one place where that is decided, for every command.

    A later source replaces an earlier one, value by value: the model's ``pretrained_cfg`` (``model`` may be that
    mapping itself), the image size that the model was built for, the card of `svit_utils.load_trained`, the arguments.
    What no source says is timm's default: 224 px, ImageNet's statistics, bicubic, the centre 87.5 %.

    Raises:
        ValueError: a value that is not possible, or a model of other than three channels.
    """
    about = dict(model if isinstance(model, Mapping) else getattr(model, "pretrained_cfg", None) or {})
    card = dict(card or {})
    if card.get("data") == "planted":  # what `PlantedShapes` are normalised with; older cards do not say so
        about |= {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    about |= {k: v for k, v in card.items() if v is not None}
    channels, *size = about.get("input_size") or (3, 224, 224)
    size = built or size if img_size is None else img_size
    if channels != 3:
        raise ValueError(f"the model takes images of {channels} channels, and pictures are read with three")
    found = {name: about[name] for name in ("interpolation", "crop_pct", "crop_mode") if about.get(name) is not None}
    given = {"crop_pct": crop_pct, "interpolation": interpolation}
    found |= {name: value for name, value in given.items() if value is not None}
    own = (
        (about["mean"], about["std"]) if about.get("mean") is not None and about.get("std") is not None else "imagenet"
    )
    mean, std = normalisation(own if normalise is None else normalise)
    height, width = (size, size) if isinstance(size, int) else map(int, size)
    return Preprocessing((height, width), mean, std, **found)


def check_options(transform: object, img_size: int | None, augment: bool, normalise: Normalisation) -> Normalisation:
    """The pictures' normalisation, "none" with one's own transform; ValueError for options that would be ignored."""
    if transform is not None and augment:
        raise ValueError("give either transform or augment=True, not both: a transform of your own replaces everything")
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    return normalise if transform is None else "none"
