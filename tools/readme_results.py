"""``make results``: write the README's results from the recorded rows, so that it claims nothing they do not hold.

``--check`` changes nothing and exits 1 when the README differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svit_utils.experiments.run import recorded
from svit_utils.experiments.summary import deit_table, planted_table, provenance_line, vit56_table
from svit_utils.paths import results_dir

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def block(folder: Path) -> str:
    """The Markdown between the markers, from the results files in ``folder``."""
    parts = []
    for title, name, table in (
        ("PlantedShapes, the small ViT (N = 197), all arms from one dense start", "planted", planted_table),
        ("CIFAR-10 at 224 px, DeiT-Tiny, 450 steps of 16 images", "deit_cifar10", deit_table),
        ("CIFAR-10 at 56 px, the small ViT from scratch", "vit56_cifar10", vit56_table),
    ):
        lines = table(folder)
        source = [r for f in sorted(folder.glob(f"{name}*.csv")) if "_correct" not in f.name for r in recorded(f)]
        source = [row for row in source if row["size"] == "full"]
        parts.append(f"**{title}**\n")
        parts.append("\n".join(lines) + "\n" if lines else "Not run yet.\n")
        if lines and source:
            parts.append(provenance_line(source) + "\n")
    tried = [row for row in recorded(folder / "vit_base_smoke.csv") if row["size"] == "full"]
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


def stamped(text: str, content: str) -> str:
    """``text`` with ``content`` between the markers."""
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Stamp or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when the README differs")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    now = readme.read_text(encoding="utf-8")
    wanted = stamped(now, block(results_dir()))
    if args.check:
        if now != wanted:
            print("the README's results differ from results/: run `make results`")
        return int(now != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
