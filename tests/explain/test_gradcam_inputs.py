"""What users hand to Grad-CAM: every form of a target, precision and wrapper, right or one error, the same from both.

Situations of public reports, among them pytorch-grad-cam 238 and 390 (a class out of range ends in an IndexError that
its `with` swallows), 96 and 493 (half precision), and PyTorch 117758 (hooks that compiled code does not see).
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from svit_utils import sparsify
from svit_utils.explain import (
    METHODS,
    attention_maps,
    attention_rollout,
    class_attention,
    default_layer,
    explain,
    grad_cam,
    layer_grad_cam,
)
from svit_utils.explain.model_state import unwrap
from tests.explain.by_hand import TINY, calls, check_rollout, even, pictures, sharp, tiny

X = pictures()
CAMS = [grad_cam, layer_grad_cam]
both = pytest.mark.parametrize("cam", CAMS)


@pytest.fixture(scope="module")
def model():
    return tiny()


def reference(model, x, targets):
    """Signed Grad-CAM before the last attention, with autograd alone, whatever the precision of the model."""
    kept = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda _m, _a, out: kept.append(out))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[range(len(x)), targets].sum(), kept[0])
    tokens, gradient = kept[0].double()[:, 1:], gradient.double()[:, 1:]
    return (gradient.mean(1, keepdim=True) * tokens).sum(-1).unflatten(1, (4, 4)).detach()


SAME = {  # each of them says class 3 for both images
    "int": 3,
    "numpy int64": np.int64(3),
    "numpy int32": np.int32(3),
    "numpy uint8": np.uint8(3),
    "numpy 0-d": np.array(3),
    "tensor 0-d": torch.tensor(3),
    "tensor 0-d int32": torch.tensor(3, dtype=torch.int32),
    "list": [3, 3],
    "tuple": (3, 3),
    "tensor": torch.tensor([3, 3]),
    "tensor uint8": torch.tensor([3, 3], dtype=torch.uint8),
    "numpy array": np.array([3, 3]),
    "list of tensors": [torch.tensor(3), torch.tensor(3)],
    "list of numpy": [np.int64(3), np.int8(3)],
    "range": range(3, 5),
    "generator": None,
}


@both
@pytest.mark.parametrize("kind", SAME)
def test_every_form_of_a_class(kind, cam, model):
    targets = (3 for _ in range(2)) if kind == "generator" else SAME[kind]
    expected = reference(model, X, [3, 4] if kind == "range" else [3, 3])
    got = cam(model, X, targets, relu=False)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


WRONG = {
    "too large": (5, r"lie in 0 to 4, .* got \[5\]"),
    "negative": (-1, r"lie in 0 to 4, .* got \[-1\]"),
    "one too large": ([0, 7], r"lie in 0 to 4, .* got \[7\]"),
    "one negative": (torch.tensor([-2, 0]), r"lie in 0 to 4, .* got \[-2\]"),
    "far too large": (2**40, "lie in 0 to 4"),
    "unsigned": (np.uint64(2**63), "lie in 0 to 4"),
    "too many": ([0, 1, 2], "one for each of the 2 images, got 3"),
    "too few": ([0], "one for each of the 2 images, got 1"),
    "none of them": ([], "one for each of the 2 images, got 0"),
    "one-element tensor": (torch.tensor([1]), "one for each of the 2 images, got 1"),
    "float": (1.0, "whole numbers"),
    "numpy float": (np.float64(1), "whole numbers"),
    "float tensor": (torch.tensor([0.0, 1.0]), "whole numbers"),
    "float in a list": ([0, 1.5], "whole numbers"),
    "nan": (float("nan"), "whole numbers"),
    "bool": (True, "whole numbers"),
    "bools": ([True, False], "whole numbers"),
    "bool tensor": (torch.tensor([True, False]), "whole numbers"),
    "numpy bool": (np.bool_(True), "whole numbers"),
    "one-hot": (torch.eye(5, dtype=torch.int64)[:2], "whole numbers"),
    "column": (torch.tensor([[0], [1]]), "whole numbers"),
    "text": ("3", "whole numbers"),
    "texts": (["0", "1"], "whole numbers"),
    "dict": ({0: 1, 1: 2}, "whole numbers"),
    "None in a list": ([None, 1], "whole numbers"),
    "object": (object(), "whole numbers"),
}


@both
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_class(kind, cam, model):
    targets, says = WRONG[kind]
    with pytest.raises(ValueError, match=f"targets must .*{says}"):
        cam(model, X, targets)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", WRONG)
def test_both_say_the_same(kind, model):
    errors = []
    for cam in CAMS:
        with pytest.raises(ValueError) as caught:
            cam(model, X, WRONG[kind][0])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@both
def test_no_class_is_the_predicted_one(cam, model):
    torch.testing.assert_close(cam(model, X), cam(model, X, model(X).argmax(-1)))


PRECISIONS = {torch.float16: 3e-2, torch.bfloat16: 2e-1}


@both
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("given", ["model", "float32", "float64", "other half"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_half_precision(dtype, given, sparse, cam):
    model = tiny().to(dtype)
    if sparse:
        sparsify(model, 0.02)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    as_given = {"model": dtype, "float32": torch.float32, "float64": torch.float64, "other half": other}[given]
    x = X.to(dtype).to(as_given) if given != "other half" else X.to(other)
    got = cam(model, x, [3, 1], relu=False)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    # The sums of the formula are in single precision, on the model's own activations and gradients.
    torch.testing.assert_close(got.double(), reference(model, x.to(dtype), [3, 1]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_maps_of_half_precision(dtype):
    exact, model = tiny(), tiny().to(dtype)
    for x in (X.to(dtype), X):
        maps = attention_maps(model, x)
        assert {weights.dtype for weights in maps.values()} == {dtype}
        rollout, shown = attention_rollout(model, x), class_attention(model, x)
        assert rollout.dtype == shown.dtype == torch.float32
        # Rollout is computed in single precision from the maps: against float64 on the same maps.
        check_rollout(rollout, list(maps.values()), even([0], 17), 1, atol=1e-6)
        torch.testing.assert_close(rollout, attention_rollout(exact, X), atol=PRECISIONS[dtype], rtol=0)


def test_double_images_for_a_single_precision_model(model):
    for method in METHODS:
        torch.testing.assert_close(explain(model, X.double(), method, 1), explain(model, X, method, 1))


def test_norms_in_single_precision_do_not_decide_the_images_type():
    model = tiny()
    model.patch_embed.to(torch.float32)
    mixed = tiny().to(torch.bfloat16)
    mixed.cls_token.data = mixed.cls_token.data.float()  # the first parameter is not the first that images meet
    mixed.pos_embed.data = mixed.pos_embed.data.bfloat16()
    mixed.blocks.to(torch.float32), mixed.norm.to(torch.float32), mixed.head.to(torch.float32)
    for cam in CAMS:
        torch.testing.assert_close(cam(mixed, X, 2), cam(model, X, 2), atol=0.1, rtol=0.1)


def test_rollout_under_autocast_is_as_exact_as_its_maps(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = attention_maps(model, X)
        rollout = attention_rollout(model, X)
        cams = [cam(model, X, 2, relu=False) for cam in CAMS]
    check_rollout(rollout, list(maps.values()), even([0], 17), 1, atol=1e-5)
    torch.testing.assert_close(cams[0], cams[1], atol=1e-5, rtol=1e-3)


@both
def test_overflow_is_said_and_no_map_of_nans_returned(cam):
    model = tiny()
    with torch.no_grad():
        model.head.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"not finite.*float32"):
        cam(model.half(), X, 1)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", SURROUNDINGS)
def test_inside_and_from_every_gradient_mode(mode, method, model):
    expected = explain(model, X, method, 1)
    with SURROUNDINGS[mode]():
        made_inside = X * 1
        inside = explain(model, made_inside, method, 1)
        predicted = explain(model, made_inside, method)
    torch.testing.assert_close(inside.clone(), expected)
    torch.testing.assert_close(explain(model, made_inside, method, 1), expected)
    torch.testing.assert_close(predicted.clone(), explain(model, X, method))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@both
def test_images_that_require_gradients_keep_theirs(cam, model):
    x = X.clone().requires_grad_(True)
    (x.sum() * 2).backward()
    assert not cam(model, x, 1).requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 2)) and x.requires_grad


@both
def test_a_model_made_in_inference_mode(cam):
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(ValueError, match=r"inference_mode"):
        cam(model, X, 1)
    assert attention_rollout(model, X).shape == (2, 4, 4)


@both
@pytest.mark.parametrize("what", ["all", "mlp", "head"])
def test_quantised_models(what, cam):
    names = {"all": {nn.Linear}, "mlp": {"blocks.1.mlp.fc1"}, "head": {"head"}}[what]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny(), names, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"quantised.*before"):
        cam(model, X, 1)
    expected = calls(model, X)
    for got, weights in zip(attention_maps(model, X).values(), expected, strict=True):
        torch.testing.assert_close(got.double(), weights, atol=1e-5, rtol=0)
    check_rollout(attention_rollout(model, X), expected, even([0], 17), 1)


class Counted:
    """A compiler that compiles nothing and counts how often compiled code ran."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, _inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def compiled(how, backend):
    model = tiny()
    if how == "in place":
        model.compile(backend=backend)
    elif how == "each block in place":
        for block in model.blocks:
            block.compile(backend=backend)
    elif how == "each block wrapped":
        model.blocks = nn.Sequential(*[torch.compile(block, backend=backend) for block in model.blocks])
    elif how == "wrapped":
        model = torch.compile(model, backend=backend)
    elif how == "wrapped twice":
        model = nn.DataParallel(torch.compile(model, backend=backend))
    return model


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", ["in place", "each block in place", "each block wrapped", "wrapped", "wrapped twice"])
def test_compiled_models(how, ran, model):
    """What was compiled before does not see the hooks of an explanation, and is not asked."""
    backend = Counted()
    other = compiled(how, backend)
    if ran:
        with torch.no_grad():
            other(X)
        assert backend.runs
    backend.runs = 0
    for method in METHODS:
        torch.testing.assert_close(explain(other, X, method, 1), explain(model, X, method, 1))
    layers = list(attention_maps(other, X).values())
    for got, weights in zip(layers, attention_maps(model, X).values(), strict=True):
        torch.testing.assert_close(got, weights)
    torch.testing.assert_close(attention_maps(other, X, layers=[1]).popitem()[1], layers[1])
    expected = grad_cam(model, X, 1, layer="blocks.1", relu=False)
    for layer in (unwrap(other).blocks[1], "blocks.1"):  # as it is, and where it is compiled as it was
        torch.testing.assert_close(grad_cam(other, X, 1, layer=layer, relu=False), expected)
    assert backend.runs == 0
    if ran:
        with torch.no_grad():
            other(X)
        assert backend.runs  # compiled again afterwards


def test_threads_with_compiled_models_of_their_own(model):
    """Whether compiled code runs is one setting for all threads: it must come back whoever is last."""
    backend = Counted()
    others = [compiled("in place", backend) for _ in range(3)]
    with torch.no_grad():
        others[0](X)
    expected = attention_rollout(model, X)
    backend.runs = 0
    with ThreadPoolExecutor(3) as pool:
        for rollout in pool.map(lambda other: [attention_rollout(other, X) for _ in range(4)][-1], others):
            torch.testing.assert_close(rollout, expected)
    assert backend.runs == 0
    with torch.no_grad():
        others[0](X)
    assert backend.runs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["data parallel", "average", "data parallel of compiled"])
def test_wrappers(kind, method, model):
    wrapped = {
        "data parallel": lambda: nn.DataParallel(model),
        "average": lambda: torch.optim.swa_utils.AveragedModel(model),
        "data parallel of compiled": lambda: nn.DataParallel(torch.compile(model, backend="eager")),
    }[kind]()
    torch.testing.assert_close(explain(wrapped, X, method, 1), explain(model, X, method, 1))


LAYERS = {
    "module": lambda model: model.blocks[1].norm1,
    "name": lambda _: "blocks.1.norm1",
    "index": lambda _: 1,
    "negative": lambda _: -2,
    "numpy index": lambda _: np.int64(1),
}


@both
@pytest.mark.parametrize("kind", LAYERS)
def test_ways_to_name_a_layer(kind, cam, model):
    expected = cam(model, X, 1, layer=model.blocks[1].norm1, relu=False)
    torch.testing.assert_close(cam(model, X, 1, layer=LAYERS[kind](model), relu=False), expected)
    assert not torch.allclose(expected, cam(model, X, 1, relu=False))
    assert default_layer(model) is model.blocks[2].norm1


UNKNOWN = {
    "too large": 3,
    "too small": -4,
    "name": "blocks.9.norm1",
    "empty name": "",
    "bool": True,
    "float": 1.0,
    "list": [1],
    "no module": object(),
}


@both
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_layers_of_grad_cam(kind, cam, model):
    with pytest.raises(ValueError, match=r"unknown layer .*: allowed are indices -3 to 2"):
        cam(model, X, 1, layer=UNKNOWN[kind])


@both
def test_layers_of_another_model_or_kind(cam, model):
    with pytest.raises(ValueError, match=r"unknown layer LayerNorm.*: allowed are indices -3 to 2"):
        cam(model, X, 1, layer=tiny().blocks[1].norm1)
    for layer in (model.head, model.patch_embed.proj, "blocks.1.attn.attn_drop", "blocks.1.attn.q_norm"):
        with pytest.raises(ValueError, match=r"expected tokens|was not called"):
            cam(model, X, 1, layer=layer)


@pytest.mark.parametrize("kind", [k for k in UNKNOWN if k not in ("list",)])
def test_unknown_layers_of_the_maps(kind, model):
    layer = UNKNOWN[kind]
    for ask in (
        lambda: attention_maps(model, X, layers=layer),
        lambda: attention_maps(model, X, layers=[layer]),
        lambda: class_attention(model, X, layer=layer),
        lambda: attention_rollout(model, X, start_layer=layer),
    ):
        with pytest.raises(
            ValueError, match=r"unknown attention layer .*: allowed are indices -3 to 2 and the names blocks\.0"
        ):
            ask()


@pytest.mark.parametrize("layer", [1, -2, "blocks.1.attn", "blocks.1", np.int64(1), torch.tensor(1)], ids=repr)
def test_ways_to_name_a_layer_of_the_maps(layer, model):
    (expected,) = attention_maps(model, X, layers=[1]).values()
    for layers in (layer, [layer]):
        maps = attention_maps(model, X, layers=layers)
        assert list(maps) == ["blocks.1.attn"] and torch.equal(maps["blocks.1.attn"], expected)
    torch.testing.assert_close(class_attention(model, X, layer=layer), class_attention(model, X, layer=1))
    torch.testing.assert_close(
        attention_rollout(model, X, start_layer=layer), attention_rollout(model, X, start_layer=1)
    )


def test_one_layer_where_one_is_asked_for(model):
    for layer in ([0, 1], [], None):
        with pytest.raises(ValueError, match="one layer"):
            class_attention(model, X, layer=layer)
    with pytest.raises(ValueError, match="at least one layer"):
        attention_maps(model, X, layers=[])


def test_a_methods_own_options(model):
    got = explain(model, X, "rollout", residual=0.2, start_layer=1)
    torch.testing.assert_close(got, attention_rollout(model, X, residual=0.2, start_layer=1))
    with pytest.raises(ValueError, match="rollout has no option 'layer': allowed are head_fusion, residual, start_l"):
        explain(model, X, "rollout", layer=1)


class Tokens(nn.Module):
    """Returns what is no row of scores per image."""

    def __init__(self, out):
        super().__init__()
        self.vit, self.out, self.num_prefix_tokens = tiny(), out, 1
        self.patch_embed, self.blocks = self.vit.patch_embed, self.vit.blocks

    def forward(self, x):
        return self.out(self.vit(x))


@both
@pytest.mark.parametrize(
    "out",
    [
        lambda y: (y, y),
        lambda y: {"logits": y},
        lambda y: y[:, None].expand(-1, 3, -1),
        lambda y: y.sum(),
        lambda y: y[:1],
    ],
    ids=["pair", "dict", "tokens", "loss", "one row"],
)
def test_models_that_return_no_logits(out, cam):
    with pytest.raises(ValueError, match=r"logits \[B, classes\]"):
        cam(Tokens(out), X, 1)


@both
def test_no_path_to_the_score(cam):
    model = Tokens(lambda y: y.detach().clone().requires_grad_(True))
    with pytest.raises(ValueError, match="gradient"):
        cam(model, X, 1, layer="blocks.1.norm1")
    model = Tokens(lambda y: y.detach())
    with pytest.raises(ValueError, match="gradient"):
        cam(model, X, 1, layer="blocks.1.norm1")


@both
def test_a_failure_leaves_nothing_behind(cam):
    model = sharp(tiny(**{**TINY, "depth": 2})).train()
    model.blocks[0].eval()
    model.set_grad_checkpointing()
    for layer in ("blocks.1.norm2", "head", 7):
        with pytest.raises(ValueError):
            cam(model, X, 1, layer=layer)
    assert model.training and model.blocks[1].training and not model.blocks[0].training and model.grad_checkpointing
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
