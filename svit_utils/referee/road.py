"""ROAD, remove and debias: Rong et al. 2022 (arXiv:2202.00449)."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating
from svit_utils.explain.model_state import Targets
from svit_utils.referee.inputs import check_maps, explained_classes, global_seed, places, probability, to_pixels


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

    The mean over `percentiles` of (p_c with the lowest cells removed - p_c with the highest removed) / 2. Removed
    pixels are filled in from their neighbours by solving a linear system, with a little noise, so that the shape of
    what was removed is not itself a clue. Unchanged by any increasing transformation of the map.

    Removal and filling in are pytorch-grad-cam's, and on maps without ties the result is that of its `ROADCombined`
    with `ClassifierOutputSoftmaxTarget`. Of tied values (the many zeros of Grad-CAM after its ReLU, or of thresholded
    attention) the library removes all pixels at once, at worst the whole picture. So it is given the cells' ranks here,
    with ties broken at random, and the same share is removed whatever the map. `seed` is that of ties and noise.

    Args:
        x, maps, targets: see `svit_utils.referee.inputs`; ValueError for others.
        percentiles: shares that are *kept*, in per cent, as the library counts; each below 100 and at least one cell.
    """
    from pytorch_grad_cam.metrics.perturbation_confidence import RemoveLeastRelevantFirst, RemoveMostRelevantFirst
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    maps = check_maps(maps, x)
    cells, percentiles = maps[0].numel(), list(percentiles)
    if not percentiles or not all(100 / cells <= p < 100 for p in percentiles):
        allowed = f"a non-empty sequence in [{100 / cells:g}, 100) for maps of {cells} cells (at least one is kept)"
        raise ValueError(f"percentiles must be {allowed}, got {percentiles}")
    # Whole numbers below 2**24, and one minus them, are exact in float32.
    ranks = to_pixels(cells - 1 - places(maps, seed), x).float()  # [B, H, W]
    images, imputer, scores = x.detach().cpu().float(), NoisyLinearImputer(), []
    with evaluating(model), global_seed(seed), warnings.catch_warnings():
        # NumPy 2 on the imputer's np.argwhere of a tensor, once per picture.
        warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)
        classes = explained_classes(model, x, targets, batch_size)
        for remove in (RemoveLeastRelevantFirst, RemoveMostRelevantFirst):
            for percentile in percentiles:
                removal = remove(percentile, imputer)
                pictures = torch.stack([removal(image, rank) for image, rank in zip(images, ranks, strict=True)])
                batches = zip(pictures.split(batch_size), classes.split(batch_size), strict=True)
                scores.append(torch.cat([probability(model, part.to(x), wanted) for part, wanted in batches]))
    lowest_first, highest_first = torch.stack(scores).view(2, len(percentiles), len(x)).mean(dim=1)
    return (lowest_first - highest_first) / 2
