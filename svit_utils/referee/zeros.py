"""What a zero in a sparse attention map means, measured.

Through the *value* a key with weight 0 contributes nothing, exactly: 0 times a finite number. Through the *score* it
still counts: it stands in the denominator of the softmax, p_j = exp(s_j) / sum_m exp(s_m), and so decides with all
others how far the survivors rise above tau. And a zero closes one path in one layer; through other layers the token may
arrive all the same. The three functions below measure the three statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pandas as pd
import torch
from torch import Tensor, nn

from svit_utils.attention.formula import AttentionRecord, thresholded_softmax
from svit_utils.attention.surgery import sparse_modules
from svit_utils.explain.grid import readout_rows, token_grid, unwrap
from svit_utils.explain.maps import attention_maps, evaluating

__all__ = [
    "normaliser_effect",
    "reachability",
    "reachability_table",
    "removal_effect",
    "same_without_values",
    "value_path_certificate",
]

_CHUNK = 4  # images at a time: the maps of all layers are held together


@torch.no_grad()
def _records(model: nn.Module, x: Tensor) -> dict[str, AttentionRecord]:
    """One forward pass: sparse layer -> everything its attention computed."""
    model = unwrap(model)
    modules = sparse_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no sparse attention: call sparsify(model, threshold) first")
    found: dict[str, AttentionRecord] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in modules.items():

            def observe(_module, record, name=name) -> None:
                found[name] = record

            module.observers.append(observe)
            stack.callback(module.observers.remove, observe)
        model(x)
    return found


def _allowed(record: AttentionRecord) -> Tensor:
    """Keys a query may attend to: bool [B, H, N, M]."""
    if record.allowed is None:
        return torch.ones_like(record.weights, dtype=torch.bool)
    return record.allowed.expand_as(record.weights)


def _draw(eligible: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to `count` of the places marked along the last dimension of `eligible` [..., N], evenly and without repeats.

    Returns their indices [..., count] and which of them are real (fewer than `count` may be marked).
    """
    noise = torch.rand(eligible.shape, generator=generator).to(eligible.device)
    chosen = noise.masked_fill(~eligible, -1.0).topk(min(count, eligible.shape[-1]), dim=-1)
    return chosen.indices, chosen.values >= 0


def _take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [..., r] of `values` [..., N, M]: [..., r, M]."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


# --------------------------------------------------------------------------------------------- the value of a cut key


def same_without_values(weights: Tensor, values: Tensor, marked: Tensor, replacement: Tensor) -> Tensor:
    """Does the output stay exactly the same when the marked values are replaced? bool [R].

    Each row has values of its own, so that both outputs are products of the same shape, summed in the same order.
    Equal means equal as numbers to the last bit (0.0 and -0.0 are one number).

    Args:
        weights: [R, M].
        values: [R, M, D].
        marked: bool [R, M].
        replacement: [R, M, D], taken where `marked`. A replacement (or value) that is infinite or NaN fails even at
            weight 0, since 0 * inf is NaN.
    """
    before = weights[:, None] @ values  # [R, 1, D]
    after = weights[:, None] @ torch.where(marked[..., None], replacement, values)
    return (before == after).flatten(1).all(dim=1)


@torch.no_grad()
def value_path_certificate(model: nn.Module, x: Tensor, *, rows: int = 8, seed: int = 0) -> pd.DataFrame:
    """The value of a key with weight exactly 0 does not reach the output: counted for all rows, tried on some.

    For every row the certificate is algebraic: o = sum_j A_j v_j, and with A_j = 0 exactly and v_j finite the product
    is exactly 0 (or -0) and adding it changes no bit of a finite sum. So the weights alone certify it, and the table
    counts them. An infinite or NaN value would break it: 0 * inf is NaN.

    Literally: in a few rows per image and head, all values at weight 0 are replaced by random numbers of size 10^6 and
    A v is computed again, in the precision of the weights.

    Args:
        model: with sparse attention (dense layers are left out).
        x: images [B, 3, H, W].
        rows: rows tried per image and head, drawn from those with at least one zero.
        seed: of that draw and of the replacements.

    Returns:
        One row per sparse layer: `layer`; `rows` (queries, over images and heads), `rows_with_zeros` and `zeros`
        (exact zeros among the weights of allowed keys), which the algebra covers; `rows_checked`, `zeros_checked` and
        `identical`, the share of the rows tried whose output stayed the same to the last bit (NaN where none was
        tried). It must be 1.0.

    Raises:
        ValueError: no sparse attention, or `rows` below 1.
    """
    _check_count("rows", rows)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in x.split(_CHUNK):
        for layer, record in _records(model, part).items():
            weights, v = record.weights, record.v.to(record.weights.dtype)  # [B, H, N, M], [B, H, M, D]
            zero = (weights == 0) & _allowed(record)
            with_zeros = zero.any(dim=-1)  # [B, H, N]
            index, real = _draw(with_zeros, rows, generator)  # [B, H, r]
            tried, marked = _take_rows(weights, index)[real], _take_rows(zero, index)[real]  # [R, M]
            values = v[:, :, None].expand(*index.shape, *v.shape[2:])[real]  # [R, M, D]
            replacement = 1e6 * torch.randn(values.shape, generator=generator).to(values)
            parts.append(
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
    table = pd.DataFrame(parts).groupby("layer", sort=False, as_index=False).sum()
    table["identical"] = table["identical"] / table["rows_checked"]
    return table


# --------------------------------------------------------------------------------------------- the score of a cut key


def removal_effect(scores: Tensor, values: Tensor, removed: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """How much each row changes when keys are taken out of it altogether (score -inf), at the same threshold.

    Args:
        scores: logits [..., N, M].
        values: [..., M, D].
        removed: bool [..., N, M].
        tau: what each row is cut at, float or [..., N, 1]; it stays as it is when keys go.

    Returns:
        The L1 change of the row's weights, sum_j |A'_j - A_j| (at most 2), and the relative L2 change of its output,
        |o' - o| / |o|, both [..., N]. The weight of a removed key counts as 0 afterwards. A row without survivors is
        taken as zero; the relative change of an output that is 0 is not finite.
    """
    before = _cut(scores, tau)  # [..., N, M]
    after = _cut(scores.masked_fill(removed, -torch.inf), tau)
    out = before @ values  # [..., N, D]
    change = after @ values - out
    return (after - before).abs().sum(dim=-1), change.norm(dim=-1) / out.norm(dim=-1)


def _cut(scores: Tensor, tau: Tensor | float) -> Tensor:
    """`thresholded_softmax` with a threshold of its own for each row [..., N, 1]."""
    rows = scores.flatten(0, -2)[:, None]  # [R, 1, M]: a row stands where the operator has a head
    taus = torch.as_tensor(tau, dtype=scores.dtype, device=scores.device).expand(*scores.shape[:-1], 1).flatten()  # [R]
    return thresholded_softmax(rows, taus, empty_rows="zero").view_as(scores)


@torch.no_grad()
def normaliser_effect(
    model: nn.Module, x: Tensor, tau: float | None = None, *, keys: int = 8, seed: int = 0
) -> pd.DataFrame:
    """What cut keys do through the softmax's denominator: weights and output when they are removed from the row.

    In rows with at least two survivors (the weight of a single one is 1 whatever the scores are) a cut key, all cut
    keys, or, to compare, a survivor is removed altogether, and the row is normalised and cut anew at the same tau. Were
    a zero in the map the same as no influence, the first two changes would be 0. Removing cut keys of probability c in
    all divides every other p by 1 - c: to the survivors it is the same as a threshold of (1 - c) tau. Computed in
    double precision, from the probabilities of the model's own forward pass.

    Args:
        model: with sparse attention (dense layers are left out).
        x: images [B, 3, H, W].
        tau: cut the same probabilities there instead, in [0, 1); None takes what each row was cut at.
        keys: rows drawn per image and head, and from each row one cut key and one survivor, all evenly.
        seed: of these draws.

    Returns:
        One row per sparse `layer` and `removed` ("one cut key", "all cut keys", "one survivor"): `weight_change`, mean
        L1 change of the row's weights, in [0, 2]; `output_change`, mean relative L2 change of its output before the
        projection; `rows`, how many rows the means are over, the same rows for all three. NaN where there are none.

    Raises:
        ValueError: no sparse attention, tau outside [0, 1), or `keys` below 1.
    """
    _check_count("keys", keys)
    if tau is not None and not 0.0 <= tau < 1.0:
        raise ValueError(f"tau must lie in [0, 1), got {tau!r}")
    generator = torch.Generator().manual_seed(seed)
    changes: dict[tuple[str, str], list[Tensor]] = {}  # (layer, removed) -> [2, R] per part of the batch
    for part in x.split(_CHUNK):
        for layer, record in _records(model, part).items():
            probs, values = record.probs.double(), record.v.double()  # [B, H, N, M], [B, H, M, D]
            level = torch.as_tensor(record.tau if tau is None else tau, dtype=probs.dtype, device=probs.device)
            level = level.expand(*probs.shape[:-1], 1)  # [B, H, N, 1]
            kept = probs > level
            cut = ~kept & _allowed(record)
            index, real = _draw((kept.sum(dim=-1) >= 2) & cut.any(dim=-1), keys, generator)  # [B, H, r]
            probs, level, kept, cut = (_take_rows(t, index) for t in (probs, level, kept, cut))  # [B, H, r, M|1]
            removals = {
                "one cut key": _one_of(cut, generator),
                "all cut keys": cut,
                "one survivor": _one_of(kept, generator),
            }
            for removed, mask in removals.items():
                # softmax(log p) = p: no need of the logits, and masked keys come out at -inf.
                effect = removal_effect(probs.log(), values, mask, level)
                changes.setdefault((layer, removed), []).append(torch.stack([e[real] for e in effect]))
    table = []
    for (layer, removed), parts in changes.items():
        weight, output = torch.cat(parts, dim=1)  # [R] each
        row = {"layer": layer, "removed": removed, "weight_change": float(weight.mean())}
        table.append({**row, "output_change": float(output.mean()), "rows": len(weight)})
    return pd.DataFrame(table)


def _one_of(marked: Tensor, generator: torch.Generator) -> Tensor:
    """One of the marked places of each row of `marked` [..., M], evenly: bool [..., M]; none where none is marked."""
    index, _ = _draw(marked, 1, generator)
    return torch.zeros_like(marked).scatter(-1, index, True) & marked


# --------------------------------------------------------------------------------------------- the paths round a zero


def _steps(weights: Tensor, residual: bool) -> Tensor:
    """Which token reaches which in one layer: bool [B, N, N] from the map [B, H, N, N]; rows are queries."""
    if weights.ndim != 4 or weights.shape[-2] != weights.shape[-1]:
        raise ValueError(f"every map must be [B, H, N, N], got shape {tuple(weights.shape)}")
    step = (weights != 0).any(dim=1)
    if residual:
        step = step | torch.eye(step.shape[-1], dtype=torch.bool, device=step.device)
    return step


def _boolean_product(a: Tensor, b: Tensor) -> Tensor:
    """OR over k of (a_ik AND b_kj); counts up to N are exact in float32."""
    return (a.float() @ b.float()) > 0


def reachability(maps: Sequence[Tensor], residual: bool = True) -> Tensor:
    """Which input token can reach which token through the first l layers: bool [L, B, N, N] from L maps [B, H, N, N].

    Entry [l - 1, b, i, j] says that a chain of values leads from token j at the input to token i after layer l: in
    every layer a head whose weight is not exactly 0, or, with `residual`, the token's own residual connection (which
    stays with the token, as the MLP does). It is where `rollout_matrix` is positive, without the sizes. Influence
    through scores is not counted, so False does not say "no influence".

    Raises:
        ValueError: no map, or maps that are not square and of one size.
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


def reachability_table(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """How many patches have a value path to the classifier's token, looking back 1, 2, ... L layers from the end.

    At depth 1 a patch counts if the last layer's row of the class token gives it a weight in any head; at depth d if a
    chain through the last d layers does. Distilled DeiT: to the class or the distillation token. A model that pools
    patches reads them all, so there every patch counts at once by its residual connection.

    Args:
        model: sparse or dense (dense softmax has no zeros: share 1 from the first layer back).
        x: images [B, 3, H, W].

    Returns:
        One row per `depth` and `residual` (whether the residual connection counts as a path beside attention), with
        `layer`, the earliest layer on the path, and `reachable_share`, mean over images of the share of patches.

    Raises:
        ValueError: no readable attention, or layers over other tokens than the model's grid.
    """
    grid = token_grid(model, x)
    start = readout_rows(model, grid)
    parts = []
    for part in x.split(_CHUNK):
        maps = attention_maps(model, part)
        if any(weights.shape[-1] != grid.num_tokens for weights in maps.values()):
            raise ValueError(
                f"paths need one token grid in every layer ({grid.num_tokens} tokens), got "
                f"{[weights.shape[-1] for weights in maps.values()]}"
            )
        for residual in (True, False):
            reached = torch.zeros(len(part), 1, grid.num_tokens, dtype=torch.bool, device=part.device)
            reached[..., start] = True
            for depth, (layer, weights) in enumerate(reversed(maps.items()), start=1):
                reached = _boolean_product(reached, _steps(weights, residual))  # [B, 1, N]
                shares = reached[..., grid.num_prefix :].double().mean(dim=(1, 2))  # [B]
                row = {"depth": depth, "layer": layer, "residual": residual}
                parts += [{**row, "reachable_share": share} for share in shares.tolist()]
    return pd.DataFrame(parts).groupby(["depth", "layer", "residual"], sort=False, as_index=False).mean()
