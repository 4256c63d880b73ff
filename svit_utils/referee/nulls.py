"""How sparse is attention that knows nothing? What a sparsity has to be compared with.

Some sparsity is forced, whatever the model: `sparsity_floor`. Attention with keys whose coordinates are permuted over
the tokens keeps something of the model and throws away what it makes of *this* image: a sparsity that it shares is no
evidence of selection. The study compares with two more such nulls (`research/nulls.py`).
"""

import math
from contextlib import ExitStack
from fractions import Fraction

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from svit_utils.exclusive import evaluating, exclusively, in_this_thread
from svit_utils.explain.layers import attention_places, called_places, is_readable
from svit_utils.explain.model_state import traceable, unwrap
from svit_utils.referee.inputs import check_tau


def sparsity_floor(tokens: int, tau: float) -> float:
    """The smallest share of a row of `tokens` keys that a cut at `tau` can remove, in [0, 1].

    1 - min(N, ceil(1/tau) - 1) / N, because k probabilities above tau that sum to at most 1 have k tau < 1; a row that
    is even over its survivors reaches it. Raises ValueError for fewer than one token, or tau outside [0, 1).
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens!r}")
    check_tau(tau)
    if tau == 0:
        return 0.0
    # By the decimal number that tau is written as: in floats, 1 / tau may land on the wrong side of a whole number.
    survivors = min(tokens, math.ceil(1 / Fraction(str(tau))) - 1)
    return float(1 - Fraction(survivors, tokens))


@exclusively
@torch.no_grad()
def queries_and_keys(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """One forward pass of `x` [B, 3, H, W]: layer name -> (q, k), each [B, H, N, D], after the norms of q and k.

    q carries the factor D ** -0.5, so that q @ k.transpose(-2, -1) are the logits [B, H, N, N] before the softmax,
    which a fused kernel never forms. Raises ValueError for a model without attention, with one that is not timm's
    `Attention`, dense or sparse (others may rotate q and k, or do anything), or with one that is called with a mask.
    """
    model = unwrap(model)
    layers, allowed = attention_places(model), "timm's Attention, dense or sparse, with timm's own forward"
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention to read queries and keys from: it takes {allowed}")
    for name, place in layers.items():
        if not isinstance(place.module, Attention) or not is_readable(place.module):
            raise ValueError(f"{name} is a {type(place.module).__name__}: queries and keys are read from {allowed}")
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {place.module: [] for place in layers.values()}

    def catch(module, args, kwargs):
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal") or len(args) > 1:
            name = next(name for name, place in layers.items() if place.module is module)
            raise ValueError(f"{name} is called with a mask, which q and k alone do not show: leave it out")
        qkv = module.qkv(args[0]).unflatten(-1, (3, module.num_heads, -1))  # [B, N, 3, H, D]
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        found[module].append((module.q_norm(q) * module.scale, module.k_norm(k)))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(traceable(model, x))
        for module in found:
            stack.callback(module.register_forward_pre_hook(in_this_thread(catch), with_kwargs=True).remove)
        model(x)
    calls = called_places(layers, {module: len(pairs) for module, pairs in found.items()})
    return {name: found[layers[name].module][call] for name, call in calls.items()}


def permute_coordinates(k: Tensor, generator: torch.Generator) -> Tensor:
    """Keys [..., N, D] with each coordinate permuted over the N tokens by itself.

    Every coordinate keeps its distribution, and the coordinates of a key no longer belong together. Permuting *whole*
    keys would be no null: it only reorders every row, and changes no count or sum over it.
    """
    order = torch.rand(k.shape, generator=generator).argsort(dim=-2).to(k.device)
    return k.gather(-2, order)
