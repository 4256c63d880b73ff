"""The explanations by name, and all maps of a batch at once."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from svit_utils.explain.gradcam import grad_cam, layer_grad_cam
from svit_utils.explain.maps import class_attention
from svit_utils.explain.model_state import Targets
from svit_utils.explain.rollout import attention_rollout

# (model, images, targets) -> maps [B, h, w]. A new explanation is one line here.
METHODS: dict[str, Callable[[nn.Module, Tensor, Targets], Tensor]] = {
    "attention": lambda model, x, targets: class_attention(model, x).mean(dim=1),  # last layer, mean over heads
    "attention_heads": lambda model, x, targets: class_attention(model, x),  # the only one with heads: [B, H, h, w]
    "rollout": lambda model, x, targets: attention_rollout(model, x),
    "grad_cam": grad_cam,
    "layer_grad_cam": layer_grad_cam,
}


def explain_batch(
    model: nn.Module,
    x: Tensor,
    methods: Sequence[str] | str = ("attention", "rollout", "grad_cam", "layer_grad_cam"),
    targets: Targets = None,
) -> dict[str, Tensor]:
    """Maps of each of `methods` for images `x` [B, 3, H, W]: name -> [B, h, w] on the token grid.

    `methods` are names in `METHODS`, or one of them. Attention and rollout know no class; `targets` (default: the
    predicted classes) concerns the two Grad-CAMs. Raises ValueError for an unknown method, or where a method does.
    """
    methods = [methods] if isinstance(methods, str) else methods
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: allowed are {', '.join(METHODS)}")
    return {method: METHODS[method](model, x, targets) for method in methods}
