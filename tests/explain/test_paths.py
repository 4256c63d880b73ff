"""The edges and paths of a rollout, against all paths of small models, one by one."""

from __future__ import annotations

from itertools import pairwise, product

import networkx as nx
import numpy as np
import pytest
import torch

from svit_utils import sparsify
from svit_utils.explain import (
    attention_maps,
    attention_rollout,
    readout_rows,
    rollout_graphs,
    rollout_matrix,
    strongest_paths,
    token_grid,
)
from tests.explain.by_hand import calls, pictures, tiny

X = pictures(2, 16, 16).double()
SMALL = {"img_size": 16, "depth": 3}  # 4 patches


def all_paths(maps, image, reads, prefix, residual=0.5):
    """Every path from a patch, by its tokens: a product of numbers each."""
    steps = []
    for weights in maps:
        step = (1 - residual) * weights[image].double().mean(0).numpy() + residual * np.eye(weights.shape[-1])
        total = step.sum(1, keepdims=True)
        steps.append(step / np.where(total > 0, total, 1))
    n, found = len(steps[0]), {}
    for tokens in product(range(n), repeat=len(steps) + 1):
        if tokens[0] >= prefix:
            mass = reads[tokens[-1]]
            for step, before, after in zip(steps, tokens[:-1], tokens[1:], strict=True):
                mass = mass * step[after, before]
            if mass > 0:
                found[tokens] = mass
    return found


def edges_of(paths):
    """Mass of each edge: the sum over the paths through it."""
    found = {}
    for tokens, mass in paths.items():
        for layer, (before, after) in enumerate(pairwise(tokens)):
            edge = (layer, before), (layer + 1, after)
            found[edge] = found.get(edge, 0) + mass
    return found


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("tau", [None, 0.2])
@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 1}, {"class_token": False, "global_pool": "avg"}])
def test_the_strongest_edges_that_carry_the_share(kwargs, tau, share):
    model = tiny(**SMALL, **kwargs).double()
    if tau is not None:
        sparsify(model, tau)
    grid, maps = token_grid(model, X), list(attention_maps(model, X).values())
    reads = np.zeros(grid.num_tokens)
    rows = readout_rows(model, grid).tolist()
    reads[rows] = 1 / len(rows)
    for image, graph in enumerate(rollout_graphs(model, X, share)):
        paths = all_paths(maps, image, reads, grid.num_prefix)
        masses, total = edges_of(paths), sum(paths.values())
        assert total == pytest.approx(float(attention_rollout(model, X)[image].sum()), abs=1e-9)
        assert graph.graph["total"] == pytest.approx(total, abs=1e-9) and graph.graph["edges"] == len(masses)
        for start, end, mass in graph.edges(data="mass"):
            assert mass == pytest.approx(masses[start, end], abs=1e-9)
        ranked = sorted(masses, key=masses.get, reverse=True)
        count = graph.number_of_edges()
        weakest = min(masses[edge] for edge in graph.edges)
        assert weakest >= masses[ranked[count - 1]] - 1e-9

        def inside(edges, paths=paths):
            return sum(m for p, m in paths.items() if all(((l, p[l]), (l + 1, p[l + 1])) in edges for l in range(3)))

        assert inside(set(graph.edges)) == pytest.approx(graph.graph["carried"], abs=1e-9)
        assert graph.graph["carried"] >= share * total - 1e-9
        assert inside(set(ranked[: count - 1])) < share * total  # one edge less is not enough


@pytest.mark.parametrize("tau", [None, 0.2])
def test_the_strongest_paths_are_the_fewest(tau):
    model = tiny(**SMALL).double()
    if tau is not None:
        sparsify(model, tau)
    maps = list(attention_maps(model, X).values())
    (graph, _) = rollout_graphs(model, X, 1.0)
    ranked = sorted(all_paths(maps, 0, np.eye(5)[0], 1).items(), key=lambda item: -item[1])
    found = strongest_paths(graph, 0.8)
    for path, (_, mass) in zip(found, ranked, strict=False):
        assert path.mass == pytest.approx(mass, rel=1e-6)
    assert all(dict(ranked)[path.tokens] == pytest.approx(path.mass) for path in found)
    total = sum(mass for _, mass in ranked)
    assert sum(path.mass for path in found) >= 0.8 * total > sum(path.mass for path in found[:-1])
    assert len(strongest_paths(graph, 1.0)) == len(ranked)
    assert [p.mass for p in strongest_paths(graph, 0.8, most=3)] == [p.mass for p in found[:3]]


def test_sparse_attention_needs_fewer_edges_and_fallback_rows_bring_them_back():
    model, x = tiny(), pictures()
    dense = rollout_graphs(model, x)
    sparsify(model, 0.1)
    cut = rollout_graphs(model, x)
    assert all(a.number_of_edges() < b.number_of_edges() for a, b in zip(cut, dense, strict=True))
    sparsify(model, 0.5)  # many rows fall back to their softmax
    with_rows, without = (rollout_graphs(model, x, 1.0, fallback=fallback) for fallback in (True, False))
    sparsify(model, 0.5, empty_rows="zero")
    empty = attention_maps(model, x)
    assert any(bool((weights.sum(-1) == 0).any()) for weights in empty.values())
    for image in range(2):
        assert without[image].number_of_edges() < with_rows[image].number_of_edges()
    # The first layer sees the same picture either way: there, leaving rows out is what `zero` does.
    sparsify(model, 0.5, layers=[0], empty_rows="dense")
    for graph, image in zip(rollout_graphs(model, x, 1.0, fallback=False), range(2), strict=True):
        step = torch.zeros(17, 17)
        for (layer, j), (_, i), weight in graph.edges(data="weight"):
            if layer == 0:
                step[i, j] = weight
        wanted = rollout_matrix([empty["blocks.0.attn"]])[image]
        used = step.any(dim=1)
        torch.testing.assert_close(step[used][:, 1:], wanted[used][:, 1:], atol=1e-6, rtol=0)


def test_a_dense_model_and_one_that_loses_no_row_have_no_fallback():
    model, x = tiny(), pictures()
    for tau in (None, 0.01):
        if tau is not None:
            sparsify(model, tau, empty_rows="cap")
        first, second = (rollout_graphs(model, x, fallback=fallback) for fallback in (True, False))
        assert all(nx.utils.graphs_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "mean", "siglip", "eva"])
def test_every_family_sums_to_its_rollout(kind, family, images):
    model = family(kind)
    sparsify(model, 0.03, layers=[0, 2])
    for graph, rolled in zip(rollout_graphs(model, images, 0.8), attention_rollout(model, images), strict=True):
        assert graph.graph["total"] == pytest.approx(float(rolled.sum()), abs=1e-5)
        assert 0.8 <= graph.graph["carried"] / graph.graph["total"] <= 1 and nx.is_directed_acyclic_graph(graph)
        assert {layer for layer, _ in graph.nodes} == {0, 1, 2, 3}
    assert not any(module.row_observers for module in model.modules() if hasattr(module, "row_observers"))
    assert strongest_paths(graph, 0.05)


def test_reused_blocks_have_their_own_rows():
    model = tiny(depth=2)
    model.blocks = torch.nn.Sequential(model.blocks[0], model.blocks[1], model.blocks[0])
    sparsify(model, 0.4)
    x = pictures()
    assert len(calls(model, x)) == 0  # sparse: no fused call of PyTorch's
    for graph in rollout_graphs(model, x, 1.0, fallback=False):
        assert graph.graph["layers"] == 3 and 0 < graph.graph["total"] <= 1


def test_bad_input():
    model, x = tiny(), pictures()
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            rollout_graphs(model, x, share)
    (graph, _) = rollout_graphs(model, x)
    with pytest.raises(ValueError, match=r"most be at least 1, got 0\.5 and 0"):
        strongest_paths(graph, most=0)
    with pytest.raises(ValueError, match=r"residual must lie in \[0, 1\)"):
        rollout_graphs(model, x, residual=1.0)
    assert rollout_graphs(model, x[:0]) == []
    assert strongest_paths(nx.DiGraph()) == []
