"""What was aimed at, and what was measured: a line per target, read from the files that the other modules wrote."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.measure import Row

FILES = ("attention", "vit", "accuracy")


def rows(folder: Path) -> list[Row]:
    """The worst measured value for each target, where it was, and whether it is met; "not measured" without data.

    Raises:
        FileNotFoundError: a file of `FILES` is missing; run ``python -m benchmarks`` first.
    """
    attention, vit, accuracy = (pd.read_csv(folder / f"{name}.csv") for name in FILES)
    cpu = attention[(attention.device_type == "cpu") & (attention.n >= 197)]
    gpu = attention[attention.device_type == "cuda"]
    step = vit[(vit.model == "vit_base_patch16_224") & (vit.img_size == 224) & (vit.what == "training step")]
    step = step[step.variant != "dense"]  # sparse and untrained: the worst counts, whichever it is
    found = [
        *_cpu_rows(cpu),
        _worst("GPU forward / SDPA, N <= 577", 1.3, _ours(gpu[gpu.n <= 577], "forward")),
        _worst("GPU forward / SDPA, N > 577", 1.6, _ours(gpu[gpu.n > 577], "forward")),
        _worst(
            "GPU forward / SDPA, N >= 2049, clustered",
            1.0,
            _ours(gpu[(gpu.n >= 2049) & (gpu.logits == "clustered")], "forward"),
        ),
        _worst("GPU forward+backward / SDPA", 1.6, _ours(gpu, "forward+backward")),
        _worst("ViT-Base training step at 224 px / dense, CPU", 1.1, _steps(step[step.device_type == "cpu"])),
        _worst("ViT-Base training step at 224 px / dense, GPU", 1.05, _steps(step[step.device_type == "cuda"])),
        _worst("error against float64 / the reference's, float32", 2.0, _errors(accuracy)),
    ]
    return found


def _cpu_rows(cpu: pd.DataFrame) -> list[Row]:
    one = cpu[(cpu.threads == cpu.threads.min())]
    several = cpu[(cpu.threads == cpu.threads.max()) & (cpu.threads > cpu.threads.min())]
    found = []
    for label, part in (("one thread", one), ("all threads", several)):
        found.append(_worst(f"CPU forward / SDPA, {label}", 1.25, _ours(part, "forward")))
        found.append(_worst(f"CPU forward+backward / SDPA, {label}", 1.5, _ours(part, "forward+backward")))
        for direction in ("forward", "forward+backward"):
            ratios = _against_plain(part[part.n >= 577], direction, "median_ms")
            found.append(_worst(f"CPU {direction} / plain formula, N >= 577, {label}", 0.5, ratios))
    for direction in ("forward", "forward+backward"):
        memory = _against_plain(one[one.n == 4097], direction, "peak_growth_mib")
        found.append(_worst(f"CPU peak memory at N = 4097 / plain formula, {direction}", 0.05, memory))
    return found


def _ours(part: pd.DataFrame, direction: str) -> pd.Series:
    """Ratios to SDPA of this library's fast backend, by where they were measured."""
    part = part[part.variant.isin(("tiled", "triton")) & (part.direction == direction)]
    return part.ratio_to_sdpa.set_axis(_where(part))


def _against_plain(part: pd.DataFrame, direction: str, column: str) -> pd.Series:
    part = part[(part.direction == direction) & part[column].notna()]
    keys = ["n", "logits", "threads"]
    fast = part[part.variant.isin(("tiled", "triton"))].set_index(keys)
    plain = part[part.variant == "plain formula"].set_index(keys)
    ratios = (fast[column] / plain[column]).dropna()
    ratios.index = [f"N = {n}, {logits}" for n, logits, _ in ratios.index]
    return ratios


def _steps(part: pd.DataFrame) -> pd.Series:
    return part.set_index("variant").ratio_to_dense


def _errors(accuracy: pd.DataFrame) -> pd.Series:
    """Largest error of the fast backend over that of the reference, for each quantity in float32."""
    narrow = accuracy[accuracy.dtype == "float32"].set_index(["quantity", "tau"])
    fast, plain = narrow[narrow.backend != "reference"], narrow[narrow.backend == "reference"]
    ratios = (fast.max_error / plain.max_error).dropna()
    ratios.index = [f"{quantity}, tau = {tau}" for quantity, tau in ratios.index]
    return ratios


def _where(part: pd.DataFrame) -> list[str]:
    return [f"N = {n}, {logits}" for n, logits in zip(part.n, part.logits, strict=True)]


def _worst(target: str, bound: float, values: pd.Series) -> Row:
    if values.empty:
        return {"target": target, "bound": bound, "worst": "", "where": "", "median": "", "met": "not measured"}
    worst = float(values.max())
    met = "yes" if worst <= bound else "no"
    median = round(float(values.median()), 3)
    return {
        "target": target,
        "bound": bound,
        "worst": round(worst, 3),
        "where": str(values.idxmax()),
        "median": median,
        "met": met,
    }


def printed(found: list[Row]) -> str:
    """The table as text."""
    return pd.DataFrame(found)[["target", "bound", "worst", "where", "median", "met"]].to_string(index=False)
