"""Deletion and insertion: Petsiuk et al. 2018 (RISE, arXiv:1806.07421).

With p_c the softmax probability of the explained class, and x_t the image with the map's highest share t of cells
painted over (deletion) or, beginning with a blank picture, put back (insertion), the curve is p_c(x_t) and the score
its area over t in [0, 1].
"""

import math

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating
from svit_utils.explain.model_state import Targets
from svit_utils.referee.inputs import check_count, check_maps, explained_classes, filled, places, probability, to_pixels


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

    Of its area (`curve_area`), **lower is better**: a faithful map makes the probability fall early. At share t the
    round(t h w) highest cells are replaced by `fill`, in the units of the normalised images (0 is grey), tied cells in
    random order (`seed`). Unchanged by any increasing transformation of the map. Cost: steps + 1 forward passes per
    image. A flat patch is itself unusual, and the probability can fall because of its edges: `road` avoids that.

    For `x`, `maps`, `targets` see `svit_utils.referee.inputs`; ValueError for others.
    """
    order = places(check_maps(maps, x), seed)
    return _curve(model, x, filled(x, fill), x, order, targets, steps, batch_size)


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

    Of its area, **higher is better**: a faithful map brings the class back early. `start="blur"` begins with the
    blurred image, as RISE does, which avoids edges between grey and picture; "fill" with a picture of `fill`
    throughout. Other arguments, cost, ties and errors as for `deletion_curve`.
    """
    order, blank = places(check_maps(maps, x), seed), filled(x, fill)
    if start not in ("blur", "fill"):
        raise ValueError(f"unknown start {start!r}: allowed are 'blur', 'fill'")
    return _curve(model, x, x, blurred(x) if start == "blur" else blank, order, targets, steps, batch_size)


def blurred(x: Tensor) -> Tensor:
    """`x` under a Gaussian whose standard deviation is an eighth of the shorter side.

    That makes a shape that fills half of the picture unrecognisable, which RISE's 5 pixels at 224 px do not.
    """
    from torchvision.transforms.functional import gaussian_blur

    sigma = min(x.shape[-2:]) / 8
    return gaussian_blur(x, kernel_size=[2 * math.ceil(2 * sigma) + 1] * 2, sigma=[sigma] * 2)


@torch.no_grad()
def _curve(
    model: nn.Module, x: Tensor, top: Tensor, rest: Tensor, order: Tensor, targets: Targets, steps: int, batch_size: int
) -> Tensor:
    """p_c of pictures that show `top` on the first k / steps of the cells and `rest` elsewhere: [B, steps + 1].

    `order` [B, h, w] has each cell's place, see `places`; `x` are the clean images.
    """
    check_count("steps", steps)
    counts = torch.tensor([round(k * order[0].numel() / steps) for k in range(steps + 1)])
    values = []
    with evaluating(model):
        classes = explained_classes(model, x, targets, batch_size)
        for pairs in torch.arange(len(order) * (steps + 1)).split(batch_size):
            image, step = pairs // (steps + 1), pairs % (steps + 1)
            taken = to_pixels(order[image] < counts[step, None, None], x).to(x.device)  # [b, H, W]
            on_device = image.to(x.device)
            pictures = torch.where(taken[:, None], top[on_device], rest[on_device])  # [b, C, H, W]
            values.append(probability(model, pictures, classes[image]))
    return torch.cat(values).view(len(order), steps + 1)


def curve_area(curve: Tensor) -> Tensor:
    """Area under curves [B, steps + 1] over t in [0, 1], by trapezoids: [B]. ValueError for fewer than two points."""
    curve = torch.as_tensor(curve).detach().cpu().double()
    if curve.ndim != 2 or curve.shape[1] < 2:
        raise ValueError(f"curves must be [B, steps + 1] with steps at least 1, got shape {tuple(curve.shape)}")
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)
