"""Chapter 7: a quantile cuts its share, the heaviest column is the study's, the printed gradient is autograd's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from research.second import sinks
from svit_utils import thresholded_softmax
from svit_utils.attention import RelativeThreshold
from svit_utils.explain import attention_maps
from svit_utils.models import create_model
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "07_thresholds_that_earn_their_place"


def scores(seed: int, n: int = 60) -> torch.Tensor:
    return 2 * torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("share", [0.2, 0.7, 0.95])
def test_a_quantile_cuts_its_share(share: float) -> None:
    tau_for = extract_function(CHAPTER, "tau_for", {"np": np})
    maps = [scores(seed).softmax(-1) for seed in (0, 1)]
    tau = tau_for(share, *maps)
    found = torch.cat([(p <= tau).double().flatten() for p in maps]).mean()
    assert float(found) == pytest.approx(share, abs=0.02)


def test_the_heaviest_column_is_that_of_the_study() -> None:
    heaviest_column = extract_function(CHAPTER, "heaviest_column")
    dense_vit = create_model("small_vit").eval()
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ours = [heaviest_column(p).mean().item() for p in attention_maps(dense_vit, images).values()]
    assert ours == pytest.approx(sinks.sink_table(dense_vit, images)["share"].tolist(), abs=1e-6)


def test_the_gradient_of_tau_as_printed() -> None:
    row = scores(3)[0, 0, 0]
    tau = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(row), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = thresholded_softmax(row[None], tau)[0]
    (weights * upstream).sum().backward()
    p, alive = row.softmax(-1), weights.detach() > 0
    z = (p[alive] - 0.01).sum()
    mean = (weights.detach() * upstream)[alive].sum()
    printed = -(upstream[alive] - mean).sum() / z
    assert alive.sum() > 5
    assert float(tau.grad) == pytest.approx(float(printed))


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_below_one_over_n_no_row_is_ever_empty(spread: float) -> None:
    n = 50
    p = (spread * scores(5, n)).softmax(-1)
    weights = thresholded_softmax((spread * scores(5, n)), RelativeThreshold(0.99), empty_rows="zero")
    assert (weights.sum(-1) > 0.99).all()
    assert ((p > 0.99 / n).sum(-1) <= n / 0.99).all()
