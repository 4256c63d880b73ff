"""The Triton kernels in half precision, where a row keeps one key, or just keeps a few.

Errors are distances from float64; the kernels' may be at most twice those of the formula in the same dtype, whose sums
are float32 and whose products take rounded factors (`benchmarks.gpu.prove`). The interpreter rounds as a GPU does.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.cases import PerQuery
from benchmarks.gpu.prove import formula_in_dtype
from svit_utils.attention import EMPTY_ROWS, Threshold, attention_record, thresholded_attention
from tests.attention.test_triton import DEVICE, NAMES, blocks_of

pytest.importorskip("triton", reason="triton is not installed")
HALVES = (torch.float16, torch.bfloat16)
N, WIDTH = 40, 16


def inputs(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, N, WIDTH, generator=g) for _ in range(3))
    return [x.to(DEVICE, dtype) for x in (2 * q, k, v)]


def sorted_probabilities(tensors, **options):
    record = attention_record(*(x.double() for x in tensors), 0.0, **options)
    return record.probs.sort(dim=-1, descending=True)


def derivatives(attention, tensors, tau, direction, **options):
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out = attention(q, k, v, tau, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, *tau.parameters()), direction.to(out))]


def by(backend):
    return lambda q, k, v, tau, **options: thresholded_attention(q, k, v, tau, backend=backend, **options)


def per_query(tau) -> Threshold:
    return PerQuery(tau.float().clone()).to(DEVICE)


@pytest.mark.parametrize("left", [0.1, 2e-6])
@pytest.mark.parametrize("mode", EMPTY_ROWS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_single_survivor_gives_its_value_to_the_bit(dtype, mode, left):
    """However little is left of it: the largest probability exceeds tau by the share ``left`` of itself.

    Under "cap", which cuts at half the largest or below, the others have less than that.
    """
    tensors = inputs(dtype, seed=0)
    if mode == "cap":
        tensors[0] = tensors[0] * 4
    probs, order = sorted_probabilities(tensors)
    largest, second = probs[..., :1], probs[..., 1:2]
    if mode == "cap":
        tau = torch.maximum(0.49 * largest, second)
        alone = tau < 0.499 * largest
    else:
        tau = torch.maximum((1 - left) * largest, (largest + second) / 2)
        alone = largest - tau > 0.4 * left * largest
    assert alone.float().mean() > 0.3
    direction = torch.randn(1, 2, N, WIDTH, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    direction = direction.masked_fill(~alone, 0.0)
    wanted = tensors[2].gather(2, order[..., :1].expand(-1, -1, -1, WIDTH))
    ones = torch.zeros(1, 2, N, N, device=DEVICE).scatter(-1, order[..., :1], 1.0)
    exact = ones.transpose(-1, -2) @ direction.to(dtype).float()
    for single in (True, False):
        with blocks_of(16, 64 if single else 16, single):
            out, _, _, dv, _ = derivatives(by("triton"), tensors, per_query(tau), direction, empty_rows=mode)
        assert torch.equal(out[alone.squeeze(-1)], wanted[alone.squeeze(-1)])
        torch.testing.assert_close(dv.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("above", [0.3, 3e-3])
@pytest.mark.parametrize("mode", ["dense", "top1"])
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_that_just_keep_a_few_keys(dtype, mode, above):
    """tau lies below the third largest probability by the share ``above``, so that Z is small, and 1 / Z is large."""
    errors: dict[str, dict[str, list[torch.Tensor]]] = {}
    for seed in range(3):
        tensors = inputs(dtype, seed)
        tensors[0] = tensors[0] / 8  # nearly equal probabilities
        tau = per_query(sorted_probabilities(tensors)[0][..., 2:3] * (1 - above))
        direction = torch.randn(1, 2, N, WIDTH, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))
        exact = derivatives(by("reference"), [x.double() for x in tensors], tau, direction.to(dtype), empty_rows=mode)
        found = {"formula": derivatives(formula_in_dtype, tensors, tau, direction, empty_rows=mode)}
        for single in (True, False):
            with blocks_of(16, 64 if single else 16, single):
                found[f"single={single}"] = derivatives(by("triton"), tensors, tau, direction, empty_rows=mode)
        for which, values in found.items():
            for name, x, e in zip(NAMES, values, exact, strict=True):
                errors.setdefault(name, {}).setdefault(which, []).append((x.double() - e).flatten())
    for name, of in errors.items():
        error = {which: float(torch.cat(x).square().mean().sqrt()) for which, x in of.items()}
        assert error["single=True"] <= 2 * error["formula"], (name, error)
        assert error["single=False"] <= 2 * error["formula"], (name, error)
