"""How a class's score changes with each attention weight: the gradient at the weights that multiply V."""

from typing import Any

import torch
from torch import Tensor, nn

from svit_utils.exclusive import exclusively
from svit_utils.explain.layers import places
from svit_utils.explain.model_state import (
    Targets,
    at_least_single,
    check_differentiable,
    check_images,
    explained_scores,
    in_precision_of,
    only_input_gradients,
    unreached,
    unwrap,
)
from svit_utils.explain.passing import Layers, one_pass


@exclusively
def attention_gradients(
    model: nn.Module, x: Tensor, targets: Targets = None, layers: Layers = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (A, dy/dA), both [B, H, N, N], for the score (logit) y of each image's class.

    A are the weights that multiply V, as `attention_maps` gives them: in a sparse layer those after the cut, the
    renormalisation and the empty-row fallback. The gradient is the partial one with respect to them: it asks what the
    score would do if a weight grew by itself. So it is not zero where the cut made a weight zero, and it knows nothing
    of the softmax before. Single precision or wider.

    Args:
        x: images [B, 3, H, W], B at least 1.
        targets: a class, or one class per image; None explains the predicted class.
        layers: as for `attention_maps`.

    Raises ValueError as `attention_maps`, for unknown targets, no images, and where no gradient reaches a layer or it
    is not finite.
    """
    model = unwrap(model)
    check_images(x)
    check_differentiable(model)
    if not len(x):
        raise ValueError("there is no gradient of a score without images: got a batch of none")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with only_input_gradients(model):
        images = in_precision_of(model, x).detach().clone().requires_grad_(True)
        with one_pass(model, images, layers) as (maps, logits):
            for name, gradient in zip(maps, _gradients(model, maps, logits, targets), strict=True):
                found[name] = at_least_single(maps[name].detach()), at_least_single(gradient)
    if not all(bool(torch.isfinite(gradient).all()) for _, gradient in found.values()):
        raise ValueError("a gradient at the attention weights is not finite (NaN, infinity): try the model in float32")
    return found


def _gradients(model: nn.Module, maps: dict[str, Tensor], logits: Any, targets: Targets) -> list[Tensor]:
    for name, weights in maps.items():
        if not weights.requires_grad:
            raise unreached(places(model)[name])
    scores = explained_scores(logits, targets, len(next(iter(maps.values()))))
    if not scores.requires_grad:
        raise ValueError(f"no gradient of the score reaches the attention: {type(model).__name__} computes none")
    gradients = torch.autograd.grad(scores.sum(), list(maps.values()), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(maps.values(), gradients, strict=True)]
