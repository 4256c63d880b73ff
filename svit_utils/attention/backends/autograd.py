"""What the fast backends share: their ops' flat arguments, and the autograd Function around a pair of ops.

A backend registers two custom ops, so that ``torch.compile`` and ``torch.func`` see one call and look no further:

    forward(q, k, v, *settings, need)                    -> out [B, H, N, Dv], rows [B, H, N, .], more [B, H, N, .]
    backward(grad, out, rows, more, q, k, v, *settings)  -> gradients of q, k, v, and of each row's tau [B, H, N]

``rows`` and ``more`` are what a backend hands from one to the other, or empty; ``need`` is a number of its own;
``settings`` are those of `SETTINGS`. Ops take numbers and tensors only, so a
`Call` is taken apart by `flat` on one side and put together by `from_flat` on the other.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from svit_utils.attention.call import Call
from svit_utils.attention.formula import statistics_dtype
from svit_utils.attention.record import attend

# The part of an op's schema that says what a call is computed with; `flat` gives the values in this order.
SETTINGS = "Tensor tau, Tensor? mask, float scale, bool causal, float dropout, Tensor? seed, str empty_rows"
# What a fast backend reports of each row: survivors, the sum of their p, non-zero weights, 1 / sum(A^2).
STATISTICS = 4
_Function = TypeVar("_Function", bound=Callable[..., Any])
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def flat(call: Call, q: Tensor) -> tuple[Any, ...]:
    """The call's settings as an op takes them; the seed of its dropout, if it has any, is drawn here."""
    tau = call.tau
    if not isinstance(tau, Tensor):
        tau = torch.full((), tau, dtype=statistics_dtype(q), device=q.device)  # made there: nothing is copied to a GPU
    elif tau.device != q.device:
        tau = tau.to(q.device)  # of a threshold object that does not follow a model
    seed = torch.randint(2**62, ()) if call.dropout_p else None
    return tau, call.attn_mask, call.scale, call.is_causal, call.dropout_p, seed, call.empty_rows


def from_flat(settings: Sequence[Any]) -> Call:
    """The call again, without its seed."""
    tau, mask, scale, causal, dropout, _, empty_rows = settings
    return Call(tau, scale, mask, causal, dropout, empty_rows)


def run(name: str, q: Tensor, k: Tensor, v: Tensor, call: Call, need: int) -> tuple[Tensor, ...]:
    """The op ``svit::<name>``; through an autograd Function only where a derivative may be asked for.

    A Function's bookkeeping takes a noticeable part of the time where N is small.
    """
    settings = flat(call, q)
    if differentiates(q, k, v, settings[0]):
        return Forward.apply(name, q, k, v, *settings, need)
    return _op(name, q)(q, k, v, *settings, need)


def implements(name: str) -> Callable[[_Function], _Function]:
    """Remember a function as what the op ``svit::<name>`` does."""

    def remember(function: _Function) -> _Function:
        _IMPLEMENTATIONS[name] = function
        return function

    return remember


def _op(name: str, q: Tensor) -> Any:
    """The op, or the function behind it where nobody looks: the dispatcher costs as much as a small problem's work."""
    if torch.compiler.is_compiling() or _transforms_active() or type(q) is not Tensor or q.is_meta:
        return getattr(torch.ops.svit, name)
    return _IMPLEMENTATIONS[name]


def differentiates(*tensors: Tensor) -> bool:
    """Whether a derivative may be asked for: by autograd, or by torch.func, whose tensors do not say so."""
    if _transforms_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# What torch.autograd.Function asks itself; should it be renamed, every call goes through the Function.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class Forward(torch.autograd.Function):
    """The op ``svit::<name>`` with ``svit::<name>_backward`` as its derivative.

    A Function, because torch.func differentiates those, and not ops with a registered formula.
    """

    @staticmethod
    def forward(name, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, need):  # type: ignore[no-untyped-def]
        return _op(name, q)(q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, need)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, tau, mask, seed, *output)
        ctx.settings = (name, scale, causal, dropout, empty_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, tau, mask, seed, out, rows, more = ctx.saved_tensors
        name, scale, causal, dropout, empty_rows = ctx.settings
        arguments = (grad, out, rows, more, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows)
        if differentiates(grad, q, k, v, tau):  # under create_graph=True
            dq, dk, dv, dtau = Backward.apply(f"{name}_backward", *arguments)
        else:
            dq, dk, dv, dtau = _op(f"{name}_backward", q)(*arguments)
        dtau = dtau.unsqueeze(-1).sum_to_size(tau.shape).to(tau.dtype) if ctx.needs_input_grad[4] else None
        return None, dq, dk, dv, dtau, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return one_by_one(Forward.apply, info, in_dims, arguments)


class Backward(torch.autograd.Function):
    """The first derivative, itself differentiable: by the formula and its N x N matrices, since that is rare.

    The parameters of `forward` are written out because torch.compile counts them.
    """

    @staticmethod
    def forward(name, grad, out, rows, more, q, k, v, tau, mask, scale, causal, dropout, seed, empty_rows):  # type: ignore[no-untyped-def]
        settings = (tau, mask, scale, causal, dropout, seed, empty_rows)
        return _op(name, q)(grad, out, rows, more, q, k, v, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, grad, _, _, _, q, k, v, tau, mask, scale, causal, dropout, _, empty_rows = inputs
        ctx.save_for_backward(grad, q, k, v, tau, mask)
        ctx.settings = (scale, causal, dropout, empty_rows)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mask = ctx.saved_tensors
        scale, causal, dropout, empty_rows = ctx.settings
        if dropout:
            raise NotImplementedError(
                "the fast backends have no second derivatives with dropout: set dropout_p=0 or backend='reference'"
            )
        call = Call(tensors[-1], scale, mask, causal, empty_rows=empty_rows)
        dgrad, *rest = second_derivatives(tensors, directions, call)
        # `out`, `rows` and `more` come in as tensors of their own, but they are functions of q, k and v: the gradients
        # of those contain their share.
        return None, dgrad, None, None, None, *rest, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return one_by_one(Backward.apply, info, in_dims, arguments)


for _each in (Forward, Backward):
    # PyTorch asks for the signature at every call, and works it out anew unless it is kept.
    _each.forward.__signature__ = inspect.signature(_each.forward)  # type: ignore[union-attr]


def second_derivatives(tensors: Sequence[Tensor], directions: tuple[Tensor, ...], call: Call) -> tuple[Tensor, ...]:
    """The derivative of the first derivatives of (q, k, v, each row's tau) in ``directions``, by the formula.

    ``tensors`` are the output's gradient, q, k, v and tau; the results belong to the same five. ``call.tau`` is unused.
    """

    def out(q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        formula = Call(tau, call.scale, empty_rows=call.empty_rows)
        return attend(q, k, v, formula, scale=call.scale, attn_mask=call.attn_mask, is_causal=call.is_causal).out

    def first(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv, dtau = torch.func.vjp(out, q, k, v, tau.expand(*q.shape[:3], 1))[1](grad)
        return dq, dk, dv, dtau.squeeze(-1)

    return torch.func.vjp(first, *tensors)[1](directions)


def one_by_one(op: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """A vmap rule that computes the elements one after the other: each is work enough for the whole processor."""
    results = [
        op(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
