"""The attention weights that multiply V, of dense, sparse and mixed models, fused or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention.module import SparseAttentionMixin
from svit_utils.explain.grid import readout_rows, token_grid, unwrap

__all__ = ["attention_layers", "attention_maps", "class_attention", "upsample"]

_DENSE = (Attention, AttentionRope, EvaAttention)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the body; every module's own training flag comes back after it."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every self-attention module whose map can be read, by name, in the model's order.

    Sparse ones, and timm's `Attention`, `AttentionRope` and `EvaAttention` with timm's own forward: a subclass that
    computes something else would give a map that is not what it multiplies with V.
    """
    found = {}
    for name, module in unwrap(model).named_modules():
        dense = any(isinstance(module, cls) and type(module).forward is cls.forward for cls in _DENSE)
        if isinstance(module, SparseAttentionMixin) or dense:
            found[name] = module
    return found


def _select(names: list[str], layers: Sequence[int | str] | int | str | None) -> list[str]:
    if layers is None:
        return names
    chosen = [layers] if isinstance(layers, (int, str)) else list(layers)
    picked = []
    for layer in chosen:
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


@contextmanager
def _recording(module: nn.Module, name: str, store: dict[str, Tensor]) -> Iterator[None]:
    """Put the weights of `module`'s next forward in `store[name]`."""
    if isinstance(module, SparseAttentionMixin):

        def observe(_module, record) -> None:
            store[name] = record.weights.detach()

        module.observers.append(observe)
        try:
            yield
        finally:
            module.observers.remove(observe)
    else:
        # The fused kernel never forms the weights: timm's own unfused path does, and hands them to `attn_drop`, the
        # identity in
        # evaluation mode, just before it multiplies them with V.
        fused = module.fused_attn
        module.fused_attn = False
        handle = module.attn_drop.register_forward_hook(
            lambda _m, _args, weights: store.__setitem__(name, weights.detach())
        )
        try:
            yield
        finally:
            handle.remove()
            module.fused_attn = fused


@torch.no_grad()
def attention_maps(
    model: nn.Module, x: Tensor, layers: Sequence[int | str] | int | str | None = None
) -> dict[str, Tensor]:
    """One forward pass of `x` [B, 3, H, W]: layer name -> the weights [B, H, N, N] that multiply V in that layer.

    For a sparse layer these are the weights after the cut, the renormalisation and the empty-row fallback. A zero
    among them says that the value of that key does not reach the query; its score still moves the softmax normaliser
    of the keys that stay.

    Args:
        layers: indices into `attention_layers(model)`, names, or None for all; order is the model's.

    Raises:
        ValueError: the model has no readable attention, or a layer is unknown.
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
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in names:
            stack.enter_context(_recording(modules[name], name, store))
        model(x)
    return {name: store[name] for name in names if name in store}


def class_attention(model: nn.Module, x: Tensor, layer: int | str = -1) -> Tensor:
    """Attention of the classifier's token to every patch, per head: [B, H, h, w].

    The query is the class token (distilled DeiT: class and distillation token, averaged). Models without a class-token
    head pool patch tokens, so there the average over all patch queries is taken. Mass on prefix tokens is left out: a
    map sums to at most 1.
    """
    grid = token_grid(model, x)
    (weights,) = attention_maps(model, x, layers=layer).values()  # [B, H, N, N]
    if weights.shape[-1] != grid.num_tokens:
        raise ValueError(
            f"layer {layer!r} attends over {weights.shape[-1]} tokens, the model's grid has {grid.num_tokens}"
        )
    rows = weights[:, :, readout_rows(model, grid).to(weights.device)].mean(dim=2)  # [B, H, N]
    return rows[..., grid.num_prefix :].unflatten(-1, grid.size)  # [B, H, h, w]


def upsample(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """[..., h, w] maps on the token grid -> [..., H, W] on the image.

    `nearest` keeps the patches visible; `bilinear` (default) is what Grad-CAM figures usually show.
    """
    if maps.ndim < 2:
        raise ValueError(f"maps must be [..., h, w], got shape {tuple(maps.shape)}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kwargs = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(flat, size=size, mode=mode, **kwargs).reshape(*maps.shape[:-2], *size)
