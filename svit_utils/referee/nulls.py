"""How sparse is attention that knows nothing? Nulls with which a sparsity has to be compared.

Some sparsity is forced, whatever the model: `sparsity_floor`. Three nulls keep something of the model and throw away
what it makes of *this* image: keys whose coordinates are permuted over the tokens, keys of another image, and Gaussian
logits of the same spread. A sparsity that they share is no evidence of selection.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from svit_utils.attention.formula import thresholded_softmax
from svit_utils.attention.record import effective_support
from svit_utils.attention.tracker import has_class_token
from svit_utils.explain.maps import attention_layers
from svit_utils.explain.model_state import evaluating, unwrap
from svit_utils.referee.inputs import check_tau

if TYPE_CHECKING:
    import pandas as pd


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


@torch.no_grad()
def queries_and_keys(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """One forward pass of `x` [B, 3, H, W]: layer name -> (q, k), each [B, H, N, D], after the norms of q and k.

    q carries the factor D ** -0.5, so that q @ k.transpose(-2, -1) are the logits [B, H, N, N] before the softmax,
    which a fused kernel never forms. Raises ValueError for a model without attention, with one that is not timm's
    `Attention`, dense or sparse (others may rotate q and k, or do anything), or with one that is called with a mask.
    """
    model = unwrap(model)
    layers, allowed = attention_layers(model), "timm's Attention, dense or sparse, with timm's own forward"
    for name, module in model.named_modules():
        if (name in layers) != isinstance(module, Attention):
            raise ValueError(f"{name} is a {type(module).__name__}: queries and keys are read from {allowed}")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention to read queries and keys from: it takes {allowed}")
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name, module, args, kwargs):
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal") or len(args) > 1:
            raise ValueError(f"{name} is called with a mask, which q and k alone do not show: leave it out")
        qkv = module.qkv(args[0]).unflatten(-1, (3, module.num_heads, -1))  # [B, N, 3, H, D]
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        found[name] = (module.q_norm(q) * module.scale, module.k_norm(k))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(partial(catch, name), with_kwargs=True).remove)
        model(x)
    return found


def row_statistics(scores: Tensor, tau: float) -> dict[str, Tensor]:
    """What a cut at `tau` does to each row of logits `scores` [..., N, M], before any fallback: each entry [..., N].

    With p the row's softmax, S = {j : p_j > tau} and A the row cut and renormalised (ValueError for tau not in [0, 1)):

    * `cut_sparsity`: share of the M keys with p_j <= tau,
    * `kept_mass`: sum of p over S,
    * `effective_support`: 1 / sum(A^2), as many keys with even weights would give the same; 0 where S is empty,
    * `empty`: boolean, S is empty.
    """
    check_tau(tau)
    probs = scores.softmax(dim=-1)  # [..., N, M]
    kept = probs > tau
    return {
        "cut_sparsity": 1 - kept.sum(dim=-1) / kept.shape[-1],
        "kept_mass": (probs * kept).sum(dim=-1),
        "effective_support": effective_support(thresholded_softmax(scores, tau, empty_rows="zero")),
        "empty": ~kept.any(dim=-1),
    }


def permute_coordinates(k: Tensor, generator: torch.Generator) -> Tensor:
    """Keys [..., N, D] with each coordinate permuted over the N tokens by itself.

    Every coordinate keeps its distribution, and the coordinates of a key no longer belong together. Permuting *whole*
    keys would be no null: it only reorders every row, and changes no count or sum over it.
    """
    order = torch.rand(k.shape, generator=generator).argsort(dim=-2).to(k.device)
    return k.gather(-2, order)


def matched_gaussian(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Independent normal logits [..., N, M], each row as spread as that row of `scores`; softmax ignores its mean."""
    noise = torch.randn(scores.shape, generator=generator, dtype=scores.dtype).to(scores.device)
    return noise * scores.std(dim=-1, keepdim=True)


def sparsity_against_nulls(model: nn.Module, x: Tensor, tau: float = 0.01, *, seed: int = 0) -> pd.DataFrame:
    """Sparsity of the model's attention on the images `x` [B, 3, H, W] beside that of three nulls, cut at `tau`.

    The cut is applied to the logits, of sparse and of dense layers alike: for a dense model the numbers say what a cut
    *would* take, and in a sparse one an empty row counts as empty, whatever it falls back to.

    Returns a row per `layer`, `head`, `queries` ("all", and "class" for the class token's row alone, where there is
    one) and `source`: "observed", the model's own logits; "permuted_keys", see `permute_coordinates`; "other_image",
    queries of each image against the keys of the next one in the batch; "gaussian", see `matched_gaussian`. Columns:
    `cut_sparsity`, `kept_mass`, `effective_support` and `empty_rate`, means over images and queries as in
    `row_statistics`, and `floor`, see `sparsity_floor`.

    Raises ValueError for fewer than two images, tau outside [0, 1), or where `queries_and_keys` does.
    """
    import pandas as pd

    check_tau(tau)
    if len(x) < 2:
        raise ValueError(f"x must hold at least 2 images (keys are swapped between them), got {len(x)}")
    generator = torch.Generator().manual_seed(seed)
    parts = {"all": slice(None), **({"class": slice(1)} if has_class_token(model) else {})}
    table = []
    for layer, (q, k) in queries_and_keys(model, x).items():
        sums: dict[tuple[str, str], Tensor] = {}  # (queries, source) -> [H, 4], summed over images
        for image in range(len(q)):  # one at a time: [B, H, N, N] several times over would not be small
            own, keys = q[image], k[image].transpose(-2, -1)  # [H, N, D], [H, D, N]
            scores = own @ keys  # [H, N, N]
            sources = {
                "observed": scores,
                "permuted_keys": own @ permute_coordinates(k[image], generator).transpose(-2, -1),
                "other_image": own @ k[(image + 1) % len(k)].transpose(-2, -1),
                "gaussian": matched_gaussian(scores, generator),
            }
            for source, logits in sources.items():
                rows = torch.stack([s.double() for s in row_statistics(logits, tau).values()], dim=-1)  # [H, N, 4]
                for queries, part in parts.items():
                    sums[queries, source] = sums.get((queries, source), 0) + rows[:, part].mean(dim=1).cpu()
        for (queries, source), total in sums.items():
            for head, means in enumerate((total / len(q)).tolist()):
                where = {"layer": layer, "head": head, "queries": queries, "source": source}
                columns = zip(("cut_sparsity", "kept_mass", "effective_support", "empty_rate"), means, strict=True)
                table.append({**where, **dict(columns), "floor": sparsity_floor(k.shape[-2], tau)})
    return pd.DataFrame(table)
