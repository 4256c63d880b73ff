"""Grad-CAM on token grids, through pytorch-grad-cam and through Captum.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): with activations A [C, h, w] of a layer and the score y of a class,
map = ReLU(sum_c mean_hw(dy / dA_c) A_c). Both libraries compute this on a layer with output [B, C, h, w], and a
transformer's layer gives [B, N, C]: on that, Captum would average the gradient over channels and sum over tokens, and
pytorch-grad-cam's example assumes 14 x 14 patches after one prefix token. So the tokens are put on the model's own grid
first. Both functions raise ValueError where there is no token grid, or where the gradient on the patch tokens is zero
or not finite.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from svit_utils.exclusive import in_this_thread
from svit_utils.explain.grid import TokenGrid, token_grid, tokens_to_grid
from svit_utils.explain.layers import Place, find_layer, places
from svit_utils.explain.model_state import (
    Targets,
    at_least_single,
    check_differentiable,
    explained_scores,
    in_precision_of,
    only_input_gradients,
    traceable,
    unreached,
    unwrap,
)
from svit_utils.explain.passing import in_backward

# A module of the model, its name, the index of a block for the place before its attention, or None for the last block.
Layer: TypeAlias = nn.Module | str | int | None
_Scores: TypeAlias = Callable[[Tensor], Tensor]  # the model's output -> the score of each image's class [B]


def default_layer(model: nn.Module) -> nn.Module:
    """The layer whose output Grad-CAM uses by default, just before the last attention.

    It is `blocks[-1].norm1`, or the output of `blocks[-2]` where no norm precedes the attention; ValueError where there
    is neither. After its last attention, a model with a class-token head never mixes tokens again: the gradient on the
    patch tokens there is exactly zero. Pooled models would allow a later layer; the same place keeps maps comparable.
    """
    return layer_place(unwrap(model), None).module


def _before_attention(found: dict[str, Place], index: int) -> str:
    """The name of the layer whose output enters the attention of block `index`."""
    children = [name for name, _ in found[f"blocks.{index}"].module.named_children()]
    first = [name for name in children if name in ("norm1", "attn")]  # in the order in which they are called
    if first[:1] == ["norm1"]:
        return f"blocks.{index}.norm1"
    if index == 0:
        kind = type(found["blocks.0"].module).__name__
        raise ValueError(f"no layer precedes the attention of the first block, a {kind}: give the layer")
    return f"blocks.{index - 1}"


def layer_place(model: nn.Module, layer: Layer) -> Place:
    """The place in the model that `layer` names, or ValueError."""
    found = places(model)
    if isinstance(layer, str) and layer and layer in found:
        return found[layer]
    blocks = [name for name in found if name.rpartition(".")[0] == "blocks"]
    if isinstance(layer, nn.Module):
        layer = unwrap(layer)
        for place in found.values():
            if place.module is layer:
                return replace(place, index=None)
    elif not blocks and not isinstance(layer, str):
        raise ValueError(
            f"{type(model).__name__} has no `blocks`: give the layer, a module whose output is [B, N, C], or its name"
        )
    return found[_before_attention(found, len(blocks) - 1 if layer is None else find_layer(layer, blocks, "layer"))]


def grad_cam(model: nn.Module, x: Tensor, targets: Targets = None, *, layer: Layer = None, relu: bool = True) -> Tensor:
    """Grad-CAM of images `x` [B, 3, H, W] through pytorch-grad-cam: [B, h, w] on the token grid, in units of the logit.

    Args:
        targets: a class, or one class per image, as integers of any kind; None explains the predicted class.
        layer: where the map is taken, an output [B, N, C]: a module, its name, or the index of a block for the place
            before its attention; by default `default_layer(model)`. Of a module that stands in several places, the name
            says which call is meant.
        relu: keep only evidence for the class, as in the paper; False gives the signed map.

    Maps of a model in half precision are computed in single precision from its activations and gradients.
    """
    return _explain(_pytorch_grad_cam, model, x, targets, layer, relu)


def layer_grad_cam(
    model: nn.Module, x: Tensor, targets: Targets = None, *, layer: Layer = None, relu: bool = True
) -> Tensor:
    """Grad-CAM through Captum's `LayerGradCam`: arguments as for `grad_cam`, with which it agrees to rounding."""
    return _explain(_captum, model, x, targets, layer, relu)


def _explain(
    library: Callable[..., Tensor | None], model: nn.Module, x: Tensor, targets: Targets, layer: Layer, relu: bool
) -> Tensor:
    model = unwrap(model)
    grid, place = token_grid(model, x), layer_place(model, layer)
    check_differentiable(model)

    def scores(logits: Any) -> Tensor:
        place.call(tap.calls)
        chosen = explained_scores(logits, targets, len(x))
        if not chosen.requires_grad:
            raise ValueError(f"no gradient of the score reaches {place}: {type(model).__name__} computes without them")
        return chosen

    with only_input_gradients(model), traceable(model, x), _tapped(place, grid) as tap:
        if not len(x):
            return torch.zeros(0, *grid.size, dtype=at_least_single(x).dtype, device=x.device)
        images = in_precision_of(model, x).detach().clone().requires_grad_(True)
        raw = library(model, images, scores, tap)
    gradient = tap.gradients[0] if tap.gradients else None  # a backward pass meets the last call first
    if raw is None or gradient is None or not bool((gradient != 0).any()):
        raise ValueError(
            f"the gradient on the patch tokens at {type(place.module).__name__} is exactly zero, so a Grad-CAM map "
            f"there says nothing: with a class-token head, give a layer before the last attention (blocks[-1].norm1 is "
            f"the default); under empty_rows='zero' the class token's rows may all be empty"
        )
    raw = raw.detach().to(x.device)
    if not bool(torch.isfinite(raw).all()):
        raise ValueError(f"the Grad-CAM map at {place} is not finite (NaN or infinity): try the model in float32")
    return raw.clamp_min(0) if relu else raw


class _Tap(nn.Identity):
    """The patch tokens of a layer go through it as [B, C, h, w], which both libraries read correctly.

    It is called for the calls of the layer up to the one that is meant, which so is the last that the libraries see.
    """

    def __init__(self, place: Place, grid: TokenGrid) -> None:
        super().__init__()
        self.place, self.grid, self.calls, self.gradients = place, grid, 0, list[Tensor]()

    def divert(self, _module: nn.Module, _args: object, tokens: Tensor) -> Tensor | None:
        """The layer's forward hook."""
        if in_backward():
            return None
        self.calls += 1
        if self.calls > 1 + (self.place.index or 0):
            return None
        patches = tokens_to_grid(tokens, self.grid)
        if not patches.requires_grad:
            raise unreached(self.place)
        patches = self(at_least_single(patches))
        patches.register_hook(self.gradients.append)  # the very gradient that both libraries average
        patches = patches.to(tokens.dtype).flatten(2).transpose(1, 2)  # [B, h*w, C]
        return torch.cat([tokens[:, : self.grid.num_prefix], patches], dim=1)  # [B, N, C]


@contextmanager
def _tapped(place: Place, grid: TokenGrid) -> Iterator[_Tap]:
    tap = _Tap(place, grid)
    handle = place.module.register_forward_hook(in_this_thread(tap.divert))
    try:
        yield tap
    finally:
        handle.remove()


def _pytorch_grad_cam(model: nn.Module, x: Tensor, scores: _Scores, tap: _Tap) -> Tensor | None:
    from pytorch_grad_cam import GradCAM

    # Not by calling `cam`, which would rectify the map, rescale it to [0, 1] and resize it; not in a `with`, which
    # swallows every IndexError.
    cam = GradCAM(model, [tap])
    seen = cam.activations_and_grads
    try:
        scores(seen(x)).sum().backward()
        if not seen.gradients:
            return None
        raw = cam.get_cam_image(x, tap, None, seen.activations[-1].numpy(), seen.gradients[-1].numpy())
    finally:
        seen.release()
    return torch.from_numpy(raw)


def _captum(model: nn.Module, x: Tensor, scores: _Scores, tap: _Tap) -> Tensor | None:
    from captum.attr import LayerGradCam

    try:
        raw = LayerGradCam(lambda images: scores(model(images)), tap).attribute(x)  # [B, 1, h, w]
    except RuntimeError as error:
        if "heckpoint" in str(error):
            raise ValueError(
                f"no gradient reaches {tap.place}: {type(model).__name__} uses gradient checkpointing, which keeps "
                f"gradients with use_reentrant=False"
            ) from error
        if "appears to not have been used in the graph" not in str(error):
            raise
        return None
    return raw.squeeze(1)
