"""How large a study is: which arms, and how many pictures each score is taken on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from research import Arm, Design, get_design
from research.arms import study_arm
from svit_utils.paths import repo_root, results_dir


@dataclass(frozen=True)
class StudyProfile:
    """One study. Its cells are the parts of `research.study.parts.PARTS` for every arm of ``design``.

    Attributes:
        name: of the profile.
        design: the arms, trained by `research.run_design`.
        out: folder of the results.
        localisation, faithfulness, background, mass, sparsity, sanity: test pictures that each kind of score is taken
            on; ``mass`` is for the share of a map on ground and distractors.
        resamples: of each bootstrap.
    """

    name: str
    design: Design
    out: Path
    localisation: int = 1000
    faithfulness: int = 50
    background: int = 1000
    mass: int = 200
    sparsity: int = 20
    sanity: int = 20
    resamples: int = 10_000


def _full() -> StudyProfile:
    return StudyProfile("full", get_design("study"), results_dir() / "study")


def _deit() -> StudyProfile:
    """DeiT-Tiny on CIFAR-10: no masks, so only the label-free scores; one seed, described and not judged."""
    design = get_design("deit_cifar10")
    names = ("dense-lr3e-04-seed0", "sparse0.01-lr3e-04-seed0", "sparse0.01-warmup-lr3e-04-seed0")
    arms = tuple(arm for arm in design.arms if arm.name in names)
    return StudyProfile("deit", replace(design, arms=arms), results_dir() / "study_deit")


def _smoke() -> StudyProfile:
    """Every part of the study, in a minute or two: a few steps, a few pictures. Its numbers mean nothing."""
    kinds = ("dense", "sparse", "warmup")
    arms: list[Arm] = [study_arm(kind, 0.0, seed) for seed in (0, 1) for kind in kinds[: 3 - seed]]
    arms += [study_arm("top_k", 0.0, 0), study_arm("dense", 0.9, 0), study_arm("sparse", 0.9, 0)]
    arms = [replace(arm.small(), val_images=10, test_images=40) for arm in arms]
    return StudyProfile(
        "smoke",
        replace(get_design("study"), name="study_smoke", arms=tuple(arms)),
        (repo_root() or Path.cwd()) / "build" / "study-smoke",
        localisation=30,
        faithfulness=2,
        background=40,
        mass=10,
        sparsity=3,
        sanity=3,
        resamples=500,
    )


PROFILES = {"full": _full, "deit": _deit, "smoke": _smoke}


def get_study(name: str) -> StudyProfile:
    """The study of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown study {name!r}: allowed are {', '.join(map(repr, PROFILES))}")
    return PROFILES[name]()
