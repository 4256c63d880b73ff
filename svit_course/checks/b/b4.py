"""b4: forward and backward as an autograd Function, and a learnable threshold that uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svit_course.checks.b.shared import FLATTER, Given, as_numpy, compare_tau, formula, softmax
from svit_course.judging import Mistake, array, close, compare, untouched
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention.formula import thresholded_softmax

Named = dict[str, np.ndarray]
NAMES = ("q", "k", "v", "tau")


def inputs(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """q [B, H, N, d], k [B, H, M, d], v [B, H, M, Dv], tau [H]; and d_out [B, H, N, Dv].

    ``flat``: so many of the last head's first queries lose every key. ``ones``: d_out is that of ``out.sum()``.
    """
    rng = np.random.default_rng(case["seed"])
    lead, n, m, d, dv = (case["b"], len(case["tau"])), case["n"], case["m"], case["d"], case["dv"]
    q = case.get("std", 1.5) * rng.standard_normal((*lead, n, d))
    q[:, -1, : case.get("flat", 0)] *= FLATTER
    k, v = rng.standard_normal((*lead, m, d)), rng.standard_normal((*lead, m, dv))
    d_out = np.ones((*lead, n, dv)) if case.get("ones") else rng.standard_normal((*lead, n, dv))
    dtype = np.dtype(case.get("dtype", "float64"))
    return [x.astype(dtype) for x in (q, k, v, np.array(case["tau"]))], d_out.astype(dtype)


def logit_of(case: Case) -> Tensor:
    """The number whose sigmoid is tau, [H]."""
    return torch.logit(torch.tensor(case["tau"], dtype=torch.float64)).float()


# ------------------------------------------------------------------------------------------------ what is seen


def leaves(case: Case) -> tuple[list[Tensor], Tensor]:
    """Fresh q, k, v, tau that require gradients, and d_out."""
    arrays, d_out = inputs(case)
    upstream = torch.tensor(d_out)
    if case.get("ones"):  # one number, expanded, as autograd hands it to the backward of a sum
        upstream = torch.ones((), dtype=upstream.dtype).expand(upstream.shape)
    return [torch.tensor(x, requires_grad=True) for x in arrays], upstream


def gradients(out: Any, leaf: Sequence[Tensor], upstream: Tensor, names: Sequence[str] = NAMES) -> Seen:
    """{"dq": ..., ...}; None where no gradient comes."""
    try:
        found = torch.autograd.grad(out, leaf, upstream, allow_unused=True)
    except RuntimeError as error:
        said = str(error)
        if "incorrect number of gradients" in said:
            raise Wrong(f"backward returns one gradient for each input of forward: q, k, v, tau ({said})") from error
        if "invalid gradient at index" in said:
            raise Wrong(
                f"backward returns a gradient of another shape than its input ({said}). For tau: is it summed over "
                "images and rows, to [H]?"
            ) from error
        raise
    return {f"d{name}": value for name, value in zip(names, found, strict=True)}


def probe(case: Case, function: Any, learnable: Any) -> Seen:
    """The Function's output and gradients, alone and where something comes between; and the learnable threshold."""
    kind: Any = function
    if not (isinstance(kind, type) and issubclass(kind, torch.autograd.Function)):
        raise Wrong("ThresholdedAttention should stay a subclass of torch.autograd.Function")
    leaf, upstream = leaves(case)
    given = upstream.clone()
    out = function.apply(*leaf)
    seen: Seen = {"out": out, "own": f"{function.__name__}Backward"}
    if not isinstance(out, Tensor) or out.shape != upstream.shape or out.dtype != upstream.dtype:
        return seen  # without gradients: the output is wrong already
    seen["first"] = gradients(out, leaf, upstream)
    seen["after"] = {**dict(zip(NAMES, [x.detach().clone() for x in leaf])), "d_out": upstream.clone()}

    # The same again, with another forward pass before the backward one.
    leaf, _ = leaves(case)
    again = function.apply(*leaf)
    function.apply(*[0.5 * x.detach().flip(-1) for x in leaf[:3]], 0.5 * leaf[3].detach())
    seen["second"] = gradients(again, leaf, given)

    if case.get("overwrite"):
        seen["overwritten"] = {name: overwritten(case, function, i) for i, name in enumerate("qkv")}
    return {**seen, **probe_learnable(case, learnable, given)}


def overwritten(case: Case, function: Any, position: int) -> Seen | str:
    """What happens if an input is overwritten between forward and backward: ``"noticed"``, or these gradients."""
    leaf, upstream = leaves(case)
    out = function.apply(*leaf)
    with torch.no_grad():
        leaf[position].add_(1.0)
    try:
        return gradients(out, leaf, upstream)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return "noticed"
        raise


def probe_learnable(case: Case, learnable: Any, upstream: Tensor) -> Seen:
    """Output of learnable_attention, the gradient of its logit, and the steps that autograd recorded."""
    leaf, logit = leaves(case)[0], logit_of(case).requires_grad_()
    learned = learnable(*leaf[:3], logit)
    seen: Seen = {"learned": learned}
    if isinstance(learned, Tensor):
        if not learned.requires_grad:
            raise Wrong("no gradient comes through learnable_attention. Is there a detach(), a .data or a no_grad?")
        seen["nodes"] = nodes(learned)
        if learned.shape == upstream.shape:
            seen.update(gradients(learned, [logit], upstream.to(learned.dtype), ["logit"]))
    return seen


def nodes(out: Tensor) -> list[str]:
    """The names of the steps that autograd has recorded behind ``out``."""
    names, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(type(node).__name__)
            waiting.extend(following for following, _ in node.next_functions)
    return sorted(names)


# ------------------------------------------------------------------------------------------------ what is expected


def expected(case: Case, empty_rows: str = "dense") -> Named:
    """The library's output ``out``, the same with tau from its logit, ``learned``, and the gradients of both."""
    arrays, d_out = inputs(case)
    q, k, v, tau = leaf = [torch.tensor(x, requires_grad=True) for x in arrays]
    logit = logit_of(case).requires_grad_()
    scores = q @ k.transpose(-1, -2) / case["d"] ** 0.5
    out = thresholded_softmax(scores, tau, empty_rows=empty_rows) @ v
    grads = torch.autograd.grad(out, leaf, torch.tensor(d_out), retain_graph=True)
    learned = thresholded_softmax(scores, torch.sigmoid(logit), empty_rows=empty_rows) @ v
    (dlogit,) = torch.autograd.grad(learned, logit, torch.tensor(d_out))
    named = {f"d{name}": value for name, value in zip(NAMES, grads, strict=True)}
    return as_numpy({"out": out, "learned": learned, "dlogit": dlogit, **named})


def judge(case: Case, seen: Seen) -> None:
    """The Function's output, its inputs, its gradients, what it remembers; then learnable_attention."""
    (q, k, v, tau), d_out = inputs(case)
    right = expected(case)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if q.dtype == np.float32 else {"rtol": 1e-5, "atol": 1e-6}
    out = array(seen, "out", "the result of ThresholdedAttention.apply")
    if np.isnan(out).any():
        raise Wrong("NaN in out: a row without survivors is 0/0. It gets its plain softmax back")
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(case["d"]).astype(q.dtype)
    dense = softmax(scores) @ v
    empty = "an empty row gets nothing: here it keeps its plain softmax"
    mistakes = [(expected(case, "zero")["out"], empty), (dense, "nothing is cut: this is dense attention")]
    compare(out, right["out"], "out", mistakes, **tolerance)
    if out.dtype != q.dtype:
        raise Wrong(f"out is {out.dtype} for inputs of {q.dtype}: leave the dtype as it comes")
    untouched(seen["after"], q=q, k=k, v=v, tau=tau, d_out=d_out)
    judge_gradients(case, seen["first"], right, (scores, v, tau, d_out), tolerance)
    judge_memory(seen, right, tolerance)
    judge_learnable(seen, right, dense)


def judge_memory(seen: Seen, right: Named, tolerance: dict[str, float]) -> None:
    """What backward needs is kept where another forward pass, or a change of an input, cannot spoil it."""
    for name in NAMES:
        if not close(array(seen["second"], f"d{name}", f"the gradient of {name}"), right[f"d{name}"], **tolerance):
            raise Wrong(
                f"the gradient of {name} is right, and wrong once another forward pass comes before the backward one: "
                "keep what backward needs on ctx (ctx.save_for_backward), not on the class or in a global variable"
            )
    for name, came in seen.get("overwritten", {}).items():
        if came != "noticed" and not all(close(came[f"d{x}"], right[f"d{x}"], **tolerance) for x in NAMES):
            raise Wrong(
                f"{name} was overwritten between forward and backward, and the gradient is silently wrong: "
                "ctx.save_for_backward would have raised an error, an attribute such as ctx.q = q does not notice"
            )


def judge_learnable(seen: Seen, right: Named, dense: np.ndarray) -> None:
    """Its output, that it goes through the student's Function, and the gradient of its logit."""
    learned = array(seen, "learned", "the result of learnable_attention")
    uncut = [(dense, "learnable_attention cuts nothing: is tau = sigmoid(logit)?")]
    compare(learned, right["learned"], "the output of learnable_attention", uncut, rtol=1e-3, atol=1e-4)
    if seen["own"] not in seen["nodes"]:
        raise Wrong(
            "learnable_attention does not go through ThresholdedAttention.apply, so that autograd, and not your "
            "backward, makes the gradient"
        )
    if seen["dlogit"] is None:
        raise Wrong(
            "no gradient reaches logit. Is there a detach(), a .data, an item() or a float() between logit and tau?"
        )
    slope = "the gradient of logit is that of tau: the slope of the sigmoid, tau (1 - tau), is missing"
    mistakes = [(seen["first"]["dtau"], slope), (-right["dlogit"], "the gradient of logit has the wrong sign")]
    got = array(seen, "dlogit", "the gradient of logit")
    compare(got, right["dlogit"], "the gradient of logit", mistakes, rtol=1e-3, atol=1e-5)


def judge_gradients(case: Case, got: Seen, right: Named, given: Given, tolerance: dict[str, float]) -> None:
    """The gradients of q, k, v and tau, ``got``, against the ``right`` ones."""
    for name in NAMES:
        if got[f"d{name}"] is None:
            raise Wrong(f"backward returns no gradient for {name}: it returns dq, dk, dv, dtau, one for each input")
        came = array(got, f"d{name}", f"the gradient of {name}")
        if name == "tau":
            compare_tau(came, right["dtau"], "the gradient of tau", given)
            continue
        if np.isnan(came).any():
            raise Wrong(
                f"the gradient of {name} contains NaN: an empty row has Z = 0. Guard the division in backward, too"
            )
        compare(
            came, right[f"d{name}"], f"the gradient of {name}", gradient_mistakes(case, name, right, given), **tolerance
        )


def gradient_mistakes(case: Case, name: str, right: Named, given: Given) -> Iterator[Mistake]:
    """Of the gradient of q, k or v."""
    (q, k, _, _), d_out = inputs(case)
    yield (
        expected(case, "zero")[f"d{name}"],
        f"the gradient of {name} leaves out the empty rows: they fall back to the softmax, and so does their gradient",
    )
    if name == "v":
        plain = formula(given, "dense")["p"].swapaxes(-1, -2) @ d_out
        yield plain, "the gradient of v uses the softmax p: the output is A v"
        return
    root = np.sqrt(case["d"])
    yield right[f"d{name}"] * root, f"the gradient of {name} is not divided by sqrt(d), as the scores are"
    turned: Callable[[np.ndarray], np.ndarray] = {
        "q": lambda ds: ds @ k / root,
        "k": lambda ds: ds.swapaxes(-1, -2) @ q / root,
    }[name]
    for ds, why in score_mistakes(given):
        yield turned(ds), f"the gradient of {name} is wrong: {why}"


def score_mistakes(given: Given) -> Iterator[Mistake]:
    """Of the gradient of the scores, which those of q and k go through."""
    rows, tau = formula(given, "dense"), given[2]
    survives = (rows["p"] > tau[:, None, None]) | rows["empty"]
    cut = "cut keys get no gradient: they get -tau G p_j, because their score is in the softmax's denominator"
    yield np.where(survives, rows["ds"], 0), cut
    of_p = "the gradient of p is used for that of the scores: the softmax's Jacobian is missing"
    yield rows["dp"], of_p
    yield rows["p"] * rows["dp"], "p * g is used for the gradient of the scores: subtract tau G from g first"
    constant = formula(given, constant_sum=True)["ds"]
    yield constant, "Z is taken for a constant, as if it were detached: D is missing from g"


QUESTION = Question(
    name="b4",
    answers=("ThresholdedAttention", "learnable_attention"),
    cases=(
        {"what": "one image, two heads", "seed": 5, "b": 1, "n": 4, "m": 6, "d": 4, "dv": 3, "tau": [0.1, 0.05]},
        {"what": "a batch of two", "seed": 6, "b": 2, "n": 5, "m": 7, "d": 3, "dv": 2, "tau": [0.1, 0.05, 0.12]},
        {
            "what": "a head with empty rows",
            "seed": 7,
            "b": 2,
            "n": 4,
            "m": 5,
            "d": 3,
            "dv": 3,
            "tau": [0.1, 0.28],
            "flat": 2,
        },
        {
            "what": "in float32",
            "seed": 8,
            "b": 1,
            "n": 5,
            "m": 6,
            "d": 4,
            "dv": 3,
            "tau": [0.1, 0.08],
            "dtype": "float32",
        },
        {
            "what": "an input overwritten after forward",
            "seed": 9,
            "b": 1,
            "n": 3,
            "m": 5,
            "d": 3,
            "dv": 2,
            "tau": [0.1, 0.05],
            "overwrite": True,
        },
    ),
    probe=probe,
    judge=judge,
    hints=(
        "forward is assignment a's attention with one tau for each head; backward is b1, b2 and b3 in torch, and two "
        "more products, from the scores to q and k. ctx.save_for_backward in one, ctx.saved_tensors in the other.",
        "scores = q k^T / sqrt(d), so dq = dS k / sqrt(d) and dk = dS^T q / sqrt(d). In an empty row the weights are p "
        "itself, so the gradient that arrives at p there is dO.v_j, and tau gets nothing.",
        "Let g be b1's on rows with a survivor and dO.v_j on empty ones (torch.where). Then dS = p * (g - (p * "
        "g).sum(dim=-1, keepdim=True)) holds for both. learnable_attention: tau = torch.sigmoid(logit), then "
        "ThresholdedAttention.apply(q, k, v, tau).",
    ),
    section="chapter 1, section 1.7, and chapter 2, section 2.9",
)
