"""Sparsity of rows known in closed form, and nulls that must or must not change it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from scipy.stats import norm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from research.nulls import matched_gaussian, row_statistics, sparsity_against_nulls
from svit_utils import TokenSparsityTracker, sparsified, sparsify
from svit_utils.explain import attention_maps
from svit_utils.models import load_embedded
from svit_utils.referee.nulls import permute_coordinates, queries_and_keys, sparsity_floor

MEASURES = ["cut_sparsity", "kept_mass", "effective_support", "empty_rate"]
SOURCES = {"observed", "permuted_keys", "other_image", "gaussian"}
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tiny(**options):
    """Two blocks, two heads, N = 17 tokens; queries and keys large enough that rows are far from flat."""
    torch.manual_seed(0)
    options = {"embed_dim": 16, "num_heads": 2, **options}
    model = VisionTransformer(img_size=16, patch_size=4, depth=2, num_classes=3, **options).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 40
    return model


def mean_of(table, source, queries="all"):
    part = table[(table["source"] == source) & (table["queries"] == queries)]
    return part.sort_values(["layer", "head"]).set_index(["layer", "head"])[MEASURES]


# ------------------------------------------------------------------------------------------------------- the floor


def test_floor_of_the_published_setting():
    assert sparsity_floor(197, 0.01) == 98 / 197  # 99 survivors of 197: 49.7 %
    assert sparsity_floor(50, 0.01) == 0.0  # patch 32 at 224 px: every key may survive
    assert sparsity_floor(197, 0.1) == 188 / 197
    assert sparsity_floor(5, 0.0) == 0.0


@pytest.mark.parametrize("tau", [0.001, 0.0025, 0.01, 0.02, 0.07, 0.1, 0.3, 1 / 3, 0.5, 0.9, 1e-9])
@pytest.mark.parametrize("tokens", [1, 3, 10, 197, 577])
def test_floor_is_the_fullest_even_row(tokens, tau):
    # Counted, not computed: the largest k for which k even survivors of 1/k each lie above tau.
    fullest = max(k for k in range(1, tokens + 1) if Fraction(1, k) > Fraction(str(tau)))
    assert sparsity_floor(tokens, tau) == pytest.approx(1 - fullest / tokens, abs=1e-15)


def test_floor_refuses_what_is_no_row_or_no_threshold():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        sparsity_floor(0, 0.01)
    for tau in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\)"):
            sparsity_floor(197, tau)


# ------------------------------------------------------------------------------------------------------ the statistics


def test_row_statistics_by_hand():
    toy = torch.tensor([10.0, 6, 3, 1], dtype=torch.float64) / 20  # A = (8, 4, 1) / 13 at tau = 0.1
    flat = torch.full((4,), 0.25, dtype=torch.float64)
    one = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    found = row_statistics(torch.stack([toy, flat, one]).log(), 0.1)
    expected = {
        "cut_sparsity": [1 / 4, 0.0, 3 / 4],
        "kept_mass": [19 / 20, 1.0, 0.97],
        "effective_support": [169 / 81, 4.0, 1.0],
        "empty": [False, False, False],
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), torch.tensor(values, dtype=torch.float64), check_dtype=False)
    above = row_statistics(flat.log(), 0.3)  # tau over 1/N: the flattest row loses every key
    assert {name: float(value) for name, value in above.items()} == {
        "cut_sparsity": 1.0,
        "kept_mass": 0.0,
        "effective_support": 0.0,
        "empty": 1.0,
    }


def test_the_fullest_row_sits_on_the_floor():
    row = torch.zeros(197, dtype=torch.float64)
    row[:99] = 1 / 99
    found = row_statistics(row.log(), 0.01)
    assert float(found["cut_sparsity"]) == pytest.approx(sparsity_floor(197, 0.01))
    assert float(found["effective_support"]) == pytest.approx(99)


# ------------------------------------------------------------------------------------------------- queries and keys


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}])
def test_queries_and_keys_give_the_models_own_attention(options):
    model = tiny(**options)
    found = queries_and_keys(model, X)
    maps = attention_maps(model, X)
    assert list(found) == list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    for name, (q, k) in found.items():
        assert q.shape == k.shape == (3, 2, maps[name].shape[-1], 8)
        torch.testing.assert_close((q @ k.transpose(-2, -1)).softmax(-1), maps[name], rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_queries_and_keys_of_a_sparse_model():
    model = tiny()
    sparsify(model, 0.1, empty_rows="zero")
    maps = attention_maps(model, X)
    for name, (q, k) in queries_and_keys(model, X).items():
        r = ((q @ k.transpose(-2, -1)).softmax(-1) - 0.1).relu()
        torch.testing.assert_close(r / r.sum(-1, keepdim=True).clamp_min(1e-9), maps[name], rtol=1e-3, atol=1e-4)


def test_queries_and_keys_refuses_other_attention_and_masks():
    eva = Eva(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(ValueError, match=r"blocks.0.attn is a EvaAttention: .* timm's Attention"):
        queries_and_keys(eva, X)
    with pytest.raises(ValueError, match="Linear has no attention"):
        queries_and_keys(nn.Linear(2, 2), X)
    model = tiny()
    plain = type(model.blocks[0].attn)

    class Own(plain):
        def forward(self, x, **kwargs):
            return super().forward(x)

    model.blocks[1].attn.__class__ = Own
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is a Own"):
        queries_and_keys(model, X)
    model.blocks[1].attn.__class__ = plain

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = plain(16, 2)

        def forward(self, x):
            return self.attn(x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())

    with pytest.raises(ValueError, match="attn is called with a mask"):
        queries_and_keys(Masked(), torch.zeros(1, 5, 16))


def test_queries_and_keys_of_every_call():
    model = tiny()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[1], model.blocks[0])
    found, maps = queries_and_keys(model, X), attention_maps(model, X)
    assert list(found) == list(maps) == [f"blocks.{i}.attn" for i in range(3)]
    for name, (q, k) in found.items():
        torch.testing.assert_close((q @ k.transpose(-2, -1)).softmax(-1), maps[name], rtol=1e-4, atol=1e-5)
    model.blocks[1].attn = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is a MultiheadAttention"):
        queries_and_keys(model, X)


# ---------------------------------------------------------------------------------------------------------- the nulls


def test_permuting_whole_keys_changes_no_count():
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, 3, 40, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(40, generator=generator)
    before = row_statistics(q @ k.transpose(-2, -1), 0.02)
    whole = row_statistics(q @ k[:, :, order].transpose(-2, -1), 0.02)
    apart = row_statistics(q @ permute_coordinates(k, generator).transpose(-2, -1), 0.02)
    for name in before:
        torch.testing.assert_close(before[name], whole[name])
    assert not torch.allclose(before["cut_sparsity"], apart["cut_sparsity"])


def test_permuted_coordinates_keep_their_values_and_lose_their_company():
    k = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    k[..., 1] = k[..., 0]  # two coordinates that always agree
    permuted = permute_coordinates(k, torch.Generator().manual_seed(1))
    assert torch.equal(k.sort(dim=-2).values, permuted.sort(dim=-2).values)
    assert (permuted[..., 0] == permuted[..., 1]).double().mean() < 0.1


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_matched_gaussian_cuts_what_theory_says(sigma):
    # For many keys sum exp(s) is near N exp(sigma^2 / 2), so p > tau where z > (log(N tau) + sigma^2 / 2) / sigma.
    n, tau = 4000, 2 / 4000
    ramp = torch.linspace(-1, 1, n, dtype=torch.float64)
    scores = (7 + sigma * ramp / ramp.std()).expand(200, n)  # spread sigma, mean 7, nothing normal about it
    noise = matched_gaussian(scores, torch.Generator().manual_seed(0))
    assert noise.std(dim=-1).mean() == pytest.approx(sigma, rel=0.01) and abs(noise.mean()) < 0.01
    share = row_statistics(noise, tau)["cut_sparsity"].mean()
    assert float(share) == pytest.approx(norm.cdf((torch.tensor(n * tau).log() + sigma**2 / 2) / sigma), abs=0.01)


def test_matched_gaussian_follows_each_row():
    spreads = torch.tensor([0.0, 0.1, 1.0, 10.0], dtype=torch.float64)
    scores = spreads[:, None] * torch.linspace(-1, 1, 20_000, dtype=torch.float64)
    noise = matched_gaussian(scores, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.std(dim=-1), scores.std(dim=-1), rtol=0.03, atol=0)


def test_every_source_of_flat_attention_is_flat():
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    for tau, expected in ((0.1, [1.0, 0.0, 0.0, 1.0]), (0.05, [0.0, 1.0, 17.0, 0.0])):  # 1/17 = 0.059
        table = sparsity_against_nulls(model, X, tau)
        assert torch.allclose(torch.tensor(table[MEASURES].to_numpy()), torch.tensor(expected).double(), atol=1e-4)
        assert (table["floor"] == sparsity_floor(17, tau)).all()


def test_the_table_is_tidy_seeded_and_above_the_floor():
    model, state = tiny(), torch.get_rng_state()
    table = sparsity_against_nulls(model, X, 0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert list(table.columns) == ["layer", "head", "queries", "source", *MEASURES, "floor"]
    assert len(table) == 2 * 2 * 2 * 4 and set(table["source"]) == SOURCES
    assert not table.duplicated(["layer", "head", "queries", "source"]).any()
    assert (table["cut_sparsity"] >= table["floor"]).all()
    assert table.equals(sparsity_against_nulls(model, X, 0.1))
    other = sparsity_against_nulls(model, X, 0.1, seed=1)
    for source in SOURCES:
        same = mean_of(table, source).equals(mean_of(other, source))
        assert same == (source in ("observed", "other_image"))
    pooled = sparsity_against_nulls(tiny(class_token=False, global_pool="avg"), X, 0.1)
    assert set(pooled["queries"]) == {"all"}


def test_keys_of_the_same_image_are_no_other_image():
    table = sparsity_against_nulls(tiny(), X[:1].repeat(2, 1, 1, 1), 0.1)
    assert mean_of(table, "observed").equals(mean_of(table, "other_image"))
    apart = sparsity_against_nulls(tiny(), X, 0.1)
    assert not mean_of(apart, "observed").equals(mean_of(apart, "other_image"))


def test_with_one_coordinate_permuting_it_is_permuting_whole_keys():
    table = sparsity_against_nulls(tiny(embed_dim=4, num_heads=4), X, 0.1)
    observed, permuted = mean_of(table, "observed"), mean_of(table, "permuted_keys")
    assert (observed - permuted).abs().to_numpy().max() < 1e-4
    assert (observed - mean_of(table, "gaussian")).abs().to_numpy().max() > 0.01


def test_observed_is_what_the_tracker_counts():
    model = load_embedded("planted_sparse_seed0")
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with sparsified(model, 0.01, empty_rows="zero"):
        with TokenSparsityTracker(model) as tracker, torch.no_grad():
            model(x)
        table = sparsity_against_nulls(model, x)
    for queries in ("all", "class"):
        tracked = tracker.table()
        tracked = tracked[tracked["queries"] == queries].set_index(["layer", "head"])[MEASURES]
        difference = (mean_of(table, "observed", queries) - tracked).abs()
        # rounding may move an entry or two of 38,809 across tau
        assert difference.drop(columns="effective_support").to_numpy().max() < 1e-3
        assert difference["effective_support"].max() < 0.05


def test_bad_input():
    with pytest.raises(ValueError, match=r"at least 2 images .* got 1"):
        sparsity_against_nulls(tiny(), X[:1])
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\), got 1.5"):
        sparsity_against_nulls(tiny(), X, 1.5)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\), got nan"):
        row_statistics(torch.zeros(2, 2), float("nan"))
