"""What a zero means: toys worked out by hand, then the shipped sparse model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from research.zeros import (
    normaliser_effect,
    reachability,
    reachability_table,
    removal_effect,
    same_without_values,
    value_path_certificate,
)
from svit_utils import TokenSparsityTracker, sparsified, sparsify
from svit_utils.data import PlantedShapes
from svit_utils.explain import attention_maps, rollout_matrix
from svit_utils.models import create_model, load_embedded

TAU = 0.01
X = PlantedShapes("test").batch(5).images  # more than one chunk


@pytest.fixture(scope="module")
def sparse():
    model = load_embedded("planted_sparse_seed0")
    sparsify(model, TAU)
    return model


# ---------------------------------------------------------------------------------------------- the value of a cut key


def test_only_values_at_zero_can_be_replaced():
    weights = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).repeat(4, 1)
    values = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    marked = weights == 0
    marked[1, 2] = True  # in the second row a value that counts as well
    replacement = torch.full_like(values, -1e30)
    replacement[2, 1, 0] = torch.inf  # 0 * inf is NaN
    replacement[3, 0] = torch.nan  # not marked: not taken
    same = same_without_values(weights, values, marked, replacement)
    assert same.tolist() == [True, False, False, True]
    weights[0, 1] = 1e-25  # nearly zero is not zero
    assert not same_without_values(weights, values, marked, replacement)[0]


def test_certificate_counts_every_zero_and_holds(sparse):
    state = torch.get_rng_state()
    table = value_path_certificate(sparse, X, rows=3)
    assert torch.equal(state, torch.get_rng_state())
    assert (table["identical"] == 1.0).all()
    assert (table["rows"] == 5 * 3 * 197).all() and (table["rows_checked"] == 5 * 3 * 3).all()
    for (name, weights), row in zip(attention_maps(sparse, X).items(), table.itertuples(), strict=True):
        zero = weights == 0
        assert row.layer == name
        assert row.zeros == int(zero.sum()) and row.rows_with_zeros == int(zero.any(-1).sum())
        assert 100 * row.rows_checked < row.zeros_checked < 197 * row.rows_checked
    with TokenSparsityTracker(sparse) as tracker, torch.no_grad():
        sparse(X)
    tracked = tracker.table().query("queries == 'all'").groupby("layer", sort=False)["applied_sparsity"].mean()
    assert (table["zeros"] / (table["rows"] * 197)).tolist() == pytest.approx(tracked.tolist(), abs=1e-4)
    assert not sparse.blocks[0].attn.observers


def test_nothing_to_certify_is_not_certified():
    model = create_model("small_vit").eval()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)  # flat attention: every row falls back, without a zero
    sparsify(model, TAU)
    table = value_path_certificate(model, X[:1])
    assert (table[["zeros", "rows_with_zeros", "rows_checked", "zeros_checked"]] == 0).all(axis=None)
    assert table["identical"].isna().all()


# ---------------------------------------------------------------------------------------------- the score of a cut key

TOY = (torch.tensor([[10.0, 6, 3, 1]], dtype=torch.float64) / 20).log()  # [1, 4]; A = (8, 4, 1, 0) / 13 at tau = 0.1
VALUES = torch.tensor([[1.0], [2], [3], [4]], dtype=torch.float64)  # o = 19/13


def only(*keys):
    return torch.tensor([[j in keys for j in range(4)]])


def test_removing_the_cut_key_of_the_toy():
    # p' = (10, 6, 3) / 19, so A' = (81, 41, 11) / 133 and o' = 196/133
    weight, output = removal_effect(TOY, VALUES, only(3), 0.1)
    assert weight.item() == pytest.approx(22 / 1729) and output.item() == pytest.approx(3 / 361)


def test_removing_a_survivor_of_the_toy():
    # p' = (10, 3, 1) / 14, so R' = (8.6, 1.6, 0) / 14, A' = (43, 0, 8, 0) / 51 and o' = 67/51
    weight, output = removal_effect(TOY, VALUES, only(1), 0.1)
    assert weight.item() == pytest.approx(43 / 51 - 8 / 13 + 4 / 13 + 8 / 51 - 1 / 13)
    assert output.item() == pytest.approx(abs(67 / 51 - 19 / 13) / (19 / 13))


def test_removal_limits():
    assert [float(e) for e in removal_effect(TOY, VALUES, only(), 0.1)] == [0.0, 0.0]
    # the weight of a single survivor is 1 whatever the others' scores do; without it, the next key takes all
    assert [float(e) for e in removal_effect(TOY, VALUES, only(1, 2, 3), 0.4)] == [0.0, 0.0]
    weight, output = removal_effect(TOY, VALUES, only(0), 0.4)  # then p' = (6, 3, 1) / 10
    assert weight.item() == pytest.approx(2.0) and output.item() == pytest.approx(1.0)


def test_removing_all_cut_keys_is_a_lower_threshold_to_the_survivors():
    scores = 2 * torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tau = torch.linspace(0.01, 0.03, 40, dtype=torch.float64)[:, None].expand(3, 40, 1)  # one for each row
    p = scores.softmax(-1)
    kept = p > tau
    mass = (p * kept).sum(-1, keepdim=True)
    cut, lower = (r / r.sum(-1, keepdim=True) for r in ((p - tau) * kept, (p - mass * tau) * kept))
    weight, output = removal_effect(scores, values, ~kept, tau)
    torch.testing.assert_close(weight, (lower - cut).abs().sum(-1))
    torch.testing.assert_close(output, ((lower - cut) @ values).norm(dim=-1) / (cut @ values).norm(dim=-1))


def test_cut_keys_of_the_model_have_influence(sparse):
    state = torch.get_rng_state()
    table = normaliser_effect(sparse, X, keys=4)
    assert torch.equal(state, torch.get_rng_state())
    assert table["layer"].unique().tolist() == [f"blocks.{i}.attn" for i in range(4)]
    assert (table["rows"] == 5 * 3 * 4).all()
    for measure in ("weight_change", "output_change"):
        change = table.pivot(index="layer", columns="removed", values=measure)
        assert (change["one cut key"] > 0).all()
        assert (change["all cut keys"] > 5 * change["one cut key"]).all()
        assert (change["one survivor"] > change["one cut key"]).all()
    assert table["weight_change"].max() < 2
    assert table.equals(normaliser_effect(sparse, X, keys=4))
    assert not table.equals(normaliser_effect(sparse, X, keys=4, seed=1))


def test_normaliser_effect_at_another_threshold(sparse):
    own = normaliser_effect(sparse, X[:2], keys=4)
    given = normaliser_effect(sparse, X[:2], TAU, keys=4)
    assert own["weight_change"].tolist() == pytest.approx(given["weight_change"].tolist(), abs=1e-6)
    nothing_cut = normaliser_effect(sparse, X[:2], 0.0)
    assert (nothing_cut["rows"] == 0).all() and nothing_cut["weight_change"].isna().all()
    one_at_most = normaliser_effect(sparse, X[:2], 0.5)  # two cannot both exceed 1/2
    assert (one_at_most["rows"] == 0).all()
    with sparsified(sparse, TAU, empty_rows="cap"):  # rows with thresholds of their own
        assert (normaliser_effect(sparse, X[:2], keys=4)["rows"] == 2 * 3 * 4).all()


# ----------------------------------------------------------------------------------------------- the paths round a zero


def test_reachability_by_hand():
    first = torch.zeros(1, 2, 3, 3)
    first[0, 0, 1, 2] = 0.3  # token 2 -> token 1, in one head
    first[0, 1, 0, 0] = first[0, 1, 2, 2] = 1.0
    second = torch.zeros(1, 2, 3, 3)
    second[0, 1, 0, 1] = 1e-30  # token 1 -> token 0, small but not zero
    reached = reachability([first, second], residual=False)[:, 0].int().tolist()
    assert reached == [
        [[1, 0, 0], [0, 0, 1], [0, 0, 1]],
        [[0, 0, 1], [0, 0, 0], [0, 0, 0]],  # only 2 -> 1 -> 0 is left
    ]
    reached = reachability([first, second])[:, 0].int().tolist()
    assert reached == [
        [[1, 0, 0], [0, 1, 1], [0, 0, 1]],
        [[1, 1, 1], [0, 1, 1], [0, 0, 1]],  # 1 -> 0 in the second layer; 2 -> 1 waits in the residual
    ]


@pytest.mark.parametrize("residual", [False, True])
def test_reachability_is_where_rollout_is_positive(residual):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, 2, 30, 30, generator=generator) for _ in range(4)]
    maps = [m * (torch.rand(m.shape, generator=generator) < 0.03) for m in maps]
    reached = reachability(maps, residual)
    assert reached.shape == (4, 3, 30, 30) and 0 < reached.double().mean() < 0.5
    for depth in range(1, 5):
        rolled = rollout_matrix(maps[:depth], residual=0.5 if residual else 0.0)
        assert torch.equal(reached[depth - 1], rolled > 0)


def test_looking_back_from_the_class_token(sparse):
    table = reachability_table(sparse, X)
    assert list(table.columns) == ["depth", "layer", "residual", "reachable_share"]
    assert table[table["depth"] == 1]["layer"].unique().tolist() == ["blocks.3.attn"]
    maps = list(attention_maps(sparse, X).values())
    for row in table.itertuples():
        paths = reachability(maps[-row.depth :], row.residual)[-1][:, 0, 1:]
        assert row.reachable_share == pytest.approx(paths.double().mean().item())
    shares = table[table["residual"]].set_index("depth")["reachable_share"]
    assert shares.is_monotonic_increasing and shares[1] < 0.5 and shares[4] > 0.99
    last = (maps[-1][:, :, 0, 1:] != 0).any(dim=1).double().mean()
    assert shares[1] == pytest.approx(last.item())


def test_dense_attention_reaches_everything_at_once():
    table = reachability_table(create_model("small_vit").eval(), X[:1])
    assert len(table) == 8 and (table["reachable_share"] == 1.0).all()


def test_bad_input(sparse):
    dense = create_model("small_vit")
    for function in (value_path_certificate, normaliser_effect):
        with pytest.raises(ValueError, match="VisionTransformer has no sparse attention: call sparsify"):
            function(dense, X)
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1, got 0"):
        value_path_certificate(sparse, X, rows=0)
    with pytest.raises(ValueError, match="keys must be a whole number of at least 1, got -1"):
        normaliser_effect(sparse, X, keys=-1)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\), got 1"):
        normaliser_effect(sparse, X, 1)
    with pytest.raises(ValueError, match="at least one layer"):
        reachability([])
    with pytest.raises(ValueError, match=r"every map must be \[B, H, N, N\], got shape \(1, 2, 3, 4\)"):
        reachability([torch.zeros(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="agree in images and tokens"):
        reachability([torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4)])
