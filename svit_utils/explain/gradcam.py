"""Grad-CAM on token grids, through pytorch-grad-cam and through Captum.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): with activations A [C, h, w] of a layer and the score y of a class,
map = ReLU(sum_c mean_hw(dy / dA_c) A_c). Both libraries do this right on a [B, C, h, w] layer; a transformer's layer
gives [B, N, C]. On that, Captum would average the gradient over channels and sum over tokens, and pytorch-grad-cam's
example would cut 14 x 14 patches after one prefix token. Here the tokens are put on the model's own grid first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from svit_utils.explain.grid import TokenGrid, token_grid, tokens_to_grid, unwrap
from svit_utils.explain.maps import evaluating

__all__ = ["default_layer", "grad_cam", "layer_grad_cam"]

_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm")


def default_layer(model: nn.Module) -> nn.Module:
    """The tap before the last attention: `blocks[-1].norm1`; the output of `blocks[-2]` where norms follow attention.

    After its last attention, a model with a class-token head never mixes tokens again: the gradient on patch tokens
    there is exactly zero. Pooled models could be tapped later; the same place keeps maps comparable.
    """
    blocks = getattr(unwrap(model), "blocks", None)
    if blocks is None or len(blocks) == 0:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no `blocks`: give the layer to tap, a module whose output is [B, N, C]"
        )
    last = blocks[-1]
    if hasattr(last, "norm1") and type(last).__name__ not in _POST_NORM:
        return last.norm1
    if len(blocks) < 2:
        raise ValueError(
            f"{type(last).__name__} normalises after its attention and there is no block before it: give the layer "
            f"to tap"
        )
    return blocks[-2]


@contextmanager
def _input_gradient_only(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, parameters frozen, and afterwards flags and accumulated gradients as they were.

    pytorch-grad-cam calls `model.eval()`, `zero_grad()` and `backward()` for good: harmful in the middle of a training
    run.
    """
    saved = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with evaluating(model), torch.enable_grad():
        try:
            for parameter, _, _ in saved:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, requires_grad, grad in saved:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def _resolve_targets(model: nn.Module, x: Tensor, targets: int | Sequence[int] | Tensor | None) -> list[int]:
    """One class index per image; None takes the model's own prediction."""
    if targets is None:
        with torch.no_grad():
            return model(x).argmax(dim=-1).tolist()
    if isinstance(targets, int):
        return [targets] * len(x)
    chosen = [int(target) for target in targets]
    if len(chosen) != len(x):
        raise ValueError(f"targets must be one class, or one for each of the {len(x)} images, got {len(chosen)}")
    return chosen


def _check_gradient(gradient: Tensor | None, layer: nn.Module) -> None:
    """Refuse a tap that the score does not depend on through any patch token of any image."""
    if gradient is None or not bool((gradient != 0).any()):
        raise ValueError(
            f"the gradient on the patch tokens at {type(layer).__name__} is exactly zero, so a Grad-CAM map there "
            f"says nothing: with a class-token "
            "head tap before the last attention (blocks[-1].norm1, the default); under empty_rows='zero' the class "
            "token's rows may all be empty"
        )


class _RawGradCAM(GradCAM):
    """pytorch-grad-cam's Grad-CAM, keeping the map from before its ReLU, rescaling to [0, 1] and resizing."""

    raw: Tensor
    gradient: Tensor | None = None

    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        if grads is None:  # the score does not depend on the layer at all
            _check_gradient(None, target_layer)
        cam = super().get_cam_image(input_tensor, target_layer, targets, activations, grads, eigen_smooth)
        self.gradient = torch.from_numpy(grads)
        self.raw = torch.from_numpy(cam.copy())
        return cam


def grad_cam(
    model: nn.Module,
    x: Tensor,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    layer: nn.Module | None = None,
    relu: bool = True,
) -> Tensor:
    """Grad-CAM of images `x` [B, 3, H, W] through pytorch-grad-cam: [B, h, w] on the token grid, in units of the logit.

    Args:
        targets: a class, or one class per image; None explains the predicted class.
        layer: a module with output [B, N, C]; by default `default_layer(model)`.
        relu: keep only evidence for the class, as in the paper; False gives the signed map.

    Raises:
        ValueError: no token grid, or a gradient that is exactly zero on every patch token.
    """
    model = unwrap(model)
    grid = token_grid(model, x)
    layer = default_layer(model) if layer is None else layer
    with _input_gradient_only(model):
        categories = _resolve_targets(model, x, targets)
        with _RawGradCAM(model, [layer], reshape_transform=partial(tokens_to_grid, grid=grid)) as cam:
            cam(x.detach().clone().requires_grad_(True), [ClassifierOutputTarget(category) for category in categories])
            raw, gradient = cam.raw, cam.gradient
    _check_gradient(gradient, layer)
    raw = raw.to(x.device)
    return raw.clamp_min(0) if relu else raw


@contextmanager
def _grid_tap(layer: nn.Module, grid: TokenGrid) -> Iterator[nn.Module]:
    """Send the patch tokens of `layer`'s output through an identity as [B, C, h, w], and put them back.

    The identity is a layer that Captum reads correctly; the model computes what it did.
    """
    tap = nn.Identity()

    def through_tap(_module, _args, tokens: Tensor) -> Tensor:
        patches = tap(tokens_to_grid(tokens, grid)).flatten(2).transpose(1, 2)  # [B, h*w, C]
        return torch.cat([tokens[:, : grid.num_prefix], patches], dim=1)  # [B, N, C]

    handle = layer.register_forward_hook(through_tap)
    try:
        yield tap
    finally:
        handle.remove()


def layer_grad_cam(
    model: nn.Module,
    x: Tensor,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    layer: nn.Module | None = None,
    relu: bool = True,
) -> Tensor:
    """Grad-CAM through Captum's `LayerGradCam`: [B, h, w]; arguments and errors as `grad_cam`, with which it agrees to
    rounding."""
    model = unwrap(model)
    grid = token_grid(model, x)
    layer = default_layer(model) if layer is None else layer
    gradients: list[Tensor] = []
    with _input_gradient_only(model), _grid_tap(layer, grid) as tap:
        categories = _resolve_targets(model, x, targets)
        # A tensor hook on the tap's output sees the very gradient Captum averages.
        watch = tap.register_forward_hook(lambda _m, _a, out: out.register_hook(gradients.append) and None)
        try:
            raw = LayerGradCam(model, tap).attribute(
                x.detach().clone().requires_grad_(True), target=categories
            )  # [B, 1, h, w]
        except RuntimeError as error:
            if "appears to not have been used in the graph" not in str(error):
                raise
            _check_gradient(None, layer)
        finally:
            watch.remove()
    _check_gradient(gradients[-1] if gradients else None, layer)
    raw = raw.detach().squeeze(1)
    return raw.clamp_min(0) if relu else raw
