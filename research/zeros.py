"""What a zero in a sparse attention map means, measured.

Through the *value* a key with weight 0 contributes nothing, exactly: 0 times a finite number. Through the *score* it
still counts: it stands in the denominator of the softmax, p_j = exp(s_j) / sum_m exp(s_m), and so helps to decide how
far the survivors rise above tau. And a zero closes one path in one layer; through other layers the token may arrive all
the same. `value_path_certificate`, `normaliser_effect` and `reachability_table` measure the three statements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pandas as pd
import torch
from torch import Tensor, nn

from svit_utils.attention.formula import cut_and_renormalise, masked_softmax
from svit_utils.attention.record import AttentionRecord
from svit_utils.attention.surgery import sparse_modules
from svit_utils.exclusive import evaluating, exclusive, in_this_thread
from svit_utils.explain.grid import readout_rows
from svit_utils.explain.maps import maps_on_grid
from svit_utils.explain.model_state import unwrap
from svit_utils.referee.inputs import check_count, check_tau

_CHUNK = 4  # images at a time: the maps of all layers are held together


@torch.no_grad()
def _records(model: nn.Module, x: Tensor) -> Iterator[tuple[str, AttentionRecord, Tensor]]:
    """Each sparse layer's name, all that its attention computed, and the allowed keys, bool [B, H, N, M].

    A forward pass for every few images of `x` [B, 3, H, W]. Raises ValueError for a model without sparse attention.
    """
    model = unwrap(model)
    with exclusive(model):
        modules = sparse_modules(model)
        if not modules:
            raise ValueError(f"{type(model).__name__} has no sparse attention: call sparsify(model, threshold) first")
        for part in x.split(_CHUNK):
            found: dict[str, AttentionRecord] = {}
            with ExitStack() as stack:
                stack.enter_context(evaluating(model))
                for name, module in modules.items():

                    @in_this_thread
                    def observe(_module, record, name=name, found=found) -> None:
                        found[name] = record

                    module.observers.append(observe)
                    stack.callback(module.observers.remove, observe)
                model(part)
            for name, record in found.items():
                everything = torch.ones_like(record.weights, dtype=torch.bool)
                yield name, record, everything if record.allowed is None else record.allowed & everything


def _draw(eligible: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to `count` of the places marked along the last dimension of `eligible` [..., N], evenly and without repeats.

    Returns their indices [..., count] and which of them are real (fewer than `count` may be marked).
    """
    noise = torch.rand(eligible.shape, generator=generator).to(eligible.device)
    chosen = noise.masked_fill(~eligible, -1.0).topk(min(count, eligible.shape[-1]), dim=-1)
    return chosen.indices, chosen.values >= 0


def _one_of(marked: Tensor, generator: torch.Generator) -> Tensor:
    """One of the marked places of each row of `marked` [..., M], evenly: bool [..., M]; none where none is marked."""
    index, _ = _draw(marked, 1, generator)
    return torch.zeros_like(marked).scatter(-1, index, True) & marked


def _take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [..., r] of `values` [..., N, M]: [..., r, M]."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))


def same_without_values(weights: Tensor, values: Tensor, marked: Tensor, replacement: Tensor) -> Tensor:
    """Does the output A v stay exactly the same when the marked values are replaced? bool [R], a row each.

    Weights are [R, M], values and replacement [R, M, D], marked bool [R, M]: each row has values of its own, so that
    both outputs are products of the same shape, summed in the same order. The same means to the last bit (0.0 and -0.0
    are one number). An infinite or NaN value fails even at weight 0, since 0 * inf is NaN.
    """
    before = weights[:, None] @ values  # [R, 1, D]
    after = weights[:, None] @ torch.where(marked[..., None], replacement, values)
    return (before == after).flatten(1).all(dim=1)


@torch.no_grad()
def value_path_certificate(model: nn.Module, x: Tensor, *, rows: int = 8, seed: int = 0) -> pd.DataFrame:
    """Does the value of a key with weight exactly 0 reach the output? Counted for all rows, tried on some.

    In o = sum_j A_j v_j a term with A_j = 0 exactly and v_j finite is exactly 0 and changes no bit of the sum, so the
    zeros among the weights are counted. To try it, in `rows` random rows per image and head all values at weight 0 are
    replaced by random numbers of size 10^6 and A v is computed again, in the precision of the weights. Images `x` are
    [B, 3, H, W].

    Returns one row per sparse layer (dense ones are left out): `layer`; `rows` (queries, over images and heads),
    `rows_with_zeros` and `zeros` (exact zeros among the weights of allowed keys); `rows_checked`, `zeros_checked` and
    `identical`, the share of the rows tried whose output stayed the same to the last bit. It must be 1.0; NaN where no
    row was tried. Raises ValueError for no sparse attention, or `rows` below 1.
    """
    check_count("rows", rows)
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for layer, record, allowed in _records(model, x):
        weights, v = record.weights, record.v.to(record.weights.dtype)  # [B, H, N, M], [B, H, M, D]
        zero = (weights == 0) & allowed
        with_zeros = zero.any(dim=-1)  # [B, H, N]
        index, real = _draw(with_zeros, rows, generator)  # [B, H, r]
        tried, marked = _take_rows(weights, index)[real], _take_rows(zero, index)[real]  # [R, M]
        values = v[:, :, None].expand(*index.shape, *v.shape[2:])[real]  # [R, M, D]
        replacement = 1e6 * torch.randn(values.shape, generator=generator).to(values)
        counts.append(
            {
                "layer": layer,
                "rows": with_zeros.numel(),
                "rows_with_zeros": int(with_zeros.sum()),
                "zeros": int(zero.sum()),
                "rows_checked": len(tried),
                "zeros_checked": int(marked.sum()),
                "identical": int(same_without_values(tried, values, marked, replacement).sum()),
            }
        )
    table = pd.DataFrame(counts).groupby("layer", sort=False, as_index=False).sum()
    table["identical"] = table["identical"] / table["rows_checked"]
    return table


def removal_effect(scores: Tensor, values: Tensor, removed: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """How much each row changes when keys are taken out of it altogether (score -inf), at the same threshold.

    Takes logits [..., N, M], values [..., M, D], removed bool [..., N, M] and tau, a float or [..., N, 1]. Returns the
    L1 change of the row's weights, sum_j |A'_j - A_j| (at most 2), and the relative L2 change of its output,
    |o' - o| / |o|, both [..., N]. A removed key has weight 0 afterwards, and a row without survivors is zero; the
    relative change of an output that is 0 is not finite.
    """
    before = cut_and_renormalise(masked_softmax(scores), tau, "zero")  # [..., N, M]
    after = cut_and_renormalise(masked_softmax(scores.masked_fill(removed, -torch.inf)), tau, "zero")
    out = before @ values  # [..., N, D]
    change = after @ values - out
    return (after - before).abs().sum(dim=-1), change.norm(dim=-1) / out.norm(dim=-1)


@torch.no_grad()
def normaliser_effect(
    model: nn.Module, x: Tensor, tau: float | None = None, *, keys: int = 8, seed: int = 0
) -> pd.DataFrame:
    """What cut keys do through the softmax's denominator: how weights and output change when keys leave the row.

    In rows with at least two survivors (the weight of a single one is 1 whatever the scores are) a cut key, all cut
    keys, or, to compare, a survivor is removed, and the row is normalised and cut again at the same tau. If a zero in
    the map meant no influence, the first two changes would be 0. Removing cut keys of total probability c divides every
    other p by 1 - c: to the survivors it is the same as a threshold of (1 - c) tau. Computed in double precision, from
    the probabilities of the model's own forward pass.

    Args:
        x: images [B, 3, H, W].
        tau: cut the same probabilities there instead, in [0, 1); None takes what each row was cut at.
        keys: rows drawn per image and head, with `seed`; from each row one cut key and one survivor, all evenly.

    Returns:
        One row per sparse `layer` and `removed` ("one cut key", "all cut keys", "one survivor"): `weight_change`, mean
        L1 change of the row's weights, in [0, 2]; `output_change`, mean relative L2 change of its output before the
        projection; `rows`, how many rows the means are over, the same rows for all three. NaN where there are none.

    Raises ValueError for no sparse attention, tau outside [0, 1), or `keys` below 1.
    """
    check_count("keys", keys)
    if tau is not None:
        check_tau(tau)
    generator = torch.Generator().manual_seed(seed)
    changes: dict[tuple[str, str], list[Tensor]] = {}  # (layer, removed) -> [2, R] per part of the batch
    for layer, record, allowed in _records(model, x):
        probs, values = record.probs.double(), record.v.double()  # [B, H, N, M], [B, H, M, D]
        level = torch.as_tensor(record.tau if tau is None else tau, dtype=probs.dtype, device=probs.device)
        level = level.expand(*probs.shape[:-1], 1)  # [B, H, N, 1]
        kept = probs > level
        cut = ~kept & allowed
        index, real = _draw((kept.sum(dim=-1) >= 2) & cut.any(dim=-1), keys, generator)  # [B, H, r]
        probs, level, kept, cut = (_take_rows(t, index) for t in (probs, level, kept, cut))  # [B, H, r, M|1]
        one_cut = _one_of(cut, generator)
        removals = {"one cut key": one_cut, "all cut keys": cut, "one survivor": _one_of(kept, generator)}
        for removed, mask in removals.items():
            # softmax(log p) = p, so the logits are not needed; masked keys come out at -inf.
            effect = removal_effect(probs.log(), values, mask, level)
            changes.setdefault((layer, removed), []).append(torch.stack([e[real] for e in effect]))
    table = []
    for (layer, removed), parts in changes.items():
        weight, output = torch.cat(parts, dim=1)  # [R] each
        row = {"layer": layer, "removed": removed, "weight_change": float(weight.mean())}
        table.append({**row, "output_change": float(output.mean()), "rows": len(weight)})
    return pd.DataFrame(table)


def _steps(weights: Tensor, residual: bool) -> Tensor:
    """Which token reaches which in one layer: bool [B, N, N] from the map [B, H, N, N]; rows are queries."""
    if weights.ndim != 4 or weights.shape[-2] != weights.shape[-1]:
        raise ValueError(f"every map must be [B, H, N, N], got shape {tuple(weights.shape)}")
    step = (weights != 0).any(dim=1)
    return step | torch.eye(step.shape[-1], dtype=torch.bool, device=step.device) if residual else step


def _boolean_product(a: Tensor, b: Tensor) -> Tensor:
    """OR over k of (a_ik AND b_kj); counts up to N are exact in float32."""
    return (a.float() @ b.float()) > 0


def reachability(maps: Sequence[Tensor], residual: bool = True) -> Tensor:
    """Which input token can reach which token through the first l layers: bool [L, B, N, N] from L maps [B, H, N, N].

    Entry [l - 1, b, i, j] says that a chain of values leads from token j at the input to token i after layer l: in
    every layer a head whose weight is not exactly 0, or, with `residual`, the token's own residual connection. It is
    where `rollout_matrix` is positive. Influence through scores is not counted, so False does not say "no influence".
    Raises ValueError for no map, or maps that are not square and of one size.
    """
    if not len(maps):
        raise ValueError("reachability needs the map of at least one layer")
    shapes = {(len(weights), *weights.shape[-2:]) for weights in maps}
    if len(shapes) != 1:
        raise ValueError(f"maps must agree in images and tokens, got {sorted(shapes)}")
    reached = [_steps(maps[0], residual)]
    for weights in maps[1:]:
        reached.append(_boolean_product(_steps(weights, residual), reached[-1]))  # later layers from the left
    return torch.stack(reached)


def reachability_table(model: nn.Module, x: Tensor, *, fallback: bool = True) -> pd.DataFrame:
    """How many patches have a value path to the classifier's token, looking back 1, 2, ... L layers from the end.

    At depth 1 a patch counts if the last layer's row of the class token gives it a weight in any head; at depth d if a
    chain through the last d layers does. Distilled DeiT: to the class or the distillation token. A model that pools
    patches reads them all, so there every patch counts at once by its residual connection. In a dense model, whose
    softmax has no zeros, every patch counts from depth 1. Images `x` are [B, 3, H, W]. Without `fallback` the rows in
    which no key rose above tau count no weights, whatever `empty_rows` gave them.

    Returns one row per `depth` and `residual` (whether the residual connection counts as a path beside attention), with
    `layer`, the earliest layer on the path, and `reachable_share`, mean over images of the share of patches. Raises
    ValueError for no readable attention, or layers over other tokens than the model's grid.
    """
    shares = []
    for part in x.split(_CHUNK):
        maps, grid = maps_on_grid(model, part)
        if not fallback:
            for name, record, _ in _records(model, part):
                fell_back = record.probs.amax(dim=-1, keepdim=True) <= record.normaliser.tau(record.scores)
                maps[name] = record.undropped.masked_fill(fell_back, 0.0)
        for residual in (True, False):
            reached = torch.zeros(len(part), 1, grid.num_tokens, dtype=torch.bool, device=part.device)
            reached[..., readout_rows(model, grid)] = True
            for depth, (layer, weights) in enumerate(reversed(maps.items()), start=1):
                reached = _boolean_product(reached, _steps(weights, residual))  # [B, 1, N]
                row = {"depth": depth, "layer": layer, "residual": residual}
                of_image = reached[..., grid.num_prefix :].double().mean(dim=(1, 2))  # [B]
                shares += [{**row, "reachable_share": share} for share in of_image.tolist()]
    return pd.DataFrame(shares).groupby(["depth", "layer", "residual"], sort=False, as_index=False).mean()
