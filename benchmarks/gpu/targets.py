"""What was aimed at on a GPU, and what was measured: a line per target, from the tables of the other modules."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu.plan import Plan, Row, Table
from svit_utils.files import read_rows

DEIT = "deit_tiny_patch16_224"


def rows(folder: Path, size: str = "full") -> list[Row]:
    """The worst value of each target, where it was, and whether it is met; "not measured" where there is no row."""
    attention, vit, proved, trained = (
        [row for row in read_rows(folder / f"{name}.csv") if row["size"] == size]
        for name in ("attention", "vit", "prove", "throughput")
    )
    ours = [row for row in attention if row["variant"] == "triton"]

    def ratios(direction: str, fits: Callable[[Row], bool]) -> list[tuple[float, str]]:
        fitting = [row for row in ours if row["direction"] == direction and fits(row)]
        return _values(fitting, "ratio_to_sdpa", ("n", "logits"))

    def empty(row: Row) -> bool:  # four fifths of the map; tiles on the border of two groups are visited
        return int(row["n"]) >= 2049 and bool(row["tiles_visited"]) and float(row["tiles_visited"]) <= 0.3

    step = [r for r in vit if (r["model"], r["img_size"]) == ("vit_base_patch16_224", "224")]
    step = [r for r in step if (r["what"], r["variant"]) == ("training step", "sparse")]
    deit = [r for r in trained if r["model"] == DEIT and r["images_per_second"]]
    fastest = {r["variant"]: r for r in sorted(deit, key=lambda r: float(r["images_per_second"]))}
    return [
        _worst("forward / SDPA, N <= 577", 1.3, ratios("forward", lambda r: int(r["n"]) <= 577)),
        _worst("forward / SDPA, N > 577", 1.6, ratios("forward", lambda r: int(r["n"]) > 577)),
        _worst("forward / SDPA, N >= 2049, 80 % of the tiles empty", 1.0, ratios("forward", empty)),
        _worst("forward + backward / SDPA", 1.6, ratios("forward+backward", lambda r: True)),
        _worst("ViT-Base training step at 224 px, sparse / dense", 1.05, _values(step, "ratio_to_dense", ("batch",))),
        _worst(
            "error against float64 / the formula's in the same dtype",
            2.0,
            _values(proved, "worst_ratio", ("dtype", "n", "mode", "worst")),
        ),
        _worst(
            "DeiT-Tiny training at 224 px, images a second",
            3000.0,
            _values(fastest.values(), "images_per_second", ("variant", "batch", "mode")),
            least=True,
        ),
    ]


def _values(found: Iterable[Row], column: str, where: tuple[str, ...]) -> list[tuple[float, str]]:
    return [
        (float(row[column]), ", ".join(f"{name} {row[name]}" for name in where)) for row in found if row.get(column)
    ]


def _worst(target: str, bound: float, values: list[tuple[float, str]], least: bool = False) -> Row:
    sign = ">=" if least else "<="
    if not values:
        return {
            "target": target,
            "bound": f"{sign} {bound:g}",
            "worst": "",
            "where": "",
            "median": "",
            "met": "not measured",
        }
    worst, where = min(values) if least else max(values)
    met = worst >= bound if least else worst <= bound
    median = round(statistics.median(value for value, _ in values), 3)
    row: Row = {"target": target, "bound": f"{sign} {bound:g}", "worst": round(worst, 3), "where": where}
    return row | {"median": median, "met": "yes" if met else "no"}


def run(plan: Plan) -> list[Row]:
    """Write ``targets.csv`` anew and print it; a rehearsal's numbers are compared with nothing."""
    found = rows(plan.out, plan.size)
    if plan.small:
        found = [{**row, "met": "not measured" if row["met"] == "not measured" else "rehearsal"} for row in found]
    table = Table(plan.out / "targets.csv", plan)
    table.rows = []
    table.extend(found)
    print(f"{'target':58s} {'bound':>8s} {'worst':>9s} {'median':>9s}  met")
    for row in found:
        print(
            f"{row['target']:58s} {row['bound']:>8s} {row['worst']!s:>9s} {row['median']!s:>9s}  {row['met']}  "
            f"{row['where']}"
        )
    return found
