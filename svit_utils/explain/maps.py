"""The attention weights that multiply V, of dense, sparse and mixed models, fused or not."""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.exclusive import evaluating, exclusively, in_this_thread
from svit_utils.explain.grid import TokenGrid, read_out, token_grid
from svit_utils.explain.layers import (
    SUPPORTED,
    Layer,
    Place,
    attention_places,
    called_places,
    check_one_stack,
    find_layer,
    is_readable,
)
from svit_utils.explain.model_state import at_least_single, in_precision_of, traceable, unwrap, whole_number
from svit_utils.explain.pooling import pooling_weights


def _select(found: dict[str, Place], layers: Iterable[Layer] | Layer) -> list[str]:
    """Those names that `layers` asks for, by index or name. Raises ValueError for one whose attention is unreadable."""
    single = isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0
    names = list(found)
    picked = [names[find_layer(layer, names)] for layer in ([layers] if single else layers)]  # type: ignore[union-attr]
    if not picked:
        raise ValueError("layers must name at least one layer, or be None for all")
    for name in picked:
        if not is_readable(found[name].module):
            raise _unreadable(found[name])
    return picked


def _unreadable(place: Place) -> ValueError:
    return ValueError(
        f"the attention of {place} cannot be read: supported are {SUPPORTED}; give in `layers` those that can be read"
    )


@exclusively
@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor, layers: Iterable[Layer] | Layer | None = None) -> dict[str, Tensor]:
    """One forward pass of `x` [B, 3, H, W]: layer name -> the weights [B, H, N, N] that multiply V in that layer.

    For a sparse layer these are the weights after the cut, the renormalisation and the empty-row fallback. A zero
    among them says that the value of that key does not reach the query; its score still changes the denominator of the
    softmax, and with it the weights of the keys that stay.

    `layers` are names, indices into the model's attention modules, or None for all that this pass calls. A module that
    stands in several places has a map, a name and an index for each. The maps come in the order of the calls.

    Raises ValueError for a model without readable attention, an unknown layer, one that is not called or whose
    attention cannot be read, and a module that is called more often than it has places. With `layers` None one such
    module is enough: none is left out.
    """
    model = unwrap(model)
    found = attention_places(model)
    if not any(is_readable(place.module) for place in found.values()):
        raise ValueError(f"{type(model).__name__} has no attention whose map can be read: supported are {SUPPORTED}")
    asked = None if layers is None else _select(found, layers)
    read = {found[name].module for name in (found if asked is None else asked) if is_readable(found[name].module)}
    calls, order, kept = Counter[nn.Module](), list[tuple[nn.Module, int]](), dict[tuple[nn.Module, int], Tensor]()

    def count(module: nn.Module, _args: object, _out: object) -> None:
        order.append((module, calls[module]))
        calls[module] += 1

    def keep(module: nn.Module, _drop: nn.Module, _args: object, weights: Tensor) -> None:
        kept[module, calls[module]] = weights.detach()

    batch, empty = x, isinstance(x, Tensor) and not len(x)
    if isinstance(x, Tensor) and x.is_floating_point():
        batch = in_precision_of(model, x.new_zeros(1, *x.shape[1:]) if empty else x)  # not every model takes no image
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(traceable(model, x))
        for module in {place.module for place in found.values()}:
            stack.callback(module.register_forward_hook(in_this_thread(count)).remove)
        for module in read:
            # A fused kernel never forms the weights. Unfused, timm's modules and the sparse ones hand them to
            # `attn_drop`, which changes nothing in evaluation mode, just before they multiply them with V. It may be
            # one object for all layers, so each gets a container of its own around it.
            stack.callback(setattr, module, "fused_attn", module.fused_attn)
            stack.callback(setattr, module, "attn_drop", module.attn_drop)
            module.fused_attn, module.attn_drop = False, nn.Sequential(module.attn_drop).eval()
            module.attn_drop.register_forward_hook(in_this_thread(partial(keep, module)))
        model(batch)
    if asked is None:
        wanted = called_places(found, calls)
    else:
        wanted = {name: found[name].call(calls[found[name].module]) for name in asked}
    if not wanted:
        raise ValueError(f"{type(model).__name__} called none of its attention modules: {', '.join(found)}")
    maps = {}
    for name in sorted(wanted, key=lambda name: order.index((found[name].module, wanted[name]))):
        weights = kept.get((found[name].module, wanted[name]))
        if weights is None:
            raise _unreadable(found[name])
        maps[name] = weights[:0] if empty else weights
    return maps


def maps_on_grid(
    model: nn.Module, x: Tensor, layers: Iterable[Layer] | Layer | None = None
) -> tuple[dict[str, Tensor], TokenGrid]:
    """`attention_maps`, checked to be over the tokens of the model's grid (else ValueError), and that grid."""
    grid = token_grid(model, x)
    maps = attention_maps(model, x, layers)
    for name, weights in maps.items():
        if (tokens := weights.shape[-1]) != grid.num_tokens:
            raise ValueError(f"layer {name} attends over {tokens} tokens, the model's grid has {grid.num_tokens}")
    return maps, grid


def class_attention(model: nn.Module, x: Tensor, layer: Layer = -1) -> Tensor:
    """Attention of the classifier's token to every patch, per head: [B, H, h, w], in single precision or wider.

    The mean over the tokens that the classifier reads, `readout_rows`; where it reads them by an attention of its own
    (SigLIP), with the weights of that, mean over its heads. Mass on prefix tokens is left out: a map sums to at most 1.
    Errors as for `maps_on_grid` and `readout_rows`.
    """
    if layer is None or (not isinstance(layer, str) and whole_number(layer) is None and isinstance(layer, Iterable)):
        raise ValueError(f"class_attention shows one layer, by index or name, got {layer!r}")
    with pooling_weights(model) as pooled:
        maps, grid = maps_on_grid(model, x, layer)
    check_one_stack(unwrap(model), [place.name for place in attention_places(model).values() if place.index == 0])
    (weights,) = maps.values()  # [B, H, N, N]
    return read_out(at_least_single(weights), model, grid, *pooled)


def upsample(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """[..., h, w] maps on the token grid (else ValueError) -> [..., H, W] on the image.

    `nearest` keeps the patches visible; `bilinear` (default) is what Grad-CAM figures usually show.
    """
    if maps.ndim < 2:
        raise ValueError(f"maps must be [..., h, w], got shape {tuple(maps.shape)}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kwargs = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(flat, size=size, mode=mode, **kwargs).reshape(*maps.shape[:-2], *size)
