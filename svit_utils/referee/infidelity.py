"""Infidelity: Yeh et al. 2019 (arXiv:1901.09392), through `captum.metrics.infidelity`.

With f_c the logit of the class: mean over perturbations I of (beta I . map - (f_c(x) - f_c(x - I)))^2.
"""

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating
from svit_utils.explain.model_state import Targets
from svit_utils.referee.inputs import check_count, check_maps, explained_classes, filled, scaled_by_peak, to_pixels


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
    """Mean squared error of the map as a forecast of what removals do to the logit: [B], in logits squared.

    **Lower is better**; 0 forecasts every removal, and a map of zeros gets the mean squared change. Each of the
    `perturbations` of an image, a forward pass each, paints a random square of cells (Yeh's square removal). The map is
    spread over its patches' pixels.

    The scale of a map is arbitrary, so the one factor beta per image that fits best is used (Captum's normalize=True).
    It may be negative, so that this score, unlike the others, does not tell a map from its negative. A constant map
    forecasts a change in proportion to the area removed, and is a baseline to beat. Logits differ in scale between
    models and images: compare maps of the same ones.

    Args:
        x, maps, targets, fill: as for `deletion_curve`; ValueError for others.
        multiply_by_inputs: what the map's values mean, named as in Captum. True: what a cell contributes, as in
            Grad-CAM, attention, rollout or gradient x input; I is 1 on the cells removed and 0 elsewhere. False: a
            slope per pixel, as in a gradient; I = x - x_perturbed.
    """
    from captum.metrics import infidelity as captum_infidelity

    maps = scaled_by_peak(check_maps(maps, x))
    check_count("perturbations", perturbations)
    blank = filled(x, fill)[:1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(x), perturbations, 3, generator=generator, dtype=torch.float64)
    scores = []
    with evaluating(model):
        classes = explained_classes(model, x, targets, batch_size)
        for part in torch.arange(len(x)).split(max(1, batch_size // perturbations)):
            images = x[part.to(x.device)]
            removed = random_squares(draws[part].flatten(0, 1), tuple(maps.shape[-2:]))  # [b * perturbations, h, w]
            removed = to_pixels(removed, x)[:, None].to(x.device)

            def perturb(repeated: Tensor, removed: Tensor = removed) -> tuple[Tensor, Tensor]:
                # Captum repeats image by image, which is the order of `removed`.
                perturbed = torch.where(removed, blank, repeated)
                change = removed.expand_as(repeated) if multiply_by_inputs else repeated - perturbed
                return change.double(), perturbed

            score = captum_infidelity(
                lambda pictures: model(pictures).double(),  # the squares are differences of nearly equal numbers
                perturb,
                images,
                to_pixels(maps[part], x)[:, None].expand_as(images).to(x.device),
                target=classes[part].to(x.device),
                n_perturb_samples=perturbations,
                normalize=True,
            )
            scores.append(score.cpu().double())
    return torch.cat(scores).clamp_min(0)  # a square, except for rounding


def random_squares(draws: Tensor, size: tuple[int, ...]) -> Tensor:
    """Squares of cells on a grid of `size` (h, w) from uniform `draws` [n, 3]: bool [n, h, w], True inside.

    The side is uniform from 1 to half of the grid's shorter side, the place uniform among those inside the grid.
    """
    height, width = size
    side = 1 + (draws[:, 0] * max(1, min(size) // 2)).long()
    top, left = (draws[:, 1] * (height - side + 1)).long(), (draws[:, 2] * (width - side + 1)).long()

    def between(length: int, start: Tensor) -> Tensor:
        at = torch.arange(length)
        return (at >= start[:, None]) & (at < (start + side)[:, None])

    return between(height, top)[:, :, None] & between(width, left)[:, None, :]
