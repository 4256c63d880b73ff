"""PlantedShapes: generated pictures whose class lies in the shape of one object, and nowhere else.

One of ten shapes is planted on a cluttered background, and its exact mask comes with every picture, so that "does the
model look at the object?" has a known answer. What keeps the class out of everything but the shape:

* every class has the same distribution of object *area*, so counting pixels of a colour says nothing;
* the object is brighter or darker than its background by a fair coin, so the mean picture of every class is the same
  and a linear classifier of pixels learns nothing;
* colours, position, clutter and distractors are drawn without looking at the label, but for ``rho``: the probability
  that the background is of the label's own family (hue and coarseness) rather than of one drawn evenly from all ten.

Every random number is a hash of seed, split, index and use (`svit_utils.data.draws`). So a picture is the same in any
batch, and a switch such as ``erase_object`` changes what it names and leaves the rest alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from svit_utils.data.backgrounds import FAMILIES, background, colour, paint_distractor, tint, value_noise
from svit_utils.data.draws import Array, Draws, Use
from svit_utils.data.shapes import ANGLES, SHAPES, coverage, measures

CLASSES: tuple[str, ...] = tuple(SHAPES)

_STREAMS = {"train": 1, "val": 2, "test": 3}
_DEFAULT_SIZE = {"train": 100_000, "val": 2_000, "test": 2_000}
_MIDDLE = 0.06  # the lightness midway between object and background is 0.5 plus or minus at most this
_TEXTURE_CELLS = 8
_MEAN, _STD = 0.5, 0.25
_CHUNK = 64  # pictures made at a time: fits the processor's cache


@dataclass(frozen=True)
class Difficulty:
    """How hard the pictures are. Lightness runs from 0 to 1.

    Raises ValueError for a number outside its range, or where the object could vanish into its background.
    """

    area: tuple[float, float] = (0.16, 0.30)  # share of the picture the object covers, drawn evenly for every class
    rotation: float = 0.3  # largest turn either way, in radians
    shift: float = 0.5  # how far the object's box may be off the middle, as a share of the side; 0.5: wherever it fits
    brighter: float = 0.5  # probability that the object is brighter than its background, not darker
    contrast: tuple[float, float] = (0.34, 0.50)  # difference between the mean lightnesses of object and background
    clutter: float = 0.18  # largest departure of the background's lightness from its mean
    texture: float = 0.05  # the same for the object

    def __post_init__(self) -> None:
        for name in ("area", "contrast"):
            low, high = getattr(self, name)
            if not 0 < low <= high < 1:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high < 1, got {(low, high)}")
        for name, largest in (("rotation", math.pi), ("shift", 0.5), ("brighter", 1)):
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} must lie in [0, {largest:.3g}], got {getattr(self, name)}")
        if self.clutter < 0 or self.texture < 0:
            raise ValueError(f"clutter and texture must not be negative, got {self.clutter} and {self.texture}")
        # The mask is exact only if a pixel of the object can never have the lightness of what it covers.
        (least, most), rest = self.contrast, f"clutter {self.clutter}, texture {self.texture}"
        if least <= self.clutter + self.texture or least / 4 <= self.texture:
            raise ValueError(
                "the smallest contrast must exceed clutter + texture and 4 * texture (else the object could vanish "
                f"into its background), got contrast {least}, {rest}"
            )
        if _MIDDLE + most / 2 + max(self.clutter, self.texture) > 0.5:
            raise ValueError(
                f"{_MIDDLE} + largest contrast / 2 + clutter (or texture) must not exceed 0.5 (lightness would leave "
                f"0 to 1), got contrast {most}, {rest}"
            )


DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(area=(0.22, 0.30), rotation=0.15, contrast=(0.44, 0.56), clutter=0.12, texture=0.03),
    "standard": Difficulty(),
    "hard": Difficulty(area=(0.10, 0.22), rotation=0.5, contrast=(0.30, 0.40), clutter=0.22, texture=0.05),
}


class PlantedBatch(NamedTuple):
    """A batch of `PlantedShapes`. The mask is coverage >= 1/2; only where coverage > 0 does the object show at all."""

    images: Tensor  # float32 [B, 3, H, W], normalised
    labels: Tensor  # int64 [B]
    masks: Tensor  # bool [B, H, W], True on the object
    coverage: Tensor  # float32 [B, H, W], share of each pixel that the object covers
    backgrounds: Tensor  # int64 [B], family of the background


class PlantedShapes(Dataset):
    """Generated pictures of ten shapes on clutter, with the exact mask of the object. Nothing is downloaded or stored.

    An item is ``(image, label)``: float32 [3, img_size, img_size] with about zero mean and unit deviation, and an int,
    which is ``i % 10`` for picture ``i``. ``batch(indices)`` gives a :class:`PlantedBatch` with the masks as well.

    Args:
        split: "train", "val" or "test"; the three have separate random streams, for the same seed too.
        size: number of pictures; 100,000 / 2,000 / 2,000 by default. It does not change the pictures.
        img_size: side in pixels.
        distractors: number of small blobs and bars, drawn below the object and without regard to the label.
        rho: probability, in [0, 1], that the background is of the label's own family.
        swap_background: give every background the family of *another* class, drawn evenly (whatever ``rho``).
        erase_object: leave the object out; the mask still says where it would be.
        difficulty: "easy", "standard", "hard", or a :class:`Difficulty`.

    Raises ValueError for an unknown split or difficulty, or a number outside its range.
    """

    classes: tuple[str, ...] = CLASSES

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        *,
        img_size: int = 56,
        seed: int = 0,
        distractors: int = 0,
        rho: float = 0.0,
        swap_background: bool = False,
        erase_object: bool = False,
        difficulty: str | Difficulty = "standard",
    ) -> None:
        if split not in _STREAMS:
            raise ValueError(f"split must be one of {sorted(_STREAMS)}, got {split!r}")
        size = _DEFAULT_SIZE[split] if size is None else size
        for name, value, least in (("size", size, 1), ("img_size", img_size, 16), ("distractors", distractors, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"rho must lie in [0, 1], got {rho}")
        if isinstance(difficulty, str):
            if difficulty not in DIFFICULTIES:
                raise ValueError(f"difficulty must be one of {list(DIFFICULTIES)} or a Difficulty, got {difficulty!r}")
            difficulty = DIFFICULTIES[difficulty]
        _check_fit(difficulty.area[1])
        self.split, self.size, self.img_size, self.seed = split, size, img_size, seed
        self.distractors, self.rho = distractors, rho
        self.swap_background, self.erase_object = swap_background, erase_object
        self.difficulty = difficulty

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        shown = ("size", "img_size", "seed", "distractors", "rho", "swap_background", "erase_object")
        return f"PlantedShapes({self.split!r}, {', '.join(f'{name}={getattr(self, name)}' for name in shown)})"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """What a DataLoader calls for a whole batch: much quicker than one picture at a time."""
        batch = self.batch(indices)
        return list(zip(batch.images.unbind(0), batch.labels.tolist(), strict=True))

    def batch(self, indices: Iterable[int] | Tensor | int) -> PlantedBatch:
        """Pictures ``indices`` (negative ones count from the end; an int n means the first n) with masks and labels.

        Raises IndexError for an index outside the set.
        """
        index = np.array(list(range(indices) if isinstance(indices, int) else map(int, indices)), dtype=np.int64)
        index = np.where(index < 0, index + self.size, index)
        if index.size == 0:
            raise ValueError("batch() needs at least one index, got none")
        if index.min() < 0 or index.max() >= self.size:
            raise IndexError(f"index outside the {self.size} pictures of this set")
        parts = [self._make(index[i : i + _CHUNK]) for i in range(0, len(index), _CHUNK)]
        return PlantedBatch(*(torch.from_numpy(np.concatenate(field)) for field in zip(*parts, strict=True)))

    def denormalise(self, images: Tensor) -> Tensor:
        """Back to colours in [0, 1], for display."""
        return (images * _STD + _MEAN).clamp(0, 1)

    def _make(self, index: Array) -> tuple[Array, ...]:
        """The fields of a `PlantedBatch` for pictures ``index`` [B], as numpy arrays."""
        d, size = self.difficulty, self.img_size
        draws = Draws(self.seed, _STREAMS[self.split], index)
        label = index % len(CLASSES)
        family = self._families(draws, label)
        middle = draws.between(Use.MIDDLE, 0.5 - _MIDDLE, 0.5 + _MIDDLE)
        sign = np.where(draws.one(Use.SIGN) < d.brighter, np.float32(0.5), np.float32(-0.5))
        step = sign * draws.between(Use.CONTRAST, *d.contrast)  # half of the contrast, signed

        image = background(draws, family, middle - step, d.clutter, size)
        for number in range(self.distractors):
            paint_distractor(image, draws, number, middle - step, 2 * step)

        covered = self._plant(draws, label)
        if not self.erase_object:
            texture = value_noise(draws, Use.TEXTURE, _TEXTURE_CELLS, size) * np.float32(d.texture)
            lightness = (middle + step)[:, None, None] + texture
            drawn = colour(lightness, tint(draws.one(Use.HUE), draws.between(Use.SATURATION, 0.1, 0.8)))
            image += covered[:, None] * (drawn - image)

        image -= np.float32(_MEAN)
        image *= np.float32(1 / _STD)
        return image, label, covered >= 0.5, covered, family

    def _families(self, draws: Draws, label: Array) -> Array:
        """The family of each background, [B]."""
        if self.swap_background:
            other = (draws.one(Use.SWAP) * (FAMILIES - 1)).astype(np.int64)
            return (label + 1 + other) % FAMILIES
        free = (draws.one(Use.FAMILY) * FAMILIES).astype(np.int64)
        return np.where(draws.one(Use.TIED) < self.rho, label, free)

    def _plant(self, draws: Draws, label: Array) -> Array:
        """Size, turn and place of each object: its coverage [B, H, W]."""
        d, size = self.difficulty, self.img_size
        unit_area, reach = measures()
        scale = np.sqrt(draws.between(Use.AREA, *d.area) / unit_area[label]) * size  # pixels per unit
        turn = draws.between(Use.TURN, -d.rotation, d.rotation).astype(np.float64)

        def extent(direction: float) -> Array:
            """Pixels from the centre to the edge of the box around the turned object."""
            slot = np.rint((direction - turn) / (2 * math.pi) * ANGLES).astype(int) % ANGLES
            return reach[label, slot] * scale

        def place(counter: int, low: Array, high: Array) -> Array:
            """Where the box fits, a pixel from the border, and is no further from the middle than allowed."""
            room = np.clip((size - 2 - low - high) / 2, 0, d.shift * size)
            return (size + low - high) / 2 + room * (2 * draws.one(counter) - 1)

        right = place(Use.X, extent(math.pi), extent(0.0))
        down = place(Use.Y, extent(math.pi / 2), extent(-math.pi / 2))
        return coverage(label, size, right, down, turn, scale)


def _check_fit(area: float) -> None:
    """Refuse an ``area`` (share of the picture) with which some shape would be wider than the picture."""
    unit_area, reach = measures()
    width = (reach + np.roll(reach, ANGLES // 2, axis=1)).max(1)  # largest extent in any direction
    width = width * math.sqrt(area) / np.sqrt(unit_area)
    if width.max() > 1.06:
        widest = f"the {CLASSES[int(width.argmax())]} would be {width.max():.2f} times as wide"
        raise ValueError(f"an object of area {area} does not fit the picture: {widest}; choose a smaller area")
