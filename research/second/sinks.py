"""Attention sinks: tokens that draw attention whatever the query asks for (Xiao et al. 2024, arXiv:2309.17453).

In vision transformers they are often patches of background whose value vectors are short, so that attending to them
does little (Darcet et al. 2024, arXiv:2309.16588; Sun et al. 2024, arXiv:2402.17762).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from svit_utils.explain import attention_maps
from svit_utils.explain.grid import token_grid

CHUNK = 20  # images at a time


@torch.no_grad()
def values(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One forward pass of ``x`` [B, 3, H, W]: layer name -> the values [B, H, N, D] of timm's `Attention`."""
    found: dict[str, Tensor] = {}

    def catch(name: str, heads: int, _linear: nn.Module, _args: object, qkv: Tensor) -> None:
        found[name] = qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)  # [B, H, N, D]

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Attention):
                hook = partial(catch, name, module.num_heads)
                stack.callback(module.qkv.register_forward_hook(hook).remove)
        model(x)
    return found


@torch.no_grad()
def sink_table(
    model: nn.Module, images: Tensor, cut: Callable[[dict[str, Tensor]], list[Tensor]] | None = None
) -> pd.DataFrame:
    """The token that gets the largest share of all attention, in each layer, image by image; then the mean.

    Args:
        model: with timm's `Attention`, dense or sparse.
        images: [B, 3, H, W].
        cut: changes the weights [B, H, N, N] of all layers, by name, before they are summed.

    Returns:
        A row per ``layer``: ``share`` of the layer's attention mass (over heads and queries) that the heaviest column
        gets; ``value_norm``, the length of its value (all heads joined) over the mean length in that image; and
        ``is_prefix``, how often it is the class token or a register. An even spread would give 1 / N.
    """
    rows = []
    for x in images.split(CHUNK):
        maps = attention_maps(model, x)
        named = maps if cut is None else dict(zip(maps, cut(maps), strict=True))
        prefix = token_grid(model, x).num_prefix
        lengths = {name: v.transpose(1, 2).flatten(2).norm(dim=-1) for name, v in values(model, x).items()}  # [B, N]
        for layer, (name, weights) in enumerate(named.items()):
            mass = weights.sum(dim=(1, 2))  # [B, N], what each column gets from all queries and heads
            share, token = (mass / mass.sum(dim=-1, keepdim=True)).max(dim=-1)
            relative = lengths[name] / lengths[name].mean(dim=-1, keepdim=True)
            norm = relative.gather(1, token[:, None]).squeeze(1)
            rows.append(pd.DataFrame({"layer": layer, "share": share, "value_norm": norm, "is_prefix": token < prefix}))
    return pd.concat(rows).astype(float).groupby("layer", as_index=False).mean().astype({"layer": int})
