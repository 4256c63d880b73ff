"""``make results``: write what the README and results/README.md say of the results, and the verdict, from the rows.

The README has the result in two sentences, a short table and the costs in a line; results/README.md the long tables;
results/verdict/ the ledger and the page of chapter 10. ``--check`` changes nothing and exits 1 where one differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
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
from research.verdict.page import write_verdict
from research.verdict.sources import Sources
from research.verdict.summary import short_table, two_sentences
from svit_utils.files import read_rows, write_file
from svit_utils.paths import results_dir

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "results" / "README.md"
COMPARED = ("tiled", "plain formula", "plain, compiled", "entmax15", "sparsemax", "top-k")


def long_tables(folder: Path) -> str:
    """Every run and comparison, from the results files in ``folder``."""
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
    return "\n".join([*lines, "", whole_models(folder) + measured(rows, threads)])


def whole_models(folder: Path) -> str:
    """Time of whole models, sparse over dense, in a sentence."""
    rows = [row for row in read_rows(folder / "bench" / "vit.csv") if row["variant"] == "sparse"]
    said = (
        f"{row['model'].split('_patch')[0]} at {row['img_size']} px, {row['what']}: {float(row['ratio_to_dense']):.2f}"
        for row in rows
    )
    return f"Whole models, sparse over dense, all cores: {'; '.join(said)}.\n\n" if rows else ""


def measured(rows: list[dict[str, str]], threads: int) -> str:
    """How the costs were measured, in a sentence."""
    first = rows[0]
    return (
        f"Medians, one run, {threads} thread{'s' * (threads > 1)}, float32, head size 64, tau {first['tau']}; "
        f"{first['device']}, torch {first['torch']}, {first['date']}, commit {first['commit']}.\n"
    )


def cost_in_short(folder: Path) -> str:
    """The range over lengths of the time of one attention call over fused dense attention's, and whole models."""
    rows = [row for row in read_rows(folder / "bench" / "attention.csv") if row["logits"] == "independent"]
    whole = [(row["variant"], float(row["ratio_to_dense"])) for row in read_rows(folder / "bench" / "vit.csv")]
    trained, untrained = ([ratio for name, ratio in whole if name == n] for n in ("sparse", "sparse, untrained"))
    if not rows or not trained or not untrained:
        return "Not measured yet.\n"
    threads = min(int(row["threads"]) for row in rows)
    said = []
    for name in ("tiled", "plain formula"):
        found = [
            float(row["ratio_to_sdpa"]) for row in rows if (row["variant"], int(row["threads"])) == (name, threads)
        ]
        said.append(f"{name} {min(found):.2f} to {max(found):.2f}")
    lengths = sorted(int(row["n"]) for row in rows)
    return (
        f"N = {lengths[0]} to {lengths[-1]}, with and without a backward pass: {', '.join(said)}. "
        f"Whole models: {min(trained):.2f} to {max(trained):.2f}, and up to {max(untrained):.2f} untrained, where rows "
        f"are empty. {measured(rows, threads)}"
    )


def stamped(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the two markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def readme(text: str, sources: Sources) -> str:
    """The README's text with its parts written again."""
    costs = cost_in_short(sources.folder)
    parts = {"result": two_sentences(sources), "results": short_table(sources), "cost": costs}
    for name, content in parts.items():
        text = stamped(text, name, content)
    return text


def results_page(text: str, folder: Path) -> str:
    """The text of results/README.md with its tables written again."""
    return stamped(stamped(text, "results", long_tables(folder)), "cost", cost(folder))


def main(argv: list[str] | None = None) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where a file differs")
    args = parser.parse_args(argv)
    folder = results_dir()
    sources = Sources(folder)
    wanted = {
        README: readme(README.read_text(encoding="utf-8"), sources),
        PAGE: results_page(PAGE.read_text(encoding="utf-8"), folder),
    }
    with tempfile.TemporaryDirectory() as made:
        for path in write_verdict(sources, Path(made)):
            wanted[folder / "verdict" / path.name] = path.read_text(encoding="utf-8")
    differ = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if args.check:
        for path in differ:
            print(f"{path} differs from what results/ holds: run `make results`")
        return int(bool(differ))
    for path in differ:
        write_file(path, wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
