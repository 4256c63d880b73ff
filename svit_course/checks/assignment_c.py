"""Assignment c: surgery on a timm model: another forward, there and back, and a map. What is checked, and the hints."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from svit_course.judging import Mistake, array, close, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong, in_words
from svit_utils import SparseAttention, sparsify, thresholded_softmax
from svit_utils.attention import sparse_modules

# The library keeps tau in float32, so the cases have taus that float32 holds exactly: multiples of 1/64.

# ------------------------------------------------------------------------------------------------ c1: the module


def _fill(module: nn.Module, seed: int, gain: float) -> None:
    """Float64 numbers in every parameter, so that nothing is zero, one or alike; ``gain`` is that of the scores."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            width = parameter.shape[-1] ** 0.5
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.5 * noise)
            else:
                parameter.copy_(noise / width * (gain if name == "qkv.weight" else 1.0))


def _options(case: Case) -> dict[str, Any]:
    options = dict(case.get("options", {}))
    if options.get("qk_norm") or options.get("scale_norm"):
        options["norm_layer"] = nn.LayerNorm
    return options


def _timm_module(case: Case) -> Attention:
    with torch.random.fork_rng(devices=[]):
        module = Attention(case["dim"], case["heads"], **_options(case))
    _fill(module, case["seed"], case.get("gain", 2.0))
    return module.train(case.get("training", False))


def _library_module(case: Case) -> SparseAttention:
    module = SparseAttention(case["dim"], case["heads"], threshold=case["tau"], **_options(case)).double().eval()
    module.load_state_dict(_timm_module(case).state_dict())
    return module


def _tokens(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case["seed"] + 1000)
    tokens = torch.randn(case["b"], case["n"], case["dim"], generator=generator, dtype=torch.float64)
    return tokens[:1].repeat(case["draws"], 1, 1) if "draws" in case else tokens


def _masks(case: Case) -> dict[str, Any]:
    """The keyword arguments of the call."""
    kind, n = case.get("mask"), case["n"]
    generator = torch.Generator().manual_seed(case["seed"] + 2000)
    if kind is None:
        return {}
    if kind == "causal":
        return {"is_causal": True}
    if kind == "additive":
        return {"attn_mask": 2 * torch.randn(case["b"], 1, n, n, generator=generator, dtype=torch.float64)}
    allowed = torch.rand(n, n, generator=generator) > 0.4
    allowed[:, 0] = True
    if kind == "blind":
        allowed[1] = False  # a query that may look at nothing
    return {"attn_mask": allowed}


def _probe_module(case: Case, thresholded_attention: Any) -> Seen:
    module, x = _timm_module(case), _tokens(case).requires_grad_()
    before = x.detach().clone()
    module.__class__ = thresholded_attention
    module.tau = case["tau"]  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        out = module(x, **_masks(case))
    seen: Seen = {"out": out, "x": x, "x before": before}
    if "draws" not in case and isinstance(out, torch.Tensor):
        seen["second"] = module(x, **_masks(case))
        seen["dx"], seen["dw"] = _gradients(out, x, module)
    return seen


def _gradients(out: Tensor, x: Tensor, module: nn.Module) -> tuple[Tensor | None, ...]:
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    weight = module.qkv.weight  # type: ignore[union-attr]
    return torch.autograd.grad((out * direction).sum(), (x, weight), allow_unused=True)  # type: ignore[arg-type]


class _After(nn.Module):
    """A layer followed, or with ``first`` preceded, by a function: this is how a mistake is put into the library's."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor], first: bool = False) -> None:
        super().__init__()
        self.layer, self.function, self.first = layer, function, first

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.function(x)) if self.first else self.function(self.layer(x))


def _constant(value: Tensor, _ignored: Tensor) -> Tensor:
    return value


def _with(case: Case, x: Tensor, masks: dict[str, Any] | None = None, **layers: Any) -> np.ndarray:
    """What the library's module gives with some of its layers exchanged, called with other masks."""
    module = _library_module(case)
    for name, layer in layers.items():
        setattr(module, name, layer)
    with torch.no_grad():
        return np.asarray(module(x, **(_masks(case) if masks is None else masks)).numpy())


def _layout_mistakes(case: Case, x: Tensor) -> list[Mistake]:
    """The projections read in another order than they are laid out."""
    b, n, h = case["b"], case["n"], case["heads"]
    d = case["dim"] // h

    def read(function: Callable[[Tensor], Tensor]) -> np.ndarray:
        return _with(case, x, qkv=_After(_library_module(case).qkv, function))

    def pick(order: str) -> np.ndarray:
        return read(lambda y: y.unflatten(-1, (3, -1))[:, :, ["qkv".index(c) for c in order]].flatten(2))

    names = "the projection holds q, k and v one after the other: the last axis unflattens to (3, H, D)"
    found = [
        (pick(order), f"q, k and v are mixed up (the results come as {order}): {names}, in this order")
        for order in ("qvk", "kqv", "kvq", "vqk", "vkq")
    ]
    found.append(
        (
            read(lambda y: y.unflatten(-1, (h, 3, d)).transpose(2, 3).flatten(2)),
            f"(H, 3, D) instead of (3, H, D): {names}",
        )
    )
    found.append(
        (
            read(lambda y: y.unflatten(-1, (3, d, h)).transpose(3, 4).flatten(2)),
            f"heads and channels are swapped in the split: {names}",
        )
    )
    found.append(
        (
            read(
                lambda y: (
                    y.unflatten(-1, (3, -1)).movedim(2, 0).reshape(3, b, h, n, d).permute(1, 3, 0, 2, 4).flatten(2)
                )
            ),
            "heads and tokens are swapped in the split: [B, N, H*D] read as [B, H, N, D]. Unflatten the last axis, "
            "then transpose",
        )
    )
    order = (
        "the axes of qkv(x) are cut up in another order than they lie in memory: B and N come first and stay, the last "
        "axis unflattens to (3, H, D), and then you permute"
    )
    found += [
        (read(lambda y: y.reshape(b, h, n, 3, d).permute(0, 2, 3, 1, 4).flatten(2)), order),
        (read(lambda y: y.reshape(b, 3, h, n, d).permute(0, 3, 1, 2, 4).flatten(2)), order),
        (read(lambda y: y.reshape(3, b, n, h, d).permute(1, 2, 0, 3, 4).flatten(2)), order),
        (read(lambda y: y.reshape(3, b, h, n, d).permute(1, 3, 0, 2, 4).flatten(2)), order),
    ]
    return found


def _no_heads(case: Case, x: Tensor) -> list[Mistake]:
    """One head as wide as the token. Norms of single heads would not fit it."""
    if case.get("options", {}).get("qk_norm"):
        return []
    sentence = (
        "there is one head only, as wide as the token: split q, k and v into self.num_heads heads of D = C / H "
        "channels, [B, H, N, D], and let each head have its own weights"
    )
    return [
        (_with({**case, "heads": 1}, x, scale=width**-0.5), sentence)
        for width in (case["dim"] // case["heads"], case["dim"])
    ]


def _merge_mistakes(case: Case, x: Tensor) -> list[Mistake]:
    b, n, h = case["b"], case["n"], case["heads"]
    fresh = _library_module(case)
    merged = _After(fresh.norm, lambda y: y.reshape(b, n, h, -1).transpose(1, 2).reshape(b, n, -1), first=True)
    interleaved = _After(fresh.norm, lambda y: y.reshape(b, n, h, -1).transpose(2, 3).flatten(2), first=True)
    return [
        (
            _with(case, x, norm=merged),
            "heads and tokens are swapped when the heads are put together: transpose [B, H, N, D] to [B, N, H, D] "
            "before you flatten",
        ),
        (
            _with(case, x, norm=interleaved),
            "the channels of the heads are interleaved: flatten [B, N, H, D], not [B, N, D, H]",
        ),
        (_with(case, x, proj=nn.Identity()), "self.proj is left out: the heads are put together, and then mixed by it"),
    ]


def _scale_mistakes(case: Case, x: Tensor) -> list[Mistake]:
    scale = (case["dim"] // case["heads"]) ** -0.5
    no_norm = _with(case, x, q_norm=nn.Identity(), k_norm=nn.Identity())
    return [
        (_with(case, x, scale=1.0), "the scores are not scaled: multiply them by self.scale, which is D ** -0.5"),
        (_with(case, x, scale=scale**2), "the scores are scaled twice: self.scale is D ** -0.5 already"),
        (_with(case, x, scale=1 / scale), "the scores are divided by self.scale: it is D ** -0.5, so multiply"),
        (
            _with(case, x, scale=case["dim"] ** -0.5),
            "the scale is that of the whole width C; each head is D = C / H wide: self.scale",
        ),
        (no_norm, "self.q_norm and self.k_norm are left out: identities in most models, and not in this one"),
        (_with(case, x, norm=nn.Identity()), "self.norm is left out: it comes between the merged heads and self.proj"),
    ]


def _cut_mistakes(case: Case, x: Tensor) -> list[Mistake]:
    """Something else than the cut in the middle, the rest right."""
    module, records, qk = _library_module(case), [], []
    module.observers.append(lambda _module, record: records.append(record))
    for norm in (module.q_norm, module.k_norm):
        norm.register_forward_hook(lambda _module, _inputs, out: qk.append(out))  # type: ignore[arg-type]
    masks, tau = _masks(case), case["tau"]
    with torch.no_grad():
        module(x, **masks)
    p, allowed = records[0].probs, records[0].allowed
    scores = qk[0] @ qk[1].transpose(-1, -2) * module.scale
    mask = masks.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    r, hard = (p - tau).relu(), p * (p > tau)
    before = "the cut comes before the softmax: tau is subtracted from probabilities, so softmax first, then cut"
    middles = [
        (p, "nothing is cut: this is dense attention. Is self.tau used?"),
        (scores.sub(tau).relu().softmax(-1), before),
        (scores.masked_fill(scores <= tau, -torch.inf).softmax(-1), before),
        (scores.sub(tau).softmax(-1), before + " (and a softmax does not notice a constant)"),
        (thresholded_softmax(p, tau), "two softmaxes: thresholded_softmax takes the scores and does its own"),
        (r, "not renormalised: divide ReLU(p - tau) by its sum in each row"),
        (hard, "survivors keep their whole p, and rows do not sum to 1: it is ReLU(p - tau) over its sum"),
        (hard / hard.sum(-1, keepdim=True), "survivors keep their whole p: the formula subtracts tau, ReLU(p - tau)"),
        (
            thresholded_softmax(scores, tau, empty_rows="zero"),
            "a row that loses every key gets zeros: it keeps its plain softmax",
        ),
        (thresholded_softmax(scores, 0.01), "the cut is at 0.01, its default, whatever tau is: pass self.tau"),
    ]
    if allowed is not None:
        plain = (qk[0] @ qk[1].transpose(-1, -2) * module.scale).softmax(-1)
        late = thresholded_softmax(plain.log(), tau) * allowed
        middles.append((late, "the mask comes after the softmax: forbidden keys must be -inf in the scores, before it"))
        middles.append(
            (late / late.sum(-1, keepdim=True), "the mask comes after the softmax: put -inf into the scores")
        )
    found: list[Mistake] = []
    for weights, sentence in middles:
        heads = (weights @ records[0].v).transpose(1, 2).flatten(2)  # [B, N, H * D]
        instead = _After(_library_module(case).norm, partial(_constant, heads), first=True)
        found.append((_with(case, x, norm=instead), sentence))
    return found


def _mask_mistakes(case: Case, x: Tensor) -> list[Mistake]:
    masks = _masks(case)
    if not masks:
        return []
    if masks.get("is_causal"):
        upper = torch.ones(case["n"], case["n"], dtype=torch.bool).triu()
        return [
            (_with(case, x, {}), "is_causal is ignored: with it, query i may look at keys 0 to i only"),
            (
                _with(case, x, {"attn_mask": upper}),
                "is_causal the wrong way round: query i sees keys 0 to i, not i to N-1",
            ),
        ]
    mask = masks["attn_mask"]
    found: list[Mistake] = [(_with(case, x, {}), "attn_mask is ignored")]
    if mask.dtype == torch.bool:
        added, other = {"attn_mask": mask.double()}, {"attn_mask": ~mask}
        ones = "the boolean mask is added as ones and zeros: True means *may attend*; put -inf where it is False"
        found.append((_with(case, x, added), ones))
        found.append((_with(case, x, other), "the boolean mask is the wrong way round: True means *may attend*"))
    else:
        found.append((_with(case, x, {"attn_mask": mask > 0}), "the mask holds numbers: they are added to the scores"))
        found.append((_with(case, x, {"attn_mask": mask != 0}), "the mask holds numbers: they are added to the scores"))
    return found


def _judge_module(case: Case, seen: Seen) -> None:
    x = _tokens(case)
    unchanged(seen["x before"], seen["x"], "x")
    got, expected = array(seen, "out", "the output"), _with(case, x)
    if "draws" in case:
        _judge_draws(case, got, expected)
        return
    if got.shape == expected.shape and np.isnan(got).any():
        blind = case.get("mask") == "blind"
        raise Wrong(
            "NaN: a query whose keys are all forbidden is a softmax over -inf only. Such a query gives 0"
            if blind
            else "NaN: a row that loses every key is 0/0. Such a row keeps its plain softmax"
        )
    if not close(got, array(seen, "second", "the output")):
        raise Wrong(
            "two calls in eval mode differ: dropout is at work. Only where self.training: self.attn_drop does that"
        )
    if not close(got, expected):  # the mistakes take a while to try
        mistakes = _mask_mistakes(case, x) + _cut_mistakes(case, x) + _scale_mistakes(case, x)
        mistakes += _no_heads(case, x)
        compare(got, expected, "the output", mistakes + _merge_mistakes(case, x) + _layout_mistakes(case, x))
    module, leaf = _library_module(case), _tokens(case).requires_grad_()
    for key, of, right in zip(
        ("dx", "dw"), ("x", "qkv.weight"), _gradients(module(leaf, **_masks(case)), leaf, module)
    ):
        if seen.get(key) is None:
            raise Wrong(f"the output does not depend on {of}, as far as autograd can see: is there a detach()?")
        if not close(array(seen, key, f"the gradient of {of}"), right.detach().numpy()):  # type: ignore[union-attr]
            raise Wrong(f"the output is right and the gradient of {of} is not: is part of it detached, or in no_grad?")


def _judge_draws(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
    """Dropout, over many draws: there, and right in the mean."""
    if got.shape != expected.shape:
        raise Wrong(f"the output has shape {got.shape}, expected {expected.shape}")
    name = "attn_drop" if case["options"].get("attn_drop") else "proj_drop"
    spread = got.std(axis=0)
    if float(spread.max()) < 1e-9:
        raise Wrong(f"self.{name} drops nothing in training mode: it is left out")
    error = np.abs(got.mean(axis=0) - expected[0])
    if (error > 6 * spread / np.sqrt(len(got)) + 1e-9).any():
        raise Wrong(
            f"with {name} in training mode, the mean over {len(got)} draws is not the output without dropout (off by "
            f"{float(error.max()):.2f}): dropout comes last, on the renormalised weights. Before the cut, its factor "
            "lifts entries over tau"
        )


C1 = Question(
    name="c1",
    answers=("ThresholdedAttention",),
    cases=(
        {"what": "one image, two heads", "seed": 1, "b": 1, "n": 6, "dim": 8, "heads": 2, "tau": 0.15625},
        {
            "what": "a batch of two, three heads, in eval mode",
            "seed": 2,
            "b": 2,
            "n": 5,
            "dim": 12,
            "heads": 3,
            "tau": 0.09375,
            "options": {"qkv_bias": True, "attn_drop": 0.4},
        },
        {
            "what": "normalised queries and keys",
            "seed": 3,
            "b": 2,
            "n": 7,
            "dim": 12,
            "heads": 2,
            "tau": 0.125,
            "options": {"qk_norm": True},
        },
        {"what": "a boolean mask", "seed": 4, "b": 2, "n": 6, "dim": 8, "heads": 2, "tau": 0.15625, "mask": "boolean"},
        {
            "what": "a mask of numbers",
            "seed": 5,
            "b": 2,
            "n": 5,
            "dim": 8,
            "heads": 2,
            "tau": 0.125,
            "mask": "additive",
        },
    ),
    probe=_probe_module,
    judge=_judge_module,
    hints=(
        "timm's own, printed above, has two branches. In which of them do the weights exist in Python, so that they "
        "can be cut? Everything around the two stays as it is there.",
        "You need the scores in Python, so take the branch without scaled_dot_product_attention: scale, mask, then "
        "thresholded_softmax(scores, self.tau), then self.attn_drop, then times v.",
        "self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4) unbinds to q, k, v of [B, H, N, D]; norms on q "
        "and k; boolean mask: masked_fill(~mask, -inf), other: added; is_causal: a lower triangle of True (tril). "
        "After A @ v: transpose(1, 2), flatten(2), norm, proj, proj_drop.",
    ),
    section="chapter 2, sections 3, 4, 6 and 7",
)

# ------------------------------------------------------------------------------------------------ models


class _Stranger(Attention):
    """A subclass whose forward nobody has read."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


_KINDS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "ViT": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "normalised": (VisionTransformer, {"qk_norm": True}),
    "pooled": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "stranger": (VisionTransformer, {"attn_layer": _Stranger}),
}


def _vit(case: Case) -> nn.Module:
    """A tiny timm model with uneven attention, in float64 and eval mode, every attention fused as timm has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        if case["model"] == "Swin":
            window = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1,), "num_heads": (2,)}
            return SwinTransformer(**window, window_size=4, num_classes=5).eval()
        cls, options = _KINDS[case["model"]]
        size = {"img_size": tuple(case.get("pixels", (32, 32))), "patch_size": 8, "embed_dim": 24, "num_heads": 3}
        model = cls(**size, depth=case.get("depth", 2), num_classes=5, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.qkv.weight.mul_(case.get("gain", 10.0))
                module.fused_attn = True
    return model.double().eval()


def _pictures(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case["seed"] + 1000)
    return torch.randn(2, 3, *case.get("pixels", (32, 32)), generator=generator, dtype=torch.float64)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def _step(parameters: list[nn.Parameter], factor: float = 0.9) -> None:
    """What an optimiser does: change the parameters that it holds."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(factor)


def _cut_logits(case: Case, tau: float, *, step: bool = False, **layers: Any) -> np.ndarray:
    """The library's answer: the case's model, after a step or not, cut at tau."""
    model = _vit(case)
    if step:
        _step(list(model.parameters()))
    if tau:
        sparsify(model, tau, **layers)
    return np.asarray(_logits(model, _pictures(case)).numpy())


# ------------------------------------------------------------------------------------------------ c2: there and back


def _flags(model: nn.Module) -> list[int]:
    return [int(m.training) for m in model.modules()] + [int(p.requires_grad) for p in model.parameters()]


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def _probe_surgery(case: Case, convert: Any, restore: Any) -> Seen:
    model, x = _vit(case), _pictures(case)
    if "refused" in case:
        try:
            return {"names": convert(model, case["tau"])}
        except ValueError as error:
            return {"refusal": str(error)}
    seen: Seen = {"keys before": list(model.state_dict()), "dense": _logits(model, x)}
    held, calls = list(model.parameters()), []
    tensors, attentions = dict(model.named_parameters()), _attentions(model)
    held[-1].requires_grad_(False)
    if case.get("training"):
        model.train()
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda _module, _inputs, _out: calls.append(1))
    seen["flags before"] = _flags(model)
    seen["state before"] = [value.clone() for value in model.state_dict().values()]
    seen["names"] = convert(model, case["tau"])
    seen["keys"] = list(model.state_dict())
    seen["state"] = [value.clone() for value in model.state_dict().values()]
    seen["flags"] = _flags(model)
    # Only a better message hangs on these two: what a hook and a training step show is judged below.
    modules = dict(model.named_modules())
    seen["replaced"] = [name for name, was in attentions.items() if modules.get(name) is not was]
    seen["copied"] = [name for name, now in model.named_parameters() if tensors.get(name) is not now]
    if "other" in case:  # another model, cut at another tau in the meantime
        convert(_vit(case), case["other"])
    try:
        seen["cut"] = _logits(model, x)
    except NotImplementedError as error:
        text = "the forward of ThresholdedAttention, c1, is not written yet: convert can only be tried with it"
        raise Wrong(text) from error
    except Exception as error:  # judged after what came before it
        return {**seen, "failed": in_words(error, ("convert", "restore"))}
    seen["calls"] = len(calls)
    try:
        restore(model)
        seen["keys restored"], seen["restored"] = list(model.state_dict()), _logits(model, x)
        convert(model, case["tau"])
        seen["names again"] = convert(model, case["again"])
        seen["again"] = _logits(model, x)
    except NotImplementedError:
        raise
    except Exception as error:  # judged after what came before it
        return {**seen, "stopped": in_words(error, ("convert", "restore"))}
    _step(held)
    seen["stepped"] = _logits(model, x)
    seen["state stepped"] = list(model.state_dict().values())
    return seen


def _judge_refusal(case: Case, seen: Seen) -> None:
    if "refusal" not in seen:
        got = seen.get("names")
        if case["model"] == "stranger" and got:
            raise Wrong(
                "it converts a subclass of Attention that has a forward of its own: ask type(module) is Attention"
            )
        raise Wrong(f"no attention that can be converted, and it returns {got!r}: raise ValueError")
    if case["refused"] not in seen["refusal"]:
        raise Wrong(f"the ValueError says {seen['refusal']!r}: name the model's class, type(model).__name__")


def _judge_names(got: Any, expected: list[str], what: str) -> None:
    if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
        raise Wrong(f"{what} should return the list of the names of the converted modules, and returns {got!r}")
    if got == expected:
        return
    if not got:
        raise Wrong(f"{what} returns no names; converted should be {', '.join(expected)}")
    raise Wrong(f"{what} names {', '.join(got)}; it should name {', '.join(expected)}, as model.named_modules() does")


def _judge_surgery(case: Case, seen: Seen) -> None:
    if "refused" in case:
        _judge_refusal(case, seen)
        return
    model = _vit(case)
    names = list(sparsify(model, case["tau"]).converted)
    before: list[str] = seen["keys before"]
    restored_keys: list[str] = seen.get("keys restored", before)
    for keys, when in ((seen["keys"], "convert"), (restored_keys, "restore")):
        if keys != before:
            odd = next((k for k in keys if k not in before), None) or next(k for k in before if k not in keys)
            raise Wrong(
                f"{when} changes the keys of the state_dict ({odd}): weights of the dense model would no longer load. "
                "Do not wrap the module: give it another class"
            )
    if seen["replaced"]:
        same = all(np.array_equal(was, now) for was, now in zip(seen["state before"], seen["state"]))
        raise Wrong(
            f"after convert {seen['replaced'][0]} is another object than before: a new module has taken its place, "
            + ("with copies of the weights" if same else "with other weights")
            + ". A new module begins with random weights, in float32, and without the hooks; nothing has to be built. "
            "Change the one that is there: module.__class__ = ThresholdedAttention"
        )
    for key, was, now in zip(before, seen["state before"], seen["state"]):
        if not np.array_equal(was, now):
            raise Wrong(
                f"{key} has other numbers after convert: a new module begins with random weights. Change the class of "
                "the module that is there"
            )
    if seen["copied"]:
        raise Wrong(
            f"{seen['copied'][0]} is another tensor than before convert: it holds copies. An optimiser made before "
            "would train tensors that nobody uses"
        )
    if "failed" in seen:
        raise Wrong(f"the converted model: {seen['failed']}")
    dense, tau = seen["dense"], case["tau"]
    cut, again = _cut_logits(case, tau), _cut_logits(case, case["again"])
    got = array(seen, "cut", "the output of the converted model")
    if seen["calls"] == 0:
        raise Wrong(
            "a forward hook that was on the attention is not called any more: another object has taken its place. "
            "Change the module, module.__class__ = ThresholdedAttention, not the model around it"
        )
    mistakes: list[Mistake] = [
        (dense, "after convert the model gives the dense output: is the class of its modules changed?"),
        (
            _cut_logits(case, tau, layers=[-1]),
            "only the last block is cut: every Attention in model.modules() should be",
        ),
        (_cut_logits(case, tau, layers=[0]), "only the first block is cut: is there a return or a break in the loop?"),
        (_cut_logits(case, 0.01), "cut at 0.01, whatever tau is: set module.tau = tau"),
    ]
    if "other" in case:
        other = (
            "converting a second model at another tau changes the first: tau must be each module's own, not the class's"
        )
        mistakes.append((_cut_logits(case, case["other"]), other))
    compare(got, cut, "the output of the converted model (if c1 holds)", mistakes)
    if seen["flags"] != seen["flags before"]:
        count = len(list(model.modules()))
        kind = "training mode" if seen["flags"][:count] != seen["flags before"][:count] else "requires_grad"
        raise Wrong(f"convert changes the {kind} of some modules: leave it as it was")
    _judge_names(seen["names"], names, "convert")
    if "restored" not in seen:
        raise Wrong(f"restore, after convert: {seen['stopped']}")
    restored = array(seen, "restored", "the output after restore")
    if not np.array_equal(restored, dense):
        if close(restored, dense):
            raise Wrong(
                "after restore the output is the dense one to rounding, not bit for bit: is the cut still there at "
                "tau = 0? Give the module its own class back"
            )
        compare(restored, dense, "the output after restore", [(cut, "after restore the model is still cut")])
        raise Wrong("after restore the output is not the dense one bit for bit")
    if "stopped" in seen:
        twice = "convert, restore and convert twice, the second time at another tau"
        raise Wrong(f"{twice}: {seen['stopped']}. Modules that are converted already count: they get the new tau")
    _judge_names(seen["names again"], names, "a second call of convert, at another tau,")
    compare(
        array(seen, "again", "the output"),
        again,
        "the output after a second convert at another tau",
        [
            (
                cut,
                "a second call of convert, at another tau, changes nothing: modules that are converted get the new tau",
            )
        ],
    )
    for key, was, now in zip(before, seen["state before"], seen["state stepped"]):
        if not close(now, 0.9 * was):
            raise Wrong(
                f"a training step on the parameters from before convert does not reach {key}: it holds copies. An "
                "optimiser would train tensors that nobody uses"
            )
    compare(
        array(seen, "stepped", "the output"),
        _cut_logits(case, case["again"], step=True),
        "the output after a training step",
    )


C2 = Question(
    name="c2",
    answers=("convert", "restore"),
    cases=(
        {"what": "a ViT of three blocks", "model": "ViT", "depth": 3, "seed": 1, "tau": 0.09375, "again": 0.15625},
        {"what": "a ViT with registers", "model": "registers", "seed": 2, "tau": 0.0625,
         "again": 0.09375},
        {"what": "a Swin, whose attention is of another class", "model": "Swin", "seed": 3, "tau": 0.0625,
         "refused": "SwinTransformer"},
    ),
    probe=_probe_surgery,
    judge=_judge_surgery,
    hints=(
        "Nothing has to be built or copied. A Python object finds its forward through its class.",
        "Walk through model.named_modules(). Where type(module) is Attention: module.__class__ = ThresholdedAttention, "
        "module.tau = tau, and note the name. restore is the same walk with the other class.",
        "Take modules of both classes in convert, so that a second call sets the new tau. No name at the end: "
        "raise ValueError(f'{type(model).__name__} has no ...'). In restore, `del module.tau` as well.",
    ),
    section="chapter 2, section 8",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ c3: for a while


class _Trouble(RuntimeError):
    """Something goes wrong in the block."""


class _Stopped(KeyboardInterrupt):
    """Somebody presses Ctrl-C."""


_RAISED: dict[str, type[BaseException]] = {"an error": _Trouble, "an interrupt": _Stopped}


_NO_MANAGER = re.compile(r"is not an iterator|context manager protocol|__enter__|generator didn't (?:yield|stop)")


def _probe_while(case: Case, cut_for_a_while: Any) -> Seen:
    try:
        return _run_blocks(case, cut_for_a_while)
    except (TypeError, AttributeError, RuntimeError) as error:
        if not _NO_MANAGER.search(str(error)):
            raise
        raise Wrong(
            f"this is no context manager ({type(error).__name__}: {error}): `yield` the names once, where the block "
            "runs, in place of `return`, and keep `@contextmanager` above the function"
        ) from error


def _run_blocks(case: Case, cut_for_a_while: Any) -> Seen:
    model, x, body = _vit(case), _pictures(case), case["body"]
    seen: Seen = {"before": _logits(model, x), "came out": "nothing"}
    held = list(model.parameters())

    def enter(tau: float) -> AbstractContextManager[Any]:
        return cut_for_a_while(model, tau)  # type: ignore[no-any-return]

    with enter(case["outer"]) if "outer" in case else torch.no_grad():
        try:
            with enter(case["tau"]) as names:
                seen["names"], seen["inside"] = names, _logits(model, x)
                if body == "step":
                    _step(held)
                if body in _RAISED:
                    raise _RAISED[body]("something goes wrong in the block")
        except (_Trouble, _Stopped) as error:
            seen["came out"] = type(error).__name__
        seen["after inner"] = _logits(model, x)
    seen["after"], seen["keys"] = _logits(model, x), list(model.state_dict())
    return seen


def _judge_while(case: Case, seen: Seen) -> None:
    model, body = _vit(case), case["body"]
    keys = list(model.state_dict())
    dense, cut = _cut_logits(case, 0.0), _cut_logits(case, case["tau"])
    still_dense = "inside the block the model is still dense: convert before the yield"
    compare(array(seen, "inside", "the output inside"), cut, "the output inside the block", [(dense, still_dense)])
    _judge_names(
        seen["names"], list(sparsify(model, case["tau"]).converted), "`as` in `with cut_for_a_while(...) as names`"
    )
    raised = _RAISED[body].__name__ if body in _RAISED else "nothing"
    if seen["came out"] != raised:
        raise Wrong(
            "an exception in the block never comes out of it: restore, and let it pass (try/finally, no except)"
        )
    if seen["keys"] != keys:
        raise Wrong("after the block the state_dict has other keys")
    after = array(seen, "after", "the output after the block")
    if "outer" in case:
        inner = array(seen, "after inner", "the output after the inner block")
        outer = _cut_logits(case, case["outer"])
        own = f"after the inner block (tau = {case['tau']}) the outer tau = {case['outer']} should be back"
        compare(
            inner,
            outer,
            "the output after the inner block",
            [
                (cut, f"{own}, and the inner one is still there"),
                (dense, f"{own}, and the model is dense: note at entry which modules were cut, and at what tau"),
            ],
        )
    if body == "step":
        expected = _cut_logits(case, 0.0, step=True)
        sentence = "a training step inside the block is undone: put back the class, not the weights"
        compare(
            after,
            expected,
            "the output after the block",
            [(dense, sentence), (_cut_logits(case, case["tau"], step=True), "after the block the model is still cut")],
        )
        return
    if not np.array_equal(after, seen["before"]):
        if close(after, seen["before"]):
            raise Wrong("after the block the output is the dense one to rounding, not bit for bit: use restore")
        if close(after, cut):
            when = f"after {body} in the block" if body in _RAISED else "after the block"
            kind = " (an interrupt is no Exception: finally catches it, `except Exception` does not)"
            raise Wrong(
                f"{when} the model is still cut: restore in `finally`, which runs however the block ends"
                + (kind if body == "an interrupt" else "")
            )
        compare(after, seen["before"], "the output after the block")
        raise Wrong("the output after the block is not that from before, bit for bit")


C3 = Question(
    name="c3",
    answers=("cut_for_a_while",),
    cases=(
        {"what": "a block that ends well", "model": "ViT", "seed": 1, "tau": 0.09375, "body": "nothing"},
        {"what": "a block that ends in an error", "model": "ViT", "seed": 2, "tau": 0.09375, "body": "an error"},
    ),
    probe=_probe_while,
    judge=_judge_while,
    hints=(
        "A function with @contextmanager and one yield: what stands before the yield runs at entry, what stands after "
        "it at the end of the block.",
        "An exception in the block comes up at the yield. Only what is in `finally` runs then: try: yield names, "
        "finally: restore(model).",
        "For nested blocks note {module: module.tau} of the modules that are cut already, before convert. In finally: "
        "restore(model), and then give these their class and their tau back.",
    ),
    section="chapter 2, section 8",
)

# ------------------------------------------------------------------------------------------------ c4: the map

_NOTHING_SEEN = re.compile(
    r"list index out of range|non-empty|NoneType|not associated with a value|referenced before|pop from|KeyError|"
    r"at least one|StopIteration|is not defined|has no attribute"
)


def _state(model: nn.Module) -> list[int]:
    return [int(getattr(m, "fused_attn", False)) for m in model.modules()] + [int(m.training) for m in model.modules()]


def _probe_map(case: Case, class_attention_on_grid: Any) -> Seen:
    model, x = _vit(case), _pictures(case)
    before, dense = _state(model), _logits(model, x)
    try:
        result = class_attention_on_grid(model, x)
    except NotImplementedError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if _NOTHING_SEEN.search(text):
            return {"stopped": text}
        return {"failed": text, "words": in_words(error, ("class_attention_on_grid",))}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {"map": result, "before": before, "state": _state(model), "hooks": hooks, "dense": dense,
            "after": _logits(model, x)}  # fmt: skip


def _weights(case: Case, layer: int = -1, **changes: Any) -> np.ndarray:
    """The softmax [B, H, N, N] that the library sees in a layer, with something in the last block changed."""
    model = _vit(case)
    last = model.blocks[-1]  # type: ignore[index]
    for name, value in changes.items():
        setattr(last if hasattr(last, name) else last.attn, name, value)
    sparsify(model, 0.0, layers=[layer])
    records: list[Any] = []
    for module in sparse_modules(model).values():
        module.observers.append(lambda _module, record: records.append(record))
    _logits(model, _pictures(case))
    return np.asarray(records[0].probs.numpy())


def _after_last(case: Case) -> list[np.ndarray]:
    """The softmax [B, H, N, N] of the last attention if it got tokens that have been through its block already."""
    model, x, tokens = _vit(case), _pictures(case), []
    sparsify(model, 0.0, layers=[-1])
    last = model.blocks[-1]  # type: ignore[index]
    handle = last.register_forward_hook(lambda _module, _inputs, out: tokens.append(out))
    with torch.no_grad():
        tokens.append(model.forward_features(x))  # type: ignore[operator]
        handle.remove()
        records: list[Any] = []
        last.attn.observers.append(lambda _module, record: records.append(record))  # type: ignore[union-attr]
        for entering in (*tokens, *map(last.norm1, tokens)):  # type: ignore[arg-type]
            last.attn(entering)  # type: ignore[operator]
    return [np.asarray(record.probs.numpy()) for record in records]


def _why_no_grid(seen: Seen, p: int, patches: int) -> str:
    """Sizes in an error's text tell a row that still holds prefix tokens from a shape that is written down."""
    sizes = {int(number) for number in re.findall(r"\d+", seen["failed"])}
    among = (1, 2, 3, 6)  # a row of one image and head, of B = 2, of H = 3, of both
    if sizes & {times * (patches + p) for times in among}:
        tokens = "1 prefix token is" if p == 1 else f"{p} prefix tokens are"
        return (
            f"the prefix tokens are still in ({seen['failed']}): of the N = {patches + p} keys {tokens} no patch, and "
            f"the grid has {patches} places. Leave out the first model.num_prefix_tokens keys"
        )
    if p > 1 and sizes & {times * (patches + p - 1) for times in among}:
        return f"only one prefix token is left out ({seen['failed']}); this model has {p}: num_prefix_tokens"
    return str(seen["words"])


def _judge_map(case: Case, seen: Seen) -> None:
    fused = (
        "timm's attention is fused: the weights never exist, attn_drop is never called, and a hook on it never fires. "
        "Set fused_attn = False on that module for the length of the call, or compute the weights from the tokens that "
        "enter it"
    )
    if "stopped" in seen:
        raise Wrong(f"it stops with {seen['stopped']}. Was nothing recorded? {fused}")
    p = {"distilled": 2, "registers": 5}.get(case["model"], 1)
    h, w = (pixels // 8 for pixels in case.get("pixels", (32, 32)))
    if "failed" in seen:
        raise Wrong(_why_no_grid(seen, p, h * w))
    value = seen["map"]
    if value is None:
        raise Wrong(f"the map is None: does the function end without `return`? Or was nothing recorded? {fused}")
    if isinstance(value, list) and not value:
        raise Wrong(f"it returns []: nothing was recorded. {fused}")
    got, full = array(seen, "map", "the map"), _weights(case)
    row = full[:, :, 0]  # [B, H, N]

    def lay(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(*rows.shape[:-1], h, w)

    expected = lay(row[..., p:])
    none, without = nn.Identity(), "this is not the softmax of the scaled scores"
    first = "first key is no patch" if p == 1 else f"first {p} keys are no patches"
    left_in = f"a prefix token is left in the map: the {first}"
    mistakes: list[Mistake] = [
        (row, left_in + ". Leave them out, then lay the rest out on the grid"),
        (lay(row[..., : h * w]), left_in + ", and everything is shifted"),
        (lay(row[..., 1 : 1 + h * w]), f"only one prefix token is left out; this model has {p}: num_prefix_tokens"),
        (row[..., p:], "the patches are still in a row: lay them out on patch_embed.grid_size"),
        (expected.mean(axis=1), "averaged over the heads: the question asks for [B, H, h, w], each head on its own"),
        (expected / expected.sum(axis=(-1, -2), keepdims=True), "divided by the sum: leave the weights as they are, "
         "what goes to the prefix tokens is missing in the map"),
        (row[..., p:].reshape(*row.shape[:2], w, h), f"the grid is h x w = {h} x {w}, and the map {w} x {h}"),
        (row[..., p:].reshape(*row.shape[:2], w, h).swapaxes(-1, -2), "the patches lie row by row: reshape to (h, w), "
         "without a transpose"),
        (lay(full[:, :, p:, 0]), "this is how much each patch looks at the class token: take the class token's *row*, "
         "weights[:, :, 0]"),
        (lay(full[:, :, p - 1, p:]), f"the query is token {p - 1}; the class token is token 0"),
        (lay(full[:, :, :p, p:].mean(axis=2)), "averaged over the prefix tokens: the class token is token 0"),
        (lay(full[:, :, p, p:]), "the query is the first patch; the class token is token 0"),
        (lay(full.mean(axis=2)[..., p:]), "averaged over all queries: only the class token's row is asked for"),
        (lay(_weights(case, 0)[:, :, 0, p:]), "this is the first block: take the last"),
        (lay(_weights(case, scale=1.0)[:, :, 0, p:]), without + ": self.scale is forgotten"),
        (lay(_weights(case, q_norm=none, k_norm=none)[:, :, 0, p:]), without + ": q_norm and k_norm are left out"),
        (lay(_weights(case, norm1=none)[:, :, 0, p:]), "the tokens are those that enter the block; the attention gets "
         "them after norm1"),
        *((lay(after[:, :, 0, p:]), "the tokens are those *after* the last block, as forward_features gives them: the "
           "last attention gets those that enter its block, after norm1") for after in _after_last(case)),
    ]  # fmt: skip
    compare(got, expected, "the map", mistakes)
    if seen["hooks"]:
        raise Wrong(f"{seen['hooks']} hook(s) are still on the model afterwards: handle.remove(), in `finally`")
    if seen["state"] != seen["before"]:
        raise Wrong("fused_attn or the training mode of a module is changed afterwards: put back what you change")
    unchanged(seen["dense"], seen["after"], "model")


C4 = Question(
    name="c4",
    answers=("class_attention_on_grid",),
    cases=(
        {"what": "a grid of 4 x 4", "model": "ViT", "seed": 1},
        {"what": "a wide picture, 4 x 6 patches", "model": "ViT", "seed": 2, "pixels": [32, 48]},
    ),
    probe=_probe_map,
    judge=_judge_map,
    hints=(
        "The weights have to come into being first: either unfuse the last block's attention for one call, or compute "
        "them yourself from what enters it.",
        "A forward *pre*-hook on model.blocks[-1].attn gets the tokens [B, N, C]. From there: qkv, q_norm and k_norm, "
        "scale, softmax. The class token is query 0.",
        "weights[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size). Remove the hook in "
        "`finally`.",
    ),
    section="chapter 2, sections 6 and 10, and chapter 5, the section on tokens and the grid",
)

QUESTIONS = (C1, C2, C3, C4)
