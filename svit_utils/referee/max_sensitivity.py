"""Max-sensitivity: Yeh et al. 2019 (arXiv:1901.09392), through `captum.metrics.sensitivity_max`.

Over noise e with every value in [-radius, radius]: max ||map(x + e) - map(x)|| / ||map(x)||.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from svit_utils.explain.model_state import Targets, only_input_gradients
from svit_utils.referee.inputs import check_count, check_images, check_maps, explained_classes, global_seed


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

    The noise of `samples` copies of each image is uniform, its `radius` in the units of the normalised images; the norm
    is Euclidean. Where the clean map is zero, the norm of the change itself is taken. A map that ignores the image
    scores a perfect 0: a low score is necessary for a good map and no evidence of one.

    Args:
        x, targets: see `svit_utils.referee.inputs`; ValueError for others, or for maps that are not finite.
        explain: (model, images [n, C, H, W], classes [n]) -> maps [n, h, w]. It may differentiate with respect to the
            images. The class of an image is fixed on the clean one and goes with its noisy copies, so a prediction that
            flips is not counted as a change of the map.
        seed: of the noise, and of what `explain` draws from torch's global CPU generator.
    """
    from captum.metrics import sensitivity_max

    check_images(x)
    check_count("samples", samples)
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be positive and finite, got {radius!r}")
    generator = torch.Generator().manual_seed(seed)

    def jitter(images: Tensor) -> Tensor:
        noise = torch.empty(images.shape).uniform_(-radius, radius, generator=generator)
        return images + noise.to(images)

    def explained(images: Tensor | tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, ...]:
        # Captum switches gradients off, hands over a tuple for the clean images and a tensor for the noisy ones, takes
        # a tuple back from either, and does not repeat the class where there is a single image.
        (batch,) = images if isinstance(images, tuple) else (images,)
        with torch.enable_grad():
            maps = check_maps(explain(model, batch.detach(), target.expand(len(batch))))
        if len(maps) != len(batch):
            raise ValueError(f"explain must return one map for each of {len(batch)} images, got {tuple(maps.shape)}")
        return (maps,)

    scores = []
    with only_input_gradients(model), global_seed(seed):
        with torch.no_grad():
            classes = explained_classes(model, x, targets, batch_size)
        for part in torch.arange(len(x)).split(max(1, batch_size // samples)):
            # Under the name `target` Captum repeats the classes as it repeats the images.
            options = {"perturb_func": jitter, "n_perturb_samples": samples, "target": classes[part]}
            scores.append(sensitivity_max(explained, x[part.to(x.device)].detach(), **options))
    return torch.cat(scores)
