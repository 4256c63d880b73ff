"""timm's contract: unfused, the weights that are multiplied with V pass through the module's ``attn_drop``.

Tools that draw or analyse a timm model's attention look there: timm's own `AttentionExtract`, and every tool with a
forward or backward hook on ``attn_drop``.
"""

from __future__ import annotations

import pytest
import torch
from timm.utils import AttentionExtract
from torch import Tensor, nn

from svit_utils.attention import NORMALISERS, sparse_modules, sparsified
from svit_utils.attention.normalisers import TopK
from svit_utils.explain import attention_maps
from tests.attention.test_families import FAMILIES, TAU, prepared, run  # noqa: F401 - `prepared` is a fixture


def unfused(model: nn.Module, fused: bool = False) -> dict[str, nn.Module]:
    """The model's sparse modules, set to timm's unfused attention."""
    modules = sparse_modules(model)
    for module in modules.values():
        module.fused_attn = fused
    return modules


def seen_by_hooks(model: nn.Module, x: object) -> dict[str, Tensor]:
    """What plain forward hooks on every ``attn_drop`` see in one pass."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.attn_drop.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out.detach()))
        for name, module in sparse_modules(model).items()
    ]
    run(model, x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", FAMILIES)
def test_a_forward_hook_sees_the_weights_of_every_family(case, prepared):  # noqa: F811
    model, x = prepared(case)
    before = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    with sparsified(model, TAU):
        fused_out = run(model, x)
        modules = unfused(model)
        records: dict[str, Tensor] = {}
        for name, module in modules.items():
            module.observers.append(lambda _, record, name=name: records.__setitem__(name, record.weights.detach()))
        wanted = seen_by_hooks(model, x)
        for module in modules.values():
            module.observers.clear()
        seen, out = seen_by_hooks(model, x), run(model, x)
        assert set(seen) == set(modules) == set(records)
        for name, weights in seen.items():
            assert torch.equal(weights, records[name]) and torch.equal(weights, wanted[name])
            assert 0.02 < float((weights == 0).float().mean()) < 1
        assert (out - fused_out).abs().max() <= 1e-4 * max(1.0, float(out.abs().max()))
    for module, fused in zip((m for m in model.modules() if hasattr(m, "fused_attn")), before, strict=True):
        module.fused_attn = fused


@pytest.mark.parametrize("case", [name for name, family in FAMILIES.items() if "NaFlex" not in name])
def test_timms_own_extractor_finds_the_sparse_weights(case, prepared):  # noqa: F811
    model, x = prepared(case)
    with sparsified(model, TAU):
        modules = unfused(model)
        found = AttentionExtract(model, method="hook")(x)
        wanted = attention_maps(model, x)
        unfused(model, fused=True)
    assert set(found) == {f"{name}.attn_drop" for name in modules}
    for name in modules:
        torch.testing.assert_close(found[f"{name}.attn_drop"], wanted[name], atol=1e-6, rtol=1e-5)


def test_a_backward_hook_sees_the_gradient_of_the_weights(prepared):  # noqa: F811
    model, x = prepared("ViT")
    gradients: dict[str, Tensor] = {}
    with sparsified(model, TAU):
        modules = unfused(model)
        weights: dict[str, Tensor] = {}
        for name, module in modules.items():
            module.attn_drop.register_full_backward_hook(
                lambda m, inputs, outputs, name=name: gradients.__setitem__(name, outputs[0])
            )

            def keep(m, args, out, name=name):
                out.retain_grad()
                weights[name] = out

            module.attn_drop.register_forward_hook(keep)
        model(x).square().sum().backward()
        for module in modules.values():
            module.attn_drop._forward_hooks.clear()
            module.attn_drop._backward_hooks.clear()
        unfused(model, fused=True)
    assert set(gradients) == set(modules)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, weights[name].grad)


class Scaled(nn.Module):
    """A stand-in for ``attn_drop`` that changes the weights."""

    def forward(self, weights: Tensor) -> Tensor:
        return 2 * weights


@pytest.mark.parametrize("stand_in", [nn.Identity(), Scaled()])
def test_whatever_module_stands_there_is_used(stand_in, prepared):  # noqa: F811
    model, x = prepared("ViT")
    with sparsified(model, TAU):
        modules = unfused(model)
        maps = []
        originals = {name: module.attn_drop for name, module in modules.items()}
        outputs = [run(model, x)]
        for module in modules.values():
            module.attn_drop = stand_in
        handle = modules["blocks.0.attn"].attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
        outputs.append(run(model, x))
        handle.remove()
        unfused(model, fused=True)
        model.train()
        model(x)  # fused and in training, timm would ask it for a dropout rate
        model.eval()
        for name, module in modules.items():
            module.attn_drop = originals[name]
    sums = maps[0].sum(-1)
    assert torch.allclose(sums, torch.full_like(sums, 2.0 if isinstance(stand_in, Scaled) else 1.0), atol=1e-5)
    assert torch.equal(*outputs) == isinstance(stand_in, nn.Identity)


@pytest.mark.parametrize("name", NORMALISERS)
def test_every_normaliser_goes_through_it(name, prepared):  # noqa: F811
    model, x = prepared("ViT")
    with sparsified(model, normaliser=TopK(9) if name == "topk" else name):
        unfused(model)
        seen, wanted = seen_by_hooks(model, x), attention_maps(model, x)
        unfused(model, fused=True)
    assert set(seen) == set(wanted)
    assert all(torch.equal(seen[layer], wanted[layer]) for layer in seen)


def test_fused_no_hook_fires_as_in_timm(prepared):  # noqa: F811
    model, x = prepared("ViT")
    with sparsified(model, TAU):
        unfused(model, fused=True)
        assert seen_by_hooks(model, x) == {}
