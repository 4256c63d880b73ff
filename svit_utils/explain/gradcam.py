"""Grad-CAM on token grids, through pytorch-grad-cam and through Captum.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): with activations A [C, h, w] of a layer and the score y of a class,
map = ReLU(sum_c mean_hw(dy / dA_c) A_c). Both libraries compute this on a layer with output [B, C, h, w], and a
transformer's layer gives [B, N, C]: on that, Captum would average the gradient over channels and sum over tokens, and
pytorch-grad-cam's example assumes 14 x 14 patches after one prefix token. So the tokens are put on the model's own grid
first. Both functions raise ValueError where there is no token grid, or where the gradient on the patch tokens is zero.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svit_utils.exclusive import in_this_thread
from svit_utils.explain.grid import TokenGrid, token_grid, tokens_to_grid
from svit_utils.explain.model_state import Targets, only_input_gradients, target_classes, unwrap

# The signed maps [B, h, w] and the gradient on the patch tokens; None where the score does not depend on the layer.
_Found = tuple[Tensor | None, Tensor | None]


def default_layer(model: nn.Module) -> nn.Module:
    """The layer whose output Grad-CAM uses by default, just before the last attention.

    It is `blocks[-1].norm1`, or `blocks[-2]` where the norms follow the attention; ValueError where there is neither.
    After its last attention, a model with a class-token head never mixes tokens again: the gradient on the patch tokens
    there is exactly zero. Pooled models would allow a later layer; the same place keeps maps comparable.
    """
    blocks, name = getattr(unwrap(model), "blocks", None) or [], type(unwrap(model)).__name__
    if not blocks:
        raise ValueError(f"{name} has no `blocks`: give the layer, a module whose output is [B, N, C]")
    last = blocks[-1]
    if hasattr(last, "norm1") and type(last).__name__ not in ("ResPostBlock", "EvaBlockPostNorm"):
        return last.norm1
    if len(blocks) < 2:
        raise ValueError(f"{type(last).__name__} normalises after its attention, with no block before: give the layer")
    return blocks[-2]


def grad_cam(
    model: nn.Module, x: Tensor, targets: Targets = None, *, layer: nn.Module | None = None, relu: bool = True
) -> Tensor:
    """Grad-CAM of images `x` [B, 3, H, W] through pytorch-grad-cam: [B, h, w] on the token grid, in units of the logit.

    Args:
        targets: a class, or one class per image; None explains the predicted class.
        layer: a module with output [B, N, C]; by default `default_layer(model)`.
        relu: keep only evidence for the class, as in the paper; False gives the signed map.
    """
    return _explain(_pytorch_grad_cam, model, x, targets, layer, relu)


def layer_grad_cam(
    model: nn.Module, x: Tensor, targets: Targets = None, *, layer: nn.Module | None = None, relu: bool = True
) -> Tensor:
    """Grad-CAM through Captum's `LayerGradCam`: arguments as for `grad_cam`, with which it agrees to rounding."""
    return _explain(_captum, model, x, targets, layer, relu)


def _explain(
    library: Callable[..., _Found], model: nn.Module, x: Tensor, targets: Targets, layer: nn.Module | None, relu: bool
) -> Tensor:
    model = unwrap(model)
    grid = token_grid(model, x)
    layer = default_layer(model) if layer is None else layer
    with only_input_gradients(model):
        classes = target_classes(model, x, targets)
        with _tap(layer, grid) as tap:
            raw, gradient = library(model, x.detach().clone().requires_grad_(True), classes, tap)
    if raw is None or gradient is None or not bool((gradient != 0).any()):
        raise ValueError(
            f"the gradient on the patch tokens at {type(layer).__name__} is exactly zero, so a Grad-CAM map there says "
            f"nothing: with a class-token head, give a layer before the last attention (blocks[-1].norm1 is the "
            f"default); under empty_rows='zero' the class token's rows may all be empty"
        )
    raw = raw.detach().to(x.device)
    return raw.clamp_min(0) if relu else raw


@contextmanager
def _tap(layer: nn.Module, grid: TokenGrid) -> Iterator[nn.Module]:
    """A module whose output both libraries read correctly: the layer's patch tokens go through it as [B, C, h, w]."""
    tap = nn.Identity()

    def through_tap(_module: nn.Module, _args: object, tokens: Tensor) -> Tensor:
        patches = tap(tokens_to_grid(tokens, grid)).flatten(2).transpose(1, 2)  # [B, h*w, C]
        return torch.cat([tokens[:, : grid.num_prefix], patches], dim=1)  # [B, N, C]

    handle = layer.register_forward_hook(in_this_thread(through_tap))
    try:
        yield tap
    finally:
        handle.remove()


def _pytorch_grad_cam(model: nn.Module, x: Tensor, classes: list[int], tap: nn.Module) -> _Found:
    from pytorch_grad_cam import GradCAM

    # Not by calling `cam`, which would rectify the map, rescale it to [0, 1] and resize it.
    with GradCAM(model, [tap]) as cam:
        seen = cam.activations_and_grads
        seen(x)[range(len(x)), classes].sum().backward()
        if not seen.gradients:
            return None, None
        activations, gradient = seen.activations[0], seen.gradients[0]  # [B, C, h, w] each
        raw = cam.get_cam_image(x, tap, None, activations.numpy(), gradient.numpy())
        return torch.from_numpy(raw), gradient


def _captum(model: nn.Module, x: Tensor, classes: list[int], tap: nn.Module) -> _Found:
    from captum.attr import LayerGradCam

    gradients = list[Tensor]()

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(gradients.append)  # sees the very gradient that Captum averages

    tap.register_forward_hook(watch)
    try:
        raw = LayerGradCam(model, tap).attribute(x, target=classes)  # [B, 1, h, w]
    except RuntimeError as error:
        if "appears to not have been used in the graph" not in str(error):
            raise
        return None, None
    return raw.squeeze(1), gradients[-1] if gradients else None
