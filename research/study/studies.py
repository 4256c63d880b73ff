"""How large a study is: which models, and how many pictures each score is taken on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from research.plans import MAIN_KINDS, Experiment, changed, get_experiment, study_run
from research.second import runs as second
from svit_utils.paths import repo_root, results_dir


@dataclass(frozen=True)
class Study:
    """One study. Its cells are the parts of `research.study.scores.PARTS` for every run of ``experiment``.

    Attributes:
        name: of the study.
        experiment: the runs, trained by `research.training.run_experiment`.
        out: folder of the results.
        localisation, faithfulness, background, mass, sparsity, sanity: test pictures that each kind of score is taken
            on; ``mass`` is for the share of a map on background and distractors.
        resamples: of each bootstrap.
    """

    name: str
    experiment: Experiment
    out: Path
    localisation: int = 1000
    faithfulness: int = 50
    background: int = 1000
    mass: int = 200
    sparsity: int = 20
    sanity: int = 20
    resamples: int = 10_000


def _full() -> Study:
    return Study("full", get_experiment("study"), results_dir() / "study")


def _deit() -> Study:
    """DeiT-Tiny on CIFAR-10: no masks, so only the label-free scores; one seed, described and not judged."""
    experiment = get_experiment("deit_cifar10")
    runs = tuple(
        run
        for run in experiment.runs
        if (run.profile.config.lr, run.profile.config.seed) == (3e-4, 0) and run.threshold in (None, 0.01)
    )
    return Study("deit", replace(experiment, runs=runs), results_dir() / "study_deit")


def _smoke() -> Study:
    """Every part of the study, in a minute or two: a few steps, a few pictures. Its numbers mean nothing."""
    chosen = [(kind, 0.0, 0) for kind in MAIN_KINDS]
    chosen += [("dense", 0.0, 1), ("sparse", 0.0, 1), ("top_k", 0.0, 0), ("dense", 0.9, 0), ("sparse", 0.9, 0)]
    small = [study_run(kind, rho, seed).small() for kind, rho, seed in chosen]
    runs = tuple(replace(run, profile=changed(run.profile, val_images=10, test_images=40)) for run in small)
    return Study(
        "smoke",
        replace(get_experiment("study"), name="study_smoke", runs=runs),
        (repo_root() or Path.cwd()) / "build" / "study-smoke",
        localisation=30,
        faithfulness=2,
        background=40,
        mass=10,
        sparsity=3,
        sanity=3,
        resamples=500,
    )


def _second() -> Study:
    """The second study (results/second/PLAN.md), which `research.second.run` scores in its own way."""
    return Study("second", second.experiment(), results_dir() / "second")


def _confirmed() -> Study:
    """The confirmation of the setting that the second study chose (results/second/tables/choice.csv)."""
    folder = results_dir() / "second"
    chosen = second.chosen_setting(folder)
    if chosen is None:
        raise ValueError("nothing is chosen yet: run the study 'second' first, which confirms its choice by itself")
    return Study("confirmed", second.confirmation(chosen), folder / "confirmed")


STUDIES = {"full": _full, "deit": _deit, "smoke": _smoke, "second": _second, "confirmed": _confirmed}


def get_study(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}: allowed are {', '.join(map(repr, STUDIES))}")
    return STUDIES[name]()
