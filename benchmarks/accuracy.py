"""The error of each backend and dtype against the formula in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure import Plan, Row
from benchmarks.variants import fast_backend, inputs
from svit_utils.attention import thresholded_attention

NAMES = ("out", "dq", "dk", "dv", "dtau")


def rows(plan: Plan) -> list[Row]:
    """Largest and root mean square error of output and gradients, each divided by the exact one's largest entry."""
    n, heads = (197, 2) if plan.quick else (577, 6)
    backends = ("reference", fast_backend(plan.device))
    found: list[Row] = []
    for tau in (plan.tau / 4, plan.tau):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = [x[:1, :heads] for x in inputs(n, device=plan.device, dtype=dtype)]
            exact = derivatives([x.double() for x in given], tau, "reference")
            for backend in backends:
                got = derivatives(given, tau, backend)
                for name, e, x in zip(NAMES, exact, got, strict=True):
                    error = (x.double() - e).abs() / e.abs().max()
                    row = {"n": n, "tau": tau, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
                    row |= {"device_type": plan.device, "quantity": name}
                    row |= {
                        "max_error": f"{float(error.max()):.3e}",
                        "rms_error": f"{float(error.square().mean().sqrt()):.3e}",
                    }
                    found.append(row)
                worst = max(found[-5:], key=lambda row: float(row["max_error"]))
                print(
                    f"tau {tau}  {dtype}  {backend:10s} largest error {worst['max_error']} ({worst['quantity']})",
                    flush=True,
                )
    return found


def derivatives(given: list[Tensor], tau: float, backend: str) -> list[Tensor]:
    """Output and the gradients of q, k, v and of one tau per head, for one upstream gradient."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    t = torch.full((q.shape[1],), tau, dtype=wide, device=q.device, requires_grad=True)  # one per head
    out = thresholded_attention(q, k, v, t, backend=backend)
    assert isinstance(out, Tensor)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, (q, k, v, t), direction.to(out))
    return [out.detach(), *gradients]
