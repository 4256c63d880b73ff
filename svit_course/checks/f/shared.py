"""For f1 and f2 a toy model and its answers; for f3 and f4 tables of errors and sparsities, and a choice judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from svit_course.question import Case, Seen, Wrong
from svit_utils.attention import densify, sparsify

# ------------------------------------------------------------------------------------------------ f1 and f2


def draw_model(case: Case, dropout: float = 0.0) -> VisionTransformer:
    """A dense ViT of toy size with uneven attention rows, in eval mode: 17 tokens, ``depth`` layers, ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        model = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=case["depth"],
            num_heads=3,
            num_classes=7,
            proj_drop_rate=dropout,
            attn_drop_rate=dropout,
        )
        torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
            block.attn.proj.weight.mul_(10)
    return model.double().eval()


def draw_images(case: Case) -> torch.Tensor:
    """[B, 3, 32, 32], each picture with a contrast of its own."""
    generator = torch.Generator().manual_seed(case["seed"])
    images = torch.randn(case["images"], 3, 32, 32, generator=generator, dtype=torch.float64)
    return images * torch.linspace(0.3, 2.0, case["images"], dtype=torch.float64)[:, None, None, None]


class Logits:
    """Logits [B, classes] of the case's model, given the taus of its layers; a layer that has none stays dense."""

    def __init__(self, case: Case) -> None:
        self.model, self.images = draw_model(case), draw_images(case)

    def __call__(self, taus: Mapping[int, float]) -> np.ndarray:
        densify(self.model)
        sparsify(self.model, taus)
        with torch.no_grad():
            return np.asarray(self.model(self.images).numpy())


def lengths(values: np.ndarray) -> np.ndarray:
    """Root of the sum of squares over the classes, [B, classes] -> [B]."""
    return np.asarray(np.sqrt((values**2).sum(axis=1)))


def judge_left_cut(seen: Seen) -> None:
    """
    Raises:
        Wrong: ``seen["left"]`` names modules that are still cut after the call.
    """
    if seen["left"]:
        raise Wrong(
            f"the model is still cut afterwards ({', '.join(seen['left'])}): whoever uses it next measures something "
            "else. Cut inside `with sparsified(...)`, which puts back what was there"
        )


# ------------------------------------------------------------------------------------------------ f3 and f4

# A choice may cut this much less than the best one, as a share of it.
GAP = 0.01


def draw_tables(case: Case, seed: str = "seed") -> tuple[np.ndarray, np.ndarray]:
    """Errors and sparsities [layers, taus]: written out, or drawn, both rising with tau.

    ``falls``: a layer whose last error is small again, as where most rows lose every key and fall back to dense
    attention.
    """
    if "error" in case:
        return np.array(case["error"], dtype=np.float64), np.array(case["sparsity"], dtype=np.float64)
    rng = np.random.default_rng(case[seed])
    shape = (case["layers"], len(case["taus"]))
    error = np.cumsum(rng.uniform(0.2, 1.0, shape), axis=1) * rng.lognormal(-2.5, 0.7, (case["layers"], 1))
    steps = rng.uniform(0.1, 1.0, shape)
    whole = steps.sum(axis=1, keepdims=True) + rng.uniform(0.05, 0.5, (case["layers"], 1))
    sparsity = np.cumsum(steps, axis=1) / whole
    if case["taus"][0] == 0:
        error[:, 0] = sparsity[:, 0] = 0
    if "falls" in case:
        error[case["falls"], -1] = error[case["falls"], 1]
    return error, sparsity


def picked_columns(case: Case, chosen: Any, layers: int) -> np.ndarray:
    """The columns [layers] that the chosen taus stand for.

    Raises:
        Wrong: they are not one of the case's taus for each layer.
    """
    taus = np.asarray(case["taus"], dtype=np.float64)
    if chosen is None:
        raise Wrong("the result is None: does the function end without `return`?")
    try:
        values = np.asarray(chosen, dtype=np.float64)
    except (TypeError, ValueError):
        raise Wrong(f"the taus should be a list of {layers} numbers, one per layer, and are {chosen!r:.80}") from None
    if values.shape != (layers,):
        raise Wrong(f"{layers} layers need {layers} taus, one per layer; what came has shape {values.shape}")
    far = np.abs(values[:, None] - taus)  # [layers, taus]
    strange = far.min(axis=1) > 1e-9
    if strange.any():
        if (values == values.round()).all() and values.min() >= 0 and values.max() < len(taus):
            raise Wrong(
                f"{values.astype(int).tolist()} are indices, the places of the taus in the list, not their values: "
                "return taus[j]"
            )
        raise Wrong(f"{values[strange][0]:g} is not one of the taus given ({', '.join(f'{t:g}' for t in taus)})")
    return np.asarray(far.argmin(axis=1))


def total(table: np.ndarray, columns: np.ndarray) -> float:
    """The sum over the layers of a table's entries in the chosen columns."""
    return float(table[np.arange(len(table)), columns].sum())


def judge_columns(case: Case, columns: np.ndarray, error: np.ndarray, sparsity: np.ndarray) -> None:
    """
    Raises:
        Wrong: the choice exceeds the budget, or cuts less than the best one (``best`` in the case) by more than `GAP`.
    """
    budget, layers, cut = case["budget"], len(error), total(sparsity, columns)
    judge_budget(columns, error, sparsity, budget)
    if cut >= case["best"] * (1 - GAP) - 1e-9:
        return
    spent = total(error, columns)
    found = (
        f"the budget holds ({spent:.4g} of {budget:g}), and the sparsities add up to {cut:.4g} where "
        f"{case['best']:.4g} is possible"
    )
    if "strict" in case and abs(cut - case["strict"]) < 1e-4:
        raise Wrong(f"{found}: a choice that meets the budget exactly holds it, <= and not <")
    if "falls" in case and columns[case["falls"]] != len(case["taus"]) - 1:
        raise Wrong(f"{found}: an error can fall again at a larger tau. Do not stop at the first that is too large")
    if (columns == error.argmin(axis=1)).all():
        raise Wrong(f"{found}: these are the taus of the smallest error. The budget may be spent")
    if (columns == columns[0]).all():
        raise Wrong(f"{found}: you took one tau for all layers. Let each layer have its own")
    if (columns == sparsest_within(budget / layers, error, sparsity)).all():
        raise Wrong(
            f"{found}: the budget is split evenly. A layer that bears the cut well may leave its share to others"
        )
    if "fullest" in case and abs(spent - case["fullest"]) < 1e-4:
        raise Wrong(
            f"{found}: of all choices yours has the largest error. Maximise the sparsity; the error only has to fit"
        )
    raise Wrong(
        f"{found}. Taking layers one after the other, or step by step what looks cheapest, can end here: with few "
        "layers all choices can be tried"
    )


def judge_budget(columns: np.ndarray, error: np.ndarray, sparsity: np.ndarray, budget: float) -> None:
    """
    Raises:
        Wrong: the errors of the chosen columns add up to more than the budget.
    """
    spent = total(error, columns)
    if spent <= budget + 1e-9:
        return
    why = "add the errors of all layers up before you compare"
    if (columns == sparsest_within(budget, error, sparsity)).all():
        why = "each layer holds the budget by itself, their sum does not"
    elif (columns == sparsity.argmax(axis=1)).all():
        why = "every layer took its sparsest tau, whatever the error"
    elif spent / len(error) <= budget:
        why = "the mean over the layers is within it: the budget is for the sum"
    raise Wrong(f"the budget is exceeded: the errors of your taus add up to {spent:.4g}, allowed are {budget:g}; {why}")


def sparsest_within(limit: float, error: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    """In each layer by itself the column with the most sparsity among those whose error is within the limit."""
    return np.asarray(np.where(error <= limit, sparsity, -1.0).argmax(axis=1))
