"""What PyTorch, timm and others do to a model: copies, meta device, casts, functional calls, tracing, export.

The situations are those of public reports: buffers that are garbage after `to_empty` (pytorch/pytorch, FSDP and
torchtune), an average model that keeps the state of the moment it was made (timm, swa_utils), parametrized modules
whose class is replaced, custom operators in exported programs (pytorch/onnx), models pickled by spawned processes.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models._features_fx import create_feature_extractor
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from svit_utils.attention import (
    FixedThreshold,
    LearnableThreshold,
    RelativeThreshold,
    SparseAttention,
    Threshold,
    TokenSparsityTracker,
    densify,
    sparse_modules,
    sparsified,
    sparsify,
)
from svit_utils.attention.normalisers import TopK

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
KINDS: dict[str, Callable[[], Threshold]] = {
    "fixed": lambda: FixedThreshold(0.03),
    "per head": lambda: FixedThreshold([0.02, 0.03, 0.04]),
    "relative": lambda: RelativeThreshold(0.5),
    "learned, model": lambda: LearnableThreshold(0.03, per="model"),
    "learned, layer": lambda: LearnableThreshold(0.03, per="layer"),
    "learned, head": lambda: LearnableThreshold(0.03, per="head"),
}


def vit(cls: type[nn.Module] = VisionTransformer, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = cls(**{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight"):
                parameter[: 2 * len(parameter) // 3] *= 14
        nn.init.normal_(model.head.weight)
    return model


def sparse(kind: str = "fixed", **arguments: Any) -> Any:
    model = vit(**arguments)
    sparsify(model, KINDS[kind]())
    return model


def taus(model: nn.Module) -> list[float]:
    return [float(module.threshold(17).detach().flatten()[0]) for module in sparse_modules(model).values()]


def warm(model: nn.Module, share: float) -> None:
    for module in sparse_modules(model).values():
        module.threshold.set_warmup(share)


def same(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# --- the meta device ---------------------------------------------------------------------------------------------


@pytest.fixture
def junk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in empty memory is 7."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(real(*a, **k)))


def fill(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.fill_(7.0)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("way", ["built there", "moved there", "never there", "assigned", "cast after"])
@pytest.mark.parametrize("kind", KINDS)
def test_emptied_and_loaded_it_is_what_was_saved(kind, way, share, junk):
    expected = sparse(kind)
    warm(expected, share)
    if way in ("moved there", "never there"):
        model = sparse(kind)
    else:
        with torch.device("meta"):
            model = VisionTransformer(**SMALL).eval()
            sparsify(model, KINDS[kind]())
    warm(model, share)
    if way == "moved there":
        model.to("meta")
    if way != "assigned":
        model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict(), strict=True, assign=way == "assigned")
    if way == "cast after":
        same(model.double()(X.double()).float(), expected(X))
    else:
        assert torch.equal(model(X), expected(X))
    assert taus(model) == taus(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_emptied_and_given_dense_weights_a_learned_tau_starts_where_it_was_to_start(kind, junk):
    with torch.device("meta"):
        model = VisionTransformer(**SMALL).eval()
        sparsify(model, KINDS[kind]())
    model.to_empty(device="cpu")
    model.load_state_dict(vit().state_dict(), strict=False)
    same(model(X), sparse(kind)(X))


def test_built_with_the_sparse_layer_on_the_meta_device(junk):
    layer = SparseAttention.using(threshold=0.03)
    with torch.device("meta"):
        model = VisionTransformer(**SMALL, attn_layer=layer).eval()
    model.to_empty(device="cpu")
    model.load_state_dict(vit().state_dict())
    assert torch.equal(model(X), sparse()(X))


def test_accelerates_empty_weights():
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        model = VisionTransformer(**SMALL).eval()
        sparsify(model, 0.03)
    model.load_state_dict(vit().state_dict(), assign=True)
    assert torch.equal(model(X), sparse()(X))


def test_a_tau_without_values_is_refused():
    with pytest.raises(ValueError, match="without values, on the meta device"):
        FixedThreshold(torch.tensor([0.1, 0.2, 0.3], device="meta"))


# --- averages and copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [ModelEmaV3, AveragedModel, copy.deepcopy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_while_tau_rises_is_said_once(kind, average, caplog):
    """timm's average keeps the tau of the moment it was made; PyTorch's follows with the buffers at each update."""
    model = sparse(kind)
    full = taus(model)
    warm(model, 0.25)
    with caplog.at_level(logging.WARNING, "svit_utils"):
        made = average(model)
    assert [record.getMessage().count("tau stands at 0.25 of its value") for record in caplog.records] == [1]
    warm(model, 1.0)
    averaged = made.module if average is ModelEmaV3 else made
    if average is AveragedModel:
        made.update_parameters(model)
    else:
        assert taus(averaged) == pytest.approx([0.25 * tau for tau in full])
        warm(averaged, 1.0)
    assert taus(averaged) == pytest.approx(full)
    assert {module.threshold.share for module in sparse_modules(averaged).values()} == {1.0}


@pytest.mark.parametrize("average", [ModelEmaV3, AveragedModel, copy.deepcopy], ids=lambda f: f.__name__)
def test_a_copy_at_the_full_tau_is_made_in_silence(average, caplog):
    model = sparse("learned, layer")
    with caplog.at_level(logging.WARNING, "svit_utils"):
        averaged = average(model)
        warm(model, 0.5)
        sparsify(model, model.blocks[0].attn.threshold)  # layers get copies, which are part of the model
    assert not caplog.records
    assert {round(tau, 6) for tau in taus(getattr(averaged, "module", averaged))} == {0.03}


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy": copy.copy,
    "torch.save": lambda model: saved(model, weights_only=False),
}


def saved(thing: Any, weights_only: bool) -> Any:
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=weights_only)


class Named(Attention):
    """A subclass that keeps timm's forward."""

    def spoken(self) -> str:
        return f"{self.num_heads} heads"


@pytest.mark.parametrize("made", [*KINDS, "using", "subclass"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_the_same_under_the_same_names(how, made):
    if made == "using":
        model = vit(attn_layer=SparseAttention.using(threshold=0.03))
    elif made == "subclass":
        model = sparse(attn_layer=Named)
        assert model.blocks[0].attn.spoken() == "3 heads"
    else:
        model = sparse(made)
    copied = COPIES[how](model)
    assert torch.equal(copied(X), model(X))
    assert list(copied.state_dict()) == list(model.state_dict())
    dense = densify(copied)
    assert type(dense.blocks[0].attn) is (Named if made == "subclass" else Attention)
    same(dense(X), vit()(X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_with_weights_only(kind):
    model = sparse(kind)
    other = sparse(kind, num_classes=5)
    other.load_state_dict(saved(model.state_dict(), weights_only=True), strict=True)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("change", [densify, lambda m: sparsify(m, 0.5), lambda m: sparsify(m, LearnableThreshold())])
@pytest.mark.parametrize("start", ["sparse", "dense"])
def test_what_is_done_to_a_shallow_copy_of_an_attention_stays_there(start, change):
    model = sparse() if start == "sparse" else vit()
    keys, expected = list(model.state_dict()), model(X)
    change(nn.Sequential(copy.copy(model.blocks[0].attn)))
    assert torch.equal(model(X), expected) and list(model.state_dict()) == keys


def test_a_threshold_given_by_hand_or_to_a_replica_is_the_one_in_force():
    """DataParallel copies children, not the normaliser that holds the threshold."""
    for normaliser in ("thresholded", "hard_cut"):
        for fused in (True, False):
            model, expected = vit(), vit()
            sparsify(model, 0.01, normaliser=normaliser)
            sparsify(expected, 0.1, normaliser=normaliser)
            for block in (*model.blocks, *expected.blocks):
                block.attn.fused_attn = fused
            for block in model.blocks:
                block.attn.threshold = FixedThreshold(0.1)
            assert torch.equal(model(X), expected(X)), (normaliser, fused)


# --- other ways to call a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    model = sparse(kind)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    other = {name: tensor.detach() * 1.1 for name, tensor in tensors.items()}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
            tensor.copy_(other[name])
    assert torch.equal(torch.func.functional_call(model, tensors, (X,)), model(X))
    same(torch.func.functional_call(model, other, (X,)), expected(X))


@pytest.mark.parametrize("kind", ["fixed", "per head", "learned, layer", "learned, head"])
def test_an_ensemble_by_vmap(kind):
    models = [sparse(kind) for _ in range(2)]
    with torch.no_grad():
        models[1].head.weight.mul_(2)
    stacked = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    out = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (X,)), randomness="different")(*stacked)
    for one, model in zip(out, models, strict=True):
        same(one, model(X))


@pytest.mark.parametrize("kind", ["fixed", "per head", "learned, layer"])
def test_gradients_of_each_image(kind):
    model = sparse(kind)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    for image in range(2):
        model.zero_grad()
        model(X[image : image + 1]).sum().backward()
        for name, parameter in model.named_parameters():
            same(found[name][image], parameter.grad, 1e-4)


class Shrunk(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.9 * weight


PARAMETRIZED: dict[str, Callable[[Any], object]] = {
    "weight norm": lambda attention: parametrizations.weight_norm(attention.qkv),
    "spectral norm": lambda attention: parametrizations.spectral_norm(attention.qkv),
    "of a projection": lambda attention: parametrize.register_parametrization(attention.proj, "weight", Shrunk()),
    "of the module": lambda attention: parametrize.register_parametrization(attention, "q_bias", Shrunk()),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_attention_stays_parametrized(kind):
    model = vit(Eva, use_rot_pos_emb=True, qkv_fused=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_bias.normal_()
            block.attn.v_bias.normal_()
            PARAMETRIZED[kind](block.attn)
    classes, names, dense = [type(m) for m in model.modules()], list(model.state_dict()), model(X)
    weights = copy.deepcopy(model.state_dict())
    sparsify(model, 0.0)
    same(model(X), dense)  # nothing is cut, and what is parametrized is still in force
    sparsify(model, 0.05)
    cut = model(X)
    assert not torch.allclose(cut, dense, rtol=1e-3) and list(model.state_dict()) == names
    same(copy.deepcopy(model)(X), cut)
    densify(model)
    assert [type(m) for m in model.modules()] == classes and torch.equal(model(X), dense)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_attention_parametrized_after_it_became_sparse():
    model = vit(Eva, qkv_fused=True)
    sparsify(model, 0.05)
    parametrize.register_parametrization(model.blocks[1].attn, "q_bias", Shrunk())
    cut = model(X)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn was parametrized after it became sparse.*remove"):
        densify(model)
    assert len(sparse_modules(model)) == 2 and torch.equal(model(X), cut)
    parametrize.remove_parametrizations(model.blocks[1].attn, "q_bias", leave_parametrized=False)
    same(densify(model)(X), vit(Eva, qkv_fused=True)(X))


def test_a_learned_tau_may_be_parametrized():
    model = sparse("learned, layer")

    class Bounded(nn.Module):
        def forward(self, logit: Tensor) -> Tensor:
            return logit.clamp(max=-4.0)

    for block in model.blocks:
        parametrize.register_parametrization(block.attn.threshold, "logit", Bounded())
    assert taus(model) == pytest.approx([float(torch.sigmoid(torch.tensor(-4.0)))] * 2)
    model.double()
    model(X.double()).sum().backward()


QUANTISE: dict[str, Callable[[Any], Any]] = {
    "before": lambda model: quantised(model) if sparsify(model, 0.0, layers=[]) else model,
    "after": lambda model: quantised(model) if sparsify(model, 0.05) else model,
}


def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantised kernels for this processor")
@pytest.mark.parametrize("when", QUANTISE)
def test_quantised_attention_without_any_parameter(when):
    model = QUANTISE[when](vit())
    start = model(X)
    with sparsified(model, 0.2):
        assert not torch.allclose(model(X), start)
    assert torch.equal(model(X), start)
    with TokenSparsityTracker(model) if when == "after" else sparsified(model, 0.1):
        model(X)
    assert torch.equal(densify(model)(X), quantised(vit())(X))


def test_pruned_attention():
    model = vit()
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.3)
    dense, names = model(X), list(model.state_dict())
    sparsify(model, 0.05)
    cut = model(X)
    assert list(model.state_dict()) == names and not torch.equal(cut, dense)
    assert torch.equal(densify(model)(X), dense)
    for block in model.blocks:
        prune.remove(block.attn.qkv, "weight")
    sparsify(model, 0.05)
    same(model(X), cut)


@pytest.mark.parametrize("kind", KINDS)
def test_timms_feature_extraction_by_torch_fx(kind):
    model = sparse(kind)
    names = ["blocks.0.attn", "blocks.1.mlp.fc1"]
    expected: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *a, name=name: expected.update({name: a[2]}))
    model(X)
    for name, found in create_feature_extractor(model, names)(X).items():
        same(found, expected[name])


@pytest.mark.parametrize("wrap", ["in place", "around"])
def test_a_compiled_model_is_cut_and_comes_back(wrap):
    model = vit()
    compiled = torch.compile(model, backend="eager") if wrap == "around" else model
    if wrap == "in place":
        model.compile(backend="eager")
    dense = compiled(X).detach()
    with sparsified(compiled, 0.05):
        cut = compiled(X).detach()
        for module in sparse_modules(model).values():
            module.threshold.set_warmup(0.0)
        same(compiled(X), dense)
    assert not torch.allclose(cut, dense) and torch.equal(compiled(X), dense)
    sparsify(compiled, 0.05)
    same(compiled(X), cut)


# --- number formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_tau_is_float32_whatever_the_default_is(kind, default):
    torch.set_default_dtype(default)
    try:
        threshold = KINDS[kind]().set_warmup(0.3)
        again = KINDS[kind]().to("meta").to_empty(device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    expected = KINDS[kind]().set_warmup(0.3)
    for name, tensor in [*threshold.named_parameters(), *threshold.named_buffers()]:
        assert tensor.dtype == torch.float32 and torch.equal(tensor, dict(state_of(expected))[name])
    for name, tensor in state_of(again):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, dict(state_of(KINDS[kind]()))[name])


def state_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float64),
        lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
        lambda m: m.half().float().bfloat16(),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_cast_leaves_tau_alone(kind, cast):
    model = sparse(kind)
    warm(model, 0.3)
    before = {name: t.detach().clone() for m in sparse_modules(model).values() for name, t in state_of(m.threshold)}
    cast(model)
    assert model.head.weight.dtype != torch.float32
    for module in sparse_modules(model).values():
        for name, tensor in state_of(module.threshold):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert model(X.to(model.head.weight.dtype)).dtype == model.head.weight.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_is_without_a_dimension(kind):
    assert all(parameter.ndim >= 1 for parameter in sparse(kind).parameters())


# --- programs that leave Python ----------------------------------------------------------------------------------


def of_size(large: bool) -> dict[str, Any]:
    """Small, or with N = 197 tokens, where "auto" chooses the tiles."""
    return {"img_size": 56} if large else {}


def pictures(large: bool, n: int) -> Tensor:
    side = 56 if large else 16
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def quiet_trace(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the checks of shapes
        return torch.jit.trace(model, x)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_has_plain_operators_alone(kind, large):
    model = sparse(kind, **of_size(large))
    traced = quiet_trace(model, pictures(large, 2))
    assert not [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("svit::")]
    stream = io.BytesIO()
    torch.jit.save(traced, stream)
    stream.seek(0)
    same(torch.jit.load(stream)(pictures(large, 3)), model(pictures(large, 3)), 1e-4)


@pytest.mark.parametrize("normaliser", ["hard_cut", "clipped", TopK(3)])
def test_traces_of_other_normalisers(normaliser):
    model = vit()
    sparsify(model, normaliser=normaliser)
    same(quiet_trace(model, X)(pictures(False, 3)), model(pictures(False, 3)))


@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
@pytest.mark.parametrize("program", ["trace", "onnx", "export"])
def test_whatever_the_backend_a_program_has_plain_operators(program, backend):
    model, x = vit(img_size=56), pictures(True, 2)
    sparsify(model, 0.006, backend=backend)
    if program == "trace":
        kinds = [node.kind() for node in quiet_trace(model, x).inlined_graph.nodes()]
    elif program == "export":
        exported = torch.export.export(model, (x,))
        kinds = [str(node.target) for node in exported.graph.nodes]
        same(exported.module()(x), model(x), 1e-4)
    else:
        kinds = onnx_operators(model, x)
    assert not [kind for kind in kinds if "svit" in kind]


def onnx_operators(model: nn.Module, x: Tensor) -> list[str]:
    """Of the older exporter, which refuses operators that it does not know before it needs the package onnx."""
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), stream, dynamo=False)
    except Exception as error:
        if "onnx is not installed" not in str(error):
            raise
        return []
    import onnx

    program = onnx.load_from_string(stream.getvalue())
    onnx.checker.check_model(program)
    return [f"{node.domain}::{node.op_type}" for node in program.graph.node if node.domain]


@pytest.mark.parametrize("kind", KINDS)
def test_the_older_onnx_exporter_knows_every_operator(kind):
    assert onnx_operators(sparse(kind), X) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_takes_another_batch(kind):
    model = sparse(kind)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},))
    same(exported.module()(pictures(False, 5)), model(pictures(False, 5)))


def test_a_tracker_does_not_get_into_a_trace():
    model = sparse()
    with TokenSparsityTracker(model):
        traced = quiet_trace(model, X)
    same(traced(X), model(X))
