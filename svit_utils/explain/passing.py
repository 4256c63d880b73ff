"""The weights on their way to V: where every readable attention module can be watched, and where it can be changed.

A fused kernel never forms the weights. Unfused, timm's modules and the sparse ones hand them to `attn_drop`, which
changes nothing in evaluation mode, just before they multiply them with V.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from svit_utils.exclusive import evaluating, in_this_thread
from svit_utils.explain.layers import (
    SUPPORTED,
    Layer,
    Place,
    attention_places,
    called_places,
    find_layer,
    is_readable,
)
from svit_utils.explain.model_state import in_precision_of, traceable

Layers: TypeAlias = Iterable[Layer] | Layer | None
Visitor: TypeAlias = Callable[[nn.Module, Tensor], Tensor | None]


@contextmanager
def weights_passing(modules: Iterable[nn.Module], visit: Visitor) -> Iterator[None]:
    """In the body, `visit(module, weights)` sees the weights [B, H, N, N] that each of `modules` multiplies with V.

    That is after the cut, the renormalisation, the empty-row fallback, and dropout. What it returns takes their place;
    None leaves them as they are. Only what this thread computes is seen. The caller has the model alone.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.callback(setattr, module, "fused_attn", module.fused_attn)
            stack.callback(setattr, module, "attn_drop", module.attn_drop)
            # `attn_drop` may be one object for all layers, so each gets a container of its own around it.
            around = nn.Sequential(module.attn_drop)  # type: ignore[arg-type]
            around.register_forward_hook(in_this_thread(lambda _d, _a, out, module=module: visit(module, out)))
            module.fused_attn, module.attn_drop = False, around
        yield


def in_backward() -> bool:
    """Whether a backward pass runs: gradient checkpointing repeats calls there that were counted before."""
    return torch._C._current_graph_task_id() != -1


def unreadable(place: Place) -> ValueError:
    """The error for a layer whose attention cannot be read."""
    return ValueError(
        f"the attention of {place} cannot be read: supported are {SUPPORTED}; give in `layers` those that can be read"
    )


def readable_places(model: nn.Module, layers: Layers = None) -> tuple[dict[str, Place], list[str] | None]:
    """All places of attention of the model, and those names that `layers` asks for (None for all).

    Raises ValueError for a model without readable attention, no or an unknown layer, or one that is unreadable.
    """
    found = attention_places(model)
    if not any(is_readable(place.module) for place in found.values()):
        raise ValueError(f"{type(model).__name__} has no attention whose map can be read: supported are {SUPPORTED}")
    if layers is None:
        return found, None
    single = isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0
    names = list(found)
    picked = [names[find_layer(layer, names)] for layer in ([layers] if single else layers)]  # type: ignore[union-attr]
    if not picked:
        raise ValueError("layers must name at least one layer, or be None for all")
    for name in picked:
        if not is_readable(found[name].module):
            raise unreadable(found[name])
    return found, picked


@contextmanager
def one_pass(model: nn.Module, x: Tensor, layers: Layers = None) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """(layer name -> weights [B, H, N, N], the model's output) of one forward pass in evaluation mode.

    The weights are the very tensors of the pass: with gradients on, they are part of its graph, and a backward pass in
    the body meets the model as it was in the forward pass. Arguments and errors as for `attention_maps`.
    """
    found, asked = readable_places(model, layers)
    read = {found[name].module for name in (found if asked is None else asked) if is_readable(found[name].module)}
    calls, order, kept = Counter[nn.Module](), list[tuple[nn.Module, int]](), dict[tuple[nn.Module, int], Tensor]()

    def count(module: nn.Module, _args: object, _out: object) -> None:
        if not in_backward():
            order.append((module, calls[module]))
            calls[module] += 1

    def keep(module: nn.Module, weights: Tensor) -> None:
        if not in_backward():
            kept[module, calls[module]] = weights

    batch, empty = x, isinstance(x, Tensor) and not len(x)
    if isinstance(x, Tensor) and x.is_floating_point():
        batch = in_precision_of(model, x.new_zeros(1, *x.shape[1:]) if empty else x)  # not every model takes no image
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(traceable(model, x))
        for module in {place.module for place in found.values()}:
            stack.callback(module.register_forward_hook(in_this_thread(count)).remove)
        stack.enter_context(weights_passing(read, keep))
        output = model(batch)
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
                raise unreadable(found[name])
            maps[name] = weights[:0] if empty else weights
        yield maps, output
