"""e2: Grad-CAM on tokens: tap features and gradient before the last attention, and make a map of them.

A case with a ``depth`` runs both functions on a small model; the others hand token_grad_cam its two tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from svit_course.judging import Mistake, array, close, compare, no_nan, untouched
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.explain import grad_cam

WIDTH = 12  # channels of the small model

# ------------------------------------------------------------------------------------------------ inputs


def draw_model(case: Case) -> tuple[VisionTransformer, Tensor, Tensor]:
    """A small model with weights drawn from the seed, pictures [B, 3, H, W] and a class for each."""
    height, width = case["grid"]
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(
            img_size=(4 * height, 4 * width),
            patch_size=4,
            embed_dim=WIDTH,
            depth=case["depth"],
            num_heads=2,
            num_classes=3,
            reg_tokens=case["prefix"] - 1,
        )
    generator = torch.Generator().manual_seed(case["seed"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(len(case["targets"]), 3, 4 * height, 4 * width, generator=generator)
    return model.eval(), x, torch.tensor(case["targets"])


def draw_tokens(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Features and gradient, float32 [B, N, C] each."""
    if "features" in case:
        return np.array(case["features"], dtype=np.float32), np.array(case["gradient"], dtype=np.float32)
    rng, (height, width) = np.random.default_rng(case["seed"]), case["grid"]
    shape = (case["batch"], case["prefix"] + height * width, case["channels"])
    features = rng.standard_normal(shape).astype(np.float32)
    return features, (case.get("slope", 1.0) * rng.standard_normal(shape)).astype(np.float32)


def probe(case: Case, tap: Any, token_grad_cam: Any) -> Seen:
    """The map, with the tensors it was made of: the case's, or those that tap took from a small model."""
    grid, prefix = tuple(case["grid"]), case["prefix"]
    if "depth" not in case:
        features, gradient = (torch.from_numpy(tokens) for tokens in draw_tokens(case))
        return {"map": token_grad_cam(features, gradient, grid, prefix), "features": features, "gradient": gradient}
    model, x, targets = draw_model(case)
    pair = tap(model, x, targets)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise Wrong("tap should return two tensors: `return features, gradient`")
    seen: Seen = {"features": pair[0], "gradient": pair[1], "hooks": hooks(model)}
    shape = (len(x), prefix + grid[0] * grid[1], WIDTH)
    if all(isinstance(tokens, Tensor) and tokens.shape == shape for tokens in pair):
        seen["map"] = token_grad_cam(pair[0].detach(), pair[1].detach(), grid, prefix)
    return seen


def hooks(model: torch.nn.Module) -> int:
    """How many are on the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def judge(case: Case, seen: Seen) -> None:
    """The tap, where the case has a model; then the map that token_grad_cam makes."""
    if "depth" in case:
        judge_tap(case, seen)
        features, gradient = seen["features"], seen["gradient"]
    else:
        features, gradient = draw_tokens(case)
        untouched(seen, features=features, gradient=gradient)
    judge_map(case, array(seen, "map", "the map"), features, gradient)


# ------------------------------------------------------------------------------------------------ the map


def signed_sum(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B, n], features [B, n, C] summed over the channels with a weight each, [B, 1, C], or with other weights."""
    return np.asarray((features.astype(np.float64) * weights).sum(axis=-1))


def mean_slope(gradient: np.ndarray) -> np.ndarray:
    """Grad-CAM's channel weights [B, 1, C]: the gradient [B, n, C] averaged over the tokens."""
    return np.asarray(gradient.astype(np.float64).mean(axis=1, keepdims=True))


def judge_map(case: Case, got: np.ndarray, features: np.ndarray, gradient: np.ndarray) -> None:
    """Features and gradient [B, N, C] with their prefix tokens, as token_grad_cam got them."""
    prefix = case["prefix"]
    signed = signed_sum(features[:, prefix:], mean_slope(gradient[:, prefix:]))
    expected = np.maximum(signed, 0).reshape(-1, *case["grid"])
    whole = (
        "the rescaling hides how strong a map is, and divides by zero where it is blank: leave the values as they are"
    )
    no_nan(got, expected, "NaN in a map: is it divided by its maximum? " + whole)

    def mistakes() -> Iterator[Mistake]:
        yield from weight_mistakes(case, features, gradient)
        yield from layout_mistakes(case, signed)
        yield from batch_mistakes(case, features, gradient, expected)
        with np.errstate(all="ignore"):
            largest = expected.max(axis=(1, 2), keepdims=True)
            scaled, ranged = expected / largest, (expected - expected.min(axis=(1, 2), keepdims=True)) / largest
        yield scaled, "divided by the map's maximum: " + whole
        yield ranged, "rescaled to [0, 1]: " + whole
        grid = f"[B, {case['grid'][0]}, {case['grid'][1]}]"
        yield expected.reshape(len(features), -1), f"the map is still a row of tokens: put it on the grid, {grid}"

    compare(got, expected, "the map", mistakes(), rtol=1e-4, atol=1e-5)


def weight_mistakes(case: Case, features: np.ndarray, gradient: np.ndarray) -> Iterator[Mistake]:
    """Other channel weights, other tokens, and another end than the ReLU."""
    prefix = case["prefix"]
    patches, slopes = features[:, prefix:], gradient[:, prefix:]
    count, channels = patches.shape[1:]
    signed = signed_sum(patches, mean_slope(slopes))

    def drawn(values: np.ndarray) -> np.ndarray:
        return np.maximum(values, 0).reshape(-1, *case["grid"])

    yield (
        drawn(signed_sum(patches, slopes.astype(np.float64).mean(axis=2, keepdims=True))),
        "the gradient is averaged over the *channels*, one weight per token: average over the patch tokens, dim=1, one "
        "weight per channel",
    )
    each = "gradient times features, token by token: average the gradient over the patch tokens first"
    yield drawn(signed_sum(patches, slopes.astype(np.float64))), each
    negative = "there are negative values: the ReLU is missing, evidence against the class is cut off"
    yield signed.reshape(-1, *case["grid"]), negative
    yield (
        np.abs(signed).reshape(-1, *case["grid"]),
        "the absolute value takes the place of the ReLU: evidence *against* the class shows as bright as evidence for "
        "it",
    )
    yield (
        drawn(signed_sum(patches, mean_slope(gradient))),
        "the prefix tokens' gradient is part of your channel weights: average over the patch tokens only, "
        "gradient[:, prefix:]",
    )
    one = min(prefix, 1)  # the habit [:, 1:]
    shifted = signed_sum(features, mean_slope(gradient[:, one:]))[:, one : one + count]
    yield drawn(shifted), f"{prefix} prefix tokens come first here, and you leave out 1: use `prefix`"
    behind = signed_sum(features, mean_slope(gradient[:, :count]))[:, :count]
    yield drawn(behind), "the last tokens are left out: the prefix tokens come *first*, [:, prefix:]"
    yield drawn(signed) * count, "the gradient is summed over the tokens: take the mean"
    yield drawn(signed) / channels, "the channels are averaged: the map is their weighted *sum*"


def layout_mistakes(case: Case, signed: np.ndarray) -> Iterator[Mistake]:
    """The right values [B, n] on another grid."""
    height, width = case["grid"]
    values = np.maximum(signed, 0)
    turned = "the grid is transposed: tokens lie row by row, so a map is [h, w] with w tokens in each row"
    yield values.reshape(-1, width, height), turned
    yield values.reshape(-1, width, height).swapaxes(1, 2), turned
    yield values.reshape(-1, height, width).swapaxes(1, 2), turned


def batch_mistakes(case: Case, features: np.ndarray, gradient: np.ndarray, expected: np.ndarray) -> Iterator[Mistake]:
    """Pictures mixed up with one another."""
    patches, weights = features[:, case["prefix"] :], mean_slope(gradient[:, case["prefix"] :])

    def drawn(weights: np.ndarray) -> np.ndarray:
        return np.maximum(signed_sum(patches, weights), 0).reshape(expected.shape)

    pooled = "the gradient is averaged over the batch as well: each picture has its own channel weights"
    yield drawn(weights.mean(axis=0, keepdims=True)), pooled
    yield drawn(weights[:1]), "the first picture's channel weights are used for all: each picture has its own"
    first = "only the first picture's map: every picture has its own weights and its own map"
    yield expected[0], first
    yield expected[:1], first


# ------------------------------------------------------------------------------------------------ the tap


def judge_tap(case: Case, seen: Seen) -> None:
    """Features and gradient have to give the map that the library makes: no second tap is needed to judge one."""
    model, x, targets = draw_model(case)
    prefix, grid = case["prefix"], tuple(case["grid"])
    tokens = (len(x), prefix + grid[0] * grid[1], WIDTH)
    features, gradient = array(seen, "features", "features"), array(seen, "gradient", "gradient")
    for name, came in (("features", features), ("gradient", gradient)):
        if came.shape != tokens:
            raise Wrong(f"tap: {name} has shape {came.shape}, expected [B, N, C] = {tokens}, prefix tokens included")
    if not (gradient[:, prefix:] != 0).any():
        raise Wrong(
            "tap: the gradient on every patch token is exactly zero. After the last attention a class-token head never "
            "mixes tokens again: tap *before* it, at model.blocks[-1].norm1"
        )
    expected = library_map(model, x, targets.tolist())
    made, other = (
        signed_sum(a[:, prefix:], mean_slope(b[:, prefix:])).reshape(expected.shape)
        for a, b in ((features, gradient), (gradient, features))
    )
    if close(other, expected, 1e-3, 1e-4):
        raise Wrong("tap: the two results are in the wrong order: `return features, gradient`")
    what = "tap: the map that your features and gradient give"
    compare(made, expected, what, tap_mistakes(case, expected), rtol=1e-3, atol=1e-4)
    if seen["hooks"]:
        raise Wrong("tap leaves a hook on the model, and every later call runs it again: handle.remove()")


def library_map(model: VisionTransformer, x: Tensor, classes: list[int], layer: Any = None) -> np.ndarray:
    """The library's Grad-CAM [B, h, w] without its ReLU."""
    return np.asarray(grad_cam(model, x, classes, layer=layer, relu=False).double().numpy())


def tap_mistakes(case: Case, expected: np.ndarray) -> Iterator[Mistake]:
    """Maps [B, h, w] of features and gradients that are taken in another way."""
    model, x, targets = draw_model(case)
    before = model.blocks[-2] if case["depth"] > 1 else model.norm_pre
    entering = library_map(model, x, targets.tolist(), before)
    yield entering, "tap: these are the tokens that enter norm1; asked is its output"
    per_class = np.stack([library_map(model, x, [c] * len(x)) for c in range(3)])  # [3, B, h, w]
    with torch.no_grad():
        p = model(x).double().softmax(dim=-1).numpy().T[..., None, None]  # [3, B, 1, 1]
    own = np.arange(len(x))
    predicted = "tap: the gradient is that of the predicted class: take the score of the class in `targets`"
    yield per_class[p[..., 0, 0].argmax(axis=0), own], predicted
    summed = "tap: the scores of all classes are summed: take each picture's `targets` alone"
    yield per_class.sum(axis=0), summed
    first = library_map(model, x, [int(targets[0])] * len(x))
    yield first, "tap: the first target is used for every picture"
    yield (
        per_class[targets.numpy()].sum(axis=0),
        "tap: every picture's gradient is that of all the targets: scores.gather(1, targets[:, None]) takes one each",
    )
    mean = "tap: the scores are averaged over the batch, so the gradient is divided by its size: sum them"
    yield expected / len(x), mean
    of_probability = (p * (per_class - (p * per_class).sum(axis=0)))[targets.numpy(), own]
    yield of_probability, "tap: the gradient is that of a probability: take the score before the softmax"


QUESTION = Question(
    name="e2",
    answers=("tap", "token_grad_cam"),
    cases=(
        {
            "what": "two by two patches, two channels, by hand",
            "grid": [2, 2],
            "prefix": 1,
            "features": [[[7, 7], [1, 0], [0, 3], [0, 1], [3, 0]]],
            "gradient": [[[9, 5], [4, 0], [0, -2], [0, -2], [0, 0]]],
        },
        {
            "what": "three pictures on 3 x 5 patches, two prefix tokens",
            "seed": 3,
            "batch": 3,
            "grid": [3, 5],
            "prefix": 2,
            "channels": 4,
        },
        {
            "what": "a small model with a class token",
            "seed": 4,
            "grid": [2, 3],
            "prefix": 1,
            "depth": 2,
            "targets": [2, 0],
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "tap: a forward hook on model.blocks[-1].norm1 sees the tokens; torch.autograd.grad(score, tokens) gives their "
        "gradient. token_grad_cam: leave out the prefix of both tensors first.",
        "The gradient is of one number: the logit of each picture's class, summed over the pictures. The weights alpha "
        "have the shape [B, 1, C]: a mean over dim=1, the patch tokens. The map sums over dim=-1.",
        "kept = []; handle = layer.register_forward_hook(lambda module, args, out: kept.append(out)); logits = "
        "model(x); handle.remove(); score = logits.gather(1, targets[:, None]).sum(): of the run that kept[0] comes "
        "from. Then alpha = gradient[:, prefix:].mean(dim=1, keepdim=True), and at the end .relu() and .unflatten(1, "
        "grid).",
    ),
    section="chapter 5, section 5.5, with its two traps",
)
