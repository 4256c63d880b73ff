"""The tracker's table against the same numbers computed directly from the returned weights."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from svit_utils.attention import (
    EMPTY_ROWS,
    TokenSparsityTracker,
    attention_record,
    densify,
    sparse_modules,
    sparsified,
    sparsify,
)

TAU = 0.02
COLUMNS = [
    "layer", "head", "queries", "kept_mean", "kept_p10", "kept_p50", "kept_p90", "cut_sparsity", "applied_sparsity",
    "empty_rate", "kept_mass", "effective_support",
]  # fmt: skip


def vit(**arguments: Any) -> VisionTransformer:
    """A ViT with sharpened attention: rows with few, many and no survivors."""
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**settings, **arguments}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * 48] *= 12.0
    return model


class Alone(nn.Module):
    """One attention module, so that a test can give it any mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(48, num_heads=3)
        with torch.no_grad():
            self.attn.qkv.weight[: 2 * 48] *= 3.0

    def forward(self, x, attn_mask=None):
        return self.attn(x, attn_mask=attn_mask)


def expected_statistics(weights, probs, tau, allowed):
    """One head's statistics from [B, N, M] arrays, query by query."""
    kept, cut, zeros, mass, support, keys = [], 0, 0, [], [], 0
    for b, i in np.ndindex(*weights.shape[:2]):
        mine = allowed[b, i]
        if not mine.any():
            continue  # a padded query has no row
        p, a = probs[b, i][mine], weights[b, i][mine]
        survives = p > np.broadcast_to(tau, (*weights.shape[:2], 1))[b, i]
        kept.append(int(survives.sum()))
        cut += int((~survives).sum())
        zeros += int((a == 0).sum())
        keys += len(p)
        mass.append(p[survives].sum())
        support.append(1 / np.square(a).sum() if a.any() else 0.0)
    return {
        "kept_mean": np.mean(kept),
        **{f"kept_p{q}": np.percentile(kept, q, method="inverted_cdf") for q in (10, 50, 90)},
        "cut_sparsity": cut / keys,
        "applied_sparsity": zeros / keys,
        "empty_rate": np.mean(np.array(kept) == 0),
        "kept_mass": np.mean(mass),
        "effective_support": np.mean(support),
    }


def check_table(model: nn.Module, mode: str, *args: Any, class_token: bool, **kwargs: Any) -> None:
    captured: dict[str, tuple[Any, ...]] = {}
    sparsify(model, TAU, empty_rows=mode)
    modules = sparse_modules(model)
    for name, module in modules.items():

        def keep(m, record, name=name):
            allowed = torch.ones_like(record.probs, dtype=torch.bool)
            if record.allowed is not None:
                allowed &= record.allowed
            tau = torch.as_tensor(TAU).float()
            if mode == "cap":
                tau = torch.minimum(record.probs.amax(-1, keepdim=True) / 2, tau)[:, 0]
            captured[name] = tuple(np.asarray(t) for t in (record.weights, record.probs, tau, allowed))

        module.observers.append(keep)
    with torch.no_grad(), TokenSparsityTracker(model) as tracker:
        model(*args, **kwargs)
    for module in modules.values():
        assert len(module.observers) == 1
        module.observers.clear()
    table = tracker.table()
    assert list(table.columns) == COLUMNS
    sets = ["all", "class"] if class_token else ["all"]
    assert len(table) == len(modules) * 3 * len(sets)
    for row in table.to_dict(orient="records"):
        weights, probs, tau, allowed = captured[row["layer"]]
        h = row["head"]
        parts = [a[:, h] for a in (weights, probs, allowed)]
        if mode == "cap":
            tau = np.minimum(parts[1].max(-1, keepdims=True) / 2, np.float32(TAU))
        if row["queries"] == "class":
            parts = [a[:, :1] for a in parts]
            tau = tau[:, :1] if tau.ndim else tau
        expected = expected_statistics(parts[0], parts[1], tau, parts[2])
        assert {c: row[c] for c in COLUMNS[3:]} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_table_against_direct_computation(mode):
    check_table(vit(), mode, torch.randn(3, 3, 32, 32), class_token=True)


def test_table_without_a_class_token():
    check_table(vit(class_token=False, global_pool="avg"), "zero", torch.randn(2, 3, 32, 32), class_token=False)


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_masked_keys_and_padded_queries_are_left_out(mode):
    mask = torch.rand(2, 1, 30, 30) > 0.4
    mask[..., 0] = True
    mask[:, :, 25:] = False  # five padded queries
    check_table(Alone().eval(), mode, torch.randn(2, 30, 48), class_token=False, attn_mask=mask)
    lowest = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    check_table(Alone().eval(), mode, torch.randn(2, 30, 48), class_token=False, attn_mask=lowest)


def test_two_sparsities_differ_where_rows_fall_back():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    tables = {}
    for mode in EMPTY_ROWS:
        with sparsified(model, 0.3, empty_rows=mode, layers=[0]), TokenSparsityTracker(model) as tracker:
            model(x)
        tables[mode] = tracker.summary()
    assert 0 < tables["zero"].empty_rate < 1
    assert tables["zero"].cut_sparsity == tables["dense"].cut_sparsity == tables["top1"].cut_sparsity
    assert tables["zero"].applied_sparsity == pytest.approx(tables["zero"].cut_sparsity)
    assert tables["dense"].applied_sparsity < tables["dense"].cut_sparsity - 0.05
    assert tables["top1"].applied_sparsity == pytest.approx(  # one key of each empty row comes back
        tables["top1"].cut_sparsity - tables["top1"].empty_rate / 65, abs=1e-6
    )
    assert tables["cap"].empty_rate == 0
    assert tables["cap"].applied_sparsity == pytest.approx(tables["cap"].cut_sparsity)


def test_effective_support_of_a_zero_row_is_zero():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    with sparsified(model, 0.98, empty_rows="zero"), TokenSparsityTracker(model) as tracker:
        model(x)
    table = tracker.table()
    assert (table["empty_rate"] > 0.9).all()
    assert table["effective_support"].to_numpy() == pytest.approx(1 - table["empty_rate"].to_numpy(), abs=1e-4)


def test_streaming_equals_one_batch():
    model, x = vit(), torch.randn(4, 3, 32, 32)
    sparsify(model, TAU)
    with torch.no_grad():
        with TokenSparsityTracker(model) as whole:
            model(x)
        with TokenSparsityTracker(model) as parts:
            model(x[:1])
            model(x[1:])
    one, two = whole.table(), parts.table()
    assert one[COLUMNS[:3]].equals(two[COLUMNS[:3]])
    np.testing.assert_allclose(one[COLUMNS[3:]].astype(float), two[COLUMNS[3:]].astype(float), atol=1e-5)
    assert whole.summary().rows == parts.summary().rows == 4 * 65 * 3 * 3


def test_percentiles_are_exact_for_any_number_of_queries():
    model = Alone().eval()
    sparsify(model, 0.03)
    for n in (3, 7, 10, 11, 30):
        kept = {}

        def keep(m, record, kept=kept):
            kept["counts"] = (record.probs > np.float32(0.03)).sum(-1)[0]

        model.attn.observers.append(keep)
        with TokenSparsityTracker(model) as tracker:
            model(torch.randn(1, n, 48))
        model.attn.observers.clear()
        for head, row in tracker.table().iterrows():
            for q in (10, 50, 90):
                wanted = np.sort(kept["counts"][head].numpy())[-(-q * n // 100) - 1]  # the ceil(q n / 100)-th
                assert row[f"kept_p{q}"] == wanted


def test_the_tracker_changes_no_output():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    sparsify(model, TAU)
    plain = model(x)
    with TokenSparsityTracker(model):
        assert torch.equal(model(x), plain)


def test_the_record_is_what_attention_returns():
    q, k, v = (torch.randn(1, 3, 6, 4) for _ in range(3))
    record = attention_record(q, k, v, 0.2)
    torch.testing.assert_close(record.weights @ record.v, record.out)
    torch.testing.assert_close(record.probs, (q @ k.transpose(-2, -1) / 2).softmax(-1))


def test_class_rows_come_with_a_class_token_only():
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3}
    for name, has_class in {
        "deit_tiny_distilled_patch16_224": True,
        "vit_small_patch14_reg4_dinov2": True,
        "eva02_tiny_patch14_224": True,
        "vit_base_patch16_siglip_224": False,
        "vit_medium_patch16_reg4_gap_256": False,  # registers, no class token
    }.items():
        model = timm.create_model(name, **small).eval()
        sparsify(model, TAU)
        with torch.no_grad(), TokenSparsityTracker(model) as tracker:
            model(torch.randn(1, 3, 32, 32))
        assert ("class" in set(tracker.table()["queries"])) == has_class, name


def test_reset_and_nothing_recorded():
    model, x = vit(), torch.randn(1, 3, 32, 32)
    sparsify(model, TAU)
    tracker = TokenSparsityTracker(model)
    with pytest.raises(ValueError, match="nothing recorded yet"):
        tracker.table()
    with tracker:
        model(x)
    first = tracker.table()
    tracker.reset()
    with pytest.raises(ValueError, match="nothing recorded yet"):
        tracker.summary()
    with tracker:
        model(x)
    assert tracker.table().equals(first)


def test_to_json(tmp_path):
    model, x = vit(), torch.randn(1, 3, 32, 32)
    sparsify(model, TAU)
    with TokenSparsityTracker(model) as tracker:
        model(x)
    path = tmp_path / "tracker.json"
    path.write_text("old")
    assert tracker.to_json(path) == path
    content = json.loads(path.read_text())
    assert len(content["table"]) == 3 * 3 * 2 and list(content["table"][0]) == COLUMNS
    assert content["summary"]["cut_sparsity"] == pytest.approx(tracker.summary().cut_sparsity)
    assert [p.name for p in tmp_path.iterdir()] == ["tracker.json"]


def test_a_randomly_initialised_vit_is_empty_and_the_summary_says_so():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=56, patch_size=4, embed_dim=96, depth=2, num_heads=3, num_classes=10).eval()
    sparsify(model, 0.01)
    with torch.no_grad(), TokenSparsityTracker(model) as tracker:
        model(torch.randn(2, 3, 56, 56))
    summary = tracker.summary()
    assert summary.empty_rate > 0.99
    assert summary.warning is not None and "lose every key" in summary.warning
    assert "WARNING" in str(summary)
    assert summary.applied_sparsity < 0.01 < 0.99 < summary.cut_sparsity  # under `dense` such a model is dense
    assert (summary.layers, summary.heads, summary.rows) == (2, 6, 2 * 197 * 6)
    sparse = vit()
    sparsify(sparse, 0.001)
    with TokenSparsityTracker(sparse) as tracker:
        sparse(torch.randn(1, 3, 32, 32))
    assert tracker.summary().warning is None and "WARNING" not in str(tracker.summary())


def test_a_dense_model_is_refused():
    model = vit()
    with pytest.raises(ValueError, match="no sparse attention to track; call sparsify"):
        TokenSparsityTracker(model)
    sparsify(model)
    with pytest.raises(ValueError, match="no sparse attention to track"):
        TokenSparsityTracker(densify(model))


def test_observers_go_with_the_block_even_after_an_exception():
    model = vit()
    sparsify(model, TAU)
    modules = sparse_modules(model).values()

    def fail() -> None:
        with TokenSparsityTracker(model):
            assert all(len(m.row_observers) == 1 for m in modules)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(m.row_observers for m in modules)
    with TokenSparsityTracker(model) as tracker:
        densify(model)
    assert not tracker._totals


def test_copies_of_a_watched_model_are_not_watched():
    model = vit()
    sparsify(model, TAU)
    images = torch.randn(1, 3, 32, 32)
    with TokenSparsityTracker(model) as tracker, torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not any(m.row_observers for m in sparse_modules(other).values())
            other(images)
        assert not tracker._totals
        model(images)
    assert tracker.table()["layer"].nunique() == 3


def test_a_wrapped_model_has_class_rows():
    model = vit()
    sparsify(model, TAU)
    with TokenSparsityTracker(nn.Sequential(model)) as tracker, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert set(tracker.table()["queries"]) == {"all", "class"}


def test_heatmap():
    model = vit()
    sparsify(model, TAU)
    with TokenSparsityTracker(model) as tracker:
        model(torch.randn(1, 3, 32, 32))
    for column, queries in (("cut_sparsity", "all"), ("empty_rate", "class")):
        figure = tracker.heatmap(column, queries)
        assert isinstance(figure, Figure)
        axes = figure.axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
        table = tracker.table()
        values = table[table["queries"] == queries][column].to_numpy().reshape(3, 3)
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), values)
    with pytest.raises(ValueError, match=r"column must be one of kept_mean.*got 'sparsity', 'all'"):
        tracker.heatmap("sparsity")
    with pytest.raises(ValueError, match="queries one of all, class"):
        tracker.heatmap(queries="patch")
