"""Learned thresholds held at a share that is cut: what is counted, what gets a gradient, where they end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from svit_utils.attention import LearnableThreshold, TokenSparsityTracker, sparse_modules, sparsify
from svit_utils.models import load_trained, save_trained
from svit_utils.training import CheckpointError, SparsityTarget, TrainConfig, train
from svit_utils.training.recipe import param_groups

TOKENS = 17
CONFIG = TrainConfig(steps=60, batch_size=8, lr=1e-3, threshold_lr=0.1, log_every=1)


def model_with(per: str, init: float = 0.05, **options: Any) -> VisionTransformer:
    """16 patches and a class token; its attention is sharpened, so that rows differ and have survivors."""
    torch.manual_seed(3)
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, num_classes=4)
    for block in model.blocks:
        block.attn.qkv.weight.data[:16] *= 15.0
    sparsify(model, LearnableThreshold(init, per=per), **options)
    return model


def data(n: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4)


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    images, labels = data().tensors
    return images[:n], labels[:n]


def penalty(model: VisionTransformer, target: float, **options: Any) -> Tensor:
    x, y = batch()
    return SparsityTarget(model, CONFIG, target, **options)(model, x, y) - F.cross_entropy(model(x), y)


def cut_share(model: VisionTransformer, x: Tensor) -> Any:
    with TokenSparsityTracker(model) as tracker, torch.no_grad():
        model(x)
    table = tracker.table()
    return table[table["queries"] == "all"].groupby("layer", sort=False)["cut_sparsity"].mean().to_numpy()


@pytest.mark.parametrize("per", ["model", "layer", "head"])
@pytest.mark.parametrize("empty_rows", ["dense", "top1"])
def test_the_share_is_what_the_tracker_counts(per: str, empty_rows: str) -> None:
    for init in (0.02, 0.08, 0.5):
        model = model_with(per, init)
        share = cut_share(model, batch()[0])
        for each, expected in (("model", (share.mean() - 0.6) ** 2), ("layer", ((share - 0.6) ** 2).mean())):
            found = penalty(model, 0.6, each=each, weight=1.0, guard=0.0)
            assert float(found.detach()) == pytest.approx(float(expected), abs=1e-5), (init, each)


def test_rows_without_a_survivor_pull_tau_down() -> None:
    model = model_with("layer", 0.9999)  # above nearly every row's largest probability
    x, y = batch()
    SparsityTarget(model, CONFIG, 0.6, weight=0.0)(model, x, y).backward()
    for module in sparse_modules(model).values():
        assert float(module.threshold.logit.grad) > 0  # a step against it lowers tau
    live = model_with("layer", 0.001)
    assert float(penalty(live, 0.6, weight=0.0).detach()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("per", ["model", "layer", "head"])
def test_the_gradient_is_that_of_the_soft_mask_and_only_tau_gets_one(per: str) -> None:
    model, x = model_with(per), batch()[0]
    logits: dict[str, Tensor] = {}

    def watch(module: Any, q: Tensor, k: Tensor, *_: Any) -> None:
        name = next(name for name, m in sparse_modules(model).items() if m is module)
        logits[name] = (q * module.scale) @ k.transpose(-2, -1)

    for module in sparse_modules(model).values():
        module.input_observers.append(watch)
    with torch.no_grad():
        model(x)
    for module in sparse_modules(model).values():
        module.input_observers.remove(watch)

    weight, target, temperature = 3.0, 0.6, 0.3
    parameters = list(model.parameters())
    plain = torch.autograd.grad(F.cross_entropy(model(x), batch()[1]), parameters, allow_unused=True)
    options = {"weight": weight, "guard": 0.0, "temperature": temperature}
    both = torch.autograd.grad(SparsityTarget(model, CONFIG, target, **options)(model, *batch()), parameters)

    # By hand, in float64: d/dtau of weight (s - target)^2 with s counted and ds/dlog tau that of the soft mask.
    heads = 2
    s, slope = [], []  # a number per layer; [H] per layer
    for name, module in sparse_modules(model).items():
        log_p = logits[name].double().log_softmax(dim=-1)  # [B, H, N, N]
        log_tau = F.logsigmoid(module.threshold.logit.detach().double())
        log_tau = log_tau.expand(heads)[:, None, None]
        cut = (log_p <= log_tau).double()
        soft = torch.sigmoid((log_tau - log_p) / temperature)
        s.append(float(cut.mean()))
        slope.append((soft * (1 - soft) / temperature).mean(dim=(0, 2, 3)) / heads)  # d s_l / d log tau_h
    missed = sum(s) / len(s) - target
    named = dict(zip([id(p) for p in parameters], zip(both, plain), strict=True))
    expected: dict[int, Tensor] = {}
    for module, by_head in zip(sparse_modules(model).values(), slope, strict=True):
        p = module.threshold.logit
        one_minus = 1 - torch.sigmoid(p.detach().double())  # d log tau / d logit
        own = 2 * weight * missed * by_head / len(s)
        own = own * one_minus if per == "head" else (own.sum() * one_minus)
        expected[id(p)] = expected.get(id(p), torch.zeros_like(own)) + own
    for p in parameters:
        with_penalty, without = named[id(p)]
        if id(p) in expected:
            base = torch.zeros_like(with_penalty) if without is None else without
            torch.testing.assert_close((with_penalty - base).double(), expected[id(p)], atol=1e-6, rtol=1e-3)
        else:
            torch.testing.assert_close(with_penalty, without, atol=0, rtol=0)


@pytest.mark.parametrize("per", ["model", "layer", "head"])
@pytest.mark.parametrize("target", [0.5, 0.75])
def test_training_ends_at_the_target(per: str, target: float) -> None:
    model, x = model_with(per, 0.02), data().tensors[0]
    assert cut_share(model, x).mean() < target - 0.1
    loss = SparsityTarget(model, CONFIG, target, weight=30.0, images=8)
    train(model, data(), None, CONFIG, progress=False, loss=loss)
    assert float(cut_share(model, x).mean()) == pytest.approx(target, abs=0.05)
    assert not any(module.input_observers for module in sparse_modules(model).values())


def test_a_tau_far_too_high_comes_back() -> None:
    model, x = model_with("head", 0.9), data().tensors[0]
    with TokenSparsityTracker(model) as before, torch.no_grad():
        model(x)
    config = replace(CONFIG, threshold_lr=0.3)  # over 60 steps the logit has some way to go
    loss = SparsityTarget(model, config, 0.5, weight=30.0, images=8)
    train(model, data(), None, config, progress=False, loss=loss)
    with TokenSparsityTracker(model) as after, torch.no_grad():
        model(x)
    assert before.summary().empty_rate > 0.99 and after.summary().empty_rate < 0.2
    assert after.summary().cut_sparsity == pytest.approx(0.5, abs=0.06)


def test_every_layer_can_be_held_at_the_target() -> None:
    spread = {}
    for each in ("model", "layer"):
        model = model_with("layer")
        loss = SparsityTarget(model, CONFIG, 0.7, each=each, weight=30.0, images=8)
        train(model, data(), None, CONFIG, progress=False, loss=loss)
        spread[each] = float(abs(cut_share(model, data().tensors[0]) - 0.7).max())
    assert spread["layer"] < 0.05


def test_thresholds_have_a_rate_of_their_own_and_no_decay() -> None:
    model = model_with("head")
    learned = {id(module.threshold.logit) for module in sparse_modules(model).values()}
    for layer_decay in (None, 0.5):
        for rate, expected in ((0.1, 0.1), (None, CONFIG.lr)):
            groups = param_groups(model, replace(CONFIG, threshold_lr=rate, layer_decay=layer_decay))
            assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
            own = [group for group in groups if {id(p) for p in group["params"]} & learned]
            assert all(group["weight_decay"] == 0 for group in own)
            if rate is not None:
                assert [group["lr"] for group in own] == [expected]
    with pytest.raises(ValueError, match="threshold_lr must be positive or None, got 0"):
        replace(CONFIG, threshold_lr=0)


def test_they_are_trained_in_bf16_saved_and_loaded(tmp_path: Any) -> None:
    config = replace(CONFIG, precision="bf16", steps=10)
    model = model_with("head")
    before = [module.threshold.logit.detach().clone() for module in sparse_modules(model).values()]
    train(model, data(), None, config, progress=False, loss=SparsityTarget(model, config, 0.7))
    after = [module.threshold for module in sparse_modules(model).values()]
    assert all(threshold.logit.dtype == torch.float32 for threshold in after)
    assert all(float((a.logit.detach() - b).abs().min()) > 1e-3 for a, b in zip(after, before, strict=True))
    save_trained(model, tmp_path / "m.safetensors", architecture="vit_tiny_patch16_224", model_args=ARGS)
    loaded, _ = load_trained(tmp_path / "m.safetensors")
    for a, b in zip(after, sparse_modules(loaded).values(), strict=True):
        assert torch.equal(a.logit, b.threshold.logit)


ARGS = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}


def test_a_run_is_resumed_only_with_the_same_loss(tmp_path: Any) -> None:
    config = replace(CONFIG, steps=4)

    def run(target: float) -> None:
        model = model_with("layer")
        loss = SparsityTarget(model, config, target)
        train(model, data(), None, config, progress=False, out_dir=tmp_path, loss=loss)

    run(0.6)
    run(0.6)
    with pytest.raises(CheckpointError, match=r"loss was SparsityTarget.target=0.6.* and is SparsityTarget.target=0.7"):
        run(0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target must lie in"),
        ({"target": 1.0}, "target must lie in"),
        ({"target": float("nan")}, "target must lie in"),
        ({"each": "head"}, "each must be one of 'model', 'layer', got 'head'"),
        ({"weight": -1.0}, "weight and guard must be at least 0"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"images": 0}, "images at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityTarget(model_with("layer"), CONFIG, **{"target": 0.7, **options})


def test_models_that_cannot_be_steered_are_refused() -> None:
    dense = VisionTransformer(**ARGS)
    with pytest.raises(ValueError, match="the model has no learnable threshold"):
        SparsityTarget(dense, CONFIG, 0.7)
    sparsify(dense, 0.01)
    with pytest.raises(ValueError, match=r"blocks.0.attn has no learnable threshold"):
        SparsityTarget(dense, CONFIG, 0.7)
    loss = SparsityTarget(model_with("layer"), CONFIG, 0.7)
    with pytest.raises(ValueError, match="no sparse attention was called"):
        loss(VisionTransformer(**ARGS), *batch())
