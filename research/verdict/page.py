"""``results/verdict/page.csv``: the verdict on one page, a row for each claim of the card.

The words are written here, every number in them is read. The tally is of the ledger's lines on the first study and the
experiments before it; what the second study finds stands in the ledger until it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from research.second.markdown import SETTINGS
from research.verdict import accuracy, maps, second, shares
from research.verdict.ledger import lines
from research.verdict.line import HOW, WORDS, Line, seeds, sentence
from research.verdict.sources import Sources
from svit_utils.files import write_rows
from svit_utils.records import Row
from svit_utils.referee import sparsity_floor

SECOND = "(second study)"


@dataclass(frozen=True)
class Claim:
    """A row of the page.

    Attributes:
        says: the card, in a few words.
        names: of the claim in the ledger.
        found: what was found, in a sentence, from the records.
        why: the reason, or what is missing.
    """

    says: str
    names: tuple[str, ...]
    found: Callable[[Sources], str]
    why: str


def gap(sources: Sources, kind: str, steps: int) -> Row:
    """The second study's difference of accuracy from dense, all five seeds.

    Raises:
        ValueError: it is not recorded yet.
    """
    row = second.margin(sources, kind, steps)
    if row is None or row["seeds"] != "5":
        raise ValueError(f"no row of {kind!r} at {steps} steps with five seeds in results/second/tables/margins.csv")
    return row


def gap_in_words(sources: Sources, kind: str, steps: int) -> str:
    """``-1.3 [-1.8, -0.7]``, in points."""
    return sentence(gap(sources, kind, steps), 100, 1)


def warmed_up_in_words(sources: Sources) -> str:
    """The gap with tau warmed up at each budget: ``-4.6 after 150, -1.9 after 450, -0.3 [-0.7, +0.0] after 1,350``."""
    said = [f"{100 * float(gap(sources, 'warmup', steps)['mean']):+.1f} after {steps}" for steps in (150, 450)]
    if longest := second.margin(sources, "warmup", 1350):
        said.append(f"{sentence(longest, 100, 1)} after 1,350 with {seeds(longest)}")
    return ", ".join(said)


def within_margin(sources: Sources) -> Iterator[tuple[str, Row, int]]:
    """What the second study found not inferior at 450 steps with five seeds, from 60 % zeros on.

    Yields the setting, its accuracy minus dense, and the zeros in percent.
    """
    for row in sources.second("margins"):
        if (row["steps"], row["result"], row["seeds"]) == ("450", "not inferior", "5"):
            share = round(100 * second.zeros(sources, row["setting"], 450))
            if share >= 60:
                yield row["setting"], row, share


def _accurate(sources: Sources) -> str:
    gaps = [gap_in_words(sources, "sparse", steps) for steps in (150, 450)]
    deit = sentence(sources.deit("warmed up").wider, 100, 1)
    rates = " and ".join(sources.deit_rate(how) for how in ("warmed up", "dense"))
    return (
        f"ViT-Base was not run. The small ViT (rate 0.0005) is {gaps[0]} points from dense after 150 steps, {gaps[1]} "
        f"after 450 (warmed up: {warmed_up_in_words(sources)}); "
        f"DeiT-Tiny (450 steps, warmed up, at its own rate and dense at its own: {rates}) {deit}, two seeds."
    )


def _grows(sources: Sources) -> str:
    (row,) = (row for row in sources.second("contrasts") if (row["family"], row["setting"]) == ("A closing", "sparse"))
    return f"There is no lead; a deficit shrinks by {sentence(row, 100, 1)} points from 150 to 450 steps."


def _seventy(sources: Sources) -> str:
    cut = [float(row["cut_sparsity"]) for rows in sources.groups.values() for row in rows]
    noise = sentence(shares.beyond_noise(sources, "sparse"), 100, 1)
    floor = sparsity_floor(accuracy.TOKENS, 0.01)
    return (
        f"tau = 0.01 cuts {min(cut):.0%} to {max(cut):.0%} of the weights: {floor:.0%} go by arithmetic, and noise of "
        f"the same spread loses no less (model minus noise {noise} points)."
    )


def _named_sweeps(sources: Sources) -> Iterator[tuple[str, accuracy.Sweep]]:
    return zip(("the small ViT", "DeiT-Tiny"), accuracy.sweeps(sources), strict=True)


def _no_compromise(sources: Sources) -> str:
    said = []
    for name, sweep in _named_sweeps(sources):
        tau = accuracy.nearest_to_seventy(sweep)
        found = sweep.of[tau]
        said.append(f"{name} {sentence(found.minus_dense, 100, 1)} at {float(found.row['cut_sparsity']):.0%} cut")
    margins = [f"{SETTINGS[s]} {sentence(row, 100, 1)} at {share} % zeros" for s, row, share in within_margin(sources)]
    return (
        f"About 70 % is what tau = {tau} cuts, which is 1/N; there one pair each: {', '.join(said)} (points). In the "
        f"second study, five seeds, these are less than a point below dense: {'; '.join(margins)}."
    )


def _importance(sources: Sources) -> str:
    kept = [100 * found.mean for kind in HOW for found in shares.kept_by_layer(sources, kind)]
    share = f"{min(kept):.0f} to {max(kept):.0f} %"
    return f"The cut takes the smallest weights, but many of them: the rest holds {share} of a layer's attention."


def _compared(sources: Sources, kind: str, name: str, metric: str, other: str) -> str:
    rows = maps.picked(sources, "localisation", kind, name).query("metric == @metric and second == @other")
    (row,) = rows.to_dict("records")
    return sentence(row)


def _object(sources: Sources) -> str:
    energy = _compared(sources, "sparse", "attention", "energy_in_mask", "dense displayed")
    ranks = _compared(sources, "sparse", "attention", "average_precision", "dense displayed")
    return (
        "Tidier than the dense map, and less on the object than the dense map drawn through the same threshold: of "
        f"attention, energy {energy}, average precision {ranks}."
    )


def _grad_cam(sources: Sources) -> str:
    rows = pd.concat([maps.picked(sources, "localisation", kind, "grad_cam") for kind in HOW])
    decided = int((rows["result"] != "open").sum())
    return f"{decided} of {len(rows)} comparisons with the dense model's are decided; Captum's map is the same map."


def _faithful(sources: Sources) -> str:
    rows = maps.picked(sources, "faithfulness", "sparse", "attention").query("metric == 'deletion'")
    (row,) = rows[rows["second"] == "dense displayed"].to_dict("records")
    return (
        f"In no score better. Attention: deletion {sentence(row)} against dense displayed. Rollout fails by "
        "max-sensitivity alone, Grad-CAM is open."
    )


def _background(sources: Sources) -> str:
    (swapped,) = maps.picked(sources, "background", "sparse").query("map == 'swapped'").to_dict("records")
    noise = sources.afterwards.query(
        "metric == 'on_distractors' and rho == 0 and first == 'sparse' and map == 'attention'"
    )
    beside = {row["second"]: f"{row['mean']:+.3f}" for row in noise.to_dict("records")}
    return (
        f"On swapped grounds its accuracy is {sentence(swapped, 100, 1)} points from dense. On scattered blobs lies "
        f"more of its map than of the dense one ({beside['dense']}), less than of that drawn cut "
        f"({beside['dense displayed']})."
    )


def _ideal(sources: Sources) -> str:
    said = (f"{accuracy.preferred(sweep)} for {name}" for name, sweep in _named_sweeps(sources))
    return f"Validation prefers {' and '.join(said)}; no maps were scored there."


def _harmful(sources: Sources) -> str:
    found = [sentence(sweep.of[0.1].minus_dense, 100, 1) for sweep in accuracy.sweeps(sources)]
    first = {min(sweep.losing()) for sweep in accuracy.sweeps(sources)}
    return f"{' and '.join(found)} points in the two pairs; but {' and '.join(map(str, first))} loses already."


def _parameters(sources: Sources) -> str:
    (line,) = shares.parameters(sources)
    return f"A live small ViT: {line.measured}."


def _uniform(sources: Sources) -> str:
    rows = sources.observed("sparse", "empty_rate").groupby("layer")["value"].mean()
    kept = [100 * found.mean for found in shares.kept_by_layer(sources, "sparse")]
    return (
        f"One tau acts differently by layer: {rows.min():.0%} to {rows.max():.0%} of the rows lose every key, "
        f"{min(kept):.0f} to {max(kept):.0f} % of the attention is kept."
    )


PAGE = (
    Claim(
        "85.47 → 89.11 %: more accurate",
        (accuracy.MORE_ACCURATE,),
        _accurate,
        "A model trained dense has to learn to live with the cut; these budgets are short.",
    ),
    Claim(
        "the gap grows over the epochs",
        (accuracy.GROWS,),
        _grows,
        "More steps mend more. Whether a sparse model ever passes the dense one, no run says.",
    ),
    Claim(
        "about 70 % sparse, 59 tokens kept a head",
        (shares.SPARSE, shares.TOKENS_KEPT),
        _seventy,
        "The share follows from N, tau and the spread of the scores. It is no evidence of choosing.",
    ),
    Claim(
        "… with no compromise",
        (accuracy.NO_COMPROMISE,),
        _no_compromise,
        "The price follows the share that is cut. In the second study the margin of 1 point was fixed beforehand.",
    ),
    Claim(
        "what is cut is of low importance",
        (shares.LOW, shares.DIFFUSE),
        _importance,
        "Nine weights in ten are small one by one, and not together.",
    ),
    Claim(
        "cleaner, object-focused attention maps",
        (maps.OBJECT, maps.TIDIER),
        _object,
        "The drawing makes a map tidy; anybody can draw a dense model's map so.",
    ),
    Claim(
        "cleaner Grad-CAM, LayerGradCam",
        (maps.GRAD_CAM, maps.LAYER_GRAD_CAM),
        _grad_cam,
        "Grad-CAM shows no attention. Five seeds tell no difference, which is not: there is none.",
    ),
    Claim(
        "more interpretable (taken as: more faithful)",
        (maps.FAITHFUL,),
        _faithful,
        "What a zero hides still moves the other weights; a map is not more honest for being sparse.",
    ),
    Claim(
        "background noise is filtered out",
        (maps.RELIES, maps.LIES_ON, maps.ATTENDS, maps.FILTERS),
        _background,
        "A sharper map has more on every small bright thing, object or noise; which control one takes decides.",
    ),
    Claim(
        "tau = 0.01 is ideal",
        (accuracy.IDEAL,),
        _ideal,
        "tau means something only beside 1/N. One seed for each.",
    ),
    Claim(
        "tau ≥ 0.10 is harmful",
        (accuracy.HARMFUL,),
        _harmful,
        "At most nine keys of a row can pass, and many rows keep none.",
    ),
    Claim("no new parameters", (shares.PARAMETERS,), _parameters, "The threshold is a constant."),
    Claim(
        "one tau for all layers is a limit",
        (shares.ONE_TAU,),
        _uniform,
        "Cut without training, a tau for each layer does better (chapter 7). Trained with the cut, the second study "
        "compares it with one learned tau: see the appendix.",
    ),
)


def tally(found: Sequence[Line], names: Sequence[str]) -> str:
    """The verdicts of these claims, counted: "does not hold 2, open 6"; lines of the second study are left out."""
    said = [line.verdict for line in found if line.claim in names and SECOND not in line.where]
    counts = {word: sum(verdict.startswith(word) for verdict in said) for word in WORDS}
    return ", ".join(f"{word} {number}" for word, number in counts.items() if number)


def page(sources: Sources, ledger: Sequence[Line]) -> Iterator[dict[str, str]]:
    """The rows: what the card says, the verdicts, what was found, and why."""
    for claim in PAGE:
        row = {"the card says": claim.says, "verdicts": tally(ledger, claim.names)}
        yield {**row, "what was found": claim.found(sources), "why": claim.why}


def write_verdict(sources: Sources, out: Path) -> list[Path]:
    """Write ledger and page into the folder ``out``; the files."""
    ledger = list(lines(sources))
    tables = {"ledger": [vars(line) for line in ledger], "page": list(page(sources, ledger))}
    return [write_rows(out / f"{name}.csv", rows[0], rows) for name, rows in tables.items()]
