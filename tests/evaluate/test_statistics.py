"""Intervals against what theory says, and weight randomisation against maps that do and do not look at the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from svit_utils import sparsify
from svit_utils.evaluate import mean_interval, paired_bootstrap, randomise_weights, weight_randomisation
from svit_utils.explain import attention_rollout, grad_cam


def test_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=2000)
    interval = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval == mean_interval(values)  # seeded


def test_coverage_is_near_the_stated_confidence():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        interval = mean_interval(rng.normal(size=60), confidence=0.9, resamples=400)
        hits += interval.low <= 0 <= interval.high
    assert 0.82 <= hits / 200 <= 0.96


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 10, size=300)
    a, b = hard + 0.5 + rng.normal(0, 0.5, 300), hard + rng.normal(0, 0.5, 300)
    paired = paired_bootstrap(a, b)
    assert paired.excludes_zero() and paired.low < 0.5 < paired.high
    assert paired.high - paired.low < 0.3 < mean_interval(a).high - mean_interval(a).low
    swapped = paired_bootstrap(b, a)
    assert swapped.mean == pytest.approx(-paired.mean)


def test_equal_results_give_an_interval_of_zero_width():
    right = np.array([True, False, True, True])
    interval = paired_bootstrap(right, right)
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)
    assert not interval.excludes_zero()


def test_takes_boolean_tensors_and_refuses_the_rest():
    interval = paired_bootstrap(torch.tensor([True, True, False]), torch.tensor([False, True, False]))
    assert interval.mean == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="as many in a as in b, got 3 and 2"):
        paired_bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"one value per image, at least 2, got shape \(1,\)"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        mean_interval([1.0, 2.0], confidence=95)


def small():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=48, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 12
    return model


X = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_a_map_of_the_image_alone_survives_and_one_of_the_weights_does_not():
    model = small()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    edges = weight_randomisation(model, X, lambda m, x: x.mean(1))
    assert torch.equal(edges.correlation, torch.ones(1, 3, dtype=torch.float64))
    cams = weight_randomisation(model, X, lambda m, x: grad_cam(m, x, [0, 1, 2], relu=False))
    assert cams.correlation.abs().max() < 0.6
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_cascading_goes_from_the_head_down():
    model = small()
    check = weight_randomisation(model, X, attention_rollout, mode="cascading", seed=4)
    assert check.stages == ["head", "blocks.2", "blocks.1", "blocks.0", "embedding"]
    assert check.correlation.shape == (5, 3)
    assert torch.allclose(check.correlation[0], torch.ones(3).double())  # rollout never sees the head
    assert check.correlation[-1].mean() < check.correlation[1].mean()
    assert list(check.table().columns) == ["stage", "image", "rank_correlation"] and len(check.table()) == 15
    again = weight_randomisation(model, X, attention_rollout, mode="cascading", seed=4)
    assert torch.equal(check.correlation, again.correlation)


def test_shuffling_keeps_values_and_thresholds():
    model = small()
    from svit_utils import LearnableThreshold

    sparsify(model, LearnableThreshold(0.02, per="head"))
    shuffled = randomise_weights(model, seed=0)
    for (name, before), (_, after) in zip(model.named_parameters(), shuffled.named_parameters(), strict=True):
        torch.testing.assert_close(before.flatten().sort().values, after.flatten().sort().values)
        if ".threshold." in name:
            assert torch.equal(before, after)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, shuffled.blocks[0].attn.qkv.weight)


def test_a_constant_map_has_no_order():
    check = weight_randomisation(small(), X, lambda m, x: torch.zeros(3, 4, 4))
    assert torch.equal(check.correlation, torch.zeros(1, 3, dtype=torch.float64))


def test_bad_mode():
    with pytest.raises(ValueError, match="unknown mode 'half': allowed are 'full', 'cascading'"):
        weight_randomisation(small(), X, attention_rollout, mode="half")
    with pytest.raises(ValueError, match="block by block and Linear has no `blocks`"):
        weight_randomisation(torch.nn.Linear(2, 2), torch.zeros(1, 2), lambda m, x: m(x)[:, None], mode="cascading")
