"""Occlusion and integrated gradients, through Captum, against patches covered one by one and an integral by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from svit_utils import sparsify
from svit_utils.explain import integrated_gradients, occlusion, token_grid
from tests.explain.by_hand import pictures, tiny

X = pictures().double()


def covered_by_hand(model, x, targets, baseline, size):
    """y(x) - y(x with the patch covered), patch by patch."""
    grid = token_grid(model, x)
    out = torch.zeros(len(x), *grid.size, dtype=torch.float64)
    with torch.no_grad():
        for i in range(grid.height):
            for j in range(grid.width):
                other = x.clone()
                other[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size] = baseline
                change = model(x) - model(other)
                out[:, i, j] = change[range(len(x)), targets].double()
    return out


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("baseline", [0.0, -1.5])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_occlusion_covers_patch_by_patch(baseline, sparse, batch_size):
    model = tiny().double()
    if sparse:
        sparsify(model, 0.05)
    got = occlusion(model, X, [3, 1], baseline=baseline, batch_size=batch_size)
    torch.testing.assert_close(got, covered_by_hand(model, X, [3, 1], baseline, 8))


def test_a_picture_that_ends_within_a_patch():
    model = tiny(dynamic_img_size=True, dynamic_img_pad=True).double()
    x = pictures(2, 30, 45).double()
    got = occlusion(model, x, [3, 1])
    assert got.shape == (2, 4, 6)
    torch.testing.assert_close(got, covered_by_hand(model, x, [3, 1], 0.0, 8))
    summed = integrated_gradients(model, x, [3, 1], baseline=0.5, steps=200).sum((1, 2))
    with torch.no_grad():
        change = (model(x) - model(torch.full_like(x, 0.5)))[range(2), [3, 1]]
    torch.testing.assert_close(summed, change, atol=5e-3, rtol=5e-3)


class Linear(nn.Module):
    """A model that both methods must describe exactly: y = w x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny()
        self.patch_embed, self.num_prefix_tokens = self.vit.patch_embed, 1
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(5, 3, 32, 32, generator=generator))

    def forward(self, x):
        return torch.einsum("kchw,bchw->bk", self.weight, x) + 2


@pytest.mark.parametrize("method", [occlusion, integrated_gradients])
def test_a_linear_model_is_described_exactly(method):
    model = Linear().double()
    expected = (model.weight[[3, 1]] * (X - 0.5)).sum(1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4))
    torch.testing.assert_close(method(model, X, [3, 1], baseline=0.5), expected.detach())


def test_integrated_gradients_are_the_integral():
    model = tiny().double()
    got = integrated_gradients(model, X, [3, 1], baseline=0.2, steps=20, batch_size=7)
    start, total = torch.full_like(X, 0.2), torch.zeros_like(X)
    for step in range(400):  # midpoints
        point = (start + (step + 0.5) / 400 * (X - start)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(model(point)[range(2), [3, 1]].sum(), point)
        total += gradient / 400
    expected = ((X - start) * total).sum(1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4))
    exact = integrated_gradients(model, X, [3, 1], baseline=0.2, steps=200)
    torch.testing.assert_close(exact, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
    assert (got - exact).abs().max() < 0.5 * exact.abs().max()
    with torch.no_grad():
        change = (model(X) - model(start))[range(2), [3, 1]]
    torch.testing.assert_close(exact.sum((1, 2)), change, atol=2e-2 * float(change.abs().max()), rtol=0)


def test_bad_settings_are_named():
    model = tiny()
    for method in (occlusion, integrated_gradients):
        with pytest.raises(ValueError, match="baseline must be a finite value"):
            method(model, pictures(), 1, baseline=float("nan"))
        with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
            method(model, pictures(), 1, batch_size=0)
        with pytest.raises(ValueError, match="targets must lie in 0 to 4"):
            method(model, pictures(), 7)
        with torch.no_grad():
            broken = tiny()
            broken.head.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            method(broken, pictures(), 1)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        integrated_gradients(model, pictures(), 1, steps=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny().to(dtype)
    for method in (occlusion, integrated_gradients):
        got = method(model, pictures(), 1)
        assert got.dtype == torch.float32
        expected = method(tiny(), pictures(), 1)
        assert (got - expected).abs().max() < 0.5 * expected.abs().max()
