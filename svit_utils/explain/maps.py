"""The attention weights that multiply V, of dense, sparse and mixed models, fused or not."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention.module import SparseAttentionMixin
from svit_utils.exclusive import evaluating, exclusively, in_this_thread
from svit_utils.explain.grid import TokenGrid, read_out, token_grid
from svit_utils.explain.model_state import unwrap


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every self-attention module whose map can be read, by name, in the model's order.

    These are the sparse ones, and timm's `Attention`, `AttentionRope` and `EvaAttention` with timm's own forward. A
    subclass with another forward is left out: the weights read from it might not be those that it multiplies with V.
    """

    def readable(module: nn.Module) -> bool:
        dense = (c for c in (Attention, AttentionRope, EvaAttention) if isinstance(module, c))
        return isinstance(module, SparseAttentionMixin) or any(type(module).forward is c.forward for c in dense)

    return {name: module for name, module in unwrap(model).named_modules() if readable(module)}


def _select(names: list[str], layers: Sequence[int | str] | int | str | None) -> list[str]:
    """Those of `names` that `layers` asks for, by index or name, in the model's order."""
    if layers is None:
        return names
    picked = []
    for layer in [layers] if isinstance(layers, (int, str)) else layers:
        if isinstance(layer, str) and layer in names:
            picked.append(layer)
        elif isinstance(layer, int) and not isinstance(layer, bool) and -len(names) <= layer < len(names):
            picked.append(names[layer])
        else:
            raise ValueError(
                f"unknown attention layer {layer!r}: allowed are indices {-len(names)} to {len(names) - 1} and the "
                f"names {', '.join(names)}"
            )
    return [name for name in names if name in picked]


@exclusively
@torch.no_grad()
def attention_maps(
    model: nn.Module, x: Tensor, layers: Sequence[int | str] | int | str | None = None
) -> dict[str, Tensor]:
    """One forward pass of `x` [B, 3, H, W]: layer name -> the weights [B, H, N, N] that multiply V in that layer.

    For a sparse layer these are the weights after the cut, the renormalisation and the empty-row fallback. A zero
    among them says that the value of that key does not reach the query; its score still changes the denominator of the
    softmax, and with it the weights of the keys that stay.

    `layers` are indices into `attention_layers(model)`, names, or None for all; order is the model's. Raises ValueError
    for a model without readable attention, or an unknown layer.
    """
    model = unwrap(model)
    modules = attention_layers(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention whose map can be read: supported are timm's Attention, "
            f"AttentionRope, EvaAttention and their sparse forms"
        )
    names = _select(list(modules), layers)
    store: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: object, weights: Tensor) -> None:
        store[name] = weights.detach()

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in names:
            # A fused kernel never forms the weights. Unfused, timm's modules and the sparse ones hand them to
            # `attn_drop`, which changes nothing in evaluation mode, just before they multiply them with V.
            stack.callback(setattr, modules[name], "fused_attn", modules[name].fused_attn)
            modules[name].fused_attn = False
            hook = in_this_thread(partial(keep, name))
            stack.callback(modules[name].attn_drop.register_forward_hook(hook).remove)
        model(x)
    return {name: store[name] for name in names if name in store}


def maps_on_grid(
    model: nn.Module, x: Tensor, layers: Sequence[int | str] | int | str | None = None
) -> tuple[dict[str, Tensor], TokenGrid]:
    """`attention_maps`, checked to be over the tokens of the model's grid (else ValueError), and that grid."""
    grid = token_grid(model, x)
    maps = attention_maps(model, x, layers)
    for name, weights in maps.items():
        if (tokens := weights.shape[-1]) != grid.num_tokens:
            raise ValueError(f"layer {name} attends over {tokens} tokens, the model's grid has {grid.num_tokens}")
    return maps, grid


def class_attention(model: nn.Module, x: Tensor, layer: int | str = -1) -> Tensor:
    """Attention of the classifier's token to every patch, per head: [B, H, h, w].

    The mean over the tokens that the classifier reads, `readout_rows`. Mass on prefix tokens is left out: a map sums to
    at most 1. Errors as for `maps_on_grid`.
    """
    maps, grid = maps_on_grid(model, x, layer)
    (weights,) = maps.values()  # [B, H, N, N]
    return read_out(weights, model, grid)


def upsample(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """[..., h, w] maps on the token grid (else ValueError) -> [..., H, W] on the image.

    `nearest` keeps the patches visible; `bilinear` (default) is what Grad-CAM figures usually show.
    """
    if maps.ndim < 2:
        raise ValueError(f"maps must be [..., h, w], got shape {tuple(maps.shape)}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kwargs = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(flat, size=size, mode=mode, **kwargs).reshape(*maps.shape[:-2], *size)
