"""What the second study adds to the ledger, as far as it is done: budgets, lower thresholds, thresholds by layer."""

from __future__ import annotations

from collections.abc import Iterator

from research.second.markdown import SETTINGS
from research.second.runs import SEEDS
from research.verdict.accuracy import GROWS, IDEAL, MORE_ACCURATE, NO_COMPROMISE
from research.verdict.line import BOTH, MAPS, OWN, PLAN, Line, seeds, sentence
from research.verdict.maps import OBJECT
from research.verdict.shares import ONE_TAU
from research.verdict.sources import Sources
from svit_utils.records import Row, verdict

SAID = {"higher": "holds", "lower": "does not hold", "open": "open"}
INCOMPLETE = "open (the plan judges a family when all of it is recorded)"
WITHIN = {
    "not inferior": "holds (less than 1 point below dense)",
    "inferior": "does not hold (more than 1 point below dense)",
    "open": "open (the interval contains -1 point)",
}
KINDS = ("sparse", "warmup")


def where(setting: str, steps: str) -> str:
    """Data, model, steps, rate and setting."""
    return f"PlantedShapes, small ViT, {steps} steps, rate 0.0005, {SETTINGS[setting]} (second study)"


def contrasts(sources: Sources, family: str) -> Iterator[Row]:
    """The comparisons of a family that are recorded."""
    yield from (row for row in sources.second("contrasts") if row["family"] == family)


def margin(sources: Sources, setting: str, steps: int) -> Row | None:
    """A setting's accuracy minus dense, or None where it is not recorded."""
    rows = sources.second("margins")
    return next((row for row in rows if (row["setting"], row["steps"]) == (setting, str(steps))), None)


def zeros(sources: Sources, setting: str, steps: int) -> float:
    """The share of exact zeros of a setting, on validation pictures."""
    wanted = (setting, str(steps), "val_applied_sparsity")
    rows = sources.second("settings")
    return next(float(row["mean"]) for row in rows if (row["setting"], row["steps"], row["metric"]) == wanted)


def judged(row: Row) -> str:
    """A comparison's verdict: "higher" holds."""
    return SAID.get(row["result"], INCOMPLETE)


def more_accurate(sources: Sources) -> Iterator[Line]:
    """The gap at 150 and 450 steps; at 1,350 described."""
    for row in contrasts(sources, "A gap"):
        if row["setting"] in KINDS:
            measured = f"{sentence(row, 100, 1)} points, {seeds(row)}"
            yield Line(MORE_ACCURATE, where(row["setting"], row["steps"]), measured, judged(row), BOTH)
    for kind in KINDS:
        if longest := margin(sources, kind, 1350):
            measured = f"{sentence(longest, 100, 1)} points, {seeds(longest)}"
            yield Line(MORE_ACCURATE, where(kind, "1350"), measured, "described (three seeds)", PLAN)


def gap_grows(sources: Sources) -> Iterator[Line]:
    """The difference at 450 steps minus that at 150: does it move towards the sparse model, and does it lead?"""
    at_450 = {row["setting"]: row for row in contrasts(sources, "A gap") if row["steps"] == "450"}
    for row in contrasts(sources, "A closing"):
        if row["setting"] in KINDS:
            moves, ahead = float(row["low"]) > 0, float(at_450[row["setting"]]["low"]) > 0
            measured = f"{sentence(row, 100, 1)} points, {seeds(row)}; after 450 steps "
            measured += f"{sentence(at_450[row['setting']], 100, 1)}"
            answer = "holds" if moves and ahead else "described: no lead, but a deficit that shrinks"
            if not moves:
                answer = "open"
            yield Line(GROWS, where(row["setting"], row["steps"]), measured, answer, OWN)


def no_compromise(sources: Sources) -> Iterator[Line]:
    """Is a setting at 450 steps less than a point below dense?"""
    for row in sources.second("margins"):
        setting = row["setting"]
        if row["steps"] == "450" and (setting in KINDS or setting.startswith("tau")):
            measured = f"{sentence(row, 100, 1)} points, {seeds(row)}, {100 * zeros(sources, setting, 450):.0f} % zeros"
            few = int(row["seeds"]) < len(SEEDS)
            answer = f"open ({row['seeds']} of {len(SEEDS)} seeds)" if few else WITHIN[row["result"]]
            yield Line(NO_COMPROMISE, where(setting, "450"), measured, answer, PLAN)


def ideal(sources: Sources) -> Iterator[Line]:
    """The thresholds of part B beside 0.01, as far as they are recorded."""
    taus = {"tau0.0025": "0.0025", "tau0.005": "0.005", "tau0.0075": "0.0075", "warmup": "0.01"}
    found = {tau: row for name, tau in taus.items() if (row := margin(sources, name, 450))}
    said = [f"{tau}: {sentence(row, 100, 1)}" for tau, row in found.items()]
    place = "PlantedShapes, small ViT, 450 steps, rate 0.0005, warmed up (second study)"
    missing = [tau for tau in taus.values() if tau not in found or int(found[tau]["seeds"]) < len(SEEDS)]
    answer = f"open (part B of the plan: {', '.join(missing)} not recorded with all seeds)" if missing else ""
    measured = f"points below or above dense by tau, {'; '.join(said)}" if said else "not run"
    yield Line(IDEAL, place, measured, answer or "described: the plan compares no two thresholds", PLAN)


def one_tau(sources: Sources) -> Iterator[Line]:
    """Thresholds learned by layer or head minus one learned for the model, at an equal share cut."""
    for row in contrasts(sources, "C accuracy"):
        measured = f"minus one tau learned for the model {sentence(row, 100, 1)} points, {seeds(row)}"
        yield Line(ONE_TAU, where(row["setting"], row["steps"]), measured, judged(row), BOTH)


def on_the_object(sources: Sources) -> Iterator[Line]:
    """Average precision of the maps at 450 steps, minus dense and minus dense drawn cut."""
    rows = list(contrasts(sources, "A maps"))
    for kind in KINDS:
        for name, label in MAPS.items():
            found = [row for row in rows if (row["setting"], row["measure"]) == (kind, name)]
            if not found:
                continue
            results = [row["result"] for row in found]
            answer = INCOMPLETE if "incomplete" in results else verdict({"average_precision": results})
            measured = "; ".join(f"AP minus {row['other']} {sentence(row)}" for row in found)
            measured += f"; {seeds(found[0])}"
            yield Line(OBJECT, f"{where(kind, '450')}, {label}", measured, answer, BOTH)
