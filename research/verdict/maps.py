"""The card's sentences about maps: on the object, cleaner, more faithful, the background filtered out."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from research.verdict.line import (
    BOTH,
    HOW,
    MAPS,
    OWN,
    PLAN,
    SCORES,
    SINGLE,
    Line,
    both_intervals,
    by_rule,
    named,
    quality,
    seeds,
    sentence,
)
from research.verdict.sources import Sources
from svit_utils.referee import student_interval

OBJECT, GRAD_CAM = "object-focused attention maps", "cleaner Grad-CAM maps"
LAYER_GRAD_CAM, TIDIER = "cleaner LayerGradCam maps", "cleaner in the sense of tidier"
FAITHFUL, SPECIAL = "more faithful explanations", "it is the threshold, not any sparsity"
RELIES = "background filtered out: the model relies on it less"
LIES_ON = "background filtered out: its maps lie on it less"
ATTENDS, FILTERS = "ViT-Base attends to background noise", "background filtered out: its maps lie on noise less"
#: With the object erased only the ground can be right: less is better, whatever holds for accuracy elsewhere.
GOOD_SIDE = {"swapped": "higher", "distractors": "higher", "erased": "lower"}
TOLD = {"higher": "more than", "lower": "less than", "open": "not told from"}
ALTERNATIVES = ("hard_cut", "top_k", "entmax15", "sparsemax")


def picked(sources: Sources, family: str, kind: str, name: str | None = None) -> pd.DataFrame:
    """The judged comparisons of a family and a kind of model, of one map if it is named."""
    rows = sources.judged.query("family == @family and first == @kind")
    return rows if name is None else rows[rows["map"] == name]


def judged_map(sources: Sources, claim: str, family: str, kind: str, name: str) -> Line:
    """One map of one kind of model, by the plan's rule: how many comparisons, which decided, and one of them."""
    rows = picked(sources, family, kind, name)
    answer = by_rule(rows)
    said = rows.assign(said=[quality(row) for row in rows.to_dict("records")])
    measured = ", ".join(f"{int((said['said'] == side).sum())} {side}" for side in ("better", "worse", "open"))
    side = {"holds": "better", "does not hold": "worse"}.get(answer)
    if side:  # those that decided, and the one with the smallest p in numbers
        deciding = said[said["said"] == side]
        parts = deciding.groupby("metric", sort=False)["second"]
        measured += f"; {side}: " + ", ".join(f"{SCORES[m]} ({' and '.join(than)})" for m, than in parts)
        shown = deciding.loc[deciding["p_holm"].idxmin()].to_dict()
    else:
        main = {"localisation": "energy_in_mask", "faithfulness": "insertion"}[family]
        shown = rows[rows["metric"] == main].to_dict("records")[-1]  # the strictest control comes last
    measured += f"; {named(shown)} {sentence(shown)}, {seeds(shown)}"
    beyond = rows[rows["second"] == "dense displayed"]
    if family == "localisation" and len(beyond):  # what the drawing does by itself is left out
        measured += f"; by the comparisons with dense displayed alone: {by_rule(beyond)}"
    if family == "faithfulness" and set(said[said["said"] != "open"]["metric"]) == {"max_sensitivity"}:
        measured += "; max-sensitivity alone decides"
    rule = PLAN if family == "localisation" else BOTH
    return Line(claim, f"{sources.small}, {MAPS[name]}, {HOW[kind]}", measured, answer, rule)


def on_the_object(sources: Sources) -> Iterator[Line]:
    """Attention maps, Grad-CAM and its twin, and tidiness."""
    for name in ("attention", "rollout"):
        for kind in HOW:
            yield judged_map(sources, OBJECT, "localisation", kind, name)
    of_grad_cam = [judged_map(sources, GRAD_CAM, "localisation", kind, "grad_cam") for kind in HOW]
    yield from of_grad_cam
    apart = sources.scores[sources.scores["metric"] == "layer_grad_cam_difference"]["value"]
    same = apart.max() < 1e-4
    measured = f"within 1e-4 of Grad-CAM in all {len(apart)} models: the same map"
    for how, line in zip(HOW.values(), of_grad_cam, strict=True):
        said = (measured, line.verdict) if same else ("not the same map as Grad-CAM", "not testable here")
        yield Line(LAYER_GRAD_CAM, f"{sources.small}, {how}", *said, line.rule)
    yield Line(TIDIER, sources.small, f"sparseness (Gini) {tidiness(sources)}", "described, not judged", OWN)


def tidiness(sources: Sources) -> str:
    """The sparseness of each map, dense, displayed and sparse, in words."""
    rows = sources.scores[(sources.scores["metric"] == "sparseness") & (sources.scores["rho"] == 0)]
    rows = rows[rows["layer"].isna() & rows["head"].isna()]
    mean = rows.groupby(["kind", "map"])["value"].mean()
    said = []
    for name, label in MAPS.items():
        shown = [("dense", name, "dense"), ("dense", f"{name}_displayed", "dense displayed")]
        shown += [(kind, name, how) for kind, how in HOW.items()]
        each = [f"{words} {mean[kind, drawn]:.2f}" for kind, drawn, words in shown if (kind, drawn) in mean]
        said.append(f"{label}: {', '.join(each)}")
    return "; ".join(said)


def faithful(sources: Sources) -> Iterator[Line]:
    """What happens to the model when the picture is disturbed where the map says."""
    for name in MAPS:
        for kind in HOW:
            yield judged_map(sources, FAITHFUL, "faithfulness", kind, name)
    yield Line(FAITHFUL, "CIFAR-10, DeiT-Tiny", of_deit(sources), "described, not judged (one seed)", PLAN)


def of_deit(sources: Sources) -> str:
    """DeiT-Tiny's gains over a random map: how many of the sparse models' are above the dense model's."""
    rows = pd.read_csv(sources.folder / "study_deit" / "scores.csv")
    rows = rows[rows["layer"].isna() & rows["head"].isna()]
    value = {(r["kind"], r["map"], r["metric"]): r["value"] for r in rows.to_dict("records")}
    said = []
    for kind, how in HOW.items():
        ahead = [
            (-1 if metric == "deletion" else 1) * (value[kind, name, metric] - value[kind, "random", metric])
            > (-1 if metric == "deletion" else 1) * (value["dense", name, metric] - value["dense", "random", metric])
            for name in MAPS
            for metric in ("deletion", "insertion", "road")
        ]
        said.append(f"{how} {sum(ahead)} of {len(ahead)}")
    return f"gains over a random map that are above the dense model's: {', '.join(said)}; one seed, 50 pictures"


def background(sources: Sources) -> Iterator[Line]:
    """The model led by the background, and the maps on it, with grounds that go with the class in training."""
    for kind, how in HOW.items():
        rows = picked(sources, "background", kind)
        rows = rows[rows["map"].isin(list(GOOD_SIDE))]
        rows = rows.assign(better=rows["map"].map(GOOD_SIDE))
        said = "; ".join(f"{row['map']} {sentence(row)}" for row in rows.to_dict("records"))
        measured = f"accuracy {said}; {rows['seeds'].max()} seeds"
        yield Line(RELIES, f"{sources.small}, {how}", measured, by_rule(rows, "map"), BOTH)
    mass = sources.scores[(sources.scores["metric"] == "background_swapped") & (sources.scores["rho"] == 0.9)]
    mass = mass.pivot_table(index="seed", columns=["kind", "map"], values="value")  # a row per seed
    for name, label in MAPS.items():
        for kind, how in HOW.items():
            (row,) = picked(sources, "background", kind, name).to_dict("records")
            answer, measured = SINGLE[quality(row)], f"{named(row)} {sentence(row)}, {seeds(row)}"
            drawn = ("dense", f"{name}_displayed")
            if drawn in mass:
                found = student_interval((mass[kind, name] - mass[drawn]).dropna().to_numpy())
                measured += f"; described: minus dense displayed {sentence(found)}"
            if answer == "holds" and name != "grad_cam":
                answer = "open (better than plain dense; the plan does not compare with dense displayed)"
            yield Line(LIES_ON, f"{sources.small}, {label}, {how}", measured, answer, BOTH)


def noise(sources: Sources) -> Iterator[Line]:
    """Background noise taken literally: the share of a map on four small distractors, at rho = 0."""
    wanted = "not testable here; its weights, and masks of what is noise"
    yield Line(ATTENDS, "ViT-Base", "not run", wanted, OWN)
    rows = sources.afterwards.query("metric == 'on_distractors' and rho == 0")
    for name, label in MAPS.items():
        (row,) = rows[(rows["first"] == "dense") & (rows["map"] == name)].to_dict("records")
        measured = f"share on the distractors minus their area {both_intervals(row)}; {seeds(row)}"
        yield Line(
            ATTENDS, f"{sources.small}, dense {label}", measured, f"described: {TOLD[row['result']]} their area", OWN
        )
    for name, label in MAPS.items():
        for kind, how in HOW.items():
            found = rows[(rows["first"] == kind) & (rows["map"] == name)].to_dict("records")
            measured = "; ".join(f"{named(row)} {both_intervals(row)}" for row in found)
            answer = ", ".join(f"{TOLD[row['result']]} {row['second']}" for row in found)
            where = f"{sources.small}, {label}, {how}"
            yield Line(FILTERS, where, f"{measured}; {seeds(found[0])}", f"described: {answer}", OWN)


def alternatives(sources: Sources) -> Iterator[Line]:
    """Other ways to be sparse, minus tau = 0.01 from the first step; "lower" speaks for the threshold."""
    for kind in ALTERNATIVES:
        rows = picked(sources, "alternatives", kind)
        of_maps = rows[rows["metric"] != "accuracy"]
        of_maps = of_maps.assign(score=of_maps["map"] + " " + of_maps["metric"], better="lower")
        counts = of_maps["result"].value_counts()
        (accuracy,) = rows[rows["metric"] == "accuracy"].to_dict("records")
        sides = (("lower", "for the threshold"), ("higher", "against"), ("open", "open"))
        measured = ", ".join(f"{counts.get(side, 0)} {words}" for side, words in sides)
        measured += f", {seeds(accuracy)}; accuracy of {kind} minus sparse {sentence(accuracy, 100, 1)} points"
        yield Line(SPECIAL, f"{sources.small}, against {kind}", measured, by_rule(of_maps, "score"), BOTH)
