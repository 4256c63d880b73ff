"""Does a map say what the model used? Scores without labels or masks: disturb the image, or the map, and watch.

With p_c the softmax probability of the explained class c, and x_t the image with the map's highest share t of cells
taken away (or, beginning with a blank picture, put in):

    deletion, insertion = integral over t in [0, 1] of p_c(x_t)                          Petsiuk et al. 2018
    ROAD       = mean over shares of (p_c(lowest cells removed) - p_c(highest removed)) / 2   Rong et al. 2022
    infidelity = mean over perturbations I of (beta I . map - (f_c(x) - f_c(x - I)))^2        Yeh et al. 2019
    max-sensitivity = max over |e| <= radius of ||map(x + e) - map(x)|| / ||map(x)||          Yeh et al. 2019
    sparseness = Gini index of |map|                                                      Chalasani et al. 2018

All but the last two ask the model about pictures that it was not trained on, and a model may answer an unusual picture
in its own way: compare maps under one metric, on the same model and images, and with `random_maps`; do not read a
score on its own. Max-sensitivity and sparseness describe the map and are not evidence that it is right.

Images are [B, C, H, W], normalised so that 0 is grey. Maps are [B, h, w] with h dividing H and w dividing W: each cell
stands for a patch of H/h by W/w pixels, and h = H, w = W gives maps by pixel. `targets` is a class, one class per
image, or None for what the model predicts on the clean image. Every score is float64 on the CPU, one per image, and
does not depend on `batch_size`. The model is used in evaluation mode; its flags, its gradients and the global
random generator come back as they were.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from pytorch_grad_cam.metrics.perturbation_confidence import RemoveLeastRelevantFirst, RemoveMostRelevantFirst
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from svit_utils.explain.gradcam import _input_gradient_only, _resolve_targets
from svit_utils.explain.maps import evaluating

__all__ = [
    "curve_area",
    "deletion_curve",
    "faithfulness_scores",
    "infidelity",
    "insertion_curve",
    "max_sensitivity",
    "road",
    "sparseness",
]

Targets: TypeAlias = int | Sequence[int] | Tensor | None

# ------------------------------------------------------------------------------------------------ what is checked once


def _check_images(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"images must be a floating-point tensor [B, C, H, W] with B at least 1, got {got}")


def _check_maps(maps: Tensor) -> Tensor:
    """[B, h, w] in float64 on the CPU, finite."""
    maps = torch.as_tensor(maps)
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"maps must be [B, h, w], got shape {tuple(maps.shape)}")
    maps = maps.detach().cpu().double()
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps must be finite: NaN or infinity found")
    return maps


def _check_pair(x: Tensor, maps: Tensor) -> Tensor:
    """`maps` as `_check_maps` gives them, each cell of which is a whole patch of the images `x`."""
    _check_images(x)
    maps = _check_maps(maps)
    if len(maps) != len(x) or x.shape[-2] % maps.shape[-2] or x.shape[-1] % maps.shape[-1]:
        raise ValueError(
            f"maps must be [B, h, w] with h dividing H and w dividing W of the images [B, C, H, W], "
            f"got maps {tuple(maps.shape)} for images {tuple(x.shape)}"
        )
    return maps


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_fill(fill: float) -> None:
    if not math.isfinite(fill):
        raise ValueError(f"fill must be a finite value in the units of the normalised images, got {fill!r}")


def _fix_targets(model: nn.Module, x: Tensor, targets: Targets, batch_size: int) -> Tensor:
    """The class explained for each image: [B], int64 on the CPU. Decided on the clean image and kept from there on."""
    _check_count("batch_size", batch_size)
    if targets is None:
        return torch.tensor([c for part in x.split(batch_size) for c in _resolve_targets(model, part, None)])
    classes = torch.tensor(_resolve_targets(model, x, targets))
    known = model(x[:1]).shape[-1]
    if int(classes.min()) < 0 or int(classes.max()) >= known:
        raise ValueError(f"targets must lie in 0 to {known - 1}, the model's classes, got {classes.unique().tolist()}")
    return classes


def _probability(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability of each image's class: [B], float64 on the CPU."""
    return model(images).cpu().double().softmax(dim=-1).gather(1, classes[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------------ cells of a map


def _to_pixels(cells: Tensor, x: Tensor) -> Tensor:
    """[B, h, w] -> [B, H, W]: every pixel gets the value of its patch."""
    height, width = x.shape[-2] // cells.shape[-2], x.shape[-1] // cells.shape[-1]
    return cells.repeat_interleave(height, dim=-2).repeat_interleave(width, dim=-1)


def _places(maps: Tensor, seed: int) -> Tensor:
    """Each cell's place when the cells are sorted from the highest (0) to the lowest (h * w - 1): [B, h, w], int64.

    Ties are broken at random, independently for each image. In storage order a blank map would be a sweep from the top
    left, and on pictures with the object in the middle that is not chance.
    """
    flat = maps.flatten(1)  # [B, n]
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.rand(flat.shape, generator=generator, dtype=torch.float64).argsort(dim=1)  # [B, n]
    order = flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return shuffle.gather(1, order).argsort(dim=1).view_as(maps)


# ------------------------------------------------------------------------------------------------ deletion, insertion


def _curve(
    model: nn.Module, top: Tensor, rest: Tensor, places: Tensor, classes: Tensor, steps: int, batch_size: int
) -> Tensor:
    """p_c of the picture that shows `top` on the highest share k/steps of the cells and `rest` elsewhere: [B, k]."""
    cells = places[0].numel()
    counts = torch.tensor([round(k * cells / steps) for k in range(steps + 1)])
    values = []
    for pairs in torch.arange(len(places) * (steps + 1)).split(batch_size):
        image, step = pairs // (steps + 1), pairs % (steps + 1)
        taken = _to_pixels(places[image] < counts[step, None, None], top).to(top.device)  # [b, H, W]
        on_device = image.to(top.device)
        pictures = torch.where(taken[:, None], top[on_device], rest[on_device])  # [b, C, H, W]
        values.append(_probability(model, pictures, classes[image]))
    return torch.cat(values).view(len(places), steps + 1)


@torch.no_grad()
def deletion_curve(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    targets: Targets = None,
    *,
    steps: int = 14,
    fill: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Probability of the class while the map's highest cells are painted over: [B, steps + 1], at t = 0, 1/steps .. 1.

    Petsiuk et al. 2018 (RISE, arXiv:1806.07421). Its area (`curve_area`) is the deletion score: **lower is better**, a
    faithful map makes the probability fall early. At share t the round(t h w) highest cells are replaced by `fill`;
    tied cells are taken in random order. Unchanged by any increasing transformation of the map. Cost: steps + 1 forward
    passes per image.

    A flat patch is itself unusual, and the probability can fall because of the patch's edges: `road` was made to avoid
    that.

    Args:
        steps: number of equal shares taken away one after the other.
        fill: what is painted, in the units of the normalised images; 0 is grey.
        seed: of the order among tied cells.

    Raises:
        ValueError: shapes that do not fit, maps that are not finite, unknown classes, steps below 1.
    """
    maps = _check_pair(x, maps)
    _check_count("steps", steps)
    _check_fill(fill)
    with evaluating(model):
        classes = _fix_targets(model, x, targets, batch_size)
        blank = x.new_full((), fill).expand_as(x)
        return _curve(model, blank, x, _places(maps, seed), classes, steps, batch_size)


def _blurred(x: Tensor) -> Tensor:
    """`x` under a Gaussian of standard deviation an eighth of the shorter side."""
    sigma = min(x.shape[-2:]) / 8
    return gaussian_blur(x, kernel_size=[2 * math.ceil(2 * sigma) + 1] * 2, sigma=[sigma] * 2)


@torch.no_grad()
def insertion_curve(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    targets: Targets = None,
    *,
    start: str = "blur",
    steps: int = 14,
    fill: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Probability of the class while the map's highest cells are put back: [B, steps + 1], at t = 0, 1/steps .. 1.

    Petsiuk et al. 2018 (RISE, arXiv:1806.07421). **Higher is better** (area by `curve_area`): a faithful map brings the
    class back early. Arguments, cost, ties and invariance as for `deletion_curve`.

    Args:
        start: "blur" begins with the blurred image, as RISE does, which avoids edges between grey and picture; "fill"
            with a picture of `fill` throughout. The blur's standard deviation is an eighth of the shorter side: wide
            enough that a shape filling half of the picture is no longer recognised, where RISE's 5 pixels at 224 px
            would leave it in view.

    Raises:
        ValueError: as `deletion_curve`; an unknown start.
    """
    maps = _check_pair(x, maps)
    _check_count("steps", steps)
    _check_fill(fill)
    if start not in ("blur", "fill"):
        raise ValueError(f"unknown start {start!r}: allowed are 'blur', 'fill'")
    with evaluating(model):
        classes = _fix_targets(model, x, targets, batch_size)
        blank = _blurred(x) if start == "blur" else x.new_full((), fill).expand_as(x)
        return _curve(model, x, blank, _places(maps, seed), classes, steps, batch_size)


def curve_area(curve: Tensor) -> Tensor:
    """Area under curves [B, steps + 1] over t in [0, 1], by trapezoids: [B].

    **Lower is better** for a deletion curve, **higher** for an insertion curve; in [0, 1] for probabilities.
    """
    curve = torch.as_tensor(curve).detach().cpu().double()
    if curve.ndim != 2 or curve.shape[1] < 2:
        raise ValueError(f"curves must be [B, steps + 1] with steps at least 1, got shape {tuple(curve.shape)}")
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


# ------------------------------------------------------------------------------------------------ ROAD


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """For libraries that draw from torch's global CPU generator: seeded for the body, as it was after it."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the generators of every GPU, for good.
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def road(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    targets: Targets = None,
    *,
    percentiles: Sequence[float] = (20, 40, 60, 80),
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Remove and debias: [B] in [-0.5, 0.5]; **higher is better**, a map without information gets 0 on average.

    Rong et al. 2022 (arXiv:2202.00449): the mean over `percentiles` of (p_c with the lowest cells removed - p_c with
    the highest removed) / 2. Removed pixels are filled in from their neighbours by solving a linear system, with a
    little noise, so that the shape of what was removed is not itself a clue. Unchanged by any increasing
    transformation of the map.

    From pytorch-grad-cam: which pixels go at a percentile (`RemoveMostRelevantFirst`, `RemoveLeastRelevantFirst`) and
    the imputation (`NoisyLinearImputer`). The result is that of its `ROADCombined` with `ClassifierOutputSoftmaxTarget`
    on maps without ties; here the model runs over batches, and the imputation's draws, from torch's global generator
    there, are seeded.

    A map with many exact zeros (Grad-CAM after its ReLU, thresholded attention) has tied percentiles. The library then
    removes every tied pixel at once, at worst the whole picture, which leaves nothing to fill in from. Here the cells'
    ranks are handed over, ties broken at random, so that the same share is removed whatever the map.

    Args:
        percentiles: shares that are *kept*, in per cent, as the library counts; each in (0, 100) and at least one cell.
        seed: of the order among tied cells and of the imputation's noise.

    Raises:
        ValueError: shapes that do not fit, maps that are not finite, unknown classes, percentiles out of range.
    """
    maps = _check_pair(x, maps)
    least = 100 / maps[0].numel()
    percentiles = list(percentiles)
    if not percentiles or not all(least <= p < 100 for p in percentiles):
        raise ValueError(
            f"percentiles must be a non-empty sequence in [{least:g}, 100) for maps of {maps[0].numel()} cells: at "
            f"least one cell is kept; got {percentiles}"
        )
    # Whole numbers below 2**24, and one minus them, are exact in float32.
    ranks = _to_pixels(maps[0].numel() - 1 - _places(maps, seed), x).float()  # [B, H, W]
    images, imputer = x.detach().cpu().float(), NoisyLinearImputer()
    scores = []
    with evaluating(model), _global_seed(seed), warnings.catch_warnings():
        # NumPy 2 on the imputer's np.argwhere of a tensor, once per picture.
        warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)
        classes = _fix_targets(model, x, targets, batch_size)
        for remove in (RemoveLeastRelevantFirst, RemoveMostRelevantFirst):
            for percentile in percentiles:
                removal = remove(percentile, imputer)
                pictures = torch.stack([removal(image, rank) for image, rank in zip(images, ranks, strict=True)])
                batches = zip(pictures.split(batch_size), classes.split(batch_size), strict=True)
                scores.append(torch.cat([_probability(model, part.to(x), wanted) for part, wanted in batches]))
    lowest_first, highest_first = torch.stack(scores).view(2, len(percentiles), len(x)).mean(dim=1)
    return (lowest_first - highest_first) / 2


# ------------------------------------------------------------------------------------------------ infidelity


def _squares(draws: Tensor, size: tuple[int, int]) -> Tensor:
    """Squares of cells from uniform `draws` [n, 3]: [n, h, w], true inside.

    The side is uniform from 1 to half of the shorter side of the grid, the place uniform among those inside the grid.
    """
    height, width = size
    side = 1 + (draws[:, 0] * max(1, min(size) // 2)).long()
    top, left = (draws[:, 1] * (height - side + 1)).long(), (draws[:, 2] * (width - side + 1)).long()

    def between(length: int, start: Tensor) -> Tensor:
        at = torch.arange(length)
        return (at >= start[:, None]) & (at < (start + side)[:, None])

    return between(height, top)[:, :, None] & between(width, left)[:, None, :]


@torch.no_grad()
def infidelity(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    targets: Targets = None,
    *,
    perturbations: int = 20,
    multiply_by_inputs: bool = True,
    fill: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Mean squared error of the map as a forecast of what removals do to the logit: [B], in logits^2.

    **Lower is better**; 0 forecasts every removal, and a map of zeros gets the mean squared change. Yeh et al. 2019
    (arXiv:1901.09392), through `captum.metrics.infidelity`. A perturbation paints a random square of cells with `fill`
    (Yeh's square removal; the side is uniform from one cell to half of the shorter side of the grid). The map is spread
    over its patches' pixels.

    The scale of a map is arbitrary, so Captum's optimal scaling (normalize=True) is used: the one factor beta per image
    that fits best. It may be negative: a map and its negative score the same, so this score does not see an inverted
    map; the other scores do. It is not free of an offset either: a constant map forecasts a change in proportion to the
    area removed, and is a baseline to beat. Logits differ in scale between models and images: compare maps of the same
    ones.

    Args:
        multiply_by_inputs: what the map's values mean, named as in Captum. True (default): what a cell contributes,
            as in Grad-CAM, attention, rollout or gradient x input; the perturbation I is 1 on the cells removed and 0
            elsewhere. False: a slope per pixel, as in a gradient; I = x - x_perturbed.
        perturbations: squares drawn per image, and forward passes but for one.
        fill: what is painted, in the units of the normalised images; 0 is grey.

    Raises:
        ValueError: shapes that do not fit, maps that are not finite, unknown classes, perturbations below 1.
    """
    maps = _check_pair(x, maps)
    _check_count("perturbations", perturbations)
    _check_fill(fill)
    # The scale does not matter to the result and must not cost precision.
    peak = maps.abs().amax(dim=(1, 2), keepdim=True)
    maps = maps / torch.where(peak > 0, peak, torch.ones_like(peak))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(x), perturbations, 3, generator=generator, dtype=torch.float64)
    scores = []
    with evaluating(model):
        classes = _fix_targets(model, x, targets, batch_size)
        for part in torch.arange(len(x)).split(max(1, batch_size // perturbations)):
            images = x[part.to(x.device)]
            removed = _squares(draws[part].flatten(0, 1), tuple(maps.shape[-2:]))  # [b * perturbations, h, w]
            removed = _to_pixels(removed, x)[:, None].to(x.device)

            def perturb(repeated: Tensor, removed: Tensor = removed) -> tuple[Tensor, Tensor]:
                # Captum repeats image by image, which is the order of `removed`.
                perturbed = torch.where(removed, repeated.new_full((), fill), repeated)
                change = removed.expand_as(repeated) if multiply_by_inputs else repeated - perturbed
                return change.double(), perturbed

            score = captum_infidelity(
                lambda pictures: model(pictures).double(),  # the squares are differences of nearly equal numbers
                perturb,
                images,
                _to_pixels(maps[part], x)[:, None].expand_as(images).to(x.device),
                target=classes[part].to(x.device),
                n_perturb_samples=perturbations,
                normalize=True,
            )
            scores.append(score.cpu().double())
    return torch.cat(scores).clamp_min(0)  # a square, except for rounding


# ------------------------------------------------------------------------------------------------ max-sensitivity


def max_sensitivity(
    model: nn.Module,
    x: Tensor,
    explain: Callable[[nn.Module, Tensor, Tensor], Tensor],
    targets: Targets = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Largest relative change of the map under small noise in the image: [B]; **lower is better**, 0 is no change.

    Yeh et al. 2019 (arXiv:1901.09392), through `captum.metrics.sensitivity_max`: the noise is uniform in
    [-radius, radius] for each value, the change is measured in the Euclidean norm over the norm of the clean map (of a
    clean map of zeros: the norm of the change itself). A map that ignores the image scores a perfect 0, so this is a
    condition and not a merit.

    Args:
        explain: (model, images [n, C, H, W], classes [n]) -> maps [n, h, w]. It may differentiate with respect to the
            images. The class of an image is fixed on the clean one and goes with its noisy copies, so a prediction that
            flips is not counted as a change of the map.
        radius: in the units of the normalised images.
        samples: noisy copies per image.
        seed: of the noise, and of what `explain` draws from torch's global CPU generator.

    Raises:
        ValueError: images or maps of another shape, maps that are not finite, unknown classes, radius not positive.
    """
    _check_images(x)
    _check_count("samples", samples)
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be positive and finite, got {radius!r}")
    generator = torch.Generator().manual_seed(seed)

    def jitter(images: Tensor) -> Tensor:
        noise = torch.empty(images.shape).uniform_(-radius, radius, generator=generator)
        return images + noise.to(images)

    def explained(images: Tensor | tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, ...]:
        # Captum hands over a tuple for the clean images and a tensor for the noisy ones, takes a tuple back from
        # either, and switches gradients off.
        (batch,) = images if isinstance(images, tuple) else (images,)
        with torch.enable_grad():
            maps = _check_maps(explain(model, batch.detach(), target))
        if len(maps) != len(batch):
            raise ValueError(f"explain must return one map for each of {len(batch)} images, got {tuple(maps.shape)}")
        return (maps,)

    scores = []
    with _input_gradient_only(model), _global_seed(seed):
        with torch.no_grad():
            classes = _fix_targets(model, x, targets, batch_size)
        for part in torch.arange(len(x)).split(max(1, batch_size // samples)):
            score = captum_sensitivity_max(
                explained,
                x[part.to(x.device)].detach(),
                perturb_func=jitter,
                n_perturb_samples=samples,
                target=classes[part],  # under this name Captum repeats it as it repeats the images
            )
            scores.append(score)
    return torch.cat(scores)


# ------------------------------------------------------------------------------------------------ sparseness


def sparseness(maps: Tensor) -> Tensor:
    """Gini index of |map| for maps [B, h, w]: [B] in [0, 1); higher is sparser, which is **not evidence of quality**.

    Chalasani et al. 2018 (arXiv:1810.06583), as `quantus.Sparseness`. With |map| sorted upwards, v_1 <= ... <= v_n:

        sum_k (2 k - n - 1) v_k / (n sum_k v_k)

    0 where all values are equal (a map of zeros included), 1 - 1/n with a single value that is not zero. Unchanged by
    scaling, and by repeating every cell over its patch.

    It rewards tidiness, and knows neither the model nor the object: one pixel drawn at random is as sparse as can be,
    and a threshold raises the score of any map. Report it beside the others, to tell sparser from more faithful.
    """
    values = _check_maps(maps).abs().flatten(1).sort(dim=1).values  # [B, n]
    n = values.shape[1]
    peak = values[:, -1:]
    values = values / torch.where(peak > 0, peak, torch.ones_like(peak))
    total = values.sum(dim=1)
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return (values @ weights) / (n * torch.where(total > 0, total, torch.ones_like(total)))


# ------------------------------------------------------------------------------------------------ all of them


@torch.no_grad()
def faithfulness_scores(
    model: nn.Module, x: Tensor, maps: Tensor, targets: Targets = None, *, seed: int = 0, batch_size: int = 64
) -> dict[str, Tensor]:
    """Everything that needs only a map, with default settings: name -> [B].

    `deletion` (lower is better), `insertion` (higher), `road` (higher), `infidelity` (lower), and `sparseness`, which
    is no measure of quality. About 60 forward passes per image. Arguments and errors as in the functions themselves.
    """
    _check_pair(x, maps)
    with evaluating(model):
        classes = _fix_targets(model, x, targets, batch_size)
    return {
        "deletion": curve_area(deletion_curve(model, x, maps, classes, seed=seed, batch_size=batch_size)),
        "insertion": curve_area(insertion_curve(model, x, maps, classes, seed=seed, batch_size=batch_size)),
        "road": road(model, x, maps, classes, seed=seed, batch_size=batch_size),
        "infidelity": infidelity(model, x, maps, classes, seed=seed, batch_size=batch_size),
        "sparseness": sparseness(maps),
    }
