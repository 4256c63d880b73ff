"""Intervals against what theory says, and weight randomisation against maps that do and do not look at the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from svit_utils import sparsify
from svit_utils.explain import attention_rollout, grad_cam
from svit_utils.referee.randomisation import weight_randomisation
from svit_utils.referee.statistics import (
    Comparison,
    Interval,
    compare,
    holm,
    mean_interval,
    paired_bootstrap,
    student_interval,
)


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


def table(seeds, images, *, seed_sd, image_sd=0.5, noise_sd=1.0, mean=0.0, rng=None):
    """Differences [S, n] = mean + what the seed adds + what the image adds + the rest."""
    rng = np.random.default_rng(0) if rng is None else rng
    a = rng.normal(0, seed_sd, (seeds, 1))
    b = rng.normal(0, image_sd, (1, images))
    return mean + a + b + rng.normal(0, noise_sd, (seeds, images))


def crossed(difference, **options):
    """The crossed bootstrap's interval of the mean of `difference` [S, n]."""
    return compare(difference, np.zeros_like(difference), **options).images


def test_crossed_bootstrap_has_the_variance_of_its_formula():
    d = table(30, 400, seed_sd=0.1, mean=1.0)
    mean = d.mean()
    a, b = d.mean(1, keepdims=True) - mean, d.mean(0, keepdims=True) - mean
    e = d - mean - a - b
    parts = (a**2).sum() / 30**2, (b**2).sum() / 400**2, (e**2).sum() / (30 * 400) ** 2
    interval = crossed(d)
    assert interval.mean == pytest.approx(mean)
    assert interval.width / 2 == pytest.approx(1.96 * np.sqrt(sum(parts)), rel=0.05)
    assert parts[0] > 0.2 * sum(parts) and parts[1] > 0.2 * sum(parts)  # neither alone would do
    assert interval.n == 400 and interval == crossed(d)
    assert interval != crossed(d, seed=1)


@pytest.mark.parametrize("seeds", [1, 2, 7])
def test_crossed_bootstrap_of_seeds_that_agree_is_the_one_over_images(seeds):
    row = np.random.default_rng(3).normal(0.2, 1.0, 500)
    found, images = crossed(np.tile(row, (seeds, 1))), mean_interval(row)
    assert found.mean == pytest.approx(images.mean)
    assert found.low == pytest.approx(images.low, abs=0.03 * images.width)
    assert found.high == pytest.approx(images.high, abs=0.03 * images.width)
    # The same images are drawn however many seeds there are, so this holds to rounding.
    alone = crossed(row[None])
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=1e-12)


def test_crossed_bootstrap_of_images_that_agree_is_the_spread_of_the_seeds():
    # Two seeds, drawn twice: both the first (1/4), one of each (1/2), both the second (1/4).
    two = np.tile([[0.0], [1.0]], (1, 50))
    assert crossed(two, confidence=0.4).low == crossed(two, confidence=0.4).high == 0.5
    wide = crossed(two, confidence=0.6)
    assert (wide.low, wide.high) == (0.0, 1.0)
    # Three: all the lowest, or all the highest, with probability 1/27, more than 2.5 % and less than 5 %.
    three = np.tile([[-1.0], [0.0], [4.0]], (1, 50))
    interval = crossed(three)
    assert (interval.low, interval.mean, interval.high) == pytest.approx((-1.0, 1.0, 4.0))
    # Next on either side: twice the lowest and 0, twice the highest and 0, 3/27 each.
    narrower = crossed(three, confidence=0.9)
    assert (narrower.low, narrower.high) == pytest.approx((-2 / 3, 8 / 3))


def test_crossed_bootstrap_covers_where_images_decide_and_not_where_three_seeds_do():
    rng = np.random.default_rng(4)

    def covered(seed_sd):
        intervals = [crossed(table(3, 100, seed_sd=seed_sd, rng=rng), resamples=400) for _ in range(200)]
        return np.mean([i.low <= 0 <= i.high for i in intervals])

    assert covered(0.0) > 0.9
    assert 0.6 < covered(1.0) < 0.85  # why `compare` asks Student as well


def test_whole_numbers_are_resampled_without_rounding():
    # One picture won, one lost: a resampled mean is 0 exactly when both are drawn equally often, and counts both ways.
    d = np.zeros((3, 7))
    d[:, 0], d[:, 1] = 1, -1
    assert compare(d, np.zeros_like(d)).p_value == 1
    assert crossed(np.zeros((3, 7))) == Interval(0.0, 0.0, 0.0, 7)


def test_student_interval_by_hand():
    # Mean 2, s = 1, t_{0.975, 2} = 4.3027: 2 +- 4.3027 / sqrt(3).
    interval = student_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, -0.48414, 4.48414), abs=1e-5)
    assert (interval.n, interval.confidence) == (3, 0.95) and not interval.excludes_zero()
    # With one degree of freedom t is Cauchy's: t_{0.75, 1} = 1; mean 3, s / sqrt(2) = 1.
    half = student_interval([2.0, 4.0], confidence=0.5)
    assert (half.low, half.high) == pytest.approx((2.0, 4.0))
    assert student_interval([5.0, 5.0]).width == 0
    assert str(student_interval([2.0, 4.0], confidence=0.5)) == "3 [2, 4]"


def test_compare_is_the_larger_of_two_p_values():
    # Three seeds 1, 2, 3 on images that all agree: t = 2 / (1 / sqrt(3)) with 2 degrees of freedom, for which
    # p = 1 - t / sqrt(2 + t^2); every resample lies above 0, so the bootstrap's p is 2 / (B + 1).
    a = np.tile([[1.0], [2.0], [3.0]], (1, 40))
    found = compare(a, np.zeros_like(a), resamples=999)
    t = 2 * np.sqrt(3)
    assert found.p_value == pytest.approx(1 - t / np.sqrt(2 + t**2))
    assert (found.mean, found.n_seeds, found.n_images) == (2.0, 3, 40)
    assert found.seeds == student_interval([1, 2, 3]) and found.wider is found.seeds
    assert (found.images.low, found.images.mean, found.images.high) == pytest.approx((1, 2, 3))  # all one seed: 1/27
    assert (found.images.n, found.images.confidence) == (40, 0.95)
    assert compare(a[:1], np.zeros((1, 40)), resamples=999).p_value == pytest.approx(2 / 1000)


def test_compare_where_all_seeds_say_the_same_leaves_it_to_the_bootstrap():
    row = np.random.default_rng(5).normal(0.15, 1.0, (1, 200))
    one = compare(row, np.zeros_like(row))
    three = compare(np.tile(row, (3, 1)), np.zeros((3, 200)))
    assert 0.001 < three.p_value < 0.5 and three.p_value == one.p_value
    assert three.seeds is not None and three.seeds.width < 1e-12 and three.wider is three.images
    nothing = compare(row, row)
    assert (nothing.mean, nothing.p_value, nothing.verdict(nothing.p_value)) == (0, 1, "open")
    nothing = compare(np.tile(row, (3, 1)), np.tile(row, (3, 1)))
    assert (nothing.mean, nothing.p_value, nothing.wider.width) == (0, 1, 0)


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_compare_is_symmetric(seeds):
    a, b = table(seeds, 80, seed_sd=0.2, mean=0.3), table(seeds, 80, seed_sd=0.2, rng=np.random.default_rng(9))
    there, back = compare(a, b, resamples=2000), compare(b, a, resamples=2000)
    assert there.p_value == back.p_value and there.mean == -back.mean
    for one, other in ((there.images, back.images), (there.seeds, back.seeds)):
        assert (one is None) == (other is None) == (one is there.seeds and seeds == 1)
        if one is not None:
            assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_compare_pairs_before_it_averages():
    rng = np.random.default_rng(6)
    hard = rng.normal(0, 10, (1, 150)) + rng.normal(0, 10, (4, 1))
    a, b = hard + 0.5 + rng.normal(0, 0.3, (4, 150)), hard + rng.normal(0, 0.3, (4, 150))
    found = compare(a, b, resamples=2000)
    assert found.p_value < 0.01 and found.verdict(found.p_value) == "higher" and found.wider.width < 0.5
    right = compare(torch.tensor([[True, True, False]] * 2), torch.tensor([[False, True, False]] * 2), resamples=99)
    assert right.mean == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed_sd", [0.0, 1.0])
def test_compare_keeps_its_level(seed_sd):
    # 200 tables without a difference: a false claim in 5 % of them at most; 5 % + 4 standard errors is 11 %.
    rng = np.random.default_rng(7)
    tables = [table(4, 60, seed_sd=seed_sd, rng=rng) for _ in range(200)]
    found = [compare(d, np.zeros_like(d), resamples=399) for d in tables]
    assert np.mean([c.p_value < 0.05 for c in found]) < 0.11
    # What is claimed without adjustment is what both intervals say.
    for c in found:
        assert c.seeds is not None
        assert c.p_value >= 0.05 or (c.images.excludes_zero() and c.seeds.excludes_zero())


def test_compare_finds_what_is_there():
    rng = np.random.default_rng(8)
    tables = [table(5, 60, seed_sd=0.1, mean=1.0, rng=rng) for _ in range(50)]
    verdicts = []
    for d in tables:
        c = compare(np.zeros_like(d), d, resamples=399)
        verdicts.append(c.verdict(c.p_value))
    assert verdicts.count("lower") >= 48 and "higher" not in verdicts


def test_verdict_rules():
    narrow, wide = Interval(0.2, 0.1, 0.3, 100), Interval(0.2, -0.1, 0.5, 3)
    three = Comparison(0.2, narrow, wide, 0.01, 3, 100)
    assert three.verdict(0.049) == "higher" and three.verdict(0.05) == "open" and three.verdict(0.02, 0.01) == "open"
    assert Comparison(-0.2, narrow, wide, 0.01, 3, 100).verdict(0.049) == "lower"
    assert Comparison(0.2, narrow, None, 0.0002, 1, 100).verdict(0.0002) == "open"  # one seed speaks of one run
    assert three.wider is wide
    assert Comparison(0.2, wide, narrow, 0.01, 3, 100).wider is wide
    assert Comparison(0.2, narrow, None, 0.01, 1, 100).wider is narrow
    with pytest.raises(ValueError, match=r"p_adjusted must lie in \[0, 1\], got nan"):
        three.verdict(float("nan"))
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\), got 5"):
        three.verdict(0.01, 5)


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == pytest.approx([0.03])
    assert holm([0.0, 1.0, 0.0]) == pytest.approx([0.0, 1.0, 0.0])


def test_holm_rejects_something_only_where_bonferroni_does():
    # min_k adjusted = m min p: so the chance of any false claim is P(min p < alpha / m) <= alpha where nothing differs.
    for p in np.random.default_rng(10).uniform(size=(5, 20)) ** 3:
        adjusted, order = holm(p), np.argsort(p)
        assert adjusted.min() == pytest.approx(min(1.0, 20 * p.min()))
        assert (np.diff(adjusted[order]) >= 0).all() and (adjusted >= p).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1, float("nan")], r"must lie in \[0, 1\], got nan"),
        ([0.1, 1.5], r"must lie in \[0, 1\], got 1.5"),
        ([-0.1], r"must lie in \[0, 1\], got -0.1"),
        ([], r"one-dimensional, at least 1, got shape \(0,\)"),
        ([[0.1, 0.2]], r"one-dimensional, at least 1, got shape \(1, 2\)"),
    ],
)
def test_holm_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        holm(values)


def test_tables_that_are_none():
    with pytest.raises(ValueError, match=r"a must be \[S, n\], at least 1 seed and 2 images, got shape \(3,\)"):
        compare([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"got shape \(3, 1\)"):
        crossed(np.ones((3, 1)))
    with pytest.raises(ValueError, match="a must be finite"):
        crossed([[1.0, float("inf")]])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        crossed(np.ones((2, 3)), confidence=95)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        crossed(np.ones((2, 3)), resamples=0)
    with pytest.raises(ValueError, match=r"paired over seeds and images, got shapes \(2, 3\) and \(1, 3\)"):
        compare(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="b must be finite"):
        compare(np.ones((2, 3)), np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match=r"one value per seed, at least 2, got shape \(1,\)"):
        student_interval([1.0])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        student_interval([1.0, 2.0], confidence=0)


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
    seen = []
    weight_randomisation(model, X, lambda m, x: (seen.append(m), x[:, 0])[1])
    assert seen[0] is model
    shuffled = seen[1]
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
