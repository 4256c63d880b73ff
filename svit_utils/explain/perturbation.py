"""Maps from the input's side, through Captum: what covering a patch does, and gradients summed up on the way from grey.

Neither looks into the model, so they serve every model with a grid of patches, whatever its attention and head. Both
compare with a baseline x', a picture of one value (0 is grey, in normalised images), and answer for that baseline only.
Both are signed, in units of the logit. Raises ValueError where there is no token grid.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.exclusive import evaluating
from svit_utils.explain.grid import TokenGrid, token_grid
from svit_utils.explain.model_state import (
    Targets,
    at_least_single,
    check_differentiable,
    explained_classes,
    in_precision_of,
    only_input_gradients,
    traceable,
    unwrap,
)


def occlusion(
    model: nn.Module, x: Tensor, targets: Targets = None, *, baseline: float = 0.0, batch_size: int = 64
) -> Tensor:
    """How much the score falls when a patch is covered: [B, h, w]; one forward pass per patch and image.

        map_p = y(x) - y(x with patch p at the baseline)

    Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", arXiv:1311.2901, section 4.2,
    through `captum.attr.FeatureAblation` with a feature for each patch: Captum's `Occlusion` with a window of one patch
    that moves patch by patch, which would round to single precision.

    Args:
        targets: as for `grad_cam`.
        baseline: what covers the patch, in units of the normalised images.
        batch_size: pictures at a time.
    """
    from captum.attr import FeatureAblation

    model, grid = unwrap(model), token_grid(model, x)
    height, width = _patch_size(model, x, grid)
    rows, columns = torch.arange(x.shape[-2]) // height, torch.arange(x.shape[-1]) // width
    patches = (rows[:, None] * grid.width + columns)[None, None].to(x.device)  # [1, 1, H, W], the number of the patch

    def one_batch(images: Tensor, classes: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        several = max(1, batch_size // len(images))
        covered = FeatureAblation(score).attribute(
            images, baselines=baseline, target=classes, feature_mask=patches, perturbations_per_eval=several
        )
        return covered[:, 0, ::height, ::width]  # every pixel of a patch has the patch's value

    with torch.no_grad(), evaluating(model):
        return _in_batches(one_batch, model, x, targets, grid, baseline, batch_size)


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    targets: Targets = None,
    *,
    baseline: float = 0.0,
    steps: int = 50,
    batch_size: int = 64,
) -> Tensor:
    """Integrated gradients, summed over each patch: [B, h, w]; `steps` forward and backward passes per image.

        map_p = sum_{i in p} (x_i - x'_i) integral_0^1 dy/dx_i (x' + a (x - x')) da

    Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365, eq. 1, through
    `captum.attr.IntegratedGradients` (Gauss-Legendre). A map sums to y(x) - y(x'), up to the error of `steps` points.

    Args:
        targets: as for `grad_cam`.
        baseline: the value of the picture x', in units of the normalised images.
        steps: points of the integral.
        batch_size: pictures at a time.
    """
    from captum.attr import IntegratedGradients

    model, grid = unwrap(model), token_grid(model, x)
    check_differentiable(model)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    height, width = _patch_size(model, x, grid)

    def one_batch(images: Tensor, classes: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = IntegratedGradients(score).attribute(
            images, baselines=baseline, target=classes, n_steps=steps, internal_batch_size=batch_size
        )
        return _sum_of_patches(at_least_single(pixels.detach()), height, width)

    with only_input_gradients(model):
        return _in_batches(one_batch, model, x, targets, grid, baseline, batch_size)


def _in_batches(
    one_batch: Callable[..., Tensor],
    model: nn.Module,
    x: Tensor,
    targets: Targets,
    grid: TokenGrid,
    baseline: float,
    batch_size: int,
) -> Tensor:
    """`one_batch(images, classes, score)` of at most `batch_size` images at a time, put together: [B, h, w]."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    if not math.isfinite(baseline):
        raise ValueError(f"baseline must be a finite value in the units of the normalised images, got {baseline!r}")
    if not len(x):
        return torch.zeros(0, *grid.size, dtype=at_least_single(x).dtype, device=x.device)
    with traceable(model, x):
        images = in_precision_of(model, x).detach().clone()
        with torch.no_grad():
            logits = torch.cat([_logits(model(part), len(part)) for part in images.split(batch_size)])
        classes = torch.tensor(explained_classes(logits, targets, len(x)), device=images.device)

        def score(pictures: Tensor) -> Any:
            return at_least_single(model(pictures))

        parts = zip(images.split(batch_size), classes.split(batch_size), strict=True)
        maps = torch.cat([one_batch(*part, score) for part in parts]).to(x.device)
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("the map is not finite (NaN or infinity): try the model in float32")
    return maps


def _logits(output: Any, images: int) -> Tensor:
    explained_classes(output, None, images)  # raises ValueError for what is no row of scores per image
    return output.detach()


def _patch_size(model: nn.Module, x: Tensor, grid: TokenGrid) -> tuple[int, int]:
    """(height, width) of a patch in pixels: the embedding's own, which pads a picture that ends within a patch."""
    size: Any = getattr(model.patch_embed, "patch_size", None)
    if isinstance(size, tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return math.ceil(x.shape[-2] / grid.height), math.ceil(x.shape[-1] / grid.width)


def _sum_of_patches(pixels: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] -> [B, h, w], sums over channels and the pixels of each patch; nothing is beyond the border."""
    one = pixels.sum(dim=1)
    one = F.pad(one, (0, -one.shape[-1] % width, 0, -one.shape[-2] % height))
    return one.unflatten(2, (-1, width)).unflatten(1, (-1, height)).sum(dim=(2, 4))
