"""The card's sentences about how much is cut: about 70 %, tokens kept, low importance, diffuse, one tau for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from research.verdict.accuracy import TOKENS
from research.verdict.line import HOW, OWN, Line, level, sentence
from research.verdict.sources import DEIT_KINDS, Sources
from svit_utils.attention import sparsify
from svit_utils.models import create_model
from svit_utils.records import Row
from svit_utils.referee import Interval, sparsity_floor, student_interval

SPARSE, NOISE = "about 70 % sparse", "sparser than noise of the same spread"
TOKENS_KEPT = "59 tokens kept per head (70 % of 197 cut)"
LOW, DIFFUSE = "what is cut is of low importance (softmax weight)", "ViT-Base's attention is diffuse"
ONE_TAU, PARAMETERS = "one uniform tau for all layers and heads is a limit", "no new parameters"
SEVENTY, ROUGHLY = 0.70, 0.10  # "about 70 %" holds roughly within 10 points


def shares(rows: Sequence[Row]) -> list[list[float]]:
    """Cut and applied share of each run."""
    return [[float(row[name]) for row in rows] for name in ("cut_sparsity", "applied_sparsity")]


def about_seventy(cut: Sequence[float], applied: Sequence[float]) -> str:
    """The chapter's rule: does one of the two shares lie within 10 points of 70 %?"""
    both = (("cut", cut), ("applied", applied))
    near = [name for name, share in both if abs(np.mean(share) - SEVENTY) <= ROUGHLY]
    if not near:
        return "does not hold as a number"
    return "holds, roughly" + (f" (by the {near[0]} share alone)" if len(near) == 1 else "")


def sparsity(sources: Sources) -> Iterator[Line]:
    """The shares of every setting, beside the floor of arithmetic and noise of the same spread."""
    floor = sparsity_floor(TOKENS, 0.01)
    for where, rows in sources.groups.items():
        cut, applied = shares(rows)
        many = f"{len(rows)} seeds" if len(rows) > 1 else "one run"
        measured = f"cut {level(cut)}, applied {level(applied)}, {many}; floor {floor:.1%}"
        yield Line(SPARSE, where, measured, about_seventy(cut, applied), OWN)
    for kind, how in HOW.items():
        found = beyond_noise(sources, kind)
        side = "more than noise" if found.low > 0 else "less than noise" if found.high < 0 else "not told from noise"
        measured = f"cut share minus Gaussian {sentence(found)}, {found.n} seeds"
        yield Line(NOISE, f"{sources.small}, {how}", measured, f"described: cut {side}", OWN)


def beyond_noise(sources: Sources, kind: str) -> Interval:
    """The cut share minus that of Gaussian logits of each row's spread, over the seeds."""
    observed, gaussian = (
        sources.observed(kind, "cut_sparsity", source).groupby("seed")["value"].mean()
        for source in ("observed", "gaussian")
    )
    return student_interval((observed - gaussian).to_numpy())


def tokens(sources: Sources) -> Iterator[Line]:
    """How many tokens a query keeps in a head."""
    for where, rows in sources.groups.items():
        cut, applied = shares(rows)
        above, in_force = (level([1 - share for share in found], TOKENS, "") for found in (cut, applied))
        measured = f"tokens a query and head, above tau {above}, in force (with rows that fell back) {in_force}"
        many = f"{len(rows)} seeds" if len(rows) > 1 else "one run"
        yield Line(TOKENS_KEPT, where, f"{measured}; {many}", about_seventy(cut, applied), OWN)


def kept_by_layer(sources: Sources, kind: str) -> list[Interval]:
    """The attention that the keys above tau hold, layer by layer, over the seeds."""
    mass = sources.observed(kind, "kept_mass").groupby(["layer", "seed"])["value"].mean().unstack()
    return [student_interval(row) for row in mass.to_numpy()]


def importance(sources: Sources) -> Iterator[Line]:
    """Low importance holds if at most a tenth is lost in every layer, and fails if more than half is in some."""
    for kind, how in HOW.items():
        kept = kept_by_layer(sources, kind)
        answer = "holds" if all(found.low >= 0.9 for found in kept) else "open"
        answer = "does not hold" if any(found.high < 0.5 for found in kept) else answer
        each = ", ".join(f"{100 * f.mean:.0f} [{100 * f.low:.0f}, {100 * f.high:.0f}]" for f in kept)
        measured = f"attention kept by layer, %: {each}; {kept[0].n} seeds"
        yield Line(LOW, f"{sources.small}, {how}", measured, answer, OWN)
    for how in DEIT_KINDS:
        where = sources.deit_where(how)
        kept_mass = level([float(row["kept_mass"]) for row in sources.groups[where]])
        measured = f"attention kept, mean over layers: {kept_mass}"
        yield Line(LOW, where, measured, "open (not recorded by layer; two seeds)", OWN)


def diffuse(sources: Sources) -> Iterator[Line]:
    """What a dense model's strongest pairs hold."""
    wanted = "not testable here; its weights, and a line drawn beforehand"
    yield Line(DIFFUSE, "ViT-Base", "not run", wanted, OWN)
    cut, kept = (
        sources.observed("dense", metric).groupby("seed")["value"].mean().to_numpy()
        for metric in ("cut_sparsity", "kept_mass")
    )
    pairs, part = (sentence(student_interval(values), 100, 1).replace("+", "") for values in (1 - cut, kept))
    measured = f"the {pairs} % of pairs above 0.01 hold {part} % of the attention, {len(cut)} seeds"
    yield Line(DIFFUSE, f"{sources.small}, dense", measured, "described, not judged (no line was drawn)", OWN)


def parameters(sources: Sources) -> Iterator[Line]:
    """Counted on a live model."""
    model = create_model("small_vit", num_classes=10, img_size=56)
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sparsify(model, 0.01)
    after = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    count = sum(values.numel() for values in model.parameters())
    measured = f"{count:,} parameters; {len(before)} entries of the state dict before, {len(after)} after"
    yield Line(PARAMETERS, "a live small ViT", measured, "holds" if before == after else "does not hold", OWN)


def one_tau(sources: Sources) -> Iterator[Line]:
    """How differently one tau acts by layer and head."""
    columns = {"cut": "cut_sparsity", "empty rows": "empty_rate", "kept mass": "kept_mass"}
    for kind, how in HOW.items():
        of = {name: sources.observed(kind, metric) for name, metric in columns.items()}
        by_layer = pd.DataFrame({name: part.groupby("layer")["value"].mean() for name, part in of.items()})
        ranges = ", ".join(f"{k} {by_layer[k].min():.0%} to {by_layer[k].max():.0%}" for k in columns)
        by_head = of["cut"].groupby(["layer", "head"])["value"].mean()
        measured = f"by layer {ranges}; by head cut {by_head.min():.0%} to {by_head.max():.0%}; "
        measured += f"{of['cut']['seed'].nunique()} seeds"
        wanted = 'not testable here; arms with `LearnableThreshold(per="layer")` or `"head"`'
        yield Line(ONE_TAU, f"{sources.small}, {how}", measured, wanted, OWN)
