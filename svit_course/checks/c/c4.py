"""c4: the class token's attention, laid out on the grid of patches."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from svit_course.checks.c.shared import logits, pictures, vit
from svit_course.judging import Mistake, array, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong, describe
from svit_utils import sparsify
from svit_utils.attention import sparse_modules

# What Python says when a list that a hook should have filled is empty.
NOTHING_SEEN = re.compile(
    r"list index out of range|non-empty|NoneType|not associated with a value|referenced before|pop from|KeyError|"
    r"at least one|StopIteration|is not defined|has no attribute"
)
FUSED = (
    "timm's attention is fused: the weights never exist, attn_drop is never called, and a hook on it never fires. "
    "Set fused_attn = False on that module for the length of the call, or compute the weights from the tokens that "
    "enter it"
)
PREFIX = {"distilled": 2, "registers": 5}  # prefix tokens of a model; 1 in the others
Lay = Callable[[np.ndarray], np.ndarray]


def state(model: nn.Module) -> list[int]:
    """fused_attn and training mode of every module."""
    return [int(getattr(m, "fused_attn", False)) for m in model.modules()] + [int(m.training) for m in model.modules()]


def probe(case: Case, class_attention_on_grid: Any) -> Seen:
    """The map, or the error in its place; and the model's state, hooks and logits before and afterwards."""
    model, x = vit(case), pictures(case)
    before, dense = state(model), logits(model, x)
    try:
        result = class_attention_on_grid(model, x)
    except NotImplementedError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if NOTHING_SEEN.search(text):
            return {"stopped": text}
        return {"failed": text, "words": describe(error, ("class_attention_on_grid",))}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    seen = {"map": result, "before": before, "state": state(model), "hooks": hooks, "dense": dense}
    return {**seen, "after": logits(model, x)}


def weights(case: Case, layer: int = -1, **changes: Any) -> np.ndarray:
    """The softmax [B, H, N, N] that the library sees in a layer, with something in the last block changed."""
    model = vit(case)
    last = model.blocks[-1]  # type: ignore[index]
    for name, value in changes.items():
        setattr(last if hasattr(last, name) else last.attn, name, value)
    sparsify(model, 0.0, layers=[layer])
    records: list[Any] = []
    for module in sparse_modules(model).values():
        module.observers.append(lambda _module, record: records.append(record))
    logits(model, pictures(case))
    return np.asarray(records[0].probs.numpy())


def weights_after_last(case: Case) -> list[np.ndarray]:
    """The softmax [B, H, N, N] of the last attention if it got tokens that have been through its block already.

    Those that leave the block, and those that forward_features returns; each as they are, and after norm1.
    """
    model, x, tokens = vit(case), pictures(case), []
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


def why_no_grid(seen: Seen, p: int, patches: int) -> str:
    """Sizes in an error's text tell a row that still holds ``p`` prefix tokens from a shape that is written down."""
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


def layout_mistakes(row: np.ndarray, p: int, h: int, w: int, lay: Lay) -> Iterator[Mistake]:
    """The right row [B, H, N], laid out in another way."""
    first = "first key is no patch" if p == 1 else f"first {p} keys are no patches"
    left_in = f"a prefix token is left in the map: the {first}"
    yield row, left_in + ". Leave them out, then lay the rest out on the grid"
    yield lay(row[..., : h * w]), left_in + ", and everything is shifted"
    one = f"only one prefix token is left out; this model has {p}: num_prefix_tokens"
    yield lay(row[..., 1 : 1 + h * w]), one
    patches, right = row[..., p:], lay(row[..., p:])
    yield patches, "the patches are still in a row: lay them out on patch_embed.grid_size"
    heads = "averaged over the heads: the question asks for [B, H, h, w], each head on its own"
    yield right.mean(axis=1), heads
    yield (
        right / right.sum(axis=(-1, -2), keepdims=True),
        "divided by the sum: leave the weights as they are, what goes to the prefix tokens is missing in the map",
    )
    side = math.isqrt(h * w)
    if side * side == h * w:
        square = f"the grid is taken for a square, {side} x {side}: it is {h} x {w}, model.patch_embed.grid_size"
        yield patches.reshape(*patches.shape[:2], side, side), square
    turned = patches.reshape(*patches.shape[:2], w, h)
    yield turned, f"the grid is h x w = {h} x {w}, and the map {w} x {h}"
    yield turned.swapaxes(-1, -2), "the patches lie row by row: reshape to (h, w), without a transpose"


def row_mistakes(case: Case, full: np.ndarray, p: int, lay: Lay) -> Iterator[Mistake]:
    """Another row of the weights [B, H, N, N], or of other weights."""
    column = "this is how much each patch looks at the class token: take the class token's *row*, weights[:, :, 0]"
    yield lay(full[:, :, p:, 0]), column
    yield lay(full[:, :, p - 1, p:]), f"the query is token {p - 1}; the class token is token 0"
    yield lay(full[:, :, :p, p:].mean(axis=2)), "averaged over the prefix tokens: the class token is token 0"
    yield lay(full[:, :, p, p:]), "the query is the first patch; the class token is token 0"
    yield lay(full.mean(axis=2)[..., p:]), "averaged over all queries: only the class token's row is asked for"
    yield lay(weights(case, 0)[:, :, 0, p:]), "this is the first block: take the last"
    none, without = nn.Identity(), "this is not the softmax of the scaled scores"
    yield lay(weights(case, scale=1.0)[:, :, 0, p:]), without + ": self.scale is forgotten"
    bare = weights(case, q_norm=none, k_norm=none)
    yield lay(bare[:, :, 0, p:]), without + ": q_norm and k_norm are left out"
    entering = "the tokens are those that enter the block; the attention gets them after norm1"
    yield lay(weights(case, norm1=none)[:, :, 0, p:]), entering
    for after in weights_after_last(case):
        yield (
            lay(after[:, :, 0, p:]),
            "the tokens are those *after* the last block, as forward_features gives them: the last attention gets "
            "those that enter its block, after norm1",
        )


def judge(case: Case, seen: Seen) -> None:
    """The map is the class token's row on the grid, and the model is left as it was."""
    p = PREFIX.get(case["model"], 1)
    h, w = (pixels // 8 for pixels in case.get("pixels", (32, 32)))
    if "stopped" in seen:
        raise Wrong(f"it stops with {seen['stopped']}. Was nothing recorded? {FUSED}")
    if "failed" in seen:
        raise Wrong(why_no_grid(seen, p, h * w))
    value = seen["map"]
    if value is None:
        raise Wrong(f"the map is None: does the function end without `return`? Or was nothing recorded? {FUSED}")
    if isinstance(value, list) and not value:
        raise Wrong(f"it returns []: nothing was recorded. {FUSED}")

    def lay(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(*rows.shape[:-1], h, w)

    def mistakes() -> Iterator[Mistake]:
        yield from layout_mistakes(full[:, :, 0], p, h, w, lay)
        yield from row_mistakes(case, full, p, lay)

    full = weights(case)
    compare(array(seen, "map", "the map"), lay(full[:, :, 0, p:]), "the map", mistakes())
    if seen["hooks"]:
        raise Wrong(f"{seen['hooks']} hook(s) are still on the model afterwards: handle.remove(), in `finally`")
    if seen["state"] != seen["before"]:
        raise Wrong("fused_attn or the training mode of a module is changed afterwards: put back what you change")
    unchanged(seen["dense"], seen["after"], "model")


QUESTION = Question(
    name="c4",
    answers=("class_attention_on_grid",),
    cases=(
        {"what": "a grid of 4 x 4", "model": "ViT", "seed": 1},
        {"what": "a wide picture, 4 x 6 patches", "model": "ViT", "seed": 2, "pixels": [32, 48]},
        {"what": "a distilled DeiT, two prefix tokens", "model": "distilled", "seed": 3},
        {"what": "normalised queries and keys", "model": "normalised", "seed": 4},
    ),
    probe=probe,
    judge=judge,
    hints=(
        "The weights have to come into being first: either unfuse the last block's attention for one call, or compute "
        "them yourself from what enters it.",
        "A forward *pre*-hook on model.blocks[-1].attn gets the tokens [B, N, C]. From there: qkv, q_norm and k_norm, "
        "scale, softmax. The class token is query 0.",
        "weights[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size). Remove the hook in "
        "`finally`.",
    ),
    section="chapter 2, sections 2.6 and 2.10, and chapter 5, section 5.2",
)
