"""The explanations by name: one registry, one function."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from svit_utils.explain.gradcam import grad_cam, layer_grad_cam
from svit_utils.explain.layers import Layer
from svit_utils.explain.maps import class_attention
from svit_utils.explain.model_state import Targets
from svit_utils.explain.perturbation import integrated_gradients, occlusion
from svit_utils.explain.relevance import gradient_attention, gradient_rollout, relevance
from svit_utils.explain.rollout import attention_rollout


def _attention(model: nn.Module, x: Tensor, targets: Targets = None, *, layer: Layer = -1) -> Tensor:
    return class_attention(model, x, layer).mean(dim=1)


def _attention_heads(model: nn.Module, x: Tensor, targets: Targets = None, *, layer: Layer = -1) -> Tensor:
    return class_attention(model, x, layer)


def _rollout(
    model: nn.Module,
    x: Tensor,
    targets: Targets = None,
    *,
    head_fusion: str = "mean",
    residual: float = 0.5,
    start_layer: Layer = 0,
) -> Tensor:
    return attention_rollout(model, x, head_fusion, residual, start_layer)


# (model, images, targets, *, options) -> maps [B, h, w]. A new explanation is one line here.
METHODS: dict[str, Callable[..., Tensor]] = {
    "attention": _attention,  # of one layer, the last by default; mean over heads
    "attention_heads": _attention_heads,  # the only one with heads: [B, H, h, w]
    "rollout": _rollout,
    "grad_cam": grad_cam,
    "layer_grad_cam": layer_grad_cam,
    "gradient_attention": gradient_attention,
    "gradient_rollout": gradient_rollout,
    "relevance": relevance,
    "occlusion": occlusion,
    "integrated_gradients": integrated_gradients,
}
# Of these, the ones that are the same for every class: they show where a model looks, and no evidence for a label.
CLASS_FREE = ("attention", "attention_heads", "rollout")


def explain(
    model: nn.Module, images: Tensor, method: str = "relevance", targets: Targets = None, **options: Any
) -> Tensor:
    """Maps of `images` [B, 3, H, W] by one of `METHODS`: [B, h, w] on the model's token grid.

    Args:
        method: a name in `METHODS`; "attention_heads" alone gives [B, H, h, w].
        targets: a class, or one class per image; None explains the predicted class. Those in `CLASS_FREE` know none.
        options: the method's own, such as `layer`, `residual` or `baseline`.

    Maps of different methods have different units: compare their order, or scores of the referee. Raises ValueError for
    an unknown method or option, and where the method does.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: allowed are {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[method]).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in allowed]:
        raise ValueError(f"{method} has no option {unknown[0]!r}: allowed are {', '.join(allowed)}")
    return METHODS[method](model, images, targets, **options)
