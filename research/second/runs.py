"""The runs of the second study, in the order in which they are done; results/second/PLAN.md says what for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from research.plans import DEIT, NORMALISER, PLANTED, Experiment, Learned, Run, changed
from svit_utils.files import read_rows

SEEDS, THREE = (0, 1, 2, 3, 4), (0, 1, 2)
FRESH_SEEDS, FRESH_PICTURES = (10, 11, 12, 13, 14), 1  # of the confirmation; no other run has them
TEST_PICTURES = 2  # the seed of the second study's test pictures; the first study has seen those of seed 0
TARGET = 0.72  # share of the keys that learned thresholds cut
THRESHOLD_LR = 0.03

BASE = changed(PLANTED, precision="bf16", checkpoint_every=50, eval_every=50, val_images=2000, test_images=3000)


def run(kind: str, steps: int, seed: int, *, label: str = "", warmup: float = 0.5, **options: Any) -> Run:
    """One run on PlantedShapes; ``warmup`` is the share of it over which tau rises, where the kind has one.

    ``options`` are fields of `Run`, or changes of the profile.
    """
    own = {name: options.pop(name) for name in ("learned", "teacher", "registers") if name in options}
    profile = changed(BASE, steps=steps, seed=seed, **options)
    if kind in ("warmup", "learned", "hard_cut", "clipped"):
        profile = changed(profile, tau_warmup_steps=round(warmup * steps))
    if kind in NORMALISER:
        profile = changed(profile, normaliser=NORMALISER[kind])
    if kind == "learned":
        profile = changed(profile, threshold_lr=THRESHOLD_LR)
    return Run(f"{label or kind}-{steps}-seed{seed}", kind, profile, test_seed=TEST_PICTURES, **own)


def budgets() -> Iterator[Run]:
    """A: does the gap close with training, and the maps with it?"""
    for steps in (450, 150):
        for seed in SEEDS:
            for kind in ("dense", "warmup", "sparse", "top_k"):
                yield run(kind, steps, seed)
    for seed in THREE:
        for kind in ("dense", "warmup"):
            yield run(kind, 1350, seed)


def lower_taus() -> Iterator[Run]:
    """B: no compromise at about 70 %?"""
    for seed in SEEDS:
        for tau in (0.005, 0.0075, 0.0025):
            yield run("warmup", 450, seed, label=f"tau{tau}", threshold=tau)


LEARNED = {
    "per_model": Learned("model", TARGET),
    "per_layer": Learned("layer", TARGET),
    "per_head": Learned("head", TARGET),
    "equal_layers": Learned("layer", TARGET, each="layer"),
}


def learned() -> Iterator[Run]:
    """C: is a threshold that differs by layer or head better than one for all, at an equal share cut?"""
    for seed in SEEDS:
        for label, how in LEARNED.items():
            yield run("learned", 450, seed, label=label, learned=how, threshold=0.005)
    for start in (0.0025, 0.01):
        yield run("learned", 450, 0, label=f"per_head_from{start}", learned=LEARNED["per_head"], threshold=start)


def operators() -> Iterator[Run]:
    """D: which operator?"""
    for seed in SEEDS:
        for kind in ("hard_cut", "clipped", "entmax15"):
            yield run(kind, 450, seed)


def with_registers() -> Iterator[Run]:
    """E: what cleans a map without sparsity? Four register tokens, from a start of their own."""
    first = changed(BASE, start="scratch", steps=1200, lr=1e-3, warmup_steps=50, eval_every=0)
    start = Run("start_registers", "dense", first, curriculum=(150, 150), registers=4, test_seed=TEST_PICTURES)
    work = Path("build", "experiments", "second")  # as in the records: relative to the repository
    yield start
    weights = work / start.name / "stage2" / "last.safetensors"
    second = changed(BASE, start=str(weights), steps=500, lr=7e-4, warmup_steps=20, eval_every=0)
    again = replace(start, name="start_registers_continued", profile=second, curriculum=())
    yield again
    weights = work / again.name / "stage0" / "last.safetensors"
    for seed in THREE:
        for kind in ("dense", "warmup"):
            yield run(kind, 450, seed, label=f"{kind}_registers", registers=4, start=str(weights))


def cures() -> Iterator[Run]:
    """G: distillation from the dense model while cutting, and shorter warm-ups of tau."""
    for seed in THREE:
        yield run("warmup", 450, seed, label="distilled", teacher=f"dense-450-seed{seed}")
        yield run("warmup", 450, seed, label="warmup10", warmup=0.1)
        yield run("warmup", 450, seed, label="warmup25", warmup=0.25)


def fallbacks() -> Iterator[Run]:
    """H: other answers for rows without a survivor."""
    for seed in THREE:
        for mode in ("cap", "zero"):
            yield run("warmup", 450, seed, label=mode, empty_rows=mode)


PARTS = {
    "A": budgets,
    "B": lower_taus,
    "C": learned,
    "D": operators,
    "E": with_registers,
    "G": cures,
    "H": fallbacks,
}


def experiment() -> Experiment:
    """All runs on PlantedShapes."""
    runs = tuple(run for part in PARTS.values() for run in part())
    return Experiment("second", "The second study: budgets, lower and learned thresholds, operators", runs, 0.05, 0.20)


def confirmation(setting: str) -> Experiment:
    """The chosen setting and dense attention once more, with seeds and test pictures that nothing was chosen by.

    Raises:
        ValueError: no run of A to C at 450 steps has that setting.
    """
    planned = {run.name: run for part in "ABC" for run in PARTS[part]()}
    if f"{setting}-450-seed0" not in planned:
        raise ValueError(f"{setting!r} is no setting of parts A to C at 450 steps")
    runs = []
    for seed in FRESH_SEEDS:
        for name in ("dense", setting):
            first = planned[f"{name}-450-seed0"]
            profile = changed(first.profile, seed=seed)
            runs.append(replace(first, name=f"{name}-450-seed{seed}", profile=profile, test_seed=FRESH_PICTURES))
    return Experiment("confirmed", "The setting that was chosen, with fresh seeds", tuple(runs), 0.05, 0.20)


def chosen_setting(folder: Path) -> str | None:
    """The setting that the second study in ``folder`` chose, from its ``tables/choice.csv``; None before that."""
    rows = read_rows(folder / "tables" / "choice.csv")
    return next((row["setting"] for row in rows if row["chosen"]), None)


def deit_rates() -> Experiment:
    """I: DeiT-Tiny on CIFAR-10 at a learning rate on either side of the two that are recorded."""
    runs = []
    for lr in (1e-5, 1e-3):
        label, profile = f"lr{lr:.0e}-seed0", changed(DEIT, lr=lr)
        runs.append(Run(f"dense-{label}", "dense", profile))
        runs.append(Run(f"sparse0.01-warmup-{label}", "warmup", changed(profile, tau_warmup_steps=225)))
    return Experiment("second_deit", "DeiT-Tiny on CIFAR-10: learning rates on either side", tuple(runs), 0.10, 0.20)
