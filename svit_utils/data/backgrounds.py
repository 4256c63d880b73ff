"""Backgrounds of PlantedShapes: families of coloured noise, and distractors painted on them.

A family has a hue and a coarseness. Lightness runs from 0 to 1; colours are painted without changing it.
"""

import math
from functools import lru_cache

import numpy as np

from svit_utils.data.draws import Array, Draws, Use, cosine
from svit_utils.data.shapes import local_coordinates

FAMILIES = 10
_OCTAVES = (4, 8, 16)  # noise cells along a side, from coarse to fine
_TINT_CELLS = 4


@lru_cache(maxsize=32)
def _interpolation(cells: int, size: int) -> Array:
    """[cells + 1, size] weights that spread lattice values over pixels (smoothstep)."""
    position = (np.arange(size) + 0.5) / size * cells
    left = np.floor(position).astype(int)
    t = position - left
    t = t * t * (3 - 2 * t)
    weights = np.zeros((cells + 1, size))
    weights[left, np.arange(size)] = 1 - t
    weights[left + 1, np.arange(size)] += t
    return weights.astype(np.float32)


def value_noise(draws: Draws, start: int, cells: int, size: int) -> Array:
    """Value noise in [-1, 1], [B, size, size]: random numbers on a lattice of ``cells`` a side, smoothly interpolated.

    It uses the (cells + 1)^2 counters from ``start``.
    """
    lattice = draws.uniform(start, (cells + 1) ** 2).reshape(-1, cells + 1, cells + 1) * np.float32(2) - np.float32(1)
    weights = _interpolation(cells, size)
    return np.matmul(np.matmul(weights.T, lattice), weights)


def tint(hue: Array, strength: Array) -> Array:
    """[B, 3, 1, 1] colour direction, its channels summing to zero; hue [B] in turns, strength [B] in [0, 1]."""
    turn = hue.astype(np.float64) * (2 * math.pi)
    return np.stack([cosine(turn - 2 * math.pi * c / 3) * strength for c in range(3)], axis=1)[:, :, None, None]


def colour(lightness: Array, tint: Array) -> Array:
    """[B, 3, H, W] in [0, 1] from lightness [B, H, W] in [0, 1] and a tint [B, 3, 1|H, 1|W]; keeps the lightness."""
    room = np.minimum(lightness, 1 - lightness)
    return lightness[:, None] + tint * room[:, None]


def background(draws: Draws, family: Array, level: Array, clutter: float, size: int) -> Array:
    """Colours [B, 3, size, size] of noise round the lightness ``level`` [B], at most ``clutter`` away from it.

    ``family`` [B] in 0 to 9 decides hue and coarseness.
    """
    fine = (family * 3 % FAMILIES).astype(np.float32) / np.float32(FAMILIES - 1)  # 0 coarse ... 1 fine
    slope = np.float32(0.75) * fine
    shares = np.stack([1 - slope, np.full_like(fine, 0.6), np.float32(0.25) + slope])  # [3, B], of the octaves
    shares = shares / (shares[0] + shares[1] + shares[2])
    noise, start = np.zeros((len(family), size, size), np.float32), Use.NOISE
    for share, cells in zip(shares, _OCTAVES, strict=True):
        noise += share[:, None, None] * value_noise(draws, start, cells, size)
        start += (cells + 1) ** 2
    noise = np.clip(noise * np.float32(1.8), -1, 1)
    hue = (family.astype(np.float32) + draws.between(Use.BACKGROUND_HUE, -0.35, 0.35)) / np.float32(FAMILIES)
    drift = value_noise(draws, Use.TINT, _TINT_CELLS, size)[:, None]  # the tint comes and goes over the picture
    tints = tint(hue, draws.between(Use.BACKGROUND_SATURATION, 0.5, 0.7)) * (1 + np.float32(0.4) * drift)
    return colour(level[:, None, None] + np.float32(clutter) * noise, tints)


def paint_distractor(image: Array, draws: Draws, number: int, level: Array, contrast: Array) -> None:
    """Paint a blob or a bar into ``image`` [B, 3, H, H], its contrast 50 to 75 % of ``contrast`` [B].

    ``level`` [B] is the lightness of the background; place, size, turn and colour are drawn for distractor ``number``.
    """
    size, c = image.shape[-1], Use.DISTRACTORS + number * Use.PER_DISTRACTOR
    right, down = (draws.between(c + k, 0.06, 0.94) * np.float32(size) for k in (0, 1))
    turn = draws.between(c + 2, 0.0, math.pi).astype(np.float64)
    u, v = (np.abs(t) for t in local_coordinates(size, right, down, turn, np.ones(len(image))))
    long = (draws.between(c + 3, 0.05, 0.09) * np.float32(size))[:, None, None]
    short = (draws.between(c + 4, 0.025, 0.05) * np.float32(size))[:, None, None]
    bar = np.maximum(u - long, v - short)
    blob = (np.sqrt((u / long) ** 2 + (v / short) ** 2) - 1) * short
    is_bar = (draws.one(c + 5) < 0.5)[:, None, None]
    alpha = np.clip(np.float32(0.5) - np.where(is_bar, bar, blob), 0, 1)
    lightness = (level + contrast * draws.between(c + 6, 0.5, 0.75))[:, None, None]
    flat = colour(lightness, tint(draws.one(c + 7), draws.between(c + 8, 0.1, 0.8)))
    image += alpha[:, None] * (flat - image)
