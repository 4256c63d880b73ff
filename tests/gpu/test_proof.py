"""The proof proves: every two settings meet, wrong kernels are noticed, right ones pass, rows on the edge are found."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, prove
from benchmarks.gpu.cases import Case
from svit_utils.attention import EMPTY_ROWS, attention_record

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
USUAL = Case("float32", (32, 32), "none", "dense", "one tile", n=33, m=33, logits="flat", tau="per head", shape=(1, 2))


def test_every_two_settings_meet():
    factors = (("a", "b", "c"), (1, 2), (True, False), ("x", "y", "z", "w"))
    rows = cases.covering(factors)
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(factors[i], factors[j]))
    assert len(rows) < 20  # of 48


def test_the_cases_of_a_gpu():
    groups = cases.groups()
    every = [case for group in groups for case in group]
    assert {case.heads for case in every} == set(cases.HEADS)
    assert {(case.dtype, case.mode) for case in every} == set(itertools.product(cases.DTYPES, EMPTY_ROWS))
    assert {(case.mask, case.mode) for case in every} == set(itertools.product(cases.MASKS, EMPTY_ROWS))
    for name, values in (("logits", cases.LOGITS), ("tau", cases.TAUS), ("layout", cases.LAYOUTS)):
        assert {getattr(case, name) for case in every} == set(values)
    assert {case.m for case in every} == {n for lengths in cases.LENGTHS.values() for n in lengths}
    assert all(len({(c.dtype, c.heads, c.mask, c.mode, c.length) for c in group}) == 1 for group in groups)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_layout_changes_the_strides_only(layout):
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(cases.laid_out(x, layout), x)
    assert (cases.laid_out(x, layout).stride() == x.stride()) == (layout == "contiguous")


def wrong(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The formula with something done to q."""

    def attention(q, k, v, tau, **options):
        return prove.backend("reference")(change(q), k, v, tau, **options)

    return attention


def test_the_kernels_pass_and_a_scale_that_is_off_does_not():
    assert prove.prove_case(USUAL, DEVICE)["passed"]
    assert not prove.prove_case(USUAL, DEVICE, wrong(lambda q: 1.001 * q))["passed"]


def test_one_unwritten_number_and_one_that_does_not_repeat_are_noticed():
    draws = iter(range(100))

    def unwritten(q, k, v, tau, **options):
        out = prove.backend("reference")(q, k, v, tau, **options)
        return torch.cat([torch.empty_like(out[..., :1]), out[..., 1:]], dim=-1)

    def unsteady(q, k, v, tau, **options):
        return prove.backend("reference")(q, k, v, tau, **options) * (1 + 1e-7 * next(draws))

    assert prove.prove_case(USUAL, DEVICE, unwritten)["worst_ratio"] == float("inf")
    found = prove.prove_case(USUAL, DEVICE, unsteady)
    assert not found["repeats"] and not found["passed"]


def test_a_wrong_gradient_of_tau_is_noticed():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tau):
            return tau.clone()

        @staticmethod
        def backward(ctx, grad):
            return 0.99 * grad

    def attention(q, k, v, tau, **options):
        return prove.backend("reference")(q, k, v, Halved.apply(tau), **options)

    found = prove.prove_case(USUAL, DEVICE, attention)
    assert not found["passed"] and found["worst"].startswith("dtau")


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_rows_on_the_edge(mode):
    """Probabilities .5, .3, .2: cut at .3, with next to nothing left at .4999; "cap" takes over from .25 on."""
    scores = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.float64), scores.view(1, 1, 3, 1)

    def edge(tau: float) -> bool:
        record = attention_record(q, k, k, tau, empty_rows=mode, scale=1.0)
        return bool(prove.on_edge(record, tau, mode))

    near = 1 + 5e-5
    assert [edge(tau) for tau in (0.3, 0.3 * near, 0.4999)] == [mode != "cap"] * 3
    assert edge(0.25 * near) == (mode == "cap")
    assert not any(edge(tau) for tau in (0.0, 0.22, 0.35, 0.6))
    k = torch.zeros_like(k)  # three equal keys: which one is the largest?
    assert edge(0.4) == (mode in ("top1", "cap")) and not edge(0.1)


def test_formula_in_half_precision_rounds_its_products():
    case = Case("bfloat16", (32, 32), "none", "dense", "one tile", n=33, m=33, shape=(1, 2))
    row = prove.prove_case(case, DEVICE)
    for name in ("out", "dq", "dk", "dv"):  # beyond the rounding of the result, which both have
        assert float(row[f"formula_{name}"]) > 1.1 * float(row[f"reference_{name}"])
