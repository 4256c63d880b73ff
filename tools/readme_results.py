"""``make results``: write the README's results and costs from the recorded rows: it claims nothing they do not hold.

``--check`` changes nothing and exits 1 when the README differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from research.markdown import (
    budget,
    deit_sentence,
    deit_table,
    planted_table,
    provenance_line,
    study_sentence,
    study_table,
    vit56_table,
)
from research.second.markdown import second_sentence, second_table
from svit_utils.files import read_rows
from svit_utils.paths import results_dir

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COST_BEGIN, COST_END = "<!-- cost: begin -->", "<!-- cost: end -->"
COMPARED = ("tiled", "plain formula", "plain, compiled", "entmax15", "sparsemax", "top-k")


def block(folder: Path) -> str:
    """The Markdown between the markers, from the results files in ``folder``."""
    parts = []
    for title, name, table in (
        ("PlantedShapes, the small ViT (N = 197), all runs from one dense start", "planted", planted_table),
        ("CIFAR-10 at 224 px, DeiT-Tiny", "deit_cifar10", deit_table),
        ("CIFAR-10 at 56 px, the small ViT from scratch", "vit56_cifar10", vit56_table),
    ):
        lines = table(folder)
        source = [r for f in sorted(folder.glob(f"{name}*.csv")) if "_correct" not in f.name for r in read_rows(f)]
        source = [row for row in source if row["size"] == "full"]
        tabled = [row for row in source if row["experiment"] != "planted_start"]  # the start is not among the runs
        given = budget(tabled, rate=name != "deit_cifar10")  # there the rate is a column
        parts.append(f"**{title}{f', {given}' if given else ''}**\n")
        parts.append("\n".join(lines) + "\n" if lines else "Not run yet.\n")
        if lines and name == "deit_cifar10":
            parts.append(deit_sentence(folder) + "\n")
        if lines and source:
            parts.append(provenance_line(source) + "\n")
    lines = study_table(folder)
    given = budget(row for row in read_rows(folder / "study.csv") if row["size"] == "full") or "not run"
    parts.append(f"**The referee: do the maps lie more on the object?** (PlantedShapes, N = 197, rho = 0, {given})\n")
    parts.extend(["\n".join(lines) + "\n", study_sentence(folder) + "\n"] if lines else ["Not run yet.\n"])
    if lines := second_table(folder):
        parts.append("**The second study: does the gap close, and what costs least?** (PlantedShapes, N = 197)\n")
        parts += ["\n".join(lines) + "\n", second_sentence(folder) + "\n"]
    tried = [row for row in read_rows(folder / "vit_base_smoke.csv") if row["size"] == "full"]
    smoke = (
        f", and only tried at smoke size: {tried[0]['steps']} steps from random weights run to their end"
        if tried
        else ""
    )
    parts.append(
        "ViT-Base, the card's model, is not tested: its weights are not part of this repository "
        f"(`python -m svit_utils train --profile paper` is the command){smoke}.\n"
    )
    return "\n".join(parts)


def cost(folder: Path) -> str:
    """Time over that of fused dense attention, in Markdown, from ``bench/attention.csv`` and ``bench/vit.csv``."""
    rows = read_rows(folder / "bench" / "attention.csv")
    if not rows:
        return "Not measured yet.\n"
    threads = min(int(row["threads"]) for row in rows)
    found = {
        (row["variant"], row["direction"], int(row["n"])): float(row["ratio_to_sdpa"])
        for row in rows
        if row["logits"] == "independent" and int(row["threads"]) == threads
    }
    lengths = sorted({n for _, _, n in found})
    lines = ["| forward / forward + backward | " + " | ".join(f"N = {n}" for n in lengths) + " |"]
    lines.append("| --- " * (1 + len(lengths)) + "|")
    for variant in COMPARED:
        cells = []
        for n in lengths:
            both = [found.get((variant, direction, n)) for direction in ("forward", "forward+backward")]
            cells.append(" / ".join("" if ratio is None else f"{ratio:.2f}" for ratio in both))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    steps = {
        (row["model"], row["img_size"], row["what"]): float(row["ratio_to_dense"])
        for row in read_rows(folder / "bench" / "vit.csv")
        if row["variant"] == "sparse"
    }
    models = [f"{m.split('_patch')[0]} at {size} px, {what}: {r:.2f}" for (m, size, what), r in steps.items()]
    parts = ["\n".join(lines) + "\n"]
    if models:
        parts.append(f"Whole models, sparse over dense, all cores: {'; '.join(models)}.\n")
    first = rows[0]
    parts.append(
        f"Medians, one run, {threads} thread{'s' * (threads > 1)}, float32, head size 64, tau {first['tau']}; "
        f"{first['device']}, torch {first['torch']}, {first['date']}, commit {first['commit']}.\n"
    )
    return "\n".join(parts)


def stamped(text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``content`` between the markers."""
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def whole(text: str, folder: Path) -> str:
    """The README's text with both of its parts written again."""
    return stamped(stamped(text, block(folder)), cost(folder), COST_BEGIN, COST_END)


def main(argv: list[str] | None = None) -> int:
    """Stamp or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when the README differs")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    now = readme.read_text(encoding="utf-8")
    wanted = whole(now, results_dir())
    if args.check:
        if now != wanted:
            print("the README's results differ from results/: run `make results`")
        return int(now != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
