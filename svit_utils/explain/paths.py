"""Rollout as a graph: the few edges and paths that carry most of what reaches the classifier.

A path goes from a patch through one token after each layer to a token that the classifier reads. With A_l the factors
of `rollout_matrix` (fused, with the residual, rows divided by their sums) and s_i the share in which token i is read,

    mass of a path j_0 -> j_1 -> ... -> j_L  =  s_{j_L} A_L[j_L, j_{L-1}] ... A_1[j_1, j_0],

rollout's map at patch j_0 is the sum over all paths from there (Abnar and Zuidema 2020, arXiv:2005.00928), and the mass
of an edge the sum over all paths through it. On sparse attention the graph is sparse as well, except where rows without
a survivor fall back to their softmax.

The fewest *paths* of a given share are those with the largest masses, since masses of paths add up: `strongest_paths`
finds them. The fewest *edges* are a hard problem, since edges share paths. `rollout_graphs` takes edges in the order of
their masses, as many as are needed: the fewest among sets that leave out no stronger edge than they hold.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from svit_utils.attention.module import SparseAttentionMixin
from svit_utils.attention.rows import AttentionRows
from svit_utils.exclusive import exclusively, in_this_thread
from svit_utils.explain.grid import TokenGrid, readout_rows
from svit_utils.explain.layers import attention_places
from svit_utils.explain.maps import maps_on_grid
from svit_utils.explain.model_state import unwrap
from svit_utils.explain.pooling import pooling_weights
from svit_utils.explain.rollout import layer_steps, rollout_factors

if TYPE_CHECKING:
    import networkx as nx


class Path(NamedTuple):
    """The tokens of a path, from the patch (a token number, prefix tokens first) to the one read, and its mass."""

    tokens: tuple[int, ...]
    mass: float


@exclusively
def rollout_graphs(
    model: nn.Module,
    x: Tensor,
    share: float = 0.9,
    *,
    fallback: bool = True,
    head_fusion: str = "mean",
    residual: float = 0.5,
) -> list[nx.DiGraph]:
    """For each image of `x` [B, 3, H, W], the strongest edges that together carry `share` of its rollout from patches.

    Nodes are (l, i), token i after l layers; (0, i) is a token that enters the first. An edge (l - 1, j) -> (l, i) has
    `weight`, A_l[i, j], and `mass`, what all paths through it carry in the whole model. A node has `patch`, whether it
    is a patch token. The graph's own data are `total`, the sum of the image's rollout map; `carried`, what the paths
    inside the graph carry, at least `share` of it; `edges`, how many there are with any mass; `layers`; and `reads`,
    the share in which each token is read.

    Args:
        share: in (0, 1]; 1 keeps every edge that carries anything.
        fallback: False leaves out what a sparse layer's rows without a survivor were given instead (`empty_rows`), as
            if they had been left empty.
        head_fusion, residual: as for `attention_rollout`.

    Raises ValueError for another `share`, and as `attention_rollout`.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share!r}")
    with pooling_weights(model) as pooled:
        maps, grid, empty = _maps_and_empty_rows(model, x)
    if not fallback:
        maps = {
            name: weights.masked_fill(empty[name], 0.0) if name in empty else weights for name, weights in maps.items()
        }
    factors = rollout_factors(list(layer_steps(unwrap(model), maps).values()), head_fusion, residual)
    reads = torch.zeros(len(x), grid.num_tokens, dtype=torch.float64)
    rows = readout_rows(model, grid)
    reads[:, rows] = pooled[0].double().cpu() if pooled else 1 / len(rows)
    steps = [factor.double().cpu() for factor in factors]
    return [_graph([step[image] for step in steps], reads[image], grid, share) for image in range(len(x))]


def _maps_and_empty_rows(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], TokenGrid, dict[str, Tensor]]:
    """`maps_on_grid`, and of each sparse layer which rows [B, H, N, 1] have no survivor."""
    found = attention_places(model)
    seen: dict[nn.Module, list[Tensor]] = {
        place.module: [] for place in found.values() if isinstance(place.module, SparseAttentionMixin)
    }

    @in_this_thread
    def note(module: nn.Module, rows: AttentionRows) -> None:
        seen[module].append((rows.valid & (rows.kept == 0))[..., None])

    observed = [module.row_observers for module in seen if isinstance(module, SparseAttentionMixin)]
    try:
        for observers in observed:
            observers.append(note)
        maps, grid = maps_on_grid(model, x)
    finally:
        for observers in observed:
            observers.remove(note)
    sparse = {name: seen[found[name].module] for name in maps if found[name].module in seen}
    return maps, grid, {name: calls[found[name].call(len(calls))] for name, calls in sparse.items()}


def _graph(steps: list[Tensor], reads: Tensor, grid: TokenGrid, share: float) -> nx.DiGraph:
    """The graph of one image from its factors [N, N], first layer first, and the shares [N] of the tokens read."""
    import networkx as nx

    patches = torch.zeros_like(reads)
    patches[grid.num_prefix :] = 1
    reach, above = [patches], [reads]  # what comes from patches to a token; what of a token comes to the classifier
    for step in steps:
        reach.append(step @ reach[-1])
    for step in reversed(steps):
        above.insert(0, above[0] @ step)
    masses = torch.stack([above[l + 1][:, None] * step * reach[l] for l, step in enumerate(steps)])  # [L, N, N]
    order = masses.flatten().argsort(descending=True, stable=True)
    order = order[: int((masses > 0).sum())]
    total = float(above[0] @ patches)

    def carried(count: int) -> float:
        chosen = torch.zeros(masses.numel(), dtype=torch.bool)
        chosen[order[:count]] = True
        rolled = reads
        for step, inside in zip(reversed(steps), reversed(chosen.view_as(masses)), strict=True):
            rolled = rolled @ (step * inside)
        return float(rolled @ patches)

    few, many = 0, len(order)
    while few < many:  # the fewest edges that carry enough: what is carried grows with their number
        half = (few + many) // 2
        few, many = (few, half) if carried(half) >= share * total * (1 - 1e-12) else (half + 1, many)
    graph = nx.DiGraph(total=total, carried=carried(many), edges=len(order), layers=len(steps))
    graph.graph["reads"] = {(len(steps), i): float(part) for i, part in enumerate(reads) if part > 0}
    kept = order[:many]
    weights, tokens = torch.stack(steps).flatten()[kept].tolist(), len(reads)
    for place, weight, mass in zip(kept.tolist(), weights, masses.flatten()[kept].tolist(), strict=True):
        layer, i, j = place // tokens**2, place // tokens % tokens, place % tokens
        graph.add_edge((layer, j), (layer + 1, i), weight=weight, mass=mass)
    for node, data in graph.nodes(data=True):
        data["patch"] = node[1] >= grid.num_prefix
    return graph


def strongest_paths(graph: nx.DiGraph, share: float = 0.5, *, most: int = 1000) -> list[Path]:
    """The fewest paths that together carry `share` of what a graph of `rollout_graphs` carries, strongest first.

    Best first: each beginning of a path waits with the mass of its best continuation. Where more than `most` would be
    needed, as in dense attention, `most` of them are returned: their masses say what they carry. Raises ValueError for
    a `share` outside (0, 1] or `most` below 1.
    """
    if not 0.0 < share <= 1.0 or most < 1:
        raise ValueError(f"share must lie in (0, 1] and most be at least 1, got {share!r} and {most!r}")
    ahead = dict(graph.graph.get("reads", {}))  # the largest mass with which a node reaches the classifier
    for node in sorted(graph.nodes, reverse=True):  # later layers first
        onwards = [weight * ahead[end] for _, end, weight in graph.out_edges(node, data="weight")]
        ahead[node] = max([ahead.get(node, 0.0), *onwards])
    starts = [node for node, is_patch in graph.nodes(data="patch") if is_patch and node[0] == 0]
    heap = [(-ahead[node], 1.0, (node[1],)) for node in starts]  # (-best mass, mass so far, tokens so far)
    heapq.heapify(heap)
    found, left = list[Path](), share * graph.graph.get("carried", 0.0) * (1 - 1e-9)
    while heap and left > 0 and len(found) < most:
        best, mass, tokens = heapq.heappop(heap)
        node = len(tokens) - 1, tokens[-1]
        if node[0] == graph.graph["layers"]:
            found.append(Path(tokens, -best))
            left += best
        for _, end, weight in graph.out_edges(node, data="weight"):
            heapq.heappush(heap, (-mass * weight * ahead[end], mass * weight, (*tokens, end[1])))
    return found
