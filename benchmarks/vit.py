"""A whole Vision Transformer: one training step and one inference, sparse against timm's fused dense attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Plan, Row, in_turn, summarised
from svit_utils import TokenSparsityTracker, sparsify
from svit_utils.models import create_model

MODELS = (("vit_tiny_patch16_224", 8), ("vit_base_patch16_224", 2))  # images per step at 224 px; a quarter at 384
SIZES = (224, 384)


def rows(plan: Plan) -> list[Row]:
    """Dense, sparse with logits as spread as a trained model's, and sparse untrained, where most rows are empty."""
    torch.set_num_threads(plan.all_threads)
    found = []
    for name, images in MODELS[: 1 if plan.quick else None]:
        for size in SIZES[: 1 if plan.quick else None]:
            batch = max(1, images if size == SIZES[0] else images // 4)
            batch = 16 * batch if plan.device == "cuda" else batch
            models = {
                "dense": model(name, size, plan, spread=True, sparse=False),
                "sparse": model(name, size, plan, spread=True, sparse=True),
                "sparse, untrained": model(name, size, plan, spread=False, sparse=True),
            }
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(plan.device)
            empty = {key: empty_rate(m, x[:1]) for key, m in models.items() if key != "dense"}
            for what, step in (("inference", inference), ("training step", training_step)):
                functions: dict[str, Callable[[], object]] = {k: partial(step, m, x) for k, m in models.items()}
                for variant, row in summarised(in_turn(functions, plan), "dense").items():
                    common = {"model": name, "img_size": size, "batch": batch, "what": what, "variant": variant}
                    common |= {"threads": plan.all_threads, "device_type": plan.device, "tau": plan.tau}
                    found.append({**common, "rows_empty": round(empty.get(variant, 0.0), 3), **row})
                    print(
                        f"{name} {size} px  {what:13s}  {variant:17s} {row['median_ms']:9.1f} ms"
                        f"  {row['ratio_to_dense']:5.2f} x dense  [{row['ratio_q25']:.2f}, {row['ratio_q75']:.2f}]",
                        flush=True,
                    )
    return found


def model(name: str, size: int, plan: Plan, *, spread: bool, sparse: bool) -> nn.Module:
    """A timm model with random weights, seed 0.

    Freshly drawn, its attention is so flat that most rows are empty at tau = 0.01; ``spread`` scales the query and key
    projections until the logits are spread as in trained models.
    """
    torch.manual_seed(0)
    made = create_model(name, img_size=size, num_classes=10)
    if spread:
        for parameter in (p for n, p in made.named_parameters() if n.endswith("qkv.weight")):
            with torch.no_grad():
                parameter[: 2 * parameter.shape[0] // 3].mul_(4)  # q and k, not v
    if sparse:
        sparsify(made, plan.tau)
    return made.to(plan.device)


def empty_rate(sparse_model: nn.Module, x: Tensor) -> float:
    """The share of rows in which no key survives."""
    with torch.no_grad(), TokenSparsityTracker(sparse_model) as tracker:
        sparse_model.eval()(x)
    return float(tracker.summary().empty_rate)


def inference(m: nn.Module, x: Tensor) -> None:
    """One forward pass in evaluation mode."""
    with torch.no_grad(), _autocast(x):
        m.eval()(x)


def training_step(m: nn.Module, x: Tensor) -> None:
    """Forward, loss, backward, and a step of plain gradient descent of size 0, which keeps the rounds alike."""
    m.train()
    with _autocast(x):
        loss = F.cross_entropy(m(x), torch.zeros(len(x), dtype=torch.long, device=x.device))
    loss.backward()
    with torch.no_grad():
        for parameter in m.parameters():
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=0.0)
            parameter.grad = None


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda")
