"""What holds and what does not, in two sentences and a short table, for the README."""

from __future__ import annotations

from collections.abc import Iterator

from research.verdict import accuracy, maps
from research.verdict.line import HOW, level, sentence
from research.verdict.page import gap, gap_in_words, warmed_up_in_words, within_margin
from research.verdict.second import zeros
from research.verdict.shares import shares
from research.verdict.sources import Sources
from svit_utils.records import Row

COLUMNS = ("threshold", "model and data", "steps, rate", "seeds", "zeros, %", "accuracy minus dense, points")


def two_sentences(sources: Sources) -> str:
    """The result, with the setting that each number belongs to."""
    of_all = 100 * zeros(sources, "sparse", 450)
    cheap = "; ".join(f"{name}: {share} % zero, {sentence(row, 100, 1)}" for name, row, share in _cheap(sources))
    (ranks,) = (
        maps.picked(sources, "localisation", "sparse", "attention")
        .query("metric == 'average_precision' and second == 'dense displayed'")
        .to_dict("records")
    )
    gaps = [gap_in_words(sources, "sparse", steps) for steps in (150, 450)]
    return (
        f"**What holds:** without a new parameter, τ = 0.01 makes {of_all:.0f} % of the small ViT's attention weights "
        f"zero, and after 450 steps from a dense start its accuracy is {gaps[1]} points from dense, "
        f"rate 0.0005, five seeds ({gaps[0]} after 150; "
        f"warmed up: {warmed_up_in_words(sources)}); "
        "with a lower or a learned threshold it stays, after 450 steps, within one point of dense, the margin that a "
        f"plan had fixed ({cheap}; five seeds each).\n\n"
        "**What does not:** no model was shown to be more accurate with the cut, and after 150 steps its attention "
        "lies less on the object than the dense model's own, drawn through the same threshold (average precision "
        f"{sentence(ranks)}, five seeds); the card's model, ViT-Base, was not run.\n"
    )


def _cheap(sources: Sources) -> Iterator[tuple[str, Row, int]]:
    """Of `within_margin` the fixed threshold and the simplest learned one: name, accuracy minus dense, % zeros."""
    names = {"tau0.005": "τ = 0.005 (= 1/N), warmed up", "per_model": "one τ learned, a parameter more"}
    yield from ((names[which], row, share) for which, row, share in within_margin(sources) if which in names)


def short_table(sources: Sources) -> str:
    """The settings that a reader asks for first, a line each."""
    lines = []
    small_vit = "small ViT, PlantedShapes"
    for kind, how in HOW.items():
        for steps in (150, 450):
            row, share = gap(sources, kind, steps), f"{100 * zeros(sources, kind, steps):.0f}"
            points = gap_in_words(sources, kind, steps)
            lines.append((f"0.01, {how}", small_vit, f"{steps}, 0.0005", row["seeds"], share, points))
    for label, row, percent in _cheap(sources):
        points = sentence(row, 100, 1)
        lines.append((label.removeprefix("τ = "), small_vit, "450, 0.0005", row["seeds"], str(percent), points))
    _, sweep = accuracy.sweeps(sources)
    tau = accuracy.nearest_to_seventy(sweep)
    found = sweep.of[tau]
    points = sentence(found.minus_dense, 100, 1)
    if found.minus_own is not None:
        points += f"; dense at its own rate: {sentence(found.minus_own, 100, 1)}"
    given, share = f"{found.row['steps']}, {found.row['lr']}", f"{100 * float(found.row['applied_sparsity']):.0f}"
    lines.append((f"{tau} (1/N), warmed up", "DeiT-Tiny, CIFAR-10", given, "1", share, points))
    pairs, runs = sources.deit("warmed up"), list(sources.deit_rows("warmed up").values())
    given = f"{runs[0]['steps']}, {runs[0]['lr']}, dense {sources.deit_rate('dense')}"
    share = level(shares(runs)[1], unit="")
    points = sentence(pairs.wider, 100, 1)
    lines.append(("0.01, warmed up", "DeiT-Tiny, CIFAR-10", given, str(pairs.n_seeds), share, points))
    rows_of_text = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows_of_text) + "\n"
