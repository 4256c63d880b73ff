"""Assignment b: the backward pass by hand, and tau's gradient. What is checked, and the hints.

What is expected comes from autograd: through the library's operator, or, for the gradient of p, through the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svit_course.judging import Mistake, array, close, compare, unchanged
from svit_course.question import Case, Question, Seen, Wrong
from svit_utils.attention.formula import thresholded_softmax

# ------------------------------------------------------------------------------------------------ what is expected

# Makes a row's scores nearly equal, so that nobody exceeds tau; not quite equal, as a uniform row hides mistakes.
FLATTER = 0.05


def _numpy(named: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in named.items()}


def _library(
    scores: np.ndarray, v: np.ndarray, tau: Any, d_out: np.ndarray, empty_rows: str = "zero"
) -> dict[str, np.ndarray]:
    """Weights, output, and gradients of scores, v and tau: autograd through the package's operator."""
    s, values = (torch.tensor(x, requires_grad=True) for x in (scores, v))
    t = torch.tensor(tau, dtype=s.dtype, requires_grad=True)
    weights = thresholded_softmax(s, t, empty_rows=empty_rows)
    out = weights @ values
    ds, dv, dtau = torch.autograd.grad(out, (s, values, t), torch.tensor(d_out))
    return _numpy({"weights": weights, "out": out, "ds": ds, "dv": dv, "dtau": dtau})


def _formula(
    scores: np.ndarray,
    v: np.ndarray,
    tau: Any,
    d_out: np.ndarray,
    *,
    empty_rows: str = "zero",
    constant_sum: bool = False,
    every_key: bool = False,
) -> dict[str, np.ndarray]:
    """Autograd through the formula, written out: gradients of p, of the scores, and of one tau per row.

    ``constant_sum`` and ``every_key`` make two mistakes on purpose: the row's sum does not depend on p, and the ReLU
    lets the gradient of cut keys through.
    """
    s, values = torch.tensor(scores, requires_grad=True), torch.tensor(v)
    per_head = torch.tensor(tau, dtype=s.dtype)
    t = (per_head[:, None, None] if per_head.ndim else per_head).expand(*s.shape[:-1], 1).clone().requires_grad_()
    p = s.softmax(dim=-1)
    r = (p - t).relu()
    if every_key:
        r = r + torch.where(p > t, torch.zeros_like(p), (p - t) - (p - t).detach())
    z = r.sum(dim=-1, keepdim=True)
    if constant_sum:
        z = z.detach()
    empty = (p > t).sum(dim=-1, keepdim=True) == 0
    weights = r / z.masked_fill(empty, 1.0)
    if empty_rows == "dense":
        weights = torch.where(empty, p, weights)
    grads = torch.autograd.grad(weights @ values, (p, s, t), torch.tensor(d_out))
    named = dict(zip(("dp", "ds", "dtau"), grads, strict=True))
    return _numpy({"p": p, "r": r, "z": z, "empty": empty, "weights": weights, **named})


def _softmax(scores: np.ndarray) -> np.ndarray:
    return torch.tensor(scores).softmax(dim=-1).numpy()


def _pair(result: Any, names: str) -> tuple[Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong(f"it should return two arrays: `return {names}`")
    return result[0], result[1]


# ------------------------------------------------------------------------------------------------ b1: p and v


def _row_inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scores [..., N, M], p of the same shape, v [..., M, Dv], d_out [..., N, Dv]."""
    if "p" in case:
        p = np.array(case["p"], dtype=np.float64)
        return np.log(p), p, np.array(case["v"], dtype=np.float64), np.array(case["d_out"], dtype=np.float64)
    rng, lead = np.random.default_rng(case["seed"]), tuple(case.get("lead", ()))
    n, m, dv = case["n"], case["m"], case["dv"]
    scores = case.get("std", 1.5) * rng.standard_normal((*lead, n, m))
    if case.get("flat"):
        scores[..., : case["flat"], :] *= FLATTER
    return scores, _softmax(scores), rng.standard_normal((*lead, m, dv)), rng.standard_normal((*lead, n, dv))


def _probe_p_and_v(case: Case, grad_p_and_v: Any) -> Seen:
    _, p, v, d_out = _row_inputs(case)
    with np.errstate(all="ignore"):
        g, dv = _pair(grad_p_and_v(p, v, case["tau"], d_out), "g, dv")
    return {"g": g, "dv": dv, "p": p, "v": v, "d_out": d_out}


def _judge_p_and_v(case: Case, seen: Seen) -> None:
    scores, p, v, d_out = _row_inputs(case)
    for name, before in (("p", p), ("v", v), ("d_out", d_out)):
        unchanged(before, seen[name], name)
    got_g, got_dv = array(seen, "g", "the first result, g,"), array(seen, "dv", "the second result, dv,")
    arguments = (scores, v, case["tau"], d_out)
    truth, library = _formula(*arguments), _library(*arguments)
    g, dv, z = truth["dp"], library["dv"], truth["z"]
    if close(got_g, dv) and not close(g, dv):
        raise Wrong("the results are in the wrong order: g first, then dv")
    if truth["empty"].any():
        for got, name in ((got_g, "g"), (got_dv, "dv")):
            if np.isnan(got.astype(float)).any():
                raise Wrong(
                    f"NaN in {name}: a row without survivors has Z = 0, and here it gets zeros. Guard the division"
                )
    along = d_out @ v.swapaxes(-1, -2)
    constant = _formula(*arguments, constant_sum=True)["dp"]
    compare(
        got_g,
        g,
        "g",
        (
            (constant, "D is missing from g: raising p_j also raises Z, which divides every weight of the row"),
            (g * z, "g is not divided by Z, the row's sum of ReLU(p - tau)"),
            (constant * z, "g is dO.v_j on the survivors: subtract D = dO.o, and divide by Z"),
            (
                _formula(*arguments, every_key=True)["dp"],
                "cut keys have a g: below tau the ReLU is flat, so g is 0 there (the factor 1_S)",
            ),
            (along, "this is dO.v_j, the gradient of the weights A: go back through the division by Z and the ReLU"),
            (library["ds"], "this is the gradient of the scores; g stops before the softmax, at p"),
            (-g, "g has the wrong sign"),
        ),
    )
    compare(
        got_dv,
        dv,
        "dv",
        (
            (
                p.swapaxes(-1, -2) @ d_out,
                "dv uses the softmax p: the output is A v, so the weights after the cut count",
            ),
            (truth["r"].swapaxes(-1, -2) @ d_out, "dv uses ReLU(p - tau), not renormalised: divide by Z"),
            (dv.swapaxes(-1, -2), "dv is transposed: it has the shape of v"),
        ),
    )


_TOY: dict[str, Any] = {
    "p": [[1 / 16, 1 / 32, 1 / 8, 1 / 2, 1 / 4, 1 / 32]],
    "v": [[0, 0], [0, -8], [0, 8], [14, 0], [7, 7], [0, -8]],
    "d_out": [[1, 0]],
    "tau": 0.2,
}

B1 = Question(
    name="b1",
    answers=("grad_p_and_v",),
    cases=(
        {"what": "the book's toy row", **_TOY},
        {"what": "four queries, six keys", "seed": 1, "n": 4, "m": 6, "dv": 3, "tau": 0.1},
    ),
    probe=_probe_p_and_v,
    judge=_judge_p_and_v,
    hints=(
        "Run the forward pass first: the survivors, r, Z, the weights A and the output o. Then go back through it.",
        "dO.v_j for all queries and keys at once is one matrix product, [N, M]. D = dO.o is one number for each query.",
        "g = (p > tau) * (dO.v_j - D) / Z with D and Z of shape [..., N, 1], and dv = A transposed, times dO. Replace "
        "Z = 0 by 1 before you divide.",
    ),
    section="chapter 1, section 7",
)

# ------------------------------------------------------------------------------------------------ b2: the scores


def _probe_scores(case: Case, grad_scores: Any) -> Seen:
    scores, p, v, d_out = _row_inputs(case)
    g = _formula(scores, v, case["tau"], d_out)["dp"]
    with np.errstate(all="ignore"):
        return {"ds": grad_scores(p, g, case["tau"]), "p": p, "g": g}


def _judge_scores(case: Case, seen: Seen) -> None:
    scores, p, v, d_out = _row_inputs(case)
    tau = case["tau"]
    g = _formula(scores, v, tau, d_out)["dp"]
    unchanged(p, seen["p"], "p")
    unchanged(g, seen["g"], "g")
    expected = _library(scores, v, tau, d_out)["ds"]
    got = array(seen, "ds", "the result")
    inner = g - expected / p  # what the softmax subtracts in each row
    kept = p > tau
    compare(
        got,
        expected,
        "the result",
        (
            (
                np.where(kept, expected, 0),
                "cut keys get zero here. They have no weight, but their score is in the softmax's denominator: raising "
                "it lowers every p of the row. They get -tau G p_j",
            ),
            (g, "this is g itself: the softmax's Jacobian is missing. Each score moves every p of its row"),
            (p * g, "this is p * g, half of the softmax's Jacobian: subtract the row's part, tau G, from g first"),
            (p * (g - inner / tau), "G is subtracted without its factor tau"),
            (p * (g + inner), "tau G is added: it is subtracted from g"),
            (expected / p, "the factor p_j in front is missing"),
            (-expected, "the sign is wrong: dS = p * (g - tau G)"),
            (
                p * (g - (p * g).sum()),
                "the sum runs over the whole array: each row has its own G, axis=-1 with keepdims",
            ),
            (
                p * (g - tau * g.sum()),
                "the sum runs over the whole array: each row has its own G, axis=-1 with keepdims",
            ),
            (
                p * (g - tau * g.mean(axis=-1, keepdims=True)),
                "G is the *sum* of g over the row's keys, and this is their mean",
            ),
        ),
    )


B2 = Question(
    name="b2",
    answers=("grad_scores",),
    cases=(
        {"what": "the book's toy row", **_TOY},
        {"what": "five queries, seven keys", "seed": 2, "n": 5, "m": 7, "dv": 4, "tau": 0.1},
    ),
    probe=_probe_scores,
    judge=_judge_scores,
    hints=(
        "One score moves every probability of its row: dp_i/ds_j = p_i (1[i = j] - p_j). Sum over i.",
        "That gives p_j (g_j - sum_i p_i g_i). The sum runs over the row. Does a key with g_j = 0 get zero?",
        "The row's sum of p * g is tau G, with G the row's sum of g. Both forms are right: p * (g - tau * G), with G "
        "of shape [..., N, 1].",
    ),
    section="chapter 1, section 7",
)

# ------------------------------------------------------------------------------------------------ b3: tau


def _head_inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scores [B, H, N, M], v [B, H, M, Dv], d_out [B, H, N, Dv]; the last head's first ``flat`` queries see no key."""
    rng = np.random.default_rng(case["seed"])
    lead, n, m, dv = (case["b"], len(case["tau"])), case["n"], case["m"], case["dv"]
    scores = case.get("std", 1.5) * rng.standard_normal((*lead, n, m))
    scores[:, -1, : case.get("flat", 0)] *= FLATTER
    return scores, rng.standard_normal((*lead, m, dv)), rng.standard_normal((*lead, n, dv))


def _probe_tau(case: Case, grad_tau: Any) -> Seen:
    scores, v, d_out = (torch.tensor(x) for x in _head_inputs(case))
    p, tau = scores.softmax(dim=-1), torch.tensor(case["tau"], dtype=torch.float64)
    result = grad_tau(p, v, tau, d_out)
    return {"dtau": result, "p": p, "v": v, "tau": tau, "d_out": d_out}


def _right_tau(
    got: np.ndarray,
    expected: np.ndarray,
    rows: dict[str, np.ndarray],
    constant: np.ndarray,
    d_out: np.ndarray,
    out: np.ndarray,
    tau: np.ndarray,
    name: str,
) -> None:
    """
    Args:
        rows: of `_formula`: one gradient of tau for each row.
        constant: the same with the row's sum held fixed, [B, H, N, 1].
    """
    each = rows["dtau"][..., 0]  # [B, H, N]
    batch, _, n = each.shape
    empty = rows["empty"][..., 0]
    if got.shape == expected.shape:
        if np.isnan(got).any() and empty.any():
            raise Wrong(f"NaN in {name}: an empty row has Z = 0, and 0/0. Guard the division; the row adds nothing")
        touched = empty.any(axis=(0, 2))
        elsewhere = close(got[~touched], expected[~touched], 1e-3)
        if touched.any() and elsewhere and not close(got[touched], expected[touched], 1e-3):
            if empty.all():
                raise Wrong(f"every row is empty here, so the output does not depend on tau: {name} is 0")
            if not touched.all():
                raise Wrong(
                    f"{name} is right in the heads without empty rows and wrong in those with: a row that falls back "
                    "to its plain softmax does not depend on tau, and adds nothing"
                )
    kept = (rows["p"] > tau[:, None, None]).sum(axis=-1)
    z = np.where(empty, 1.0, rows["z"][..., 0])
    one_d = each - np.where(empty, 0, kept - 1) * (d_out * out).sum(axis=-1) / z
    mean = f"{name} is a mean: tau moves every row, and each adds its part. Sum over the rows"
    mistakes: list[Mistake] = [
        (-expected, f"{name} has the wrong sign: raising tau lowers every r_j, so dtau is *minus* the sum of G"),
        (expected / n, f"{mean} and the images"),
        (expected / (batch * n), f"{mean} and the images"),
        (expected / batch, f"{mean} and the images, not the mean over images"),
        (
            expected / rows["p"].shape[-1],
            f"{mean} and the keys: G is a sum over the survivors, not a mean over the keys",
        ),
        (expected.sum(), f"all heads are summed into one number: each head has its own tau, so {name} has shape [H]"),
        (
            each.sum(axis=-1),
            f"{name} has one number for each image and head: tau is shared by the images, so sum these too",
        ),
        (each, f"{name} has one number for each row: sum over rows and images"),
        (each[0].sum(axis=-1), f"{name} counts only the first image of the batch: sum over all images"),
        (
            constant.sum(axis=(0, 2, 3)),
            f"{name} takes Z for a constant: raising tau lowers Z too, which is where k D comes from",
        ),
        (one_d.sum(axis=(0, 2)), "D is subtracted once in each row's G: once for *every* survivor, k D"),
    ]
    compare(got, expected, name, mistakes, rtol=1e-3)


def _judge_tau(case: Case, seen: Seen) -> None:
    scores, v, d_out = _head_inputs(case)
    tau = np.array(case["tau"])
    for name, before in (("p", _softmax(scores)), ("v", v), ("tau", tau), ("d_out", d_out)):
        unchanged(before, seen[name], name)
    arguments = (scores, v, tau, d_out)
    library = _library(*arguments, empty_rows="dense")
    rows = _formula(*arguments, empty_rows="dense")
    constant = _formula(*arguments, constant_sum=True)["dtau"]
    got = array(seen, "dtau", "the result")
    _right_tau(got, library["dtau"], rows, constant, d_out, library["out"], tau, "dtau")


B3 = Question(
    name="b3",
    answers=("grad_tau",),
    cases=(
        {"what": "one image, two heads", "seed": 3, "b": 1, "n": 4, "m": 6, "dv": 3, "tau": [0.1, 0.05]},
        {"what": "one head with empty rows", "seed": 4, "b": 1, "n": 5, "m": 6, "dv": 3, "tau": [0.1, 0.2], "flat": 2},
    ),
    probe=_probe_tau,
    judge=_judge_tau,
    hints=(
        "In one row, what does a slightly larger tau do to each r_j, and to Z? It is the same for all survivors.",
        "So a row gives -G, with G the sum of its g_j, or (dO.u - k D) / Z with k the number of survivors. tau of a "
        "head is shared by all rows of that head, in all images.",
        "tau[:, None, None] lines [H] up with [B, H, N, M]. Find the empty rows by (p > tau) before any fallback, make "
        "their G zero, and sum G [B, H, N] over dim=(0, 2), with a minus sign.",
    ),
    section="chapter 2, section 9, and chapter 1, section 7",
)

# ------------------------------------------------------------------------------------------------ b4: the Function

_NAMES = ("q", "k", "v", "tau")


def _qkv(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """q [B, H, N, d], k [B, H, M, d], v [B, H, M, Dv], tau [H]; and d_out [B, H, N, Dv]."""
    rng = np.random.default_rng(case["seed"])
    lead, n, m, d, dv = (case["b"], len(case["tau"])), case["n"], case["m"], case["d"], case["dv"]
    q = case.get("std", 1.5) * rng.standard_normal((*lead, n, d))
    q[:, -1, : case.get("flat", 0)] *= FLATTER
    k, v = rng.standard_normal((*lead, m, d)), rng.standard_normal((*lead, m, dv))
    d_out = np.ones((*lead, n, dv)) if case.get("ones") else rng.standard_normal((*lead, n, dv))
    dtype = np.dtype(case.get("dtype", "float64"))
    return [x.astype(dtype) for x in (q, k, v, np.array(case["tau"]))], d_out.astype(dtype)


def _logit(case: Case) -> Tensor:
    return torch.logit(torch.tensor(case["tau"], dtype=torch.float64)).float()


def _leaves(case: Case) -> tuple[list[Tensor], Tensor]:
    inputs, d_out = _qkv(case)
    upstream = torch.tensor(d_out)
    if case.get("ones"):  # what the gradient of out.sum() looks like: one number, expanded
        upstream = torch.ones((), dtype=upstream.dtype).expand(upstream.shape)
    return [torch.tensor(x, requires_grad=True) for x in inputs], upstream


def _gradients(out: Any, inputs: Sequence[Tensor], upstream: Tensor, names: Sequence[str]) -> Seen:
    """{"dq": ..., ...}; None where no gradient comes."""
    try:
        found = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
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


def _nodes(out: Tensor) -> list[str]:
    """The names of the steps that autograd has recorded behind ``out``."""
    names, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(type(node).__name__)
            waiting.extend(following for following, _ in node.next_functions)
    return sorted(names)


def _probe_function(case: Case, function: Any, learnable: Any) -> Seen:
    kind: Any = function
    if not (isinstance(kind, type) and issubclass(kind, torch.autograd.Function)):
        raise Wrong("ThresholdedAttention should stay a subclass of torch.autograd.Function")
    inputs, upstream = _leaves(case)
    given = upstream.clone()
    out = function.apply(*inputs)
    seen: Seen = {"out": out, "own": f"{function.__name__}Backward"}
    if not isinstance(out, Tensor) or out.shape != upstream.shape or out.dtype != upstream.dtype:
        return seen  # without gradients: the output is wrong already
    seen["first"] = _gradients(out, inputs, upstream, _NAMES)
    seen["after"] = {**dict(zip(_NAMES, [x.detach().clone() for x in inputs])), "d_out": upstream.clone()}

    # The same again, with another forward pass before the backward one.
    inputs, _ = _leaves(case)
    again = function.apply(*inputs)
    function.apply(*[0.5 * x.detach().flip(-1) for x in inputs[:3]], 0.5 * inputs[3].detach())
    seen["second"] = _gradients(again, inputs, given, _NAMES)

    if case.get("overwrite"):
        seen["overwritten"] = {name: _overwritten(case, function, i) for i, name in enumerate("qkv")}

    inputs, _ = _leaves(case)
    logit = _logit(case).requires_grad_()
    learned = learnable(*inputs[:3], logit)
    seen["learned"] = learned
    if isinstance(learned, Tensor):
        if not learned.requires_grad:
            raise Wrong("no gradient comes through learnable_attention. Is there a detach(), a .data or a no_grad?")
        seen["nodes"] = _nodes(learned)
        if learned.shape == given.shape:
            seen.update(_gradients(learned, [logit], given.to(learned.dtype), ["logit"]))
    return seen


def _overwritten(case: Case, function: Any, position: int) -> Seen | str:
    """What happens if an input is overwritten between forward and backward: noticed, or these gradients."""
    inputs, upstream = _leaves(case)
    out = function.apply(*inputs)
    with torch.no_grad():
        inputs[position].add_(1.0)
    try:
        return _gradients(out, inputs, upstream, _NAMES)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return "noticed"
        raise


def _expected_function(case: Case, empty_rows: str = "dense") -> dict[str, np.ndarray]:
    (q, k, v, tau), d_out = _qkv(case)
    inputs = [torch.tensor(x, requires_grad=True) for x in (q, k, v, tau)]
    logit = _logit(case).requires_grad_()
    scores = inputs[0] @ inputs[1].transpose(-1, -2) / case["d"] ** 0.5
    out = thresholded_softmax(scores, inputs[3], empty_rows=empty_rows) @ inputs[2]
    grads = torch.autograd.grad(out, inputs, torch.tensor(d_out), retain_graph=True)
    learned = thresholded_softmax(scores, torch.sigmoid(logit), empty_rows=empty_rows) @ inputs[2]
    (dlogit,) = torch.autograd.grad(learned, logit, torch.tensor(d_out))
    named = {f"d{name}": value for name, value in zip(_NAMES, grads, strict=True)}
    return _numpy({"out": out, "learned": learned, "dlogit": dlogit, **named})


def _judge_function(case: Case, seen: Seen) -> None:
    (q, k, v, tau), d_out = _qkv(case)
    expected, zero = _expected_function(case), _expected_function(case, "zero")
    single = q.dtype == np.float32
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if single else {"rtol": 1e-5, "atol": 1e-6}
    out = array(seen, "out", "the result of ThresholdedAttention.apply")
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(case["d"]).astype(q.dtype)
    p = _softmax(scores)
    if np.isnan(out).any():
        raise Wrong("NaN in out: a row without survivors is 0/0. It gets its plain softmax back")
    compare(
        out,
        expected["out"],
        "out",
        (
            (zero["out"], "an empty row gets nothing: here it keeps its plain softmax"),
            (p @ v, "nothing is cut: this is dense attention"),
        ),
        **tolerance,
    )
    if out.dtype != q.dtype:
        raise Wrong(f"out is {out.dtype} for inputs of {q.dtype}: leave the dtype as it comes")
    for name, before in (*zip(_NAMES, (q, k, v, tau)), ("d_out", d_out)):
        unchanged(before, seen["after"][name], name)

    first, second = seen["first"], seen["second"]
    _right_gradients(case, first, expected, zero, scores, tolerance)
    for name in _NAMES:
        if not close(array(second, f"d{name}", f"the gradient of {name}"), expected[f"d{name}"], **tolerance):
            raise Wrong(
                f"the gradient of {name} is right, and wrong once another forward pass comes before the backward one: "
                "keep what backward needs on ctx (ctx.save_for_backward), not on the class or in a global variable"
            )
    for name, came in seen.get("overwritten", {}).items():
        if came != "noticed" and not all(close(came[f"d{x}"], expected[f"d{x}"], **tolerance) for x in _NAMES):
            raise Wrong(
                f"{name} was overwritten between forward and backward, and the gradient is silently wrong: "
                "ctx.save_for_backward would have raised an error, an attribute such as ctx.q = q does not notice"
            )

    learned = array(seen, "learned", "the result of learnable_attention")
    compare(
        learned,
        expected["learned"],
        "the output of learnable_attention",
        ((p @ v, "learnable_attention cuts nothing: is tau = sigmoid(logit)?"),),
        rtol=1e-3,
        atol=1e-4,
    )
    if seen["own"] not in seen["nodes"]:
        raise Wrong(
            "learnable_attention does not go through ThresholdedAttention.apply, so that autograd, and not your "
            "backward, makes the gradient"
        )
    if seen["dlogit"] is None:
        raise Wrong(
            "no gradient reaches logit. Is there a detach(), a .data, an item() or a float() between logit and tau?"
        )
    compare(
        array(seen, "dlogit", "the gradient of logit"),
        expected["dlogit"],
        "the gradient of logit",
        (
            (
                first["dtau"],
                "the gradient of logit is that of tau: the slope of the sigmoid, tau (1 - tau), is missing",
            ),
            (-expected["dlogit"], "the gradient of logit has the wrong sign"),
        ),
        rtol=1e-3,
        atol=1e-5,
    )


def _right_gradients(
    case: Case,
    got: Seen,
    expected: dict[str, np.ndarray],
    zero: dict[str, np.ndarray],
    scores: np.ndarray,
    tolerance: dict[str, float],
) -> None:
    (q, k, v, tau), d_out = _qkv(case)
    arguments = (scores, v, tau, d_out)
    rows, constant = _formula(*arguments, empty_rows="dense"), _formula(*arguments, constant_sum=True)
    p, root = rows["p"], np.sqrt(case["d"])
    ds = {
        "cut keys get no gradient: they get -tau G p_j, because their score is in the softmax's denominator": np.where(
            (p > tau[:, None, None]) | rows["empty"], rows["ds"], 0
        ),
        "the gradient of p is used for that of the scores: the softmax's Jacobian is missing": rows["dp"],
        "p * g is used for the gradient of the scores: subtract tau G from g first": p * rows["dp"],
        "Z is taken for a constant, as if it were detached: D is missing from g": constant["ds"],
    }
    turned = {"q": lambda x: x @ k / root, "k": lambda x: x.swapaxes(-1, -2) @ q / root}
    for name in _NAMES:
        if got[f"d{name}"] is None:
            raise Wrong(f"backward returns no gradient for {name}: it returns dq, dk, dv, dtau, one for each input")
        came = array(got, f"d{name}", f"the gradient of {name}")
        if name == "tau":
            _right_tau(
                came, expected["dtau"], rows, constant["dtau"], d_out, expected["out"], tau, "the gradient of tau"
            )
            continue
        if np.isnan(came).any():
            raise Wrong(
                f"the gradient of {name} contains NaN: an empty row has Z = 0. Guard the division in backward, too"
            )
        empty = (
            zero[f"d{name}"],
            f"the gradient of {name} leaves out the empty rows: they fall back to the softmax, and so does "
            "their gradient",
        )
        mistakes: list[Mistake] = [empty]
        if name in turned:
            mistakes.append(
                (expected[f"d{name}"] * root, f"the gradient of {name} is not divided by sqrt(d), as the scores are")
            )
            mistakes.extend(
                (turned[name](wrong), f"the gradient of {name} is wrong: {why}") for why, wrong in ds.items()
            )
        else:
            mistakes.append((p.swapaxes(-1, -2) @ d_out, "the gradient of v uses the softmax p: the output is A v"))
        compare(came, expected[f"d{name}"], f"the gradient of {name}", mistakes, **tolerance)


B4 = Question(
    name="b4",
    answers=("ThresholdedAttention", "learnable_attention"),
    cases=(
        {"what": "one image, two heads", "seed": 5, "b": 1, "n": 4, "m": 6, "d": 4, "dv": 3, "tau": [0.1, 0.05]},
        {"what": "a batch of two", "seed": 6, "b": 2, "n": 5, "m": 7, "d": 3, "dv": 2, "tau": [0.1, 0.05, 0.12]},
    ),
    probe=_probe_function,
    judge=_judge_function,
    hints=(
        "forward is assignment a's attention with one tau for each head; backward is b1, b2 and b3 in torch, and two "
        "more products, from the scores to q and k. ctx.save_for_backward in one, ctx.saved_tensors in the other.",
        "scores = q k^T / sqrt(d), so dq = dS k / sqrt(d) and dk = dS^T q / sqrt(d). In an empty row the weights are p "
        "itself, so the gradient that arrives at p there is dO.v_j, and tau gets nothing.",
        "Let g be b1's on rows with a survivor and dO.v_j on empty ones (torch.where). Then dS = p * (g - (p * g).sum) "
        "holds for both. learnable_attention: tau = torch.sigmoid(logit), then ThresholdedAttention.apply(q, k, v, "
        "tau).",
    ),
    section="chapter 1, section 7, and chapter 2, section 9",
)

QUESTIONS = (B1, B2, B3, B4)
