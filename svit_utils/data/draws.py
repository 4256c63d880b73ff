"""Random numbers by counting, and a cosine: both come out the same whatever else is in the batch.

Every number is a hash of a seed, a stream, the index of the picture and a counter that says what the number is for.
"""

import math

import numpy as np

Array = np.ndarray

_GOLDEN, _MASK64 = 0x9E3779B97F4A7C15, (1 << 64) - 1  # SplitMix64's step: 2**64 over the golden ratio


class Use:
    """The first counter of each use. Never renumber: every picture would change, also those of trained models."""

    MIDDLE, CONTRAST, SIGN, AREA, TURN, X, Y = range(7)
    HUE, SATURATION, BACKGROUND_HUE, BACKGROUND_SATURATION, FAMILY, TIED, SWAP = range(7, 14)
    NOISE, TINT, TEXTURE, DISTRACTORS = 1000, 2000, 3000, 4000
    PER_DISTRACTOR = 10


def _mix(z: Array) -> Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), elementwise on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """Uniform numbers for the pictures ``index`` [B] of one seed (any integer) and stream (a number per split)."""

    def __init__(self, seed: int, stream: int, index: Array) -> None:
        key = _mix(np.array([seed & _MASK64], dtype=np.uint64) + np.uint64(_GOLDEN))
        key = _mix(key ^ np.uint64((stream * 0xD1342543DE82EF95) & _MASK64))
        self._keys = _mix(key + index.astype(np.uint64) * np.uint64(_GOLDEN))  # [B]

    def uniform(self, start: int, count: int) -> Array:
        """[B, count] float32 in [0, 1), from counters ``start`` to ``start + count - 1``."""
        counters = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = _mix(self._keys[:, None] + counters[None, :])
        return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

    def one(self, counter: int) -> Array:
        """[B] float32 in [0, 1)."""
        return self.uniform(counter, 1)[:, 0]

    def between(self, counter: int, low: float, high: float) -> Array:
        """[B] float32 in [low, high)."""
        return np.float32(low) + np.float32(high - low) * self.one(counter)


def cosine(angles: Array) -> Array:
    """cos of ``angles`` [B] (float64, radians): float32 [B], by ``math.cos`` one by one.

    NumPy's vector code may round differently from its scalar code, and so by the place in the batch.
    """
    return np.array([math.cos(angle) for angle in angles.tolist()], dtype=np.float32)
