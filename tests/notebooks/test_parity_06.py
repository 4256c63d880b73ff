"""Chapter 6 writes out the tiled passes and the tile count; they are the package's and the benchmark's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks import tiles, variants
from svit_utils.attention import thresholded_attention
from svit_utils.files import read_rows
from svit_utils.paths import results_dir
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "06_what_it_costs"


def drawn(n: int, m: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    widths = ((n, 8), (m, 8), (m, 8))
    return [2 * torch.randn(3, rows, width, generator=g, dtype=torch.float64) for rows, width in widths]


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_forward_and_backward(tau: float, rows: int) -> None:
    names = {"torch": torch}
    forward = extract_function(CHAPTER, "tiled_forward", names, needs=["cut_or_keep"])
    backward = extract_function(CHAPTER, "tiled_backward", names, needs=["cut_or_keep", "backward_tile"])
    q, k, v = (x.requires_grad_() for x in drawn(33, 33, seed=0))
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    out = thresholded_attention(q[None], k[None], v[None], t, backend="tiled")[0]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(out, (q, k, v, t), upstream)
    with torch.no_grad():
        torch.testing.assert_close(forward(q, k, v, tau, rows), out, rtol=0, atol=1e-13)
        got = backward(upstream, out, q, k, v, tau, rows)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), b, rtol=1e-8, atol=1e-8)


def test_plain() -> None:
    plain = extract_function(CHAPTER, "plain", {"torch": torch})
    q, k, v = drawn(20, 20, seed=2)
    for tau in (0.01, 0.3):
        wanted = thresholded_attention(q[None], k[None], v[None], tau, backend="reference")[0]
        torch.testing.assert_close(plain(q, k, v, tau), wanted, rtol=0, atol=1e-13)


def test_kept_bytes_counts_each_piece_once() -> None:
    kept = extract_function(CHAPTER, "kept_bytes", {"torch": torch})
    x = torch.randn(100, requires_grad=True)
    assert kept(lambda x: x * 2, x) == 0
    assert kept(lambda x: x.exp(), x) == 400
    assert kept(lambda x: x.exp().square().sum(), x) == 400  # exp keeps what square keeps
    assert kept(lambda x: x * x, x) == 0  # an input


def test_empty_tiles() -> None:
    empty = extract_function(CHAPTER, "empty_tiles", {"torch": torch, "F": F})
    survives = torch.rand(150, 200, generator=torch.Generator().manual_seed(0)) > 0.9995
    assert torch.equal(empty(survives), tiles.empty_tiles(survives))
    assert 0 < float(empty(survives).float().mean()) < 1


def test_the_dent_in_the_memory_plot_is_the_batch() -> None:
    """The page divides by 4 below N = 2000 and by 1 beyond, as the benchmark's batch was."""
    for n, batch in ((1025, 4), (2049, 1)):
        assert variants.inputs(n)[0].shape[0] == batch


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_the_recorded_memory_by_tiles_is_a_fraction_of_the_formulas(direction: str) -> None:
    peak = {
        row["variant"]: float(row["peak_growth_mib"])
        for row in read_rows(results_dir() / "bench" / "attention.csv")
        if (row["n"], row["direction"], row["logits"], row["threads"]) == ("4097", direction, "independent", "1")
    }
    assert 0 < peak["tiled"] < 0.05 * peak["plain formula"]
