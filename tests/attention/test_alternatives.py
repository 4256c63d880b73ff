"""The controls: hard cut, top-k, entmax15 and sparsemax, by hand, in a model, and out of it again."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from svit_utils import TokenSparsityTracker, densify, sparsified, sparsify
from svit_utils.attention import ALTERNATIVES, AlternativeAttention, SparseAttention, sparse_modules, use_alternative
from svit_utils.attention.normalisers import entmax15, hard_cut, sparsemax, top_k
from svit_utils.explain import attention_maps

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


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_in_a_model_the_map_is_the_alternatives_and_densify_undoes_it(model: VisionTransformer, name: str) -> None:
    before, keys = model(X), list(model.state_dict())
    dense = attention_maps(model, X, layers=0)["blocks.0.attn"]
    report = use_alternative(model, name)
    assert report.converted == ("blocks.0.attn", "blocks.1.attn") and list(model.state_dict()) == keys
    cut = attention_maps(model, X, layers=0)["blocks.0.attn"]
    by_name = {"hard_cut": hard_cut, "top_k": lambda s: top_k(s, 21), "entmax15": entmax15, "sparsemax": sparsemax}
    torch.testing.assert_close(cut, by_name[name](dense.log()), atol=1e-5, rtol=1e-4)
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
    for name in ALTERNATIVES:
        use_alternative(model, name)
        model.zero_grad()
        model(X).square().sum().backward()
        gradient = model.blocks[0].attn.qkv.weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and (gradient != 0).any(), name


def test_sparsify_and_alternatives_replace_each_other(model: VisionTransformer) -> None:
    use_alternative(model, "top_k", k=3)
    (first, _) = sparse_modules(model).values()
    assert isinstance(first, AlternativeAttention) and first.setting == 3
    alternative = model(X)
    sparsify(model, 0.02)
    assert type(first) is SparseAttention and not hasattr(first, "normaliser")
    use_alternative(model, "top_k", k=3)
    with sparsified(model, 0.02):
        assert type(first) is SparseAttention
    assert type(first) is AlternativeAttention and torch.equal(model(X), alternative)
    with sparsified(model, 0.02):
        densify(model)
    assert type(first) is AlternativeAttention and torch.equal(model(X), alternative)


def test_the_warm_up_reaches_the_hard_cut(model: VisionTransformer) -> None:
    dense = model(X)
    use_alternative(model, "hard_cut", tau=0.05)
    for module in sparse_modules(model).values():
        module.threshold.scale_(0.0)
    torch.testing.assert_close(model(X), dense, atol=1e-4, rtol=1e-4)


def test_bad_settings_are_refused_and_leave_the_model_alone(model: VisionTransformer) -> None:
    before: Tensor = model(X)
    for arguments, says in (
        ({"name": "softmin"}, "unknown alternative 'softmin'"),
        ({"name": "top_k", "tau": 0.1}, "top_k takes no tau"),
        ({"name": "hard_cut", "k": 3}, "hard_cut takes no k"),
        ({"name": "top_k", "k": 0}, "k must be a whole number"),
        ({"name": "hard_cut", "tau": 1.0}, r"must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=says):
            use_alternative(model, **arguments)  # type: ignore[arg-type]
    assert torch.equal(model(X), before) and not sparse_modules(model)
    use_alternative(model, "entmax15")
    with pytest.raises(ValueError, match="take no mask"):
        model.blocks[0].attn(torch.randn(1, 5, 24), is_causal=True)
