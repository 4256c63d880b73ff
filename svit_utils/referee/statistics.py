"""Intervals and tests for scores of S training seeds on the same n images.

Two things in such a table are drawn by chance, the images and the training seeds, and each has its interval. A claim
about a *method* is about other training runs of the same recipe, and a few seeds say little about those; so `compare`
looks at both and takes the less certain answer. All functions raise ValueError for values of another shape, NaN or
infinity, and a confidence outside (0, 1).
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

# Numbers held at a time while resampling: 10,000 resamples of 10,000 images at once would take 800 MB.
_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, in the units of the data; `n` is the number of images, or of seeds."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    @property
    def width(self) -> float:
        """high - low."""
        return self.high - self.low

    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def _checked(name: str, values: Any, confidence: float, what: str, *least: int) -> np.ndarray:
    """`values` as a finite float64 array with as many dimensions as `least`, each of at least that size."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(least) or any(size < wanted for size, wanted in zip(array.shape, least)):
        raise ValueError(f"{name} must be {what}, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: NaN or infinity found")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    return array


def mean_interval(values: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval (Efron 1979) of the mean of `values` [n], resampled over images."""
    from scipy import stats

    array = _checked("values", values, confidence, "one value per image, at least 2", 2)
    # SciPy 1.15 renamed the argument.
    seed_name = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, min(resamples, _AT_ONCE // len(array))),
        confidence_level=confidence,
        # Percentile, because BCa is undefined for constant data, such as two models right on the same images.
        method="percentile",
        **{seed_name: np.random.default_rng(seed)},
    )
    low, high = result.confidence_interval
    return Interval(float(array.mean()), float(low), float(high), len(array), confidence)


def paired_bootstrap(a: Any, b: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Interval of mean(a - b), for `a` and `b` [n] measured on the same images in the same order.

    Images are resampled as pairs, so what makes an image hard for both cancels. It covers the choice of images, not of
    training seeds.
    """
    first, second = (_checked(n, v, confidence, "one value per image, at least 2", 2) for n, v in (("a", a), ("b", b)))
    if len(first) != len(second):
        raise ValueError(f"paired values must be as many in a as in b, got {len(first)} and {len(second)}")
    return mean_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)


def _crossed_means(difference: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` tables drawn from `difference` [S, n], seeds (rows) and images (columns) independently.

        mean* = (1 / (S n)) sum_si u_s v_i d_si,   u ~ Multinomial(S; 1/S, ...),   v ~ Multinomial(n; 1/n, ...)

    The pigeonhole bootstrap of Owen 2007 (arXiv:0712.1111): every seed sees the same images. Where d_si = mean + a_s +
    b_i + e_si (a, b and e summing to 0 along every row and column), their variance is sum a^2 / S^2 + sum b^2 / n^2 +
    sum e^2 / (S n)^2. With one seed, or seeds that all agree, it is the bootstrap over images. Where the seeds decide
    and are few it is too small (sum a^2 / S^2 by the factor (S - 1) / S): hence Student's t beside it in `compare`.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples!r}")
    runs, images = difference.shape
    # A stream each, so that the images drawn do not depend on how many seeds there are.
    for_runs, for_images = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    batch, sums = max(1, _AT_ONCE // images), []
    for start in range(0, resamples, batch):
        size = min(batch, resamples - start)
        u = for_runs.multinomial(runs, np.full(runs, 1 / runs), size)  # [size, S]
        v = for_images.multinomial(images, np.full(images, 1 / images), size)  # [size, n]
        sums.append(((v @ difference.T) * u).sum(axis=1))  # [size]
    # Counts, divided only here: for right-or-wrong scores every sum is a whole number, and a mean of 0 exactly 0.
    return np.concatenate(sums) / (runs * images)


def student_interval(values: Any, *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of `values` [S], one number per training seed: mean +- t_{S-1} s / sqrt(S).

    It is about the training runs one might have had, on these images. With few seeds it is wide, rightly: t is 12.7
    for two of them, 4.3 for three, 2.8 for five (two-sided, 95 %).
    """
    from scipy import stats

    array = _checked("values", values, confidence, "one value per seed, at least 2", 2)
    mean = float(array.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, len(array) - 1) * stats.sem(array))
    return Interval(mean, mean - half, mean + half, len(array), confidence)


@dataclass(frozen=True)
class Comparison:
    """The mean of a - b over seeds and images, and how sure one may be of its sign; see `compare`.

    `images` is the interval by the crossed bootstrap, over images and seeds; `seeds` the one by Student's t over the
    means per seed, None for a single seed; `p_value` is two-sided and not adjusted for other comparisons.
    """

    mean: float
    images: Interval
    seeds: Interval | None
    p_value: float
    n_seeds: int
    n_images: int

    @property
    def wider(self) -> Interval:
        """The wider of the two intervals, the one to show where there is room for one."""
        return max(filter(None, (self.images, self.seeds)), key=lambda interval: interval.width)

    def verdict(self, p_adjusted: float, alpha: float = 0.05) -> str:
        """Is a above b, by the p value that is left after `holm`? "higher", "lower" or "open".

        Always "open" for one seed: images alone say whether *this* run differs, not whether the method does. "open" is
        not "equal": the intervals say what difference is still possible. Raises ValueError for `p_adjusted` outside
        [0, 1] or `alpha` outside (0, 1).
        """
        if not 0 <= p_adjusted <= 1:
            raise ValueError(f"p_adjusted must lie in [0, 1], got {p_adjusted!r}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {alpha!r}")
        if self.n_seeds < 2 or p_adjusted >= alpha or self.mean == 0:
            return "open"
        return "higher" if self.mean > 0 else "lower"


def compare(a: Any, b: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Is the mean of `a` above that of `b`? Both [S, n], paired: row s is the same seed, column i the same image.

    The p value is the larger of two, so that a claim has to hold for other images and for other training runs:

    * the crossed bootstrap's: twice the share of resampled means at 0 or beyond, as (k + 1) / (B + 1) with B
      resamples, at most 1 (Davison & Hinkley 1997, section 4.2, for the + 1). It is never below 2 / (B + 1), which
      leaves room for a Holm family of some hundreds at B = 10,000;
    * Student's paired t over the means per seed (for S > 1), which guards the level where seeds decide and are few.
      Where all means agree on another value than 0, its p is 0 and the bootstrap's decides. That is right for maps that
      do not depend on the seed; one run copied S times looks the same, and must not be passed off as S seeds.
    """
    from scipy import stats

    what = "[S, n], at least 1 seed and 2 images"
    first, second = (_checked(name, v, confidence, what, 1, 2) for name, v in (("a", a), ("b", b)))
    if first.shape != second.shape:
        raise ValueError(f"a and b must be paired over seeds and images, got shapes {first.shape} and {second.shape}")
    difference = first - second
    means = _crossed_means(difference, resamples, seed)
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value, per_seed, seeds = min(1.0, 2 * (beyond + 1) / (len(means) + 1)), difference.mean(axis=1), None
    if len(per_seed) > 1:
        seeds = student_interval(per_seed, confidence=confidence)
        if np.ptp(per_seed) > 1e-12 * np.abs(per_seed).max():
            p_value = max(p_value, float(stats.ttest_1samp(per_seed, 0.0).pvalue))
        elif not per_seed.any():  # all seeds agree on 0; where they agree on another value, Student's p is 0
            p_value = 1.0
    mean, (low, high) = float(difference.mean()), np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    images = Interval(mean, float(low), float(high), difference.shape[1], confidence)
    return Comparison(mean, images, seeds, p_value, *difference.shape)


def holm(p_values: Any) -> np.ndarray:
    """Adjusted p values [m] of m comparisons made together, in the order given (Holm 1979).

    Of the p sorted upwards, the k-th becomes max_{j <= k} min(1, (m - j + 1) p_j): rejecting what stays below alpha
    keeps the chance of *any* false claim among the m at or below alpha, however the comparisons depend on each other.
    Raises ValueError for no p value, another shape, NaN, or a value outside [0, 1].
    """
    from statsmodels.stats.multitest import multipletests

    array = np.asarray(p_values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 1:
        raise ValueError(f"p_values must be one-dimensional, at least 1, got shape {array.shape}")
    outside = array[~((array >= 0) & (array <= 1))]  # NaN is in no range
    if len(outside):
        raise ValueError(f"p values must lie in [0, 1], got {float(outside[0])!r}")
    return multipletests(array, method="holm")[1]
