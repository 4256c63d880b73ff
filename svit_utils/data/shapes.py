"""The ten shapes of PlantedShapes as signed distance functions, their areas and extents, and how they are rasterised.

Each function takes coordinates x (to the right) and y (up) of any shape and returns a signed distance: negative inside,
zero on the outline, slope one across it away from corners. Sizes differ: `measures` gives what evens them out.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from svit_utils.data.draws import Array, cosine

ANGLES = 720  # directions in which `measures` tells the reach


def disc(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1.0


def ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - 0.725) - 0.275


def square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 1.0


def triangle(x: Array, y: Array) -> Array:
    side = np.float32(math.sqrt(0.75)) * np.abs(x) + np.float32(0.5) * y
    return np.maximum(side, -y) - 0.5


def cross(x: Array, y: Array) -> Array:
    a, b, width = np.abs(x), np.abs(y), 0.34
    return np.minimum(np.maximum(a - 1.0, b - width), np.maximum(a - width, b - 1.0))


def star(x: Array, y: Array) -> Array:
    # Fold the plane into the wedge between a tip (straight up) and the notch beside it: one straight edge is left.
    nx, ny = np.float32(math.cos(math.pi / 5)), np.float32(-math.sin(math.pi / 5))  # normal of centre to notch
    a, b = np.abs(x), y
    for _ in range(2):  # angles off the tip: up to 180 degrees, then 108, then 36
        over = np.maximum(nx * a + ny * b, 0.0)
        a, b = np.abs(a - 2.0 * over * nx), b - 2.0 * over * ny
    notch = 0.46
    ex, ey = notch * math.sin(math.pi / 5), notch * math.cos(math.pi / 5) - 1.0  # from the tip (0, 1) to the notch
    length = math.hypot(ex, ey)
    return np.float32(-ey / length) * a + np.float32(ex / length) * (b - 1.0)


def heart(x: Array, y: Array) -> Array:
    root = np.float32(math.sqrt(0.5))
    u, v = root * (x + y), root * (y - x)
    lobes = np.minimum(np.sqrt((u - 1.0) ** 2 + v * v), np.sqrt(u * u + (v - 1.0) ** 2)) - 1.0
    return np.minimum(square(u, v), lobes)


def crescent(x: Array, y: Array) -> Array:
    bite = x - 0.5
    return np.maximum(np.sqrt(x * x + y * y) - 1.0, 0.8 - np.sqrt(bite * bite + y * y))


def arrow(x: Array, y: Array) -> Array:
    b = np.abs(y)
    shaft = np.maximum(np.maximum(-1.0 - x, x - 0.2), b - 0.26)
    length = math.hypot(0.85, 1.0)
    head = np.maximum(-x, np.float32(0.85 / length) * (x - 1.0) + np.float32(1.0 / length) * b)
    return np.minimum(shaft, head)


def hourglass(x: Array, y: Array) -> Array:
    a, b = np.abs(x), np.abs(y)
    length = math.hypot(1.0, 0.74)
    return np.maximum(b - 1.0, np.float32(1.0 / length) * (a - 0.12) - np.float32(0.74 / length) * b)


_FUNCTIONS = (disc, ring, square, triangle, cross, star, heart, crescent, arrow, hourglass)
SHAPES: dict[str, Callable[[Array, Array], Array]] = {shape.__name__: shape for shape in _FUNCTIONS}


@lru_cache(maxsize=1)
def measures() -> tuple[Array, Array]:
    """Area [10] of every shape in its own units, and how far it reaches [10, ANGLES] in evenly spaced directions."""
    axis = (np.arange(640, dtype=np.float64) + 0.5) / 160.0 - 2.0
    axis = axis * 1.35  # to 2.7 either way: the heart is the largest
    x, y = np.meshgrid(axis, axis)
    cell = axis[1] - axis[0]
    angles = 2 * math.pi * np.arange(ANGLES) / ANGLES
    directions = np.stack([np.cos(angles), np.sin(angles)])
    areas, reach = [], []
    for shape in SHAPES.values():
        distance = shape(x, y)
        areas.append(np.clip(0.5 - distance / cell, 0.0, 1.0).sum() * cell**2)
        edge = (distance <= 0) & (distance > -3 * cell)
        reach.append((np.stack([x[edge], y[edge]], 1) @ directions).max(0) + cell)
    return np.array(areas), np.array(reach)


def local_coordinates(size: int, right: Array, down: Array, turn: Array, scale: Array) -> tuple[Array, Array]:
    """The pixel centres of a picture of ``size`` pixels a side as a shape sees them: (x, y), float32 [B, size, size].

    Args:
        right, down: the shape's centre [B], in pixels from the top left corner.
        turn: [B] float64, by how many radians the shape is turned anticlockwise.
        scale: [B], pixels per unit of the shape.
    """
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x = axis[None, None, :] - right.astype(np.float32)[:, None, None]
    y = down.astype(np.float32)[:, None, None] - axis[None, :, None]
    inverse = (1 / scale).astype(np.float32)
    cos = (cosine(turn) * inverse)[:, None, None]
    sin = (cosine(turn - math.pi / 2) * inverse)[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def coverage(label: Array, size: int, right: Array, down: Array, turn: Array, scale: Array) -> Array:
    """Share of each pixel inside shape number ``label`` [B]: float32 [B, size, size] in [0, 1].

    It is taken from the distance of the pixel's middle to the outline; arguments as for `local_coordinates`.
    """
    x, y = local_coordinates(size, right, down, turn, scale)
    distance = np.empty((len(label), size, size), np.float32)
    for number, shape in enumerate(SHAPES.values()):
        rows = np.flatnonzero(label == number)
        if rows.size:
            distance[rows] = shape(x[rows], y[rows])
    distance *= scale.astype(np.float32)[:, None, None]
    return np.clip(np.float32(0.5) - distance, 0, 1)
