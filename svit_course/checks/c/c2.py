"""c2: convert a timm model to thresholded attention, and restore it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from timm.layers.attention import Attention
from torch import nn

from svit_course.checks.c.shared import cut_logits, judge_names, logits, pictures, step, vit
from svit_course.judging import Mistake, array, close, compare
from svit_course.question import Case, Question, Seen, Wrong, describe
from svit_utils import sparsify


def flags(model: nn.Module) -> list[int]:
    """Training mode of every module, then requires_grad of every parameter."""
    return [int(m.training) for m in model.modules()] + [int(p.requires_grad) for p in model.parameters()]


def probe(case: Case, convert: Any, restore: Any) -> Seen:
    """Convert, use, restore, convert twice, and change the parameters that were there from the beginning."""
    model, x = vit(case), pictures(case)
    if "refused" in case:
        try:
            return {"names": convert(model, case["tau"])}
        except ValueError as error:
            return {"refusal": str(error)}
    seen: Seen = {"keys before": list(model.state_dict()), "dense": logits(model, x)}
    held, calls = list(model.parameters()), []
    tensors, attentions = dict(model.named_parameters()), {}
    held[-1].requires_grad_(False)
    if case.get("training"):
        model.train()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            attentions[name] = module
            module.register_forward_hook(lambda _module, _inputs, _out: calls.append(1))
    seen["flags before"] = flags(model)
    seen["state before"] = [value.clone() for value in model.state_dict().values()]
    seen["names"] = convert(model, case["tau"])
    seen["keys"] = list(model.state_dict())
    seen["state"] = [value.clone() for value in model.state_dict().values()]
    seen["flags"] = flags(model)
    # Only a better message hangs on these two: what a hook and a training step show is judged, too.
    modules = dict(model.named_modules())
    seen["replaced"] = [name for name, was in attentions.items() if modules.get(name) is not was]
    seen["copied"] = [name for name, now in model.named_parameters() if tensors.get(name) is not now]
    if "other" in case:  # another model, cut at another tau in the meantime
        convert(vit(case), case["other"])
    try:
        seen["cut"] = logits(model, x)
    except NotImplementedError as error:
        text = "the forward of ThresholdedAttention, c1, is not written yet: convert can only be tried with it"
        raise Wrong(text) from error
    except Exception as error:  # judged after what came before it
        return {**seen, "failed": describe(error, ("convert", "restore"))}
    seen["calls"] = len(calls)
    try:
        restore(model)
        seen["keys restored"], seen["restored"] = list(model.state_dict()), logits(model, x)
        convert(model, case["tau"])
        seen["names again"] = convert(model, case["again"])
        seen["again"] = logits(model, x)
    except NotImplementedError:
        raise
    except Exception as error:  # judged after what came before it
        return {**seen, "stopped": describe(error, ("convert", "restore"))}
    step(held)
    return {**seen, "stepped": logits(model, x), "state stepped": list(model.state_dict().values())}


def judge(case: Case, seen: Seen) -> None:
    """What convert leaves alone, the converted model, the restored one, a second convert, and a training step."""
    if "refused" in case:
        judge_refusal(case, seen)
        return
    model = vit(case)
    names = list(sparsify(model, case["tau"]).converted)
    judge_tensors(seen)
    judge_converted(case, seen, len(list(model.modules())))
    judge_names(seen["names"], names, "convert")
    judge_restored(case, seen)
    judge_again(case, seen, names)
    judge_step(case, seen)


def judge_refusal(case: Case, seen: Seen) -> None:
    """A model without an attention that can be converted is refused, by name."""
    if "refusal" not in seen:
        got = seen.get("names")
        if case["model"] == "stranger" and got:
            raise Wrong(
                "it converts a subclass of Attention that has a forward of its own: ask type(module) is Attention"
            )
        raise Wrong(f"no attention that can be converted, and it returns {got!r}: raise ValueError")
    if case["refused"] not in seen["refusal"]:
        raise Wrong(f"the ValueError says {seen['refusal']!r}: name the model's class, type(model).__name__")


def judge_tensors(seen: Seen) -> None:
    """The same modules and tensors, under the same keys."""
    before: list[str] = seen["keys before"]
    restored: list[str] = seen.get("keys restored", before)
    for keys, when in ((seen["keys"], "convert"), (restored, "restore")):
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


def converted_mistakes(case: Case, dense: np.ndarray) -> Iterator[Mistake]:
    """Logits [B, classes] of models that are converted in another way."""
    tau = case["tau"]
    yield dense, "after convert the model gives the dense output: is the class of its modules changed?"
    last = cut_logits(case, tau, layers=[-1])
    yield last, "only the last block is cut: every Attention in model.modules() should be"
    first = cut_logits(case, tau, layers=[0])
    yield first, "only the first block is cut: is there a return or a break in the loop?"
    yield cut_logits(case, 0.01), "cut at 0.01, whatever tau is: set module.tau = tau"
    if "other" in case:
        yield (
            cut_logits(case, case["other"]),
            "converting a second model at another tau changes the first: tau must be each module's own, not the "
            "class's",
        )


def judge_converted(case: Case, seen: Seen, modules: int) -> None:
    """``modules``: how many the model has."""
    if "failed" in seen:
        raise Wrong(f"the converted model: {seen['failed']}")
    got = array(seen, "cut", "the output of the converted model")
    if seen["calls"] == 0:
        raise Wrong(
            "a forward hook that was on the attention is not called any more: another object has taken its place. "
            "Change the module, module.__class__ = ThresholdedAttention, not the model around it"
        )
    what = "the output of the converted model (if c1 holds)"
    compare(got, cut_logits(case, case["tau"]), what, converted_mistakes(case, seen["dense"]))
    if seen["flags"] != seen["flags before"]:
        kind = "training mode" if seen["flags"][:modules] != seen["flags before"][:modules] else "requires_grad"
        raise Wrong(f"convert changes the {kind} of some modules: leave it as it was")


def judge_restored(case: Case, seen: Seen) -> None:
    """The restored model is the dense one, bit for bit."""
    if "restored" not in seen:
        raise Wrong(f"restore, after convert: {seen['stopped']}")
    restored, dense = array(seen, "restored", "the output after restore"), seen["dense"]
    if np.array_equal(restored, dense):
        return
    if close(restored, dense):
        raise Wrong(
            "after restore the output is the dense one to rounding, not bit for bit: is the cut still there at "
            "tau = 0? Give the module its own class back"
        )
    still_cut = [(cut_logits(case, case["tau"]), "after restore the model is still cut")]
    compare(restored, dense, "the output after restore", still_cut)
    raise Wrong("after restore the output is not the dense one bit for bit")


def judge_again(case: Case, seen: Seen, names: list[str]) -> None:
    """Convert twice, the second time at another tau."""
    if "stopped" in seen:
        twice = "convert, restore and convert twice, the second time at another tau"
        raise Wrong(f"{twice}: {seen['stopped']}. Modules that are converted already count: they get the new tau")
    second = "a second call of convert, at another tau,"
    judge_names(seen["names again"], names, second)
    first = [(cut_logits(case, case["tau"]), f"{second} changes nothing: modules that are converted get the new tau")]
    what = "the output after a second convert at another tau"
    compare(array(seen, "again", "the output"), cut_logits(case, case["again"]), what, first)


def judge_step(case: Case, seen: Seen) -> None:
    """A training step on the parameters from before convert reaches the converted model."""
    for key, was, now in zip(seen["keys before"], seen["state before"], seen["state stepped"]):
        if not close(now, 0.9 * was):
            raise Wrong(
                f"a training step on the parameters from before convert does not reach {key}: it holds copies. An "
                "optimiser would train tensors that nobody uses"
            )
    expected = cut_logits(case, case["again"], stepped=True)
    compare(array(seen, "stepped", "the output"), expected, "the output after a training step")


QUESTION = Question(
    name="c2",
    answers=("convert", "restore"),
    cases=(
        {"what": "a ViT of three blocks", "model": "ViT", "depth": 3, "seed": 1, "tau": 0.09375, "again": 0.15625},
        {"what": "a ViT with registers", "model": "registers", "seed": 2, "tau": 0.0625, "again": 0.09375},
        {
            "what": "a Swin, whose attention is of another class",
            "model": "Swin",
            "seed": 3,
            "tau": 0.0625,
            "refused": "SwinTransformer",
        },
        {
            "what": "two ViTs at two thresholds, in training mode",
            "model": "ViT",
            "seed": 4,
            "tau": 0.09375,
            "other": 0.15625,
            "again": 0.125,
            "training": True,
        },
        {
            "what": "a subclass with a forward of its own",
            "model": "stranger",
            "seed": 5,
            "tau": 0.09375,
            "refused": "VisionTransformer",
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "Nothing has to be built or copied. A Python object finds its forward through its class.",
        "Walk through model.named_modules(). Where type(module) is Attention: module.__class__ = ThresholdedAttention, "
        "module.tau = tau, and note the name. restore is the same walk with the other class.",
        "Take modules of both classes in convert, so that a second call sets the new tau. No name at the end: "
        "raise ValueError(f'{type(model).__name__} has no ...'). In restore, `del module.tau` as well.",
    ),
    section="chapter 2, section 2.8",
)
