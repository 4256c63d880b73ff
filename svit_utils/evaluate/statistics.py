"""Bootstrap intervals (Efron 1979), through `scipy.stats.bootstrap`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["Interval", "mean_interval", "paired_bootstrap"]

# SciPy 1.15 renamed the argument.
_SEED_NAME = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; in the units of the data."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def _as_vector(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be one value per image, at least 2, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: NaN or infinity found")
    return array


def mean_interval(values: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile interval of the mean of `values` [n], resampled over images."""
    array = _as_vector("values", values)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        # Resampled in batches: 10,000 resamples of 10,000 images at once would take 800 MB.
        batch=max(1, min(resamples, 2_000_000 // len(array))),
        confidence_level=confidence,
        # Percentile, because BCa is undefined for constant data, such as two models right on the same images.
        method="percentile",
        **{_SEED_NAME: np.random.default_rng(seed)},
    )
    interval = result.confidence_interval
    return Interval(float(array.mean()), float(interval.low), float(interval.high), len(array), confidence)


def paired_bootstrap(a: Any, b: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Interval of mean(a - b), for `a` and `b` [n] measured on the same images in the same order.

    Images are resampled as pairs, so what makes an image hard for both cancels. It covers the choice of images, not of
    training seeds.
    """
    first, second = _as_vector("a", a), _as_vector("b", b)
    if len(first) != len(second):
        raise ValueError(f"paired values must be as many in a as in b, got {len(first)} and {len(second)}")
    return mean_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)
