"""The ways to attend that are compared, and the logits they are given."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from svit_utils.attention import attention_record, thresholded_attention

HEADS, WIDTH = 6, 64
LENGTHS = (65, 197, 577, 1025, 2049, 4097)
LOGITS = ("independent", "clustered")
CLUSTERS = 5
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(
    n: int, *, grad: bool = False, logits: str = "independent", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, 6, N, 64], B = 4, or 1 from N = 2049 on; logits of standard deviation 2.

    ``"independent"``: sums of 64 products of Gaussians. ``"clustered"``: the tokens form 5 consecutive groups, and
    logits between groups are lower by 8, so that survivors lie in the 5 blocks on the diagonal, a fifth of the map.
    """
    g = torch.Generator().manual_seed(0)
    batch = 4 if n < 2000 else 1
    q, k, v = (torch.randn(batch, HEADS, n, WIDTH, generator=g) for _ in range(3))
    q = 2 * q
    if logits == "clustered":
        group = (torch.arange(n) * CLUSTERS) // n
        # One dimension per group carries an offset: q . k / 8 rises by 8 within a group.
        one_hot = F.one_hot(group, CLUSTERS).to(q.dtype)
        q[..., :CLUSTERS] = 8 * one_hot
        k[..., :CLUSTERS] = 8 * one_hot
    q, k, v = (x.to(device, dtype).requires_grad_(grad) for x in (q, k, v))
    return q, k, v


def cut_share(n: int, tau: float, logits: str) -> float:
    """The share of probabilities at or below tau."""
    q, k, v = (x[:1] for x in inputs(n, logits=logits))
    record = [
        attention_record(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], tau)
        for h in range(1 if n > 2000 else HEADS)
    ]
    return 1 - sum(float((r.probs > tau).float().mean()) for r in record) / len(record)


def fast_backend(device: str) -> str:
    """This library's backend in linear memory for a device; it has the same name in the tables."""
    return "triton" if device == "cuda" else "tiled"


def variants(tau: float, n: int, device: str, grad: bool) -> dict[str, Attention]:
    """Every variant that this machine and this direction allow; SDPA first."""
    found: dict[str, Attention] = {"sdpa": F.scaled_dot_product_attention}
    for name, backend in (("plain formula", "reference"), (fast_backend(device), fast_backend(device))):
        found[name] = lambda q, k, v, b=backend: thresholded_attention(q, k, v, tau, backend=b)  # type: ignore[misc]
    if device == "cuda" or shutil.which("g++") or shutil.which("clang++"):
        compiled = torch.compile(found["plain formula"], dynamic=False)
        found["plain, compiled"] = compiled
        if device == "cuda" or not grad:  # FlexAttention has no backward pass on the CPU
            found["flex, two passes"] = flex(tau, device)
    if importlib.util.find_spec("entmax") is not None:
        import entmax

        found["entmax15"] = _over_scores(lambda s: entmax.entmax15(s, dim=-1))
        found["sparsemax"] = _over_scores(lambda s: entmax.sparsemax(s, dim=-1))
    found["top-k"] = _over_scores(lambda s: _top_k(s, min(32, n)))
    return found


def _over_scores(weights: Callable[[Tensor], Tensor]) -> Attention:
    return lambda q, k, v: weights(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) @ v


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Softmax over the k largest scores."""
    values, index = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, values.softmax(dim=-1))


def flex(tau: float, device: str) -> Attention:
    """FlexAttention has no hook after the softmax; knowing a row's log-sum-exp, one before it will do.

    With L = logsumexp(s), log ReLU(exp(s - L) - tau) is a score whose softmax is R / sum(R). L takes a pass of its own:
    FlexAttention's on a GPU, SDPA's on a CPU, where FlexAttention does not return it. Empty rows get 0.
    """
    from torch.nn.attention import flex_attention as module

    flex_attention = module.flex_attention

    def cut(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            del j
            return torch.log(torch.relu(torch.exp(s - lse[b, h, i]) - tau))

        return flex_attention(q, k, v, score_mod=score)  # type: ignore[return-value]

    second = torch.compile(cut, dynamic=False)
    if device == "cuda":
        if hasattr(module, "AuxRequest"):  # from PyTorch 2.9 on
            asked, log_sum = {"return_aux": module.AuxRequest(lse=True)}, lambda answer: answer[1].lse
        else:
            asked, log_sum = {"return_lse": True}, lambda answer: answer[1]
        first = torch.compile(lambda q, k, v: log_sum(flex_attention(q, k, v, **asked)), dynamic=False)  # type: ignore[arg-type]
    else:

        def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[1]

    return lambda q, k, v: second(q, k, v, first(q, k, v))
