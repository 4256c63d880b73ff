"""Assignment f: a threshold for each layer, chosen to an error budget. What is checked, and the hints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from svit_course.judging import Mistake, array, close, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention import densify, sparse_modules, sparsify

# An answer to f3 may cut this much less than the best choice, as a share of it.
GAP = 0.01

# ------------------------------------------------------------------------------------------------ f1: the output error


def _model(case: Case, shake: float = 0.0) -> VisionTransformer:
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
            proj_drop_rate=shake,
            attn_drop_rate=shake,
        )
        torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
            block.attn.proj.weight.mul_(10)
    return model.double().eval()


def _images(case: Case) -> torch.Tensor:
    """[B, 3, 32, 32], each picture with a contrast of its own."""
    generator = torch.Generator().manual_seed(case["seed"])
    images = torch.randn(case["images"], 3, 32, 32, generator=generator, dtype=torch.float64)
    return images * torch.linspace(0.3, 2.0, case["images"], dtype=torch.float64)[:, None, None, None]


class _Logits:
    """Logits [B, classes] of the case's model, dense where ``taus`` names no layer."""

    def __init__(self, case: Case) -> None:
        self.model, self.images = _model(case), _images(case)

    def __call__(self, taus: Mapping[int, float]) -> np.ndarray:
        densify(self.model)
        sparsify(self.model, taus)
        with torch.no_grad():
            return np.asarray(self.model(self.images).numpy())


def _lengths(values: np.ndarray) -> np.ndarray:
    return np.sqrt((values**2).sum(axis=1))


def _still_cut(seen: Seen) -> None:
    if seen["left"]:
        raise Wrong(
            f"the model is still cut afterwards ({', '.join(seen['left'])}): whoever uses it next measures something "
            "else. Cut inside `with sparsified(...)`, which puts back what was there"
        )


def _probe_error(case: Case, output_error: Any) -> Seen:
    model, images = _model(case, shake=0.4), _images(case)
    model.train(bool(case.get("training")))
    taus = dict(case["taus"])
    error = output_error(model, taus, images)
    again = None if sparse_modules(model) else output_error(model, taus, images)
    mode = "training" if model.training else "eval"
    return {
        "error": error,
        "again": again,
        "left": list(sparse_modules(model)),
        "mode": mode,
        "images": images,
        "taus": [[layer, tau] for layer, tau in taus.items()],
    }


def _judge_error(case: Case, seen: Seen) -> None:
    _still_cut(seen)
    unchanged(_images(case), seen["images"], "images")
    if seen["taus"] != [list(pair) for pair in case["taus"]]:
        raise Wrong("it changed the dict of taus that it was given: the caller still needs it")
    mode = "training" if case.get("training") else "eval"
    if seen["mode"] != mode:
        raise Wrong(f"the model came in {mode} mode and is in {seen['mode']} mode afterwards: put it back as it was")
    got, again = array(seen, "error", "the result"), array(seen, "again", "the result of a second call")
    if got.shape == again.shape and not close(got, again):
        raise Wrong(
            "two calls give two different errors: the model is in train mode, and dropout draws anew each time. "
            "Measure in eval mode, model.eval()"
        )
    taus = dict(case["taus"])
    logits = _Logits(case)
    dense, cut = logits({}), logits(taus)
    away, length = _lengths(cut - dense), _lengths(dense)
    with np.errstate(all="ignore"):
        single = np.abs((cut - dense) / dense).mean(axis=1)
    across = np.sqrt(((cut - dense) ** 2).sum(axis=0)) / np.sqrt((dense**2).sum(axis=0))
    whole = np.asarray(np.linalg.norm(cut - dense) / np.linalg.norm(dense))
    one_each = "the question asks for one number per image, [B]"
    mistakes: list[Mistake] = [
        (
            np.zeros_like(away),
            "0 everywhere, and the cut does change the outputs: are both calls dense, or both cut? "
            "(A negative layer counts from the end.)",
        ),
        (away, "the error is not relative: divide by the length of the *dense* logits of the same image"),
        (away / _lengths(cut), "divided by the length of the cut logits: the dense ones are the yardstick"),
        ((away / length) ** 2, "this is the square of the relative error: take the root of the sums of squares"),
        (
            np.abs(cut - dense).sum(1) / np.abs(dense).sum(1),
            "sums of absolute values: the question uses lengths, roots of sums of squares",
        ),
        (
            single,
            "relative errors of single logits, averaged: a logit near 0 decides. Divide the lengths, once per image",
        ),
        (
            whole,
            f"averaged over the batch: this is one ratio for all images, and {one_each}: take norms over the classes",
        ),
        (np.asarray((away / length).mean()), f"averaged over the images already: {one_each}; f2 averages"),
        (away / length.mean(), "divided by the mean length over the batch: each image has its own yardstick"),
        (away / np.linalg.norm(dense), "divided by the length of the whole batch: each image has its own yardstick"),
        (across, "the norm runs over the images: it runs over the classes, dim=1, and leaves one number per image"),
        (
            (cut.argmax(1) != dense.argmax(1)).astype(float),
            "these are 0 and 1: the error asked for is how far the logits move, not whether the answer changes",
        ),
    ]
    if taus:
        everywhere = logits(dict.fromkeys(range(case["depth"]), case["taus"][0][1]))
        named = "every layer is cut at the same tau: cut only the layers in the dict, each at its own tau"
        mistakes.insert(1, (_lengths(everywhere - dense) / length, named))
    compare(got, away / length, "the error", mistakes, rtol=1e-4, atol=1e-6)


F1 = Question(
    name="f1",
    answers=("output_error",),
    cases=(
        {"what": "two layers at one tau", "seed": 1, "depth": 2, "images": 4, "taus": [[0, 0.08], [1, 0.08]]},
        {"what": "one layer of three, the others stay dense", "seed": 2, "depth": 3, "images": 5, "taus": [[1, 0.1]]},
        {
            "what": "a model that comes in training mode",
            "seed": 3,
            "depth": 2,
            "images": 3,
            "taus": [[0, 0.05], [1, 0.1]],
            "training": True,
        },
    ),
    probe=_probe_error,
    judge=_judge_error,
    hints=(
        "Two forward passes, one dense and one cut, on the same images. Everything else is bookkeeping: mode, "
        "gradients, and how the model looks afterwards.",
        "`with sparsified(model, taus):` cuts the layers that the dict names and restores the model. Remember "
        "model.training, call model.eval(), and put it back with model.train(was).",
        "(cut - dense).norm(dim=1) / dense.norm(dim=1), with dense = model(images) outside the with block and "
        "cut = model(images) inside it, all under torch.no_grad().",
    ),
    section="chapter 2, sections 8 and 9",
)

# ------------------------------------------------------------------------------------------------ f2: one at a time


def _probe_sensitivity(case: Case, sensitivity: Any) -> Seen:
    model, images, taus = _model(case), _images(case), list(case["taus"])
    try:
        errors = sensitivity(model, images, taus)
    except ValueError as error:
        if "unknown layer" not in str(error):
            raise
        raise Wrong(
            f"it asks for a layer that is not there ({error}). Is the number of layers written into the code?"
        ) from error
    return {"errors": errors, "left": list(sparse_modules(model)), "images": images, "taus": taus}


def _judge_sensitivity(case: Case, seen: Seen) -> None:
    _still_cut(seen)
    unchanged(_images(case), seen["images"], "images")
    unchanged(case["taus"], seen["taus"], "taus")
    layers, taus = range(case["depth"]), case["taus"]
    logits = _Logits(case)
    dense = logits({})
    length = _lengths(dense)

    def away(named: Any) -> np.ndarray:
        """Distances [layers, taus, B] where ``named(layer)`` lists the layers that are cut."""
        rows = [[_lengths(logits(dict.fromkeys(named(l), t)) - dense) for t in taus] for l in layers]
        return np.array(rows)

    alone = away(lambda l: [l])
    relative = alone / length
    expected = relative.mean(axis=-1)
    got = array(seen, "errors", "the table") if not isinstance(seen.get("errors"), list) else np.asarray(seen["errors"])
    if got.ndim == 2 and got.shape[1] == len(taus) and got.shape[0] != len(layers):
        raise Wrong(
            f"the table has {got.shape[0]} rows and the model {len(layers)} layers: is the number of layers written "
            "into the code? Ask the model, len(model.blocks)"
        )
    compare(
        got,
        expected,
        "the table",
        (
            (expected.T, "rows and columns are exchanged: [layers, taus]"),
            (
                expected[:, np.argsort(taus)],
                "the columns are sorted by tau: keep the order in which the taus are given",
            ),
            (
                (away(lambda l: list(range(l + 1))) / length).mean(-1),
                "layers pile up: in row l every layer up to l is cut. One at a time, the others dense",
            ),
            (
                (away(lambda l: list(layers)) / length).mean(-1),
                "every layer is cut at once: one at a time, the others dense",
            ),
            (
                (away(lambda l: [k for k in layers if k != l]) / length).mean(-1),
                "the layer of the row is the only one that is *not* cut: it should be the only one that is",
            ),
            (relative.max(-1), "the largest error over the images: the question asks for the mean"),
            (np.median(relative, -1), "the median over the images: the question asks for the mean"),
            (relative.sum(-1), "the sum over the images: divide by their number"),
            (alone.mean(-1), "the errors are not relative: does f1 hold?"),
            (
                np.sqrt((alone**2).sum(-1)) / np.linalg.norm(length),
                "one ratio for the whole batch: average the relative errors of the images",
            ),
            (np.zeros_like(expected), "0 everywhere: is the model dense while you measure?"),
        ),
        rtol=1e-4,
        atol=1e-6,
    )


F2 = Question(
    name="f2",
    answers=("sensitivity",),
    cases=(
        {"what": "three layers, four taus", "seed": 4, "depth": 3, "images": 4, "taus": [0.0, 0.05, 0.1, 0.2]},
        {"what": "two layers, one tau", "seed": 5, "depth": 2, "images": 3, "taus": [0.1]},
    ),
    probe=_probe_sensitivity,
    judge=_judge_sensitivity,
    hints=(
        "You have output_error. What does the dict of taus look like when only layer 2 is cut?",
        "{2: tau}: the layers that the dict does not name stay dense. Two loops, layers outside, taus inside, and the "
        "mean over the images.",
        "For l in range(len(model.blocks)) and t in taus: output_error(model, {l: t}, images).mean(), put into a list "
        "of rows, one row per layer, and np.array around it.",
    ),
    section="chapter 2, section 9",
)

# ------------------------------------------------------------------------------------------------ f3: choosing


def _tables(case: Case, seed: str = "seed") -> tuple[np.ndarray, np.ndarray]:
    """Errors and sparsities [layers, taus]: written out, or drawn, both rising with tau. ``falls``: a layer whose last
    error is small again, as where most rows lose every key and fall back to dense attention."""
    if "error" in case:
        return np.array(case["error"], dtype=np.float64), np.array(case["sparsity"], dtype=np.float64)
    rng = np.random.default_rng(case[seed])
    shape = (case["layers"], len(case["taus"]))
    error = np.cumsum(rng.uniform(0.2, 1.0, shape), axis=1) * rng.lognormal(-2.5, 0.7, (case["layers"], 1))
    steps = rng.uniform(0.1, 1.0, shape)
    sparsity = np.cumsum(steps, axis=1) / (
        steps.sum(axis=1, keepdims=True) + rng.uniform(0.05, 0.5, (case["layers"], 1))
    )
    if case["taus"][0] == 0:
        error[:, 0] = sparsity[:, 0] = 0
    if "falls" in case:
        error[case["falls"], -1] = error[case["falls"], 1]
    return error, sparsity


def _picked(case: Case, chosen: Any, layers: int) -> np.ndarray:
    """The columns [layers] that the chosen taus stand for."""
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
    if far.min(axis=1).max() > 1e-9:
        if (values == values.round()).all() and values.min() >= 0 and values.max() < len(taus):
            raise Wrong(
                f"{values.astype(int).tolist()} are indices, the places of the taus in the list, not their values: "
                "return taus[j]"
            )
        raise Wrong(
            f"{values[far.min(axis=1) > 1e-9][0]:g} is not one of the taus given ({', '.join(f'{t:g}' for t in taus)})"
        )
    return np.asarray(far.argmin(axis=1))


def _total(table: np.ndarray, columns: np.ndarray) -> float:
    return float(table[np.arange(len(table)), columns].sum())


def _judge_columns(case: Case, columns: np.ndarray, error: np.ndarray, sparsity: np.ndarray) -> None:
    """First whether the budget holds, then whether the choice is as sparse as it can be (``best`` in the case)."""
    budget, layers = case["budget"], len(error)
    spent, cut = _total(error, columns), _total(sparsity, columns)

    def largest(limit: float) -> np.ndarray:
        """In each layer by itself the column with the most sparsity among those whose error is within the limit."""
        return np.where(error <= limit, sparsity, -1.0).argmax(axis=1)

    if spent > budget + 1e-9:
        why = "add the errors of all layers up before you compare"
        if (columns == largest(budget)).all():
            why = "each layer holds the budget by itself, their sum does not"
        elif (columns == sparsity.argmax(axis=1)).all():
            why = "every layer took its sparsest tau, whatever the error"
        elif spent / layers <= budget:
            why = "the mean over the layers is within it: the budget is for the sum"
        raise Wrong(
            f"the budget is exceeded: the errors of your taus add up to {spent:.4g}, allowed are {budget:g}; {why}"
        )
    if cut >= case["best"] * (1 - GAP) - 1e-9:
        return
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
    if (columns == largest(budget / layers)).all():
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


def _probe_choose(case: Case, choose_thresholds: Any) -> Seen:
    error, sparsity = _tables(case)
    taus, raised, chosen = list(case["taus"]), None, None
    try:
        chosen = choose_thresholds(error, sparsity, taus, case["budget"])
    except ValueError as problem:
        if "best" in case:
            raise
        raised = str(problem)
    return {"chosen": chosen, "raised": raised, "error": error, "sparsity": sparsity, "taus": taus}


def _judge_choose(case: Case, seen: Seen) -> None:
    error, sparsity = _tables(case)
    unchanged(error, seen["error"], "error_table")
    unchanged(sparsity, seen["sparsity"], "sparsity_table")
    unchanged(case["taus"], seen["taus"], "taus")
    if "best" not in case:
        if seen["raised"] is None:
            least = error.min(axis=1).sum()
            raise Wrong(
                f"the budget is exceeded: no choice holds {case['budget']:g} here, the least is {least:.4g}. Raise a "
                "ValueError instead of returning something"
            )
        return
    _judge_columns(case, _picked(case, seen["chosen"], len(error)), error, sparsity)


F3 = Question(
    name="f3",
    answers=("choose_thresholds",),
    cases=(
        {
            "what": "two layers by hand",
            "taus": [0.001, 0.01, 0.1],
            "error": [[0.02, 0.10, 0.30], [0.10, 0.25, 0.60]],
            "sparsity": [[0.2, 0.6, 0.9], [0.3, 0.5, 0.8]],
            "budget": 0.42,
            "best": 1.2,
        },
        {
            "what": "four layers, drawn",
            "seed": 30,
            "layers": 4,
            "taus": [0.0, 0.0025, 0.005, 0.01, 0.02],
            "budget": 0.36,
            "best": 2.053538,
            "fullest": 0.356657,
        },
    ),
    probe=_probe_choose,
    judge=_judge_choose,
    hints=(
        "Layers share one budget: what one spends, another cannot. How many choices have 4 layers and 6 taus?",
        "6 ** 4 = 1296: try them all. itertools.product(range(len(taus)), repeat=number of layers) lists them.",
        "For each choice add up error_table[l, j] over the layers; skip it above the budget (equal is allowed); keep "
        "the one with the largest sum of sparsity_table[l, j]. Return taus[j], not j.",
    ),
    section="chapter 2, section 9, and chapter 4, section 4.7",
)

# ------------------------------------------------------------------------------------------------ f4: report

_KEYS = ("taus", "validation_error", "test_error", "test_sparsity", "kept")


def _splits(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Validation and test tables (error, sparsity) that disagree, and another test set that is kinder."""
    validation, test = _tables(case), _tables(case, "test_seed")
    return {"validation": validation, "test": test, "kinder": (0.4 * validation[0], test[1][::-1].copy())}


def _probe_report(case: Case, choose_and_report: Any) -> Seen:
    seen: Seen = {}
    for test in ("test", "kinder"):
        splits = {name: {"error": e, "sparsity": s} for name, (e, s) in _splits(case).items()}
        seen[test] = choose_and_report(splits["validation"], splits[test], list(case["taus"]), case["budget"])
        seen[f"{test}-tables"] = [splits[name][kind] for name in ("validation", test) for kind in ("error", "sparsity")]
    return seen


def _judge_report(case: Case, seen: Seen) -> None:
    splits = _splits(case)
    error, sparsity = splits["validation"]
    columns = {}
    for test in ("test", "kinder"):
        names = ("validation['error']", "validation['sparsity']", "test['error']", "test['sparsity']")
        for name, before, after in zip(names, (*splits["validation"], *splits[test]), seen[f"{test}-tables"]):
            unchanged(before, after, name)
        report = seen[test]
        if not isinstance(report, dict) or not set(_KEYS) <= set(report):
            came = f"a dict with {', '.join(report)}" if isinstance(report, dict) else type(report).__name__
            raise Wrong(f"the report should be a dict with {', '.join(_KEYS)}, and is {came}")
        columns[test] = _picked(case, report["taus"], len(error))
    if (columns["test"] != columns["kinder"]).any():
        raise Wrong(
            "the taus change when nothing but the test tables changes: the test set is used for choosing tau. Choose "
            "on validation, and read the test tables once the taus stand"
        )
    for test in ("test", "kinder"):
        _judge_columns(case, columns[test], error, sparsity)
        _judge_numbers(case, seen[test], columns[test], splits["validation"], splits[test])


def _judge_numbers(
    case: Case,
    report: Mapping[str, Any],
    columns: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> None:
    layers = len(columns)
    spent, on_test = _total(validation[0], columns), _total(test[0], columns)
    cut = _total(test[1], columns) / layers
    mean = "this is the mean over the layers: the budget is for the sum, so report the sum"
    from_validation = "this is the number of the validation tables: the report is about the test tables"
    compare(
        array(dict(report), "validation_error", "validation_error"),
        spent,
        "validation_error",
        ((on_test, "validation_error comes from the test tables"), (spent / layers, mean)),
    )
    compare(
        array(dict(report), "test_error", "test_error"),
        on_test,
        "test_error",
        ((spent, from_validation), (on_test / layers, mean)),
    )
    compare(
        array(dict(report), "test_sparsity", "test_sparsity"),
        cut,
        "test_sparsity",
        (
            (cut * layers, "this is the sum over the layers: report the mean, a share between 0 and 1"),
            (_total(validation[1], columns) / layers, from_validation),
        ),
    )
    kept = on_test <= case["budget"]
    if report["kept"] not in (True, False):
        raise Wrong(f"kept should be True or False, and is {report['kept']!r}")
    if bool(report["kept"]) != kept:
        held = "holds" if kept else "does not hold"
        raise Wrong(
            f"kept is {report['kept']}, and on test the budget {held} ({on_test:.4g}, allowed are {case['budget']:g}). "
            "Say so either way: compare test_error with the budget, not validation_error"
        )


F4 = Question(
    name="f4",
    answers=("choose_and_report",),
    cases=(
        {
            "what": "four layers, and a test set that disagrees",
            "seed": 60,
            "test_seed": 160,
            "layers": 4,
            "taus": [0.0, 0.0025, 0.005, 0.01, 0.02],
            "budget": 0.37,
            "best": 2.105859,
        },
    ),
    probe=_probe_report,
    judge=_judge_report,
    hints=(
        "Which of the four tables may the choice see? Which only after it?",
        "choose_thresholds gets the two validation tables. Its taus are then looked up in the tables of both sets.",
        "columns = [list(taus).index(t) for t in chosen]; test['error'][range(len(columns)), columns].sum() is "
        "test_error, and kept is test_error <= budget, whichever way it falls.",
    ),
    section="chapter 4, section 4.2, validation chooses, test reports",
)

QUESTIONS = (F1, F2, F3, F4)
