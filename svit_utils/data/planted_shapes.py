"""PlantedShapes: pictures whose class lies in the shape of one object, and nowhere else.

Ten shapes, given as signed distance functions, are planted on cluttered ground (value noise in several octaves), and
the exact mask of the object comes with every picture. "Does the model look at the object?" has a known answer.

What keeps the class out of everything but the shape:

* every class has the same distribution of object *area*, so counting pixels of a colour says nothing;
* the object is brighter or darker than its ground by a fair coin, so the mean picture of every class is the same and a
  linear probe on pixels has nothing to hold on to;
* colours, position, clutter and distractors are drawn without looking at the label.

The one wanted exception is ``rho``: with probability ``rho`` the ground comes from the family (hue and coarseness) that
belongs to the label, otherwise from a family drawn evenly from all ten.

Every number of picture ``i`` is a hash of (seed, split, i, what it is for). So a picture is the same whatever the batch
it is made in, and switches such as ``erase_object`` change what they name and leave everything else as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Array = np.ndarray

# --------------------------------------------------------------------------------------------------------------------
# Shapes. Each function takes x, y (any shape; x to the right, y up) and returns a signed distance: negative inside,
# zero on the outline, slope one across it away from corners. The size is arbitrary: it is normalised by area below.
# --------------------------------------------------------------------------------------------------------------------


def _disc(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1.0


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - 0.725) - 0.275


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 1.0


def _triangle(x: Array, y: Array) -> Array:
    side = np.float32(math.sqrt(0.75)) * np.abs(x) + np.float32(0.5) * y
    return np.maximum(side, -y) - 0.5


def _cross(x: Array, y: Array) -> Array:
    a, b = np.abs(x), np.abs(y)
    w = 0.34
    return np.minimum(np.maximum(a - 1.0, b - w), np.maximum(a - w, b - 1.0))


def _star(x: Array, y: Array) -> Array:
    # Fold the plane into the wedge between a tip (straight up) and the notch beside it; there one straight edge is
    # left.
    # nx, ny: normal of the line through the centre and that notch.
    nx, ny = np.float32(math.cos(math.pi / 5)), np.float32(-math.sin(math.pi / 5))
    a, b = np.abs(x), y
    for _ in range(2):  # angles off the tip: up to 180 degrees, then 108, then 36
        over = np.maximum(nx * a + ny * b, 0.0)
        a, b = np.abs(a - 2.0 * over * nx), b - 2.0 * over * ny
    notch = 0.46
    ex, ey = notch * math.sin(math.pi / 5), notch * math.cos(math.pi / 5) - 1.0  # from the tip (0, 1) to the notch
    length = math.hypot(ex, ey)
    return np.float32(-ey / length) * a + np.float32(ex / length) * (b - 1.0)


def _heart(x: Array, y: Array) -> Array:
    root = np.float32(math.sqrt(0.5))
    u, v = root * (x + y), root * (y - x)
    square = np.maximum(np.abs(u), np.abs(v)) - 1.0
    lobes = np.minimum(np.sqrt((u - 1.0) ** 2 + v * v), np.sqrt(u * u + (v - 1.0) ** 2)) - 1.0
    return np.minimum(square, lobes)


def _crescent(x: Array, y: Array) -> Array:
    bite = x - 0.5
    return np.maximum(np.sqrt(x * x + y * y) - 1.0, 0.8 - np.sqrt(bite * bite + y * y))


def _arrow(x: Array, y: Array) -> Array:
    b = np.abs(y)
    shaft = np.maximum(np.maximum(-1.0 - x, x - 0.2), b - 0.26)
    length = math.hypot(0.85, 1.0)
    head = np.maximum(-x, np.float32(0.85 / length) * (x - 1.0) + np.float32(1.0 / length) * b)
    return np.minimum(shaft, head)


def _hourglass(x: Array, y: Array) -> Array:
    a, b = np.abs(x), np.abs(y)
    length = math.hypot(1.0, 0.74)
    return np.maximum(b - 1.0, np.float32(1.0 / length) * (a - 0.12) - np.float32(0.74 / length) * b)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
CLASSES: tuple[str, ...] = tuple(SHAPES)
NUM_FAMILIES = len(CLASSES)

_ANGLES = 720  # resolution of the table of extents


@lru_cache(maxsize=1)
def _measures() -> tuple[Array, Array]:
    """Area [10] of every shape, and how far it reaches [10, _ANGLES] in each direction, both at its own size."""
    axis = (np.arange(640, dtype=np.float64) + 0.5) / 160.0 - 2.0
    axis = axis * 1.35  # reach 2.7: the heart is the largest
    x, y = np.meshgrid(axis, axis)
    cell = axis[1] - axis[0]
    angles = 2 * math.pi * np.arange(_ANGLES) / _ANGLES
    directions = np.stack([np.cos(angles), np.sin(angles)])
    areas, reach = [], []
    for shape in SHAPES.values():
        distance = shape(x, y)
        areas.append(np.clip(0.5 - distance / cell, 0.0, 1.0).sum() * cell**2)
        edge = (distance <= 0) & (distance > -3 * cell)
        reach.append((np.stack([x[edge], y[edge]], 1) @ directions).max(0) + cell)
    return np.array(areas), np.array(reach)


# --------------------------------------------------------------------------------------------------------------------
# Random numbers by counting: a hash of (key of the picture, number of the draw), so that order and batch do not matter.
# --------------------------------------------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
_STREAMS = {"train": 1, "val": 2, "test": 3}


def _mix(z: Array) -> Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), elementwise on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_key(seed: int, split: str) -> int:
    key = np.array([seed & _MASK64], dtype=np.uint64)
    key = _mix(key + np.uint64(_GOLDEN))
    return int(_mix(key ^ np.uint64((_STREAMS[split] * 0xD1342543DE82EF95) & _MASK64))[0])


class _Draws:
    """Uniform numbers for a batch of picture keys [B]. Each use has a fixed range of counters of its own."""

    def __init__(self, keys: Array) -> None:
        self.keys = keys

    def uniform(self, start: int, count: int) -> Array:
        """[B, count] float32 in [0, 1), from counters ``start`` to ``start + count - 1``."""
        counters = (np.arange(start + 1, start + count + 1, dtype=np.uint64)) * np.uint64(_GOLDEN)
        bits = _mix(self.keys[:, None] + counters[None, :])
        return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

    def between(self, counter: int, low: float, high: float) -> Array:
        return np.float32(low) + np.float32(high - low) * self.uniform(counter, 1)[:, 0]


# Ranges of counters. Never renumber: every picture would change, and shipped checkpoints were trained on them.
_C_MID, _C_CONTRAST, _C_SIGN, _C_AREA, _C_TURN, _C_X, _C_Y = range(7)
_C_HUE, _C_SATURATION, _C_GROUND_HUE, _C_GROUND_SATURATION, _C_FAMILY, _C_TIED, _C_SWAP = range(7, 14)
_C_NOISE, _C_TINT, _C_TEXTURE, _C_DISTRACTORS = 1000, 2000, 3000, 4000
_PER_DISTRACTOR = 10

_OCTAVES = (4, 8, 16)  # cells along a side
_TINT_CELLS = 4
_TEXTURE_CELLS = 8


@lru_cache(maxsize=32)
def _interpolation(cells: int, size: int) -> Array:
    """[cells + 1, size] weights that spread lattice values over pixels (smoothstep, as in value noise)."""
    position = (np.arange(size) + 0.5) / size * cells
    left = np.floor(position).astype(int)
    t = position - left
    t = t * t * (3 - 2 * t)
    weights = np.zeros((cells + 1, size))
    weights[left, np.arange(size)] = 1 - t
    weights[left + 1, np.arange(size)] += t
    return weights.astype(np.float32)


def _value_noise(draws: _Draws, start: int, cells: int, size: int) -> Array:
    """[B, size, size] smooth noise in [-1, 1]."""
    lattice = draws.uniform(start, (cells + 1) ** 2).reshape(-1, cells + 1, cells + 1) * np.float32(2) - np.float32(1)
    weights = _interpolation(cells, size)
    return np.matmul(np.matmul(weights.T, lattice), weights)


def _cos(angles: Array) -> Array:
    # math.cos one by one: numpy's vector code may round differently from its scalar code, so by place in the batch.
    return np.array([math.cos(a) for a in angles.tolist()], dtype=np.float32)


def _tint(hue: Array, strength: Array) -> Array:
    """[B, 3] colour direction with channels that sum to zero; hue in turns, strength in [0, 1]."""
    turn = hue.astype(np.float64) * (2 * math.pi)
    return np.stack([_cos(turn - 2 * math.pi * c / 3) * strength for c in range(3)], axis=1)


def _colour(lightness: Array, tint: Array) -> Array:
    """[B, 3, H, W] in [0, 1] from lightness [B, H, W] in [0, 1] and tint [B, 3, 1|H, 1|W]; keeps the lightness."""
    room = np.minimum(lightness, 1 - lightness)
    return lightness[:, None] + tint * room[:, None]


# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """How hard the pictures are. Lightness runs from 0 to 1.

    area      share of the picture that the object covers, drawn evenly between the two, the same for every class
    rotation  largest turn, in radians, either way
    shift     largest distance of the object's box from the middle, in each direction, as a share of the picture's side
              (never beyond the border; 0.5 is "anywhere it fits")
    brighter  probability that the object is brighter than its ground, not darker
    contrast  difference of lightness between object and ground (means), either sign
    clutter   largest departure of the ground's lightness from its mean
    texture   the same for the object
    """

    area: tuple[float, float] = (0.16, 0.30)
    rotation: float = 0.3
    shift: float = 0.5
    brighter: float = 0.5
    contrast: tuple[float, float] = (0.34, 0.50)
    clutter: float = 0.18
    texture: float = 0.05

    def __post_init__(self) -> None:
        for name in ("area", "contrast"):
            low, high = getattr(self, name)
            if not 0 < low <= high < 1:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high < 1, got {(low, high)}")
        if not 0 <= self.rotation <= math.pi:
            raise ValueError(f"rotation must lie in [0, pi] radians, got {self.rotation}")
        if not 0 <= self.shift <= 0.5:
            raise ValueError(f"shift must lie in [0, 0.5], got {self.shift}")
        if not 0 <= self.brighter <= 1:
            raise ValueError(f"brighter must lie in [0, 1], got {self.brighter}")
        if self.clutter < 0 or self.texture < 0:
            raise ValueError(f"clutter and texture must not be negative, got {self.clutter} and {self.texture}")
        # The mask is exact only if an object pixel can never have the lightness of what it covers.
        if self.contrast[0] <= self.clutter + self.texture or self.contrast[0] / 4 <= self.texture:
            raise ValueError(
                "the smallest contrast must exceed clutter + texture and 4 * texture (else the object could vanish "
                f"into its ground), got contrast {self.contrast[0]}, clutter {self.clutter}, texture {self.texture}"
            )
        if _MIDDLE + self.contrast[1] / 2 + max(self.clutter, self.texture) > 0.5:
            raise ValueError(
                f"{_MIDDLE} + largest contrast / 2 + clutter (or texture) must not exceed 0.5 (lightness would leave "
                f"0 to 1), got contrast {self.contrast[1]}, clutter {self.clutter}, texture {self.texture}"
            )


_MIDDLE = 0.06  # the middle between object and ground is 0.5 plus or minus this

DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(area=(0.22, 0.30), rotation=0.15, contrast=(0.44, 0.56), clutter=0.12, texture=0.03),
    "standard": Difficulty(),
    "hard": Difficulty(area=(0.10, 0.22), rotation=0.5, contrast=(0.30, 0.40), clutter=0.22, texture=0.05),
}


class PlantedBatch(NamedTuple):
    """``images`` float32 [B, 3, H, W], normalised; ``labels`` int64 [B]; ``masks`` bool [B, H, W], True on the object;
    ``coverage`` float32 [B, H, W], share of each pixel that the object covers (the mask is coverage >= 1/2; a pixel
    differs from the picture without the object only where coverage > 0); ``backgrounds`` int64 [B], family of the
    ground."""

    images: Tensor
    labels: Tensor
    masks: Tensor
    coverage: Tensor
    backgrounds: Tensor


_MEAN, _STD = 0.5, 0.25
_DEFAULT_SIZE = {"train": 100_000, "val": 2_000, "test": 2_000}
_CHUNK = 64  # pictures made at a time: fits the processor's cache


class PlantedShapes(Dataset):
    """Generated pictures of ten shapes on clutter, with the exact mask of the object. Nothing is downloaded or stored.

    An item is ``(image, label)``: float32 [3, img_size, img_size] with about zero mean and unit deviation, and an int.
    ``batch(indices)`` gives a :class:`PlantedBatch` with the masks as well. Classes are balanced: the label of picture
    ``i`` is ``i % 10``.

    Args:
        split: "train", "val" or "test"; the three have separate random streams, for the same seed too.
        size: number of pictures; 100,000 / 2,000 / 2,000 by default. It does not change the pictures.
        img_size: side in pixels.
        seed: any integer.
        distractors: number of small blobs and bars, drawn below the object and without regard to the label.
        rho: probability, in [0, 1], that the ground is of the label's own family; otherwise the family is random.
        swap_background: give every ground the family of *another* class, drawn evenly (whatever ``rho``).
        erase_object: leave the object out; the mask still says where it would be.
        difficulty: "easy", "standard", "hard", or a :class:`Difficulty`.

    Raises:
        ValueError: for an unknown split or difficulty, or a number outside its range.
        IndexError: for an index outside the set.
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
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if img_size < 16:
            raise ValueError(f"img_size must be at least 16 pixels, got {img_size}")
        if distractors < 0:
            raise ValueError(f"distractors must be 0 or more, got {distractors}")
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"rho must lie in [0, 1], got {rho}")
        if isinstance(difficulty, str):
            if difficulty not in DIFFICULTIES:
                raise ValueError(f"difficulty must be one of {list(DIFFICULTIES)} or a Difficulty, got {difficulty!r}")
            difficulty = DIFFICULTIES[difficulty]
        self.split, self.size, self.img_size, self.seed = split, size, img_size, seed
        self.distractors, self.rho = distractors, rho
        self.swap_background, self.erase_object = swap_background, erase_object
        self.difficulty = difficulty
        self._key = _stream_key(seed, split)
        self._check_fit()

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return (
            f"PlantedShapes({self.split!r}, size={self.size}, img_size={self.img_size}, seed={self.seed}, "
            f"distractors={self.distractors}, rho={self.rho}, swap_background={self.swap_background}, "
            f"erase_object={self.erase_object})"
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """What a DataLoader calls for a whole batch: much quicker than one picture at a time."""
        batch = self.batch(indices)
        return list(zip(batch.images.unbind(0), batch.labels.tolist(), strict=True))

    def batch(self, indices: Iterable[int] | Tensor | int) -> PlantedBatch:
        """Pictures ``indices`` (negative ones count from the end; an int n means the first n) with masks and labels."""
        if isinstance(indices, int):
            indices = range(indices)
        if isinstance(indices, Tensor):
            indices = indices.tolist()
        index = np.array([int(i) for i in indices], dtype=np.int64)
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

    # ---------------------------------------------------------------------------------------------- the making of

    def _scales(self, areas: Array) -> Array:
        """Pixels per unit of the shape so that it covers the share ``areas`` of the picture."""
        return np.sqrt(areas) * self.img_size

    def _check_fit(self) -> None:
        area, reach = _measures()
        width = (reach + np.roll(reach, _ANGLES // 2, axis=1)).max(1)  # largest extent in any direction
        largest = width * math.sqrt(self.difficulty.area[1]) / np.sqrt(area)
        if largest.max() > 1.06:
            worst = CLASSES[int(largest.argmax())]
            raise ValueError(
                f"an object of area {self.difficulty.area[1]} does not fit the picture: the {worst} would be "
                f"{largest.max():.2f} times as wide; choose a smaller area"
            )

    def _make(self, index: Array) -> tuple[Array, ...]:
        """Images, labels, masks, coverage and families of pictures ``index`` [B], as numpy arrays."""
        d, size = self.difficulty, self.img_size
        draws = _Draws(_mix(np.uint64(self._key) + index.astype(np.uint64) * np.uint64(_GOLDEN)))
        label = index % len(CLASSES)

        family = self._families(draws, label)
        middle = draws.between(_C_MID, 0.5 - _MIDDLE, 0.5 + _MIDDLE)
        sign = np.where(draws.uniform(_C_SIGN, 1)[:, 0] < d.brighter, np.float32(0.5), np.float32(-0.5))
        step = sign * draws.between(_C_CONTRAST, *d.contrast)  # half of the contrast, signed
        ground_level, object_level = middle - step, middle + step

        image = self._ground(draws, family, ground_level)
        for k in range(self.distractors):
            self._add_distractor(image, draws, k, ground_level, 2 * step)

        coverage = self._coverage(draws, label)
        if not self.erase_object:
            texture = _value_noise(draws, _C_TEXTURE, _TEXTURE_CELLS, size) * np.float32(d.texture)
            tint = _tint(draws.uniform(_C_HUE, 1)[:, 0], draws.between(_C_SATURATION, 0.1, 0.8))
            drawn = _colour(object_level[:, None, None] + texture, tint[:, :, None, None])
            image += coverage[:, None] * (drawn - image)

        image -= np.float32(_MEAN)
        image *= np.float32(1 / _STD)
        return image, label, coverage >= 0.5, coverage, family

    def _families(self, draws: _Draws, label: Array) -> Array:
        if self.swap_background:
            other = (draws.uniform(_C_SWAP, 1)[:, 0] * (NUM_FAMILIES - 1)).astype(np.int64)
            return (label + 1 + other) % NUM_FAMILIES
        free = (draws.uniform(_C_FAMILY, 1)[:, 0] * NUM_FAMILIES).astype(np.int64)
        return np.where(draws.uniform(_C_TIED, 1)[:, 0] < self.rho, label, free)

    def _ground(self, draws: _Draws, family: Array, level: Array) -> Array:
        """[B, 3, H, W]: clutter whose hue and coarseness belong to the family."""
        size = self.img_size
        fine = (family * 3 % NUM_FAMILIES).astype(np.float32) / np.float32(NUM_FAMILIES - 1)  # 0 coarse ... 1 fine
        shares = np.stack(
            [1 - np.float32(0.75) * fine, np.full_like(fine, 0.6), np.float32(0.25) + np.float32(0.75) * fine]
        )
        shares = shares / (shares[0] + shares[1] + shares[2])
        noise, start = np.zeros((len(family), size, size), np.float32), _C_NOISE
        for share, cells in zip(shares, _OCTAVES, strict=True):
            noise += share[:, None, None] * _value_noise(draws, start, cells, size)
            start += (cells + 1) ** 2
        noise = np.clip(noise * np.float32(1.8), -1, 1)
        lightness = level[:, None, None] + np.float32(self.difficulty.clutter) * noise

        jitter = draws.between(_C_GROUND_HUE, -0.35, 0.35)
        hue = (family.astype(np.float32) + jitter) / np.float32(NUM_FAMILIES)
        tint = _tint(hue, draws.between(_C_GROUND_SATURATION, 0.5, 0.7))
        drift = _value_noise(draws, _C_TINT, _TINT_CELLS, size)  # the tint comes and goes over the picture
        return _colour(lightness, tint[:, :, None, None] * (1 + np.float32(0.4) * drift[:, None]))

    def _pixels(self) -> tuple[Array, Array]:
        """x [1, 1, W] to the right and y [1, H, 1] up, in pixels from the top left corner (so y <= 0)."""
        axis = np.arange(self.img_size, dtype=np.float32) + np.float32(0.5)
        return axis[None, None, :], -axis[None, :, None]

    def _coverage(self, draws: _Draws, label: Array) -> Array:
        """[B, H, W]: share of each pixel inside the object, by the distance from its middle to the outline."""
        d, size = self.difficulty, self.img_size
        unit_area, reach = _measures()
        scale = np.sqrt(draws.between(_C_AREA, *d.area) / unit_area[label]) * size  # pixels per unit
        turn = draws.between(_C_TURN, -d.rotation, d.rotation).astype(np.float64)

        # Where the box around the turned object fits, one pixel from the border, no further off than allowed.
        def extent(direction: float) -> Array:
            slot = np.rint((direction - turn) / (2 * math.pi) * _ANGLES).astype(int) % _ANGLES
            return reach[label, slot] * scale

        def place(counter: int, low: Array, high: Array) -> Array:
            room = np.clip((size - 2 - low - high) / 2, 0, d.shift * size)
            return (size + low - high) / 2 + room * (2 * draws.uniform(counter, 1)[:, 0] - 1)

        centre_x = place(_C_X, extent(math.pi), extent(0.0))
        centre_y = -place(_C_Y, extent(math.pi / 2), extent(-math.pi / 2))

        x, y = self._pixels()
        x = x - centre_x.astype(np.float32)[:, None, None]
        y = y - centre_y.astype(np.float32)[:, None, None]
        inverse = (1 / scale).astype(np.float32)
        cos = (_cos(turn) * inverse)[:, None, None]
        sin = (_cos(turn - math.pi / 2) * inverse)[:, None, None]
        u, v = x * cos + y * sin, y * cos - x * sin
        distance = np.empty((len(label), size, size), np.float32)
        for c, shape in enumerate(SHAPES.values()):
            rows = np.flatnonzero(label == c)
            if rows.size:
                distance[rows] = shape(u[rows], v[rows])
        distance *= scale.astype(np.float32)[:, None, None]
        return np.clip(np.float32(0.5) - distance, 0, 1)

    def _add_distractor(self, image: Array, draws: _Draws, k: int, ground_level: Array, contrast: Array) -> None:
        """Paint blob or bar number ``k`` into ``image`` [B, 3, H, W], at 50 to 75 % of the object's contrast."""
        size, c = self.img_size, _C_DISTRACTORS + k * _PER_DISTRACTOR
        x, y = self._pixels()
        x = x - (draws.between(c, 0.06, 0.94) * np.float32(size))[:, None, None]
        y = y + (draws.between(c + 1, 0.06, 0.94) * np.float32(size))[:, None, None]
        turn = draws.between(c + 2, 0.0, math.pi).astype(np.float64)
        cos, sin = _cos(turn)[:, None, None], _cos(turn - math.pi / 2)[:, None, None]
        u, v = np.abs(x * cos + y * sin), np.abs(y * cos - x * sin)
        long = (draws.between(c + 3, 0.05, 0.09) * np.float32(size))[:, None, None]
        short = (draws.between(c + 4, 0.025, 0.05) * np.float32(size))[:, None, None]
        bar = np.maximum(u - long, v - short)
        blob = (np.sqrt((u / long) ** 2 + (v / short) ** 2) - 1) * short
        is_bar = (draws.uniform(c + 5, 1)[:, 0] < 0.5)[:, None, None]
        alpha = np.clip(np.float32(0.5) - np.where(is_bar, bar, blob), 0, 1)
        level = ground_level + contrast * draws.between(c + 6, 0.5, 0.75)
        tint = _tint(draws.uniform(c + 7, 1)[:, 0], draws.between(c + 8, 0.1, 0.8))
        flat = _colour(level[:, None, None], tint[:, :, None, None])
        image += alpha[:, None] * (flat - image)
