"""c1: timm's Attention with another forward.

A mistake is put into the library's module by exchanging one of its layers; the rest stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from svit_course.judging import Mistake, array, close, compare, no_nan, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils import SparseAttention, thresholded_softmax

# ------------------------------------------------------------------------------------------------ inputs


def fill(module: nn.Module, seed: int, gain: float) -> None:
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


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of the module."""
    found = dict(case.get("options", {}))
    if found.get("qk_norm") or found.get("scale_norm"):
        found["norm_layer"] = nn.LayerNorm
    return found


def timm_module(case: Case) -> Attention:
    """timm's Attention of the case, in eval mode unless the case says ``training``."""
    with torch.random.fork_rng(devices=[]):
        module = Attention(case["dim"], case["heads"], **options(case))
    fill(module, case["seed"], case.get("gain", 2.0))
    return module.train(case.get("training", False))


def library_module(case: Case) -> SparseAttention:
    """The same weights in the library's module, in eval mode."""
    module = SparseAttention(case["dim"], case["heads"], threshold=case["tau"], **options(case)).double().eval()
    module.load_state_dict(timm_module(case).state_dict())
    return module


def tokens(case: Case) -> Tensor:
    """[B, N, C]; with ``draws`` one picture's tokens, repeated so often."""
    generator = torch.Generator().manual_seed(case["seed"] + 1000)
    drawn = torch.randn(case["b"], case["n"], case["dim"], generator=generator, dtype=torch.float64)
    return drawn[:1].repeat(case["draws"], 1, 1) if "draws" in case else drawn


def masks(case: Case) -> dict[str, Any]:
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


def probe(case: Case, thresholded_attention: Any) -> Seen:
    """Output, tokens, gradients, and a second call, of a timm module that was given the student's class."""
    module, x = timm_module(case), tokens(case).requires_grad_()
    before = x.detach().clone()
    module.__class__ = thresholded_attention
    module.tau = case["tau"]  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        out = module(x, **masks(case))
    seen: Seen = {"out": out, "x": x, "x before": before}
    if "draws" not in case and isinstance(out, Tensor):
        seen["second"] = module(x, **masks(case))
        seen["dx"], seen["dw"] = gradients(out, x, module)
    return seen


def gradients(out: Tensor, x: Tensor, module: nn.Module) -> tuple[Tensor | None, ...]:
    """Of the tokens and of the weights of the qkv projection."""
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    weight = module.qkv.weight  # type: ignore[union-attr]
    return torch.autograd.grad((out * direction).sum(), (x, weight), allow_unused=True)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ mistakes


class Around(nn.Module):
    """A layer with a function of tokens before and after it."""

    def __init__(self, layer: nn.Module, *, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x) if self.before else x)
        return self.after(y) if self.after else y


def output(case: Case, called_with: dict[str, Any] | None = None, **layers: Any) -> np.ndarray:
    """What the library's module gives with some of its layers exchanged, or called with other masks."""
    module = library_module(case)
    for name, layer in layers.items():
        setattr(module, name, layer)
    with torch.no_grad():
        return np.asarray(module(tokens(case), **(masks(case) if called_with is None else called_with)).numpy())


def mask_mistakes(case: Case) -> Iterator[Mistake]:
    """The mask is ignored, or read in another way."""
    given = masks(case)
    if given.get("is_causal"):
        ones = torch.ones(case["n"], case["n"], dtype=torch.bool)
        itself = (
            "is_causal: query i may look at key i itself, too; what you forbid holds the diagonal: triu(1), not triu()"
        )
        yield output(case, {"attn_mask": ones.tril(-1)}), itself
        wide = "is_causal: query i sees key i + 1: what you allow is one diagonal too wide, tril() will do"
        yield output(case, {"attn_mask": ones.tril(1)}), wide
        upper = {"attn_mask": ones.triu()}
        yield output(case, {}), "is_causal is ignored: with it, query i may look at keys 0 to i only"
        yield output(case, upper), "is_causal the wrong way round: query i sees keys 0 to i, not i to N-1"
    elif given:
        mask = given["attn_mask"]
        yield output(case, {}), "attn_mask is ignored"
        if mask.dtype == torch.bool:
            ones = "the boolean mask is added as ones and zeros: True means *may attend*; put -inf where it is False"
            yield output(case, {"attn_mask": mask.double()}), ones
            other = "the boolean mask is the wrong way round: True means *may attend*"
            yield output(case, {"attn_mask": ~mask}), other
        else:
            numbers = "the mask holds numbers: they are added to the scores"
            yield output(case, {"attn_mask": mask > 0}), numbers
            yield output(case, {"attn_mask": mask != 0}), numbers


def cut_mistakes(case: Case) -> Iterator[Mistake]:
    """Other weights than the cut ones, everything around them right."""
    module, records, qk = library_module(case), [], []
    module.observers.append(lambda _module, record: records.append(record))
    for norm in (module.q_norm, module.k_norm):
        norm.register_forward_hook(lambda _module, _inputs, out: qk.append(out))  # type: ignore[arg-type]
    with torch.no_grad():
        module(tokens(case), **masks(case))
    (record,) = records
    unmasked = qk[0] @ qk[1].transpose(-1, -2) * module.scale
    for weights, sentence in weight_mistakes(case, record, unmasked):
        heads = (weights @ record.v).transpose(1, 2).flatten(2)  # [B, N, H * D]
        instead = Around(library_module(case).norm, before=lambda _, heads=heads: heads)
        yield output(case, norm=instead), sentence


def weight_mistakes(case: Case, record: Any, unmasked: Tensor) -> Iterator[tuple[Tensor, str]]:
    """
    Args:
        record: what the library's module shows: the right ``probs`` and the keys ``allowed``, or None.
        unmasked: scores [B, H, N, M] before the mask.
    """
    p, allowed, tau = record.probs, record.allowed, case["tau"]
    scores, mask = unmasked, masks(case).get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    r, hard = (p - tau).relu(), p * (p > tau)
    yield p, "nothing is cut: this is dense attention. Is self.tau used?"
    before = "the cut comes before the softmax: tau is subtracted from probabilities, so softmax first, then cut"
    yield scores.sub(tau).relu().softmax(-1), before
    yield scores.masked_fill(scores <= tau, -torch.inf).softmax(-1), before
    yield scores.sub(tau).softmax(-1), before + " (and a softmax does not notice a constant)"
    yield thresholded_softmax(p, tau), "two softmaxes: thresholded_softmax takes the scores and does its own"
    yield r, "not renormalised: divide ReLU(p - tau) by its sum in each row"
    yield hard, "survivors keep their whole p, and rows do not sum to 1: it is ReLU(p - tau) over its sum"
    whole = "survivors keep their whole p: the formula subtracts tau, ReLU(p - tau)"
    yield hard / hard.sum(-1, keepdim=True), whole
    zero = "a row that loses every key gets zeros: it keeps its plain softmax"
    yield thresholded_softmax(scores, tau, empty_rows="zero"), zero
    yield thresholded_softmax(scores, 0.01), "the cut is at 0.01, its default, whatever tau is: pass self.tau"
    if allowed is not None:
        late = thresholded_softmax(unmasked.softmax(-1).log(), tau) * allowed
        yield late, "the mask comes after the softmax: forbidden keys must be -inf in the scores, before it"
        yield late / late.sum(-1, keepdim=True), "the mask comes after the softmax: put -inf into the scores"


def scale_mistakes(case: Case) -> Iterator[Mistake]:
    """Another scale, or norms left out."""
    scale, none = (case["dim"] // case["heads"]) ** -0.5, nn.Identity()
    yield output(case, scale=1.0), "the scores are not scaled: multiply them by self.scale, which is D ** -0.5"
    yield output(case, scale=scale**2), "the scores are scaled twice: self.scale is D ** -0.5 already"
    yield output(case, scale=1 / scale), "the scores are divided by self.scale: it is D ** -0.5, so multiply"
    width = "the scale is that of the whole width C; each head is D = C / H wide: self.scale"
    yield output(case, scale=case["dim"] ** -0.5), width
    qk = "self.q_norm and self.k_norm are left out: identities in most models, and not in this one"
    yield output(case, q_norm=none, k_norm=none), qk
    yield output(case, norm=none), "self.norm is left out: it comes between the merged heads and self.proj"


def head_mistakes(case: Case) -> Iterator[Mistake]:
    """One head as wide as the token."""
    if case.get("options", {}).get("qk_norm"):
        return  # norms of single heads would not fit it
    one = (
        "there is one head only, as wide as the token: split q, k and v into self.num_heads heads of D = C / H "
        "channels, [B, H, N, D], and let each head have its own weights"
    )
    for width in (case["dim"] // case["heads"], case["dim"]):
        yield output({**case, "heads": 1}, scale=width**-0.5), one


def merge_mistakes(case: Case) -> Iterator[Mistake]:
    """The heads put together in another way."""
    b, n, h = case["b"], case["n"], case["heads"]

    def merged(function: Callable[[Tensor], Tensor]) -> np.ndarray:
        return output(case, norm=Around(library_module(case).norm, before=function))

    yield (
        merged(lambda y: y.reshape(b, n, h, -1).transpose(1, 2).reshape(b, n, -1)),
        "heads and tokens are swapped when the heads are put together: transpose [B, H, N, D] to [B, N, H, D] before "
        "you flatten",
    )
    yield (
        merged(lambda y: y.reshape(b, n, h, -1).transpose(2, 3).flatten(2)),
        "the channels of the heads are interleaved: flatten [B, N, H, D], not [B, N, D, H]",
    )
    left_out = "self.proj is left out: the heads are put together, and then mixed by it"
    yield output(case, proj=nn.Identity()), left_out


def split_mistakes(case: Case) -> Iterator[Mistake]:
    """The projections read in another order than they are laid out."""
    b, n, h = case["b"], case["n"], case["heads"]
    d = case["dim"] // h

    def read(function: Callable[[Tensor], Tensor]) -> np.ndarray:
        return output(case, qkv=Around(library_module(case).qkv, after=function))

    def in_order(order: str) -> np.ndarray:
        return read(lambda y: y.unflatten(-1, (3, -1))[:, :, ["qkv".index(c) for c in order]].flatten(2))

    names = "the projection holds q, k and v one after the other: the last axis unflattens to (3, H, D)"
    for order in ("qvk", "kqv", "kvq", "vqk", "vkq"):
        yield in_order(order), f"q, k and v are mixed up (the results come as {order}): {names}, in this order"
    heads_first = read(lambda y: y.unflatten(-1, (h, 3, d)).transpose(2, 3).flatten(2))
    yield heads_first, f"(H, 3, D) instead of (3, H, D): {names}"
    channels_first = read(lambda y: y.unflatten(-1, (3, d, h)).transpose(3, 4).flatten(2))
    yield channels_first, f"heads and channels are swapped in the split: {names}"

    def swapped(y: Tensor) -> Tensor:
        return y.unflatten(-1, (3, -1)).movedim(2, 0).reshape(3, b, h, n, d).permute(1, 3, 0, 2, 4).flatten(2)

    heads = "heads and tokens are swapped in the split: [B, N, H*D] read as [B, H, N, D]. Unflatten the last axis, "
    yield read(swapped), heads + "then transpose"
    order = (
        "the axes of qkv(x) are cut up in another order than they lie in memory: B and N come first and stay, the last "
        "axis unflattens to (3, H, D), and then you permute"
    )
    yield read(lambda y: y.reshape(b, h, n, 3, d).permute(0, 2, 3, 1, 4).flatten(2)), order
    yield read(lambda y: y.reshape(b, 3, h, n, d).permute(0, 3, 1, 2, 4).flatten(2)), order
    yield read(lambda y: y.reshape(3, b, n, h, d).permute(1, 2, 0, 3, 4).flatten(2)), order
    yield read(lambda y: y.reshape(3, b, h, n, d).permute(1, 3, 0, 2, 4).flatten(2)), order


# The likeliest first.
MISTAKES = (mask_mistakes, cut_mistakes, scale_mistakes, head_mistakes, merge_mistakes, split_mistakes)

# ------------------------------------------------------------------------------------------------ judge


def judge(case: Case, seen: Seen) -> None:
    """The tokens are left alone; with many ``draws`` dropout is judged, else output and gradients."""
    unchanged(seen["x before"], seen["x"], "x")
    got, expected = array(seen, "out", "the output"), output(case)
    if "draws" in case:
        judge_draws(case, got, expected)
        return
    blind = "NaN: a query whose keys are all forbidden is a softmax over -inf only. Such a query gives 0"
    empty = "NaN: a row that loses every key is 0/0. Such a row keeps its plain softmax"
    no_nan(got, expected, blind if case.get("mask") in ("blind", "causal") else empty)
    if not close(got, array(seen, "second", "the output")):
        raise Wrong(
            "two calls in eval mode differ: dropout is at work. Only where self.training: self.attn_drop does that"
        )
    compare(got, expected, "the output", chain.from_iterable(look(case) for look in MISTAKES))
    module, leaf = library_module(case), tokens(case).requires_grad_()
    right = gradients(module(leaf, **masks(case)), leaf, module)
    for key, of, gradient in zip(("dx", "dw"), ("x", "qkv.weight"), right):
        if seen.get(key) is None:
            raise Wrong(f"the output does not depend on {of}, as far as autograd can see: is there a detach()?")
        if not close(array(seen, key, f"the gradient of {of}"), gradient.detach().numpy()):  # type: ignore[union-attr]
            raise Wrong(f"the output is right and the gradient of {of} is not: is part of it detached, or in no_grad?")


def judge_draws(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
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


SMALL = {"b": 2, "n": 5, "dim": 8, "heads": 2, "tau": 0.15625}
DROPPING = {**SMALL, "b": 1, "gain": 2.0, "training": True, "draws": 4000}

QUESTION = Question(
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
        {**SMALL, "what": "is_causal", "seed": 6, "mask": "causal"},
        {**SMALL, "what": "a query that may look at nothing", "seed": 7, "mask": "blind"},
        {**SMALL, "what": "a norm before the projection", "seed": 8, "options": {"scale_norm": True}},
        {**DROPPING, "what": "dropout in training mode", "seed": 9, "options": {"attn_drop": 0.4}},
        {**DROPPING, "what": "dropout after the projection", "seed": 10, "options": {"proj_drop": 0.5}},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "timm's own, printed above, has two branches. In which of them do the weights exist in Python, so that they "
        "can be cut? Everything around the two stays as it is there.",
        "You need the scores in Python, so take the branch without scaled_dot_product_attention: scale, mask, then "
        "thresholded_softmax(scores, self.tau), then self.attn_drop, then times v.",
        "self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4) unbinds to q, k, v of [B, H, N, D]; norms on q "
        "and k; boolean mask: masked_fill(~mask, -inf), other: added; is_causal: a lower triangle of True (tril). "
        "After A @ v: transpose(1, 2), flatten(2), norm, proj, proj_drop.",
    ),
    section="chapter 2, sections 2.3, 2.4, 2.6 and 2.7",
)
