"""Assignment e: rollout, Grad-CAM on tokens, and their scores against masks. What is checked, and the hints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from svit_course.judging import Mistake, array, close, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.explain import displayed, grad_cam, rollout_matrix, upsample
from svit_utils.referee import localisation


def _rows(case: Case, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Rows of attention that sum to 1."""
    exp = np.exp(case.get("std", 1.5) * rng.standard_normal(shape))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


def _double(inputs: np.ndarray) -> Tensor:
    return torch.from_numpy(inputs.astype(np.float64))


# ------------------------------------------------------------------------------------------------ e1: rollout


def _layers(case: Case) -> list[np.ndarray]:
    """float32 [B, H, N, N] of each layer: written out, or drawn; ``empty`` queries lost all keys in ``in_heads``."""
    if "layers" in case:
        return [np.array(layer, dtype=np.float32) for layer in case["layers"]]
    rng = np.random.default_rng(case["seed"])
    drawn = []
    for depth in range(case["depth"]):
        layer = _rows(case, (case["batch"], case["heads"], case["tokens"], case["tokens"]), rng)
        for query in case.get("empty", ()):
            layer[:, case["in_heads"], (query + depth) % case["tokens"]] = 0
        drawn.append(layer.astype(np.float32))
    return drawn


def _probe_rollout(case: Case, rollout: Any) -> Seen:
    layers = [torch.from_numpy(layer) for layer in _layers(case)]
    return {"map": rollout(layers, case["prefix"]), "layers": layers}


def _judge_rollout(case: Case, seen: Seen) -> None:
    arrays, prefix = _layers(case), case["prefix"]
    if len(seen["layers"]) != len(arrays):
        raise Wrong("it changed the list `attentions`: the caller still needs it. Loop over it, without pop or reverse")
    for depth, layer in enumerate(arrays):
        unchanged(layer, seen["layers"][depth], f"attentions[{depth}]")
    got = array(seen, "map", "the map")
    layers = [_double(layer) for layer in arrays]
    matrix = rollout_matrix(layers).numpy()
    identity = np.eye(arrays[0].shape[-1])
    bare = halved = identity
    for fused in (layer.numpy().mean(axis=1) for layer in layers):
        bare, halved = fused @ bare, (fused + identity) / 2 @ halved
    columns = rollout_matrix([layer.transpose(-1, -2) for layer in reversed(layers)]).numpy().swapaxes(-1, -2)
    each = np.mean([rollout_matrix([layer]).numpy() for layer in layers], axis=0)
    expected = matrix[:, 0, prefix:]

    def row(of: Any) -> np.ndarray:
        return np.asarray(of)[:, 0, prefix:]

    missing = "the identity is missing: half of every step is the residual connection, W / 2 + I / 2"
    one = "one row for the whole batch: the first picture's. Take the class token's row of *every* picture, [:, 0]"
    uneven = (
        "the steps' rows do not sum to 1, because a query that the threshold emptied leaves a row of less: divide each "
        "row by its own sum, in every layer, before you multiply"
    )
    left = f"a prefix token is left in the map: it has {matrix.shape[-1]} tokens, leave out the first {prefix}"
    mistakes: list[Mistake] = [
        (row(rollout_matrix(layers[::-1])), "the product is in the wrong order: later layers multiply from the left"),
        (row(rollout_matrix(layers, residual=0.0)), missing),
        (row(bare), missing + ". And the rows of an emptied query do not sum to 1"),
        (row(halved), uneven),
        (row(halved) * 2 ** len(layers), uneven),
        (row(columns), "the columns sum to 1: divide each *row* by its sum, sum(dim=-1, keepdim=True)"),
        (matrix[:, 0], left),
        (matrix[:, 0, 1:], f"{prefix} prefix tokens come first here, and you leave out 1: use `prefix`"),
        (expected[0], one),
        (expected[:1], one),
        (np.broadcast_to(expected[:1], expected.shape), one),
        (matrix, "this is the whole matrix [B, N, N]: the map is the class token's row of it, without the prefix"),
        (matrix[:, prefix:, 0], "this is the class token's *column*, who reads it; asked is its row, whom it reads"),
        (row(rollout_matrix(layers, "max")), "the heads are fused by their maximum: take their mean"),
        (row(rollout_matrix(layers[-1:])), "this is the last layer alone: multiply the steps of all layers"),
        (row(rollout_matrix(layers[:1])), "this is the first layer alone: multiply the steps of all layers"),
        (row(each), "the layers are averaged: multiply them"),
        (
            expected / expected.sum(axis=-1, keepdims=True),
            "divided once more at the end: what reached the prefix is left out, so the map sums to less than 1",
        ),
    ]
    compare(got, expected, "the map", mistakes, rtol=1e-4)


E1 = Question(
    name="e1",
    answers=("rollout",),
    cases=(
        {
            "what": "three tokens, two layers, by hand",
            "prefix": 1,
            "layers": [[[[[0, 1, 0], [0, 0, 1], [0, 0, 1]]]], [[[[0, 1, 0], [0, 1, 0], [1, 0, 0]]]]],
        },
        {
            "what": "two pictures, two heads, three layers",
            "prefix": 1,
            "seed": 1,
            "batch": 2,
            "heads": 2,
            "depth": 3,
            "tokens": 7,
        },
        {
            "what": "queries that the threshold emptied in one head",
            "prefix": 1,
            "seed": 2,
            "batch": 2,
            "heads": 2,
            "depth": 3,
            "tokens": 7,
            "empty": [0, 3],
            "in_heads": [1],
        },
    ),
    probe=_probe_rollout,
    judge=_judge_rollout,
    hints=(
        "One step per layer: mean over the heads, half of it plus half the identity, each row divided by its sum.",
        "Tokens after block 2 are A2 (A1 x): a later layer stands on the left of the product so far. The map is the "
        "row of query 0, for every picture, without the first `prefix` keys.",
        "In the loop: step = step / step.sum(dim=-1, keepdim=True), then product = step if product is None else "
        "step @ product. At the end product[:, 0, prefix:].",
    ),
    section='chapter 5, sections "Attention rollout, derived" and "Known mistakes"',
)

# ------------------------------------------------------------------------------------------------ e2: Grad-CAM


def _model(case: Case) -> tuple[VisionTransformer, Tensor, Tensor]:
    """A small model with weights drawn from the seed, pictures [B, 3, H, W] and a class for each."""
    height, width = case["grid"]
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(
            img_size=(4 * height, 4 * width),
            patch_size=4,
            embed_dim=12,
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


def _tokens(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Features and gradient, float32 [B, N, C] each."""
    if "features" in case:
        return np.array(case["features"], dtype=np.float32), np.array(case["gradient"], dtype=np.float32)
    rng, (height, width) = np.random.default_rng(case["seed"]), case["grid"]
    shape = (case["batch"], case["prefix"] + height * width, case["channels"])
    features = rng.standard_normal(shape).astype(np.float32)
    return features, (case.get("slope", 1.0) * rng.standard_normal(shape)).astype(np.float32)


def _hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _probe_grad_cam(case: Case, tap: Any, token_grad_cam: Any) -> Seen:
    grid, prefix = tuple(case["grid"]), case["prefix"]
    if "depth" not in case:
        features, gradient = (torch.from_numpy(tokens) for tokens in _tokens(case))
        heat = token_grad_cam(features, gradient, grid, prefix)
        return {"map": heat, "features": features, "gradient": gradient}
    model, x, targets = _model(case)
    pair = tap(model, x, targets)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise Wrong("tap should return two tensors: `return features, gradient`")
    seen: Seen = {"features": pair[0], "gradient": pair[1], "hooks": _hooks(model)}
    if all(isinstance(tokens, Tensor) and tokens.shape == (len(x), prefix + grid[0] * grid[1], 12) for tokens in pair):
        seen["map"] = token_grad_cam(pair[0].detach(), pair[1].detach(), grid, prefix)
    return seen


def _signed(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B, n, C] projected on one weight per channel, [B, 1, C], or on whatever else is given."""
    return np.asarray((features.astype(np.float64) * weights).sum(axis=-1))


def _judge_map(case: Case, got: np.ndarray, features: np.ndarray, gradient: np.ndarray) -> None:
    (height, width), prefix = case["grid"], case["prefix"]
    patches, slopes = features[:, prefix:], gradient[:, prefix:].astype(np.float64)
    batch, count, channels = patches.shape
    signed = _signed(patches, slopes.mean(axis=1, keepdims=True))

    def drawn(values: np.ndarray, size: tuple[int, int] = (height, width)) -> np.ndarray:
        return np.maximum(values, 0).reshape(-1, *size)

    expected, grid = drawn(signed), f"[B, {height}, {width}]"
    with_prefix = _signed(patches, gradient.astype(np.float64).mean(axis=1, keepdims=True))
    one = min(prefix, 1)  # the habit [:, 1:]
    shifted = _signed(features, gradient[:, one:].astype(np.float64).mean(axis=1, keepdims=True))[:, one : one + count]
    behind = _signed(features, gradient[:, :count].astype(np.float64).mean(axis=1, keepdims=True))[:, :count]
    with np.errstate(all="ignore"):
        scaled = expected / expected.max(axis=(1, 2), keepdims=True)
        ranged = scaled - expected.min(axis=(1, 2), keepdims=True) / expected.max(axis=(1, 2), keepdims=True)
    turned = "the grid is transposed: tokens lie row by row, so a map is [h, w] with w tokens in each row"
    first = "only the first picture's map: every picture has its own weights and its own map"
    whole = (
        "the rescaling hides how strong a map is, and divides by zero where it is blank: leave the values as they are"
    )
    if got.shape == expected.shape and np.isnan(got).any():
        raise Wrong("NaN in a map: is it divided by its maximum? " + whole)
    mistakes: list[Mistake] = [
        (
            drawn(_signed(patches, slopes.mean(axis=2, keepdims=True))),
            "the gradient is averaged over the *channels*, one"
            " weight per token: average over the patch tokens, dim=1, one weight per channel",
        ),
        (
            drawn(_signed(patches, slopes)),
            "gradient times features, token by token: average the gradient over the patch tokens first",
        ),
        (
            signed.reshape(expected.shape),
            "there are negative values: the ReLU is missing, evidence against the class is cut off",
        ),
        (
            np.abs(signed).reshape(expected.shape),
            "the absolute value takes the place of the ReLU: evidence *against* the"
            " class shows as bright as evidence for it",
        ),
        (
            drawn(with_prefix),
            "the prefix tokens' gradient is part of your channel weights: average over the patch tokens"
            " only, gradient[:, prefix:]",
        ),
        (drawn(shifted), f"{prefix} prefix tokens come first here, and you leave out 1: use `prefix`"),
        (drawn(behind), "the last tokens are left out: the prefix tokens come *first*, [:, prefix:]"),
        (drawn(signed) * count, "the gradient is summed over the tokens: take the mean"),
        (drawn(signed) / channels, "the channels are averaged: the map is their weighted *sum*"),
        (drawn(signed, (width, height)), turned),
        (drawn(signed, (width, height)).swapaxes(1, 2), turned),
        (expected.swapaxes(1, 2), turned),
        (
            drawn(_signed(patches, slopes.mean(axis=(0, 1), keepdims=True))),
            "the gradient is averaged over the batch as well: each picture has its own channel weights",
        ),
        (
            drawn(_signed(patches, slopes[:1].mean(axis=1, keepdims=True))),
            "the first picture's channel weights are used for all: each picture has its own",
        ),
        (expected[0], first),
        (expected[:1], first),
        (scaled, "divided by the map's maximum: " + whole),
        (ranged, "rescaled to [0, 1]: " + whole),
        (expected.reshape(batch, -1), f"the map is still a row of tokens: put it on the grid, {grid}"),
    ]
    compare(got, expected, "the map", mistakes, rtol=1e-4, atol=1e-5)


def _judge_tap(case: Case, seen: Seen) -> None:
    model, x, targets = _model(case)
    (height, width), prefix = case["grid"], case["prefix"]
    tokens = (len(x), prefix + height * width, 12)
    features, gradient = array(seen, "features", "features"), array(seen, "gradient", "gradient")
    for name, came in (("features", features), ("gradient", gradient)):
        if came.shape != tokens:
            raise Wrong(f"tap: {name} has shape {came.shape}, expected [B, N, C] = {tokens}, prefix tokens included")
    if not (gradient[:, prefix:] != 0).any():
        raise Wrong(
            "tap: the gradient on every patch token is exactly zero. After the last attention a class-token head never "
            "mixes tokens again: tap *before* it, at model.blocks[-1].norm1"
        )

    def library(classes: list[int], layer: Any = None) -> np.ndarray:
        return grad_cam(model, x, classes, layer=layer, relu=False).double().numpy()

    per_class = np.stack([library([c] * len(x)) for c in range(3)])  # [3, B, h, w]
    with torch.no_grad():
        p = model(x).double().softmax(dim=-1).numpy().T[..., None, None]  # [3, B, 1, 1]
    own, before = np.arange(len(x)), model.blocks[-2] if case["depth"] > 1 else model.norm_pre
    asked = per_class[targets.numpy(), own]
    # No second tap is needed to judge one: features and gradient have to give the map that the library makes.
    made = _signed(features[:, prefix:], gradient[:, prefix:].astype(np.float64).mean(axis=1, keepdims=True))
    other = _signed(gradient[:, prefix:], features[:, prefix:].astype(np.float64).mean(axis=1, keepdims=True))
    if close(other.reshape(asked.shape), asked, 1e-3, 1e-4):
        raise Wrong("tap: the two results are in the wrong order: `return features, gradient`")
    compare(
        made.reshape(asked.shape),
        asked,
        "tap: the map that your features and gradient give",
        (
            (library(targets.tolist(), before), "tap: these are the tokens that enter norm1; asked is its output"),
            (
                per_class[p[..., 0, 0].argmax(axis=0), own],
                "tap: the gradient is that of the predicted class: take the score of the class in `targets`",
            ),
            (per_class.sum(axis=0), "tap: the scores of all classes are summed: take each picture's `targets` alone"),
            (library([int(targets[0])] * len(x)), "tap: the first target is used for every picture"),
            (
                per_class[targets.numpy()].sum(axis=0),
                "tap: every picture's gradient is that of all the targets: "
                "scores.gather(1, targets[:, None]) takes one each",
            ),
            (
                asked / len(x),
                "tap: the scores are averaged over the batch, so the gradient is divided by its size: sum them",
            ),
            (
                (p * (per_class - (p * per_class).sum(axis=0)))[targets.numpy(), own],
                "tap: the gradient is that of a probability: take the score before the softmax",
            ),
        ),
        rtol=1e-3,
        atol=1e-4,
    )
    if seen["hooks"]:
        raise Wrong("tap leaves a hook on the model, and every later call runs it again: handle.remove()")


def _judge_grad_cam(case: Case, seen: Seen) -> None:
    if "depth" in case:
        _judge_tap(case, seen)
        features, gradient = seen["features"], seen["gradient"]
    else:
        features, gradient = _tokens(case)
        unchanged(features, seen["features"], "features")
        unchanged(gradient, seen["gradient"], "gradient")
    _judge_map(case, array(seen, "map", "the map"), features, gradient)


E2 = Question(
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
    probe=_probe_grad_cam,
    judge=_judge_grad_cam,
    hints=(
        "tap: a forward hook on model.blocks[-1].norm1 sees the tokens; torch.autograd.grad(score, tokens) gives their "
        "gradient. token_grad_cam: leave out the prefix of both tensors first.",
        "The gradient is of one number: the logit of each picture's class, summed over the pictures. The weights alpha "
        "have the shape [B, 1, C]: a mean over dim=1, the patch tokens. The map sums over dim=-1.",
        "kept = []; handle = layer.register_forward_hook(lambda module, args, out: kept.append(out)); run the model; "
        "handle.remove(); score = model(x).gather(1, targets[:, None]).sum(). Then alpha = "
        "gradient[:, prefix:].mean(dim=1, keepdim=True), and at the end .relu() and "
        ".unflatten(1, grid).",
    ),
    section='chapter 5, section "Grad-CAM on tokens", with its two traps',
)

# ------------------------------------------------------------------------------------------------ e3: scores


def _maps_and_masks(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 [B, h, w], masks bool [B, H, W]. Drawn values are multiples of 1/8: enlarging them is exact."""
    if "maps" in case:
        return np.array(case["maps"], dtype=np.float32), np.array(case["masks"], dtype=bool)
    rng, (height, width), scale = np.random.default_rng(case["seed"]), case["size"], case.get("scale", 1)
    low, high = case.get("levels", [-4, 12])
    maps = rng.integers(low, high, (case["batch"], height, width)) / 8
    masks = np.zeros((case["batch"], height * scale, width * scale), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, height * scale // 2), rng.integers(0, width * scale // 2)
        mask[top : top + height * scale // 2, left : left + width * scale // 3] = True
    return maps.astype(np.float32), masks


def _probe_scores(case: Case, energy_in_mask: Any, pointing_game: Any) -> Seen:
    maps, masks = (torch.from_numpy(values) for values in _maps_and_masks(case))
    seen = {"energy": energy_in_mask(maps, masks), "pointing": pointing_game(maps, masks)}
    return {**seen, "maps": maps, "masks": masks}


def _judge_scores(case: Case, seen: Seen) -> None:
    maps, masks = _maps_and_masks(case)
    unchanged(maps, seen["maps"], "maps")
    unchanged(masks, seen["masks"], "masks")
    size, inside = (int(masks.shape[1]), int(masks.shape[2])), torch.from_numpy(masks)
    enlarged = {
        how: _double(maps) if maps.shape == masks.shape else upsample(_double(maps), size, how)
        for how in ("bilinear", "nearest")
    }
    corners = F.interpolate(_double(maps)[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]
    shrunk = F.interpolate(_double(masks)[:, None], size=maps.shape[1:], mode="nearest")[:, 0] > 0
    small = shrunk if bool(shrunk.flatten(1).any(dim=1).all()) else torch.ones_like(shrunk)
    values = enlarged["bilinear"].numpy()
    positive = np.maximum(values, 0)
    blank = positive.max(axis=(1, 2)) == 0
    other_sizes: list[tuple[Tensor, Tensor, str]] = [
        (enlarged["nearest"], inside, "the map is enlarged by repeating its patches: the question asks for bilinear"),
        (corners, inside, "enlarged with align_corners=True, which moves the patches: take align_corners=False"),
        (_double(maps), small, "the mask is shrunk to the map: enlarge the map to the mask"),
    ]

    energy, got = localisation.energy_in_mask(enlarged["bilinear"], inside).numpy(), array(seen, "energy", "the energy")
    share = masks.mean(axis=(1, 2))
    chance = (
        f"like a uniform map, by the object's share of the picture, {float(share[blank][0] if blank.any() else 0):.3g}"
    )
    if got.shape == energy.shape and np.isnan(got[blank]).any():
        raise Wrong(f"energy: NaN for a map without anything positive, 0/0. Score it {chance}")
    with np.errstate(all="ignore"):
        raw = (values * masks).sum(axis=(1, 2)) / values.sum(axis=(1, 2))
        absolute = (np.abs(values) * masks).sum(axis=(1, 2)) / np.abs(values).sum(axis=(1, 2))
        squared = (positive**2 * masks).sum(axis=(1, 2)) / (positive**2).sum(axis=(1, 2))
        lifted = values - values.min(axis=(1, 2), keepdims=True)
        ranged = (lifted * masks).sum(axis=(1, 2)) / lifted.sum(axis=(1, 2))
    pooled = (positive * masks).sum() / max(positive.sum(), 1e-30)
    batch = "one number for the batch: each map is divided by its own sum, over its last two dimensions"
    signs = "negative values are counted: only the positive part has energy, clamp at 0 first"

    def or_chance(score: np.ndarray) -> np.ndarray:
        return np.where(blank, energy, score)

    compare(
        got,
        energy,
        "the energy",
        (
            (np.where(blank, 0, energy), f"energy: a map without anything positive scores 0 here. Score it {chance}"),
            (np.where(blank, 1, energy), f"energy: a blank map gets full marks. Score it {chance}"),
            (raw, "energy: " + signs),
            (or_chance(raw), "energy: " + signs),
            (or_chance(absolute), "energy: " + signs + "; the absolute value turns evidence against into energy"),
            (or_chance(ranged), "energy: the maps are shifted to a minimum of 0, which gives energy to every pixel"),
            (or_chance(squared), "energy: the values are squared: sum them as they are"),
            (1 - energy, "energy: this is the share *off* the object"),
            (pooled, "energy: " + batch),
            (energy.mean(), "energy: the mean over the batch; asked is one score per map, [B]"),
            (np.broadcast_to(energy[:1], energy.shape), "energy: the first picture's score is used for all"),
            (energy[0], "energy: one score, that of the first picture; asked is one for each, [B]"),
            *((localisation.energy_in_mask(m, k).numpy(), "energy: " + says) for m, k, says in other_sizes),
        ),
    )

    pointing = localisation.pointing_game(enlarged["bilinear"], inside).numpy()
    flat, on = values.reshape(len(values), -1), masks.reshape(len(masks), -1)
    top = flat == flat.max(axis=1, keepdims=True)
    row = np.arange(len(flat))
    share_of_ties = "of tied maxima take the share that lies on the object"
    at_last = flat.shape[1] - 1 - flat[:, ::-1].argmax(axis=1)
    ties = f"argmax takes the first of the tied maxima, in the order of storage: {share_of_ties}"
    compare(
        array(seen, "pointing", "the pointing game"),
        pointing,
        "the pointing game",
        (
            (on[row, flat.argmax(axis=1)], "pointing: " + ties),
            (on[row, at_last], "pointing: the last of the tied maxima is taken: " + share_of_ties),
            (
                (top & on).any(axis=1),
                "pointing: a single tied maximum on the object is enough for you, so that a blank "
                f"map always wins: {share_of_ties}",
            ),
            ((top & on).sum(axis=1) == top.sum(axis=1), f"pointing: all or nothing: {share_of_ties}"),
            ((top & on).sum(axis=1), "pointing: this is a number of pixels: divide by the number of tied maxima"),
            (
                (top & on).sum(axis=1) / on.sum(axis=1),
                "pointing: divided by the object's area: divide by the number of tied maxima",
            ),
            (
                ((flat == flat.max()) & on).sum(axis=1) / np.maximum((flat == flat.max()).sum(axis=1), 1),
                "pointing: the maximum is taken over the whole batch: each map has its own",
            ),
            (
                np.where(blank, 0, pointing),
                "pointing: a blank map scores 0 here. All its pixels are tied: the same rule"
                " gives it the object's share",
            ),
            (pointing.mean(), "pointing: the mean over the batch; asked is one score per map, [B]"),
            *((localisation.pointing_game(m, k).numpy(), "pointing: " + says) for m, k, says in other_sizes),
        ),
    )


_SQUARE = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]

E3 = Question(
    name="e3",
    answers=("energy_in_mask", "pointing_game"),
    cases=(
        {
            "what": "by hand: tidy and wrong, smeared and right, one with negative values",
            "maps": [
                [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
                [[1, 1, 1, 1], [1, 3, 3, 1], [1, 3, 3, 1], [1, 1, 1, 1]],
                [[-4, 0, 0, 2], [0, 3, -1, 0], [0, 0, 1, 0], [0, 0, 0, -2]],
            ],
            "masks": [_SQUARE, _SQUARE, _SQUARE],
        },
        {
            "what": "ties: three maxima of which one is on the object, and a blank map",
            "maps": [
                [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0]],
                [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            ],
            "masks": [_SQUARE, _SQUARE],
        },
        {"what": "maps of 5 x 7 patches, masks of 20 x 28 pixels", "seed": 5, "batch": 3, "size": [5, 7], "scale": 4},
    ),
    probe=_probe_scores,
    judge=_judge_scores,
    hints=(
        "Bring the maps to the masks' size, then flatten both to [B, H*W] and work along dim=1: no loop is needed.",
        "Energy: clamp at 0; the sum on the object over the sum of all; where nothing is positive, put ones. Pointing: "
        "compare every value with its row's largest, so that *all* tied maxima are marked, and count them.",
        "Energy: blank = positive.amax(dim=1, keepdim=True) == 0, positive = torch.where(blank, 1.0, positive), then "
        "(positive * inside).sum(1) / positive.sum(1). Pointing: top = values == values.amax(dim=1, keepdim=True), "
        "(top & inside).sum(1) / top.sum(1).",
    ),
    section='chapter 5, section "Scoring maps against the mask", and chapter 7, section 4',
)

# ------------------------------------------------------------------------------------------------ e4: the control


def _weights(case: Case) -> np.ndarray:
    """float32 [B, H, N, N]: written out, or drawn; ``flat`` rows are uniform, so that nobody there exceeds tau."""
    if "weights" in case:
        return np.array(case["weights"], dtype=np.float32)
    tokens = case["tokens"]
    weights = _rows(case, (case["batch"], case["heads"], tokens, tokens), np.random.default_rng(case["seed"]))
    for batch, head, query in case.get("flat", ()):
        weights[batch, head, query] = 1 / tokens
    return weights.astype(np.float32)


def _probe_drawn(case: Case, drawn_through: Any, attention_map: Any) -> Seen:
    weights, tau, prefix = torch.from_numpy(_weights(case)), case["tau"], case["prefix"]
    seen = {"rows": drawn_through(weights, tau), "plain": attention_map(weights, prefix)}
    return {**seen, "drawn": attention_map(weights, prefix, tau), "weights": weights}


def _class_row(weights: np.ndarray, prefix: int) -> np.ndarray:
    return np.asarray(weights[:, :, 0, prefix:].mean(axis=1))


def _judge_drawn(case: Case, seen: Seen) -> None:
    weights, tau, prefix = _weights(case), case["tau"], case["prefix"]
    unchanged(weights, seen["weights"], "weights")
    p = weights.astype(np.float64)
    expected, zeros = (displayed(_double(weights), tau, empty_rows=mode).numpy() for mode in ("dense", "zero"))
    r, hard = np.maximum(p - tau, 0), np.where(p > tau, p, 0)
    empty = r.sum(axis=-1, keepdims=True) == 0
    with np.errstate(all="ignore"):
        hard = np.where(empty, p, hard / hard.sum(axis=-1, keepdims=True))
        columns = np.where(r.sum(axis=-2, keepdims=True) > 0, r / r.sum(axis=-2, keepdims=True), p)
        by_matrix = r / r.sum(axis=(-1, -2), keepdims=True)
    rows = array(seen, "rows", "drawn_through's result")
    sums = r.sum(axis=-1)
    example = float(sums[sums > 0].min()) if (sums > 0).any() else 0.0
    bare = f"drawn_through: your rows sum to {example:.2f}: did you renormalise after the cut?"
    if rows.shape == p.shape and np.isnan(rows).any():
        raise Wrong("drawn_through: NaN in a row without survivors, 0/0. Such a row is drawn as it is")
    compare(
        rows,
        expected,
        "drawn_through's result",
        (
            (p, "drawn_through: nothing is cut"),
            (r, bare),
            (np.where(empty, p, r), bare),
            (hard, "drawn_through: survivors keep their whole p: the threshold is subtracted, ReLU(p - tau)"),
            (zeros, "drawn_through: a row without survivors becomes zeros: here it stays as it is"),
            (
                np.where(empty.any(), p, expected),
                "drawn_through: because one row is empty all stay as they are: decide for each row, with torch.where",
            ),
            (columns, "drawn_through: divided by the sums of the columns: each *row* sums to 1, dim=-1"),
            (by_matrix, "drawn_through: divided by the sum of the matrix: each row has its own sum, dim=-1"),
        ),
        rtol=1e-4,
    )

    plain, dense = array(seen, "plain", "attention_map without tau"), _class_row(p, prefix)
    one = "attention_map: only the first picture's row: take query 0 of every picture and head, weights[:, :, 0]"

    def usual(of: np.ndarray) -> list[Mistake]:
        row = _class_row(of, prefix)
        return [
            (_class_row(of, 0), "attention_map: a prefix token is left in the map: leave out the first `prefix`"),
            (_class_row(of, 1), f"attention_map: {prefix} prefix tokens come first here, and you leave out 1"),
            (row * of.shape[1], "attention_map: the heads are summed: take their mean"),
            (of[:, :, 0, prefix:], "attention_map: the heads are still apart: take their mean, dim=1"),
            (of[:, 0, 0, prefix:], "attention_map: this is head 0 alone: take the mean of the heads"),
            (of.mean(axis=1)[:, prefix:, 0], "attention_map: this is the class token's *column*: asked is its row"),
            (of.mean(axis=1).mean(axis=1)[:, prefix:], "attention_map: the mean over all queries: asked is query 0"),
            (of.max(axis=1)[:, 0, prefix:], "attention_map: the heads are fused by their maximum: take their mean"),
            (row[:1], one),
            (row[0], one),
            (
                row / row.sum(axis=-1, keepdims=True),
                "attention_map: divided once more at the end: what goes to the "
                "prefix is left out, so the map sums to less than 1",
            ),
        ]

    compare(plain, dense, "attention_map without tau", usual(p), rtol=1e-4)
    averaged = displayed(_double(p.mean(axis=1)), tau).numpy()[:, 0, prefix:]
    patches_alone = p[:, :, 0, prefix:]
    cut = np.maximum(patches_alone - tau, 0)
    with np.errstate(all="ignore"):
        total = cut.sum(axis=-1, keepdims=True)
        early = np.where(total > 0, cut / total, patches_alone).mean(axis=1)
    compare(
        array(seen, "drawn", "attention_map with tau"),
        _class_row(expected, prefix),
        "attention_map with tau",
        (
            (dense, "attention_map: tau changes nothing: draw the rows through the threshold where tau is given"),
            (
                averaged,
                "attention_map: the heads are averaged before the cut. The operator cuts each head's row, and the"
                " control has to do the same: cut first, average then",
            ),
            (
                early,
                "attention_map: the prefix is left out before the cut, so the rows are divided by another sum. The "
                "operator cuts the whole row: cut first, leave out the prefix then",
            ),
            *usual(expected),
        ),
        rtol=1e-4,
    )


E4 = Question(
    name="e4",
    answers=("drawn_through", "attention_map"),
    cases=(
        {
            "what": "one class row in two heads, by hand",
            "tau": 0.25,
            "prefix": 1,
            "weights": [
                [[[0.5, 0.375, 0.125], [0.5, 0.5, 0], [0, 0, 1]], [[0.125, 0.375, 0.5], [0.5, 0.5, 0], [0, 0, 1]]]
            ],
        },
        {"what": "two pictures, three heads", "tau": 0.1, "prefix": 1, "seed": 6, "batch": 2, "heads": 3, "tokens": 8},
        {
            "what": "class rows without survivors",
            "tau": 0.15,
            "prefix": 1,
            "seed": 7,
            "batch": 2,
            "heads": 2,
            "tokens": 10,
            "flat": [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 4]],
        },
    ),
    probe=_probe_drawn,
    judge=_judge_drawn,
    hints=(
        "drawn_through is the operator without its softmax: the rows are probabilities already.",
        "Subtract, clip at 0, divide by the row's sum; where that sum is 0 the row stays. attention_map: which comes "
        "first, the cut, the mean over heads, or leaving out the prefix? What does the operator see?",
        "r = (weights - tau).relu(), z its row sum; torch.where(z > 0, r / z.clamp_min(1e-12), weights). Then "
        "rows = weights[:, :, 0]; if tau is not None: rows = "
        "drawn_through(rows, tau); rows.mean(dim=1)[:, prefix:].",
    ),
    section='chapter 7, section 5, and chapter 5, section "Attention per head, dense beside sparse"',
)

QUESTIONS = (E1, E2, E3, E4)
