"""e3: score maps against masks: energy in the mask, and the pointing game with ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from svit_course.checks.e.shared import double
from svit_course.judging import Mistake, array, compare, no_nan, untouched
from svit_course.question import Case, Question, Seen
from svit_utils.explain import upsample
from svit_utils.referee import localisation


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 [B, h, w], masks bool [B, H, W]. Drawn values are multiples of 1/8: their sums are exact."""
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


def probe(case: Case, energy_in_mask: Any, pointing_game: Any) -> Seen:
    """Both scores, and maps and masks as they are afterwards."""
    maps, masks = (torch.from_numpy(values) for values in inputs(case))
    seen = {"energy": energy_in_mask(maps, masks), "pointing": pointing_game(maps, masks)}
    return {**seen, "maps": maps, "masks": masks}


def enlarged(maps: np.ndarray, masks: np.ndarray, how: str = "nearest") -> Tensor:
    """The maps at the masks' size, float64 [B, H, W]: by default every pixel has the value of its patch."""
    size = (int(masks.shape[1]), int(masks.shape[2]))
    return double(maps) if maps.shape == masks.shape else upsample(double(maps), size, how)


def other_sizes(maps: np.ndarray, masks: np.ndarray) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Maps and masks brought to one size in another way than asked for."""
    inside, size = torch.from_numpy(masks), masks.shape[1:]
    bilinear = (
        "the map is enlarged bilinearly, which moves its maximum to the border: repeat each patch over its pixels"
    )
    yield enlarged(maps, masks, "bilinear"), inside, bilinear
    corners = F.interpolate(double(maps)[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]
    yield corners, inside, bilinear
    shrunk = F.interpolate(double(masks)[:, None], size=maps.shape[1:], mode="nearest")[:, 0] > 0
    small = shrunk if bool(shrunk.flatten(1).any(dim=1).all()) else torch.ones_like(shrunk)
    yield double(maps), small, "the mask is shrunk to the map: enlarge the map to the mask"


def energy_mistakes(maps: np.ndarray, masks: np.ndarray, energy: np.ndarray, chance: str) -> Iterator[Mistake]:
    """``energy`` [B] is right; ``chance`` says what a blank map should score."""
    values = enlarged(maps, masks).numpy()
    positive = np.maximum(values, 0)
    blank = positive.max(axis=(1, 2)) == 0

    def share(of: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.asarray((of * masks).sum(axis=(1, 2)) / of.sum(axis=(1, 2)))

    def or_chance(score: np.ndarray) -> np.ndarray:
        return np.where(blank, energy, score)

    zero = f"energy: a map without anything positive scores 0 here. Score it {chance}"
    yield np.where(blank, 0, energy), zero
    yield np.where(blank, 1, energy), f"energy: a blank map gets full marks. Score it {chance}"
    signs = "energy: negative values are counted: only the positive part has energy, clamp at 0 first"
    yield share(values), signs
    yield or_chance(share(values)), signs
    yield or_chance(share(np.abs(values))), signs + "; the absolute value turns evidence against into energy"
    lifted = values - values.min(axis=(1, 2), keepdims=True)
    shifted = "energy: the maps are shifted to a minimum of 0, which gives energy to every pixel"
    yield or_chance(share(lifted)), shifted
    yield or_chance(share(positive**2)), "energy: the values are squared: sum them as they are"
    yield 1 - energy, "energy: this is the share *off* the object"
    pooled = (positive * masks).sum() / max(positive.sum(), 1e-30)
    yield pooled, "energy: one number for the batch: each map is divided by its own sum, over its last two dimensions"
    yield energy.mean(), "energy: the mean over the batch; asked is one score per map, [B]"
    yield np.broadcast_to(energy[:1], energy.shape), "energy: the first picture's score is used for all"
    yield energy[0], "energy: one score, that of the first picture; asked is one for each, [B]"
    for resized, inside, says in other_sizes(maps, masks):
        yield localisation.energy_in_mask(resized, inside).numpy(), "energy: " + says


def pointing_mistakes(maps: np.ndarray, masks: np.ndarray, pointing: np.ndarray) -> Iterator[Mistake]:
    """``pointing`` [B] is right."""
    flat, on = enlarged(maps, masks).numpy().reshape(len(maps), -1), masks.reshape(len(masks), -1)  # [B, H * W]
    top, picture = flat == flat.max(axis=1, keepdims=True), np.arange(len(flat))
    hits = (top & on).sum(axis=1)
    for resized, inside, says in other_sizes(maps, masks):  # first: a larger map's one maximum looks like an argmax
        yield localisation.pointing_game(resized, inside).numpy(), "pointing: " + says
    share = "of tied maxima take the share that lies on the object"
    first = f"pointing: argmax takes the first of the tied maxima, in the order of storage: {share}"
    yield on[picture, flat.argmax(axis=1)], first
    last = flat.shape[1] - 1 - flat[:, ::-1].argmax(axis=1)
    yield on[picture, last], "pointing: the last of the tied maxima is taken: " + share
    yield (
        hits > 0,
        f"pointing: a single tied maximum on the object is enough for you, so that a blank map always wins: {share}",
    )
    yield hits == top.sum(axis=1), f"pointing: all or nothing: {share}"
    yield hits, "pointing: this is a number of pixels: divide by the number of tied maxima"
    area = "pointing: divided by the object's area: divide by the number of tied maxima"
    yield hits / on.sum(axis=1), area
    of_batch = flat == flat.max()
    yield (
        (of_batch & on).sum(axis=1) / np.maximum(of_batch.sum(axis=1), 1),
        "pointing: the maximum is taken over the whole batch: each map has its own",
    )
    yield (
        np.where((flat <= 0).all(axis=1), 0, pointing),
        "pointing: a blank map scores 0 here. All its pixels are tied: the same rule gives it the object's share",
    )
    yield pointing.mean(), "pointing: the mean over the batch; asked is one score per map, [B]"


def judge(case: Case, seen: Seen) -> None:
    """Maps and masks are left alone, and both scores are the library's."""
    maps, masks = inputs(case)
    untouched(seen, maps=maps, masks=masks)
    values, inside = enlarged(maps, masks), torch.from_numpy(masks)
    energy, got = localisation.energy_in_mask(values, inside).numpy(), array(seen, "energy", "the energy")
    blank = (values.flatten(1) <= 0).all(dim=1).numpy()
    area = float(masks.mean(axis=(1, 2))[blank][0]) if blank.any() else 0.0
    chance = f"like a uniform map, by the object's share of the picture, {area:.3g}"
    if got.shape == energy.shape:
        no_nan(got[blank], energy[blank], f"energy: NaN for a map without anything positive, 0/0. Score it {chance}")
    compare(got, energy, "the energy", energy_mistakes(maps, masks, energy, chance))
    pointing, got = localisation.pointing_game(values, inside).numpy(), array(seen, "pointing", "the pointing game")
    compare(got, pointing, "the pointing game", pointing_mistakes(maps, masks, pointing))


SQUARE = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
QUESTION = Question(
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
            "masks": [SQUARE, SQUARE, SQUARE],
        },
        {
            "what": "ties: three maxima of which one is on the object, and a blank map",
            "maps": [
                [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0]],
                [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            ],
            "masks": [SQUARE, SQUARE],
        },
        {"what": "maps of 5 x 7 patches, masks of 20 x 28 pixels", "seed": 5, "batch": 8, "size": [5, 7], "scale": 4},
    ),
    probe=probe,
    judge=judge,
    hints=(
        'Bring the maps to the masks\' size with mode="nearest", then flatten both to [B, H*W] and work along dim=1: '
        "no loop is needed.",
        "Energy: clamp at 0; the sum on the object over the sum of all; where nothing is positive, put ones. Pointing: "
        "compare every value with its row's largest, so that *all* tied maxima are marked, and count them.",
        "Energy: blank = positive.amax(dim=1, keepdim=True) == 0, positive = torch.where(blank, 1.0, positive), then "
        "(positive * inside).sum(1) / positive.sum(1). Pointing: top = values == values.amax(dim=1, keepdim=True), "
        "(top & inside).sum(1) / top.sum(1).",
    ),
    section="chapter 5, section 5.6, and chapter 8, section 8.4",
)
