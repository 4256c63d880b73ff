"""Whole Vision Transformers, sparse against timm's fused dense attention: training step and inference in bfloat16."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.card import peak_tflops
from benchmarks.gpu.plan import Clock, Plan, Row, Table
from benchmarks.gpu.timing import median_ms, peak_growth_mib, reason
from benchmarks.vit import empty_rate, inference, training_step
from svit_utils.attention import sparsify
from svit_utils.models import create_model

TAU = 0.01
MODELS = (  # name, pixels, images per step
    ("vit_base_patch16_224", 224, 128),
    ("vit_tiny_patch16_224", 224, 512),
    ("vit_base_patch16_224", 384, 32),
    ("vit_tiny_patch16_224", 384, 128),
)
SMALL_MODELS = (("vit_tiny_patch16_224", 64, 2),)


def run(plan: Plan, clock: Clock, table: Table, facts: Table) -> None:
    """Rows of ``vit.csv``: dense, sparse with logits as spread as a trained model's, sparse untrained."""
    for name, size, batch in SMALL_MODELS if plan.small else MODELS:
        if not clock.allows(10.0):
            return
        try:
            table.extend(_rows(plan, name, size, batch, peak_tflops(facts.rows, plan.size)))
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name} at {size} px: {reason(error)}")
        if plan.device == "cuda":
            torch.cuda.empty_cache()


def _rows(plan: Plan, name: str, size: int, batch: int, peak: float | None) -> list[Row]:
    made = variants(plan, name, size)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator(plan.device).manual_seed(0), device=plan.device)
    empty = {key: empty_rate(model, x[:1]) for key, model in made.items() if key != "dense"}
    flops = forward_flops(made["dense"], x[:1])
    rows: list[Row] = []
    for what, step, passes in (("training step", training_step, 3), ("inference", inference, 1)):
        base = None
        for key, model in made.items():
            calls = [partial(step, model, x)]
            row: Row = {"model": name, "img_size": size, "batch": batch, "what": what, "variant": key, "tau": TAU}
            row |= {"peak_growth_mib": peak_growth_mib(calls[0], plan.device)}
            row |= median_ms(calls, plan.device, rep_ms=400.0 if not plan.small else 50.0)
            base = base or row["median_ms"]
            rate = 1e3 * batch / row["median_ms"]
            row |= {"ratio_to_dense": round(row["median_ms"] / base, 3), "images_per_second": round(rate, 1)}
            row |= {"dense_tflops": round(passes * flops * rate / 1e12, 2)}
            row |= {"share_of_peak": round(passes * flops * rate / 1e12 / peak, 3) if peak else ""}
            row |= {"rows_empty": round(empty.get(key, 0.0), 3)}
            rows.append(row)
            print(
                f"{name} {size} px  {what:13s} {key:17s} {row['median_ms']:9.2f} ms  "
                f"{row['ratio_to_dense']:5.2f} x dense  {row['images_per_second']:9.0f} images/s",
                flush=True,
            )
    return rows


def variants(plan: Plan, name: str, size: int) -> dict[str, nn.Module]:
    """One set of random weights three times.

    Freshly drawn, attention is so flat that most rows are empty at tau = 0.01; the first two have query and key
    projections scaled until the logits are as spread as in trained models.
    """
    torch.manual_seed(0)
    with torch.device(plan.device):
        dense = create_model(name, img_size=size, num_classes=10)
    untrained = copy.deepcopy(dense)
    for parameter in (p for n, p in dense.named_parameters() if n.endswith("qkv.weight")):
        with torch.no_grad():
            parameter[: 2 * parameter.shape[0] // 3].mul_(4)  # q and k, not v
    sparse = copy.deepcopy(dense)
    sparsify(sparse, TAU)
    sparsify(untrained, TAU)
    return {"dense": dense, "sparse": sparse, "sparse, untrained": untrained}


def forward_flops(model: nn.Module, x: Tensor) -> int:
    """Operations of the dense model's forward pass, a multiplication and an addition counted as two."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops()) // len(x)
