"""The normalisers: each by hand, in a model, and out of it again; and what a new one needs."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from svit_utils import TokenSparsityTracker, densify, sparsified, sparsify
from svit_utils.attention import NORMALISERS, RelativeThreshold, describe_sparsity, restore_sparsity, sparse_modules
from svit_utils.attention.normalisers import (
    Normaliser,
    ThresholdedSoftmax,
    TopK,
    clipped_softmax,
    entmax15,
    hard_cut,
    sparsemax,
    top_k,
)
from svit_utils.explain import attention_maps
from svit_utils.paths import repo_root

P = torch.tensor([10.0, 6, 3, 1], dtype=torch.float64) / 20
TAU = 0.1


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4).eval()
    for block in model.blocks:  # logits spread enough for every alternative to cut something
        block.attn.qkv.weight.data *= 60
    return model


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_hard_cut_keeps_the_survivors_ratios() -> None:
    expected = torch.tensor([10.0, 6, 3, 0], dtype=torch.float64) / 19
    torch.testing.assert_close(hard_cut(P.log()[None], TAU)[0], expected)


def test_the_hard_cut_of_an_empty_row_is_its_softmax() -> None:
    flat = torch.zeros(1, 8)
    torch.testing.assert_close(hard_cut(flat, 0.2), torch.full((1, 8), 1 / 8))


def test_top_k_is_the_softmax_of_the_largest() -> None:
    expected = torch.tensor([10.0, 6, 0, 0], dtype=torch.float64) / 16
    torch.testing.assert_close(top_k(P.log()[None], 2)[0], expected)
    torch.testing.assert_close(top_k(P.log()[None], 4)[0], P)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must lie in 1 to"):
            top_k(P.log()[None], k)


def test_sparsemax_and_entmax15_solve_their_equations() -> None:
    scores = torch.randn(20, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    # sparsemax: w = [s - t]_+; 1.5-entmax: w = [s / 2 - t]_+ ^ 2; both sum to 1, with one t for the row.
    for weights, inverse in ((sparsemax(scores), scores), (entmax15(scores), scores / 2)):
        torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64))
        root = weights if inverse is scores else weights.sqrt()
        level = torch.where(weights > 0, inverse - root, torch.nan)
        spread = level.nan_to_num(-torch.inf).amax(-1) - level.nan_to_num(torch.inf).amin(-1)
        assert spread.abs().max() < 1e-9
        cut = torch.where(weights == 0, inverse, -torch.inf).amax(-1)
        assert (cut <= level.nan_to_num(-torch.inf).amax(-1) + 1e-9).all(), "what is cut lies below the level"
        assert (weights == 0).any()


# As functions of the scores. None of them changes when a constant is added to a row of scores, and the test below
# relies on that: it gives them log p.
CONTROLS = {
    "hard_cut": lambda s: hard_cut(s, 0.01),
    "clipped": lambda s: clipped_softmax(s, 0.01),
    "topk": lambda s: top_k(s, 21),
    "entmax15": entmax15,
    "sparsemax": sparsemax,
}


def test_every_normaliser_but_the_method_itself_is_a_control_here() -> None:
    assert set(CONTROLS) == set(NORMALISERS) - {"thresholded"}


@pytest.mark.parametrize("name", CONTROLS)
def test_in_a_model_the_map_is_the_normalisers_and_densify_undoes_it(model: VisionTransformer, name: str) -> None:
    before, keys = model(X), list(model.state_dict())
    dense = attention_maps(model, X, layers=0)["blocks.0.attn"]
    report = sparsify(model, normaliser=name)
    assert report.converted == ("blocks.0.attn", "blocks.1.attn") and list(model.state_dict()) == keys
    cut = attention_maps(model, X, layers=0)["blocks.0.attn"]
    torch.testing.assert_close(cut, CONTROLS[name](dense.log()), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(X), before)
    with TokenSparsityTracker(model) as tracker:
        model(X)
    table = tracker.table()
    layer = table[(table["layer"] == "blocks.0.attn") & (table["queries"] == "all")]
    measured = torch.tensor(layer["applied_sparsity"].to_numpy())
    torch.testing.assert_close(measured, (cut == 0).double().mean(dim=(0, 2, 3)))
    densify(model)
    assert torch.equal(model(X), before)


def test_gradients_reach_the_weights(model: VisionTransformer) -> None:
    for name in CONTROLS:
        sparsify(model, normaliser=name)
        model.zero_grad()
        model(X).square().sum().backward()
        gradient = model.blocks[0].attn.qkv.weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and (gradient != 0).any(), name


def test_one_normaliser_replaces_another(model: VisionTransformer) -> None:
    sparsify(model, normaliser=TopK(k=3))
    (first, _) = sparse_modules(model).values()
    assert isinstance(first.normaliser, TopK) and first.normaliser.k == 3 and first.threshold is None
    with_top_k, its_class = model(X), type(first)
    sparsify(model, 0.02)
    assert type(first.normaliser) is ThresholdedSoftmax and first.threshold.tau == 0.02 and type(first) is its_class
    sparsify(model, normaliser=TopK(k=3))
    with sparsified(model, 0.02):
        assert type(first.normaliser) is ThresholdedSoftmax
    assert type(first.normaliser) is TopK and torch.equal(model(X), with_top_k)
    with sparsified(model, 0.02):
        densify(model)
    assert type(first.normaliser) is TopK and torch.equal(model(X), with_top_k)


@pytest.mark.parametrize("name", ["hard_cut", "clipped"])
def test_the_warm_up_reaches_every_normaliser_with_a_threshold(model: VisionTransformer, name: str) -> None:
    dense = model(X)
    sparsify(model, 0.05, normaliser=name)
    for module in sparse_modules(model).values():
        module.threshold.set_warmup(0.0)
    torch.testing.assert_close(model(X), dense, atol=1e-4, rtol=1e-4)


def test_clipped_softmax_is_the_published_one_and_cuts_what_the_method_cuts() -> None:
    zeta, gamma = 1.0, -TAU / (1 - TAU)
    torch.testing.assert_close(clipped_softmax(P.log()[None], TAU)[0], ((zeta - gamma) * P + gamma).clamp(0, 1))
    scores = torch.randn(2, 3, 20, 50, generator=torch.Generator().manual_seed(0)) * 2
    method = ThresholdedSoftmax(0.02, empty_rows="zero").weights(scores)
    clipped = clipped_softmax(scores, 0.02)
    assert torch.equal(clipped > 0, method > 0)
    torch.testing.assert_close(clipped / clipped.sum(-1, keepdim=True), method, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "dense", "top1", "cap"])
def test_the_hard_cut_knows_every_mode_of_empty_rows(mode: str) -> None:
    flat = torch.tensor([[0.30, 0.26, 0.24, 0.20]]).log()
    expected = {"zero": [0, 0, 0, 0], "dense": [0.30, 0.26, 0.24, 0.20], "top1": [1, 0, 0, 0]}
    expected["cap"] = [0.30, 0.26, 0.24, 0.20]  # cut at 0.15, which all four exceed
    torch.testing.assert_close(hard_cut(flat, 0.4, mode)[0], torch.tensor(expected[mode]).float())


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("masks", ["causal", "boolean", "additive"])
def test_masked_keys_get_no_weight_and_a_fully_masked_query_nothing(
    model: VisionTransformer, name: str, masks: str
) -> None:
    sparsify(model, normaliser=TopK(1) if name == "topk" else name)
    attention = model.blocks[0].attn
    records = []
    attention.observers.append(lambda _, record: records.append(record))
    x = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(2))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() if masks == "causal" else torch.rand(6, 6) > 0.4
    if masks == "causal":
        attention(x, is_causal=True)
    else:
        allowed[3] = False
        mask = allowed if masks == "boolean" else torch.zeros(6, 6).masked_fill(~allowed, -torch.inf)
        attention(x, attn_mask=mask)
    (record,) = records
    assert (record.weights[..., ~allowed] == 0).all() and record.out.isfinite().all()
    if masks != "causal":
        assert (record.weights[:, :, 3] == 0).all() and (record.out[:, :, 3] == 0).all()
    if name != "clipped":
        live = allowed.any(-1)
        torch.testing.assert_close(record.weights.sum(-1)[..., live], torch.ones(1, 3, int(live.sum())))


def test_a_relative_threshold_counts_the_keys_it_may_attend_to() -> None:
    normaliser = ThresholdedSoftmax(RelativeThreshold(0.5))
    scores = torch.zeros(1, 1, 2, 4)
    scores[..., 1, 2:] = -torch.inf
    torch.testing.assert_close(normaliser.tau(scores)[0, 0, :, 0], torch.tensor([0.5 / 4, 0.5 / 2]))


class Halved(Normaliser):
    """A new normaliser: the plain softmax, halved."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def weights(self, scores: Tensor) -> Tensor:
        return self.factor * scores.softmax(dim=-1)


class Forgetful(Normaliser):
    """One that does not keep its argument."""

    def __init__(self, factor: float = 0.5) -> None:
        self.scale = factor

    def weights(self, scores: Tensor) -> Tensor:
        return self.scale * scores.softmax(dim=-1)


def test_a_setting_is_saved_by_itself_or_its_absence_is_said(
    model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NORMALISERS, "halved", Halved)
    monkeypatch.setitem(NORMALISERS, "forgetful", Forgetful)
    report = sparsify(model, normaliser=Halved(0.25))
    assert "Halved(factor=0.25)" in str(report)
    out, description = model(X), describe_sparsity(model)
    densify(model)
    restore_sparsity(model, description)
    assert torch.equal(model(X), out)
    with pytest.raises(ValueError, match="Forgetful must keep its argument factor as an attribute of the same name"):
        sparsify(model, normaliser=Forgetful(0.25))


@pytest.mark.parametrize("name", NORMALISERS)
def test_dropout_is_not_taken_for_a_cut(model: VisionTransformer, name: str) -> None:
    sparsify(model, normaliser=TopK(5) if name == "topk" else name)
    kept = {}
    for training in (False, True):
        for block in model.blocks:
            block.attn.attn_drop.p = 0.5
        model.train(training)
        with TokenSparsityTracker(model) as tracker, torch.no_grad():
            model(X)
        table = tracker.table().query("layer == 'blocks.0.attn' and queries == 'all'")
        kept[training] = table[["kept_mean", "empty_rate"]].to_numpy().ravel().tolist()
    assert kept[True] == pytest.approx(kept[False])


def test_readme_and_docstring_name_every_normaliser() -> None:
    root = repo_root()
    assert root is not None
    readme, docstring = (root / "README.md").read_text(encoding="utf-8"), sparsify.__doc__ or ""
    for name in NORMALISERS:
        assert f'"{name}"' in docstring and (name == "thresholded" or f'"{name}"' in readme), name


def test_a_new_normaliser_is_one_class_and_one_line(model: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = attention_maps(model, X, layers=0)["blocks.0.attn"]
    monkeypatch.setitem(NORMALISERS, "halved", Halved)
    sparsify(model, normaliser="halved")
    halved = attention_maps(model, X, layers=0)["blocks.0.attn"]
    torch.testing.assert_close(halved, dense / 2)
    with TokenSparsityTracker(model) as tracker:
        model(X)
    table = tracker.table().query("layer == 'blocks.0.attn' and queries == 'all'")
    assert table["applied_sparsity"].tolist() == pytest.approx((halved == 0).double().mean(dim=(0, 2, 3)).tolist())
    out, description = model(X), describe_sparsity(model)
    densify(model)
    restore_sparsity(model, description)
    assert torch.equal(model(X), out)


def test_any_object_with_weights_will_do_and_is_not_saved_by_name(model: VisionTransformer) -> None:
    class Plain:
        def weights(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=-1)

    before = model(X)
    sparsify(model, normaliser=Plain())
    torch.testing.assert_close(model(X), before)
    with pytest.raises(ValueError, match="is not in NORMALISERS"):
        describe_sparsity(model)


def test_bad_settings_are_refused_and_leave_the_model_alone(model: VisionTransformer) -> None:
    before: Tensor = model(X)
    for arguments, says in (
        ({"normaliser": "softmin"}, "unknown normaliser 'softmin': allowed are 'thresholded'"),
        ({"normaliser": 3}, r"an object with weights\(scores\), got 3"),
        ({"normaliser": "topk", "threshold": 0.1}, "normaliser 'topk' takes no threshold"),
        ({"normaliser": "clipped", "empty_rows": "zero"}, "normaliser 'clipped' takes no empty_rows"),
        ({"normaliser": TopK(3), "threshold": 0.1}, "a normaliser object takes no threshold"),
        ({"normaliser": "topk", "backend": "tiled"}, "backend 'tiled' computes the thresholded softmax only"),
        ({"normaliser": "hard_cut", "threshold": 1.0}, r"must lie in \[0, 1\)"),
        ({"normaliser": "hard_cut", "empty_rows": "no"}, "empty_rows must be one of"),
    ):
        with pytest.raises(ValueError, match=says):
            sparsify(model, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be a whole number"):
        TopK(0)
    assert torch.equal(model(X), before) and not sparse_modules(model)
