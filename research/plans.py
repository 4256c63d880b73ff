"""Every recorded training run, planned before it is done. A `Run` is one row of a file in ``results/``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from svit_utils.data import Difficulty
from svit_utils.models import SMALL_VIT
from svit_utils.training import Profile, TrainConfig

# Easier PlantedShapes to learn from at first: bright objects near the middle, then further off it.
CURRICULUM = (Difficulty(brighter=1.0, shift=0.025), Difficulty(brighter=1.0, shift=0.14))

# What stands in place of the softmax, in the words of results/study/PLAN.md; a control has its normaliser beside it.
MAIN_KINDS = ("dense", "sparse", "warmup")
CONTROLS = {"hard_cut": "hard_cut", "top_k": "topk", "entmax15": "entmax15", "sparsemax": "sparsemax"}
NORMALISER = {**CONTROLS, "clipped": "clipped"}  # clipped softmax came with the second study
KINDS = (*MAIN_KINDS, *NORMALISER, "learned")
NEVER_WARMED_UP = ("dense", "sparse")


@dataclass(frozen=True)
class Learned:
    """A learnable tau and the share cut that it is held at, see `svit_utils.training.SparsityTarget`."""

    per: str  # a tau for each "model", "layer" or "head"
    target: float  # share of the keys that are cut
    each: str = "model"  # hold the mean of the "model" at the target, or each "layer"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: unique within its experiment.
        kind: ``"dense"``; ``"sparse"``, the thresholded softmax with its full tau from the first step; ``"warmup"``,
            the same with tau rising over ``profile.config.tau_warmup_steps``; one of `NORMALISER`; or ``"learned"``,
            the thresholded softmax with a `LearnableThreshold` that starts at ``profile.threshold``.
        profile: data, model, start and recipe, with the sparse attention of that kind.
        curriculum: steps in each stage of `CURRICULUM` before the recipe begins. From random weights a ViT stays at
            chance on the standard pictures for a long time; on the easier ones it starts to learn.
        save_as: name of the checkpoint to ship, if any.
        learned: how tau is learned, for that kind.
        teacher: name of a dense run of the same experiment whose logits this run also learns from.
        registers: number of register tokens of the small ViT (Darcet et al. 2024, arXiv:2309.16588).
        test_seed: of the test pictures, on PlantedShapes.

    Raises:
        ValueError: an unknown kind, or one that does not go with the profile.
    """

    name: str
    kind: str
    profile: Profile
    curriculum: tuple[int, ...] = ()
    save_as: str | None = None
    learned: Learned | None = None
    teacher: str | None = None
    registers: int = 0
    test_seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        warmed_up = self.profile.config.tau_warmup_steps > 0
        if (warmed_up and self.kind in NEVER_WARMED_UP) or (self.kind == "warmup" and not warmed_up):
            raise ValueError(f"{self.name}: tau_warmup_steps does not go with the kind {self.kind!r}")
        if (self.kind == "learned") != (self.learned is not None):
            raise ValueError(f"{self.name}: `learned` goes with the kind 'learned', and with no other")
        if self.profile.normaliser != NORMALISER.get(self.kind, "thresholded"):
            raise ValueError(f"{self.name}: the kind {self.kind!r} has another normaliser than the profile")

    @property
    def threshold(self) -> float | None:
        """tau as recorded: of the thresholded softmax, where it starts if it is learned; None for the other kinds."""
        return self.profile.threshold if self.kind in ("sparse", "warmup", "learned") else None

    def small(self) -> Run:
        """The same run at a size that a check can repeat in seconds."""
        config = self.profile.config
        steps = min(config.steps, 4)
        profile = changed(
            self.profile,
            steps=steps,
            batch_size=min(config.batch_size, 8),
            warmup_steps=0,
            tau_warmup_steps=math.ceil(config.tau_warmup_steps / config.steps * steps),
            compile=False,
            val_images=min(self.profile.val_images or 32, 32),
            test_images=min(self.profile.test_images or 100, 100),
        )
        return replace(
            self, profile=profile, curriculum=tuple(min(steps, 2) for steps in self.curriculum), save_as=None
        )

    def columns(self) -> dict[str, Any]:
        """The run as the columns of its row in ``results/``, in their order."""
        profile, config = self.profile, self.profile.config
        return {
            "name": self.name,
            "data": profile.data,
            "model": profile.model,
            "img_size": profile.img_size,
            "start": profile.start,
            "threshold": self.threshold,
            "tau_warmup": config.tau_warmup_steps / config.steps,
            "empty_rows": profile.empty_rows,
            "alternative": self.kind if self.kind in NORMALISER else None,
            "rho": profile.rho,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "schedule": config.schedule,
            "warmup": config.warmup_steps,
            "augment": profile.augment,
            "curriculum": list(self.curriculum),
            "precision": config.precision,
            "compile": config.compile,
            "seed": config.seed,
            "val_images": profile.val_images,
            "test_images": profile.test_images,
            "save_as": self.save_as,
            **self._extras(),
        }

    def _extras(self) -> dict[str, Any]:
        """What only the second study varies; nothing for the runs of the first."""
        learned = (
            {} if self.learned is None else {f"learned_{key}": value for key, value in asdict(self.learned).items()}
        )
        rates = {"threshold_lr": self.profile.config.threshold_lr}
        others = {"teacher": self.teacher, "registers": self.registers, "test_seed": self.test_seed, **rates}
        return learned | {key: value for key, value in others.items() if value}


@dataclass(frozen=True)
class Experiment:
    """One file ``results/<name>.csv``: its runs, in the order in which they are done.

    ``accuracy_band`` (share of right answers) and ``loss_band`` (nats) say how far a repetition at small size may be
    from its recorded row.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    accuracy_band: float
    loss_band: float

    @property
    def repeated(self) -> tuple[Run, ...]:
        """The runs that have a small row, which `research.check` repeats: the first, and the first that is not dense.

        A dense run never touches the sparse attention that the results are about.
        """
        sparse = [run for run in self.runs if run.kind != "dense"]
        return tuple(run for run in self.runs if run in (self.runs[0], *sparse[:1]))


def changed(profile: Profile, **changes: Any) -> Profile:
    """The profile with ``changes``, each a field of the profile or of its recipe."""
    own = {field.name for field in fields(Profile)}
    config = replace(profile.config, **{name: value for name, value in changes.items() if name not in own})
    return replace(profile, config=config, **{name: value for name, value in changes.items() if name in own})


PLANTED = Profile(
    "planted",
    "the small ViT, fine-tuned from the shipped dense start",
    data="planted",
    model=SMALL_VIT,
    img_size=56,
    start="planted_dense_start",
    config=TrainConfig(steps=150, batch_size=64, lr=5e-4, warmup_steps=10, checkpoint_every=100),
    val_images=1000,
    test_images=2000,
)
DEIT = Profile(
    "deit",
    "DeiT-Tiny, pretrained, fine-tuned on CIFAR-10",
    data="cifar10",
    model="deit_tiny_patch16_224",
    img_size=224,
    start="pretrained",
    config=TrainConfig(steps=450, batch_size=16, warmup_steps=20, precision="bf16", compile=True, checkpoint_every=100),
    augment=True,
    val_images=500,
    test_images=2000,
)
SEEDS = (0, 1, 2)
SWEEP = (0.0025, 0.005, 0.02, 0.1)


def _planted_start() -> tuple[Run, ...]:
    first = changed(PLANTED, start="scratch", steps=1200, precision="bf16", lr=1e-3, warmup_steps=50)
    second = changed(PLANTED, steps=500, lr=7e-4, warmup_steps=20)  # another cosine from where the first ended
    return (
        Run("start", "dense", first, curriculum=(150, 150), save_as="planted_dense_start"),
        Run("start-continued", "dense", second, save_as="planted_dense_start"),
    )


def _planted_pairs() -> tuple[Run, ...]:
    runs = []
    for seed in SEEDS:
        dense, sparse = changed(PLANTED, seed=seed), changed(PLANTED, seed=seed, tau_warmup_steps=75)
        runs.append(Run(f"dense-seed{seed}", "dense", dense, save_as=f"planted_dense_seed{seed}"))
        runs.append(Run(f"sparse-seed{seed}", "warmup", sparse, save_as=f"planted_sparse_seed{seed}"))
    return tuple(runs)


def _planted_sweep() -> tuple[Run, ...]:
    return (
        *(Run(f"tau{tau}", "warmup", changed(PLANTED, threshold=tau, tau_warmup_steps=75)) for tau in SWEEP),
        Run("tau0.01-no-warmup", "sparse", PLANTED),
    )


STUDY_SEEDS = (0, 1, 2, 3, 4)
STUDY_RHOS = (0.0, 0.9)


def study_run(kind: str, rho: float, seed: int) -> Run:
    """A run of the study (results/study/PLAN.md)."""
    profile = changed(PLANTED, rho=rho, seed=seed, precision="bf16", val_images=500, test_images=1000)
    if kind == "warmup":
        profile = changed(profile, tau_warmup_steps=75)
    elif kind in CONTROLS:
        profile = changed(profile, normaliser=CONTROLS[kind])
    return Run(f"{kind}-rho{rho:g}-seed{seed}", kind, profile)


def _study() -> tuple[Run, ...]:
    # What decides comes first, in case the time runs out.
    main = [study_run(kind, rho, seed) for rho in STUDY_RHOS for seed in STUDY_SEEDS for kind in MAIN_KINDS]
    controls = [study_run(kind, rho, seed) for rho in STUDY_RHOS for seed in SEEDS for kind in CONTROLS]
    return (*main[:15], *controls[:12], *main[15:], *controls[12:])


def _deit_cifar10() -> tuple[Run, ...]:
    runs = []
    for seed in (0, 1):
        for lr in (5e-5, 3e-4):
            label, profile = f"lr{lr:.0e}-seed{seed}", changed(DEIT, lr=lr, seed=seed)
            runs.append(Run(f"dense-{label}", "dense", profile))
            runs.append(Run(f"sparse0.01-{label}", "sparse", profile))
            runs.append(Run(f"sparse0.01-warmup-{label}", "warmup", changed(profile, tau_warmup_steps=225)))
    for tau in SWEEP:
        profile = changed(DEIT, lr=3e-4, threshold=tau, tau_warmup_steps=225)
        runs.append(Run(f"sparse{tau}-warmup-lr3e-04-seed0", "warmup", profile))
    return tuple(runs)


def _vit56_cifar10() -> tuple[Run, ...]:
    profile = changed(
        PLANTED,
        data="cifar10",
        start="scratch",
        steps=800,
        lr=1e-3,
        warmup_steps=40,
        augment=True,
        val_images=2000,
        test_images=10_000,
    )
    return (
        Run("dense", "dense", profile, save_as="vit56_cifar10_dense"),
        Run("sparse", "sparse", profile, save_as="vit56_cifar10_sparse"),
    )


def _vit_base_smoke() -> tuple[Run, ...]:
    profile = changed(
        PLANTED,
        data="cifar10",
        model="vit_base_patch16_224",
        img_size=224,
        start="scratch",
        steps=2,
        batch_size=2,
        lr=3e-4,
        warmup_steps=0,
        augment=True,
        normalise="imagenet",
        val_images=8,
        test_images=16,
    )
    return Run("dense", "dense", profile), Run("sparse", "sparse", profile)


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("planted_start", "The dense start on PlantedShapes", _planted_start(), 0.10, 0.10),
        Experiment("planted_pairs", "Dense and sparse from one start, three seeds", _planted_pairs(), 0.05, 0.10),
        Experiment("planted_sweep", "tau, each fine-tuned from the same start", _planted_sweep(), 0.05, 0.20),
        Experiment("study", "Dense, sparse and controls from one dense start", _study(), 0.05, 0.20),
        Experiment("deit_cifar10", "DeiT-Tiny fine-tuned on CIFAR-10 at 224 px", _deit_cifar10(), 0.10, 0.20),
        Experiment("vit56_cifar10", "The small ViT from scratch on CIFAR-10 at 56 px", _vit56_cifar10(), 0.08, 0.10),
        Experiment(
            "vit_base_smoke", "ViT-Base, two steps from random weights: that it runs", _vit_base_smoke(), 0.2, 0.3
        ),
    )
}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def planned_rows() -> list[dict[str, Any]]:
    """Every planned run in order, as rows of ``results/planned.csv``; the chapters read it to say what was not run."""
    return [{"experiment": e.name, **run.columns()} for e in EXPERIMENTS.values() for run in e.runs]
