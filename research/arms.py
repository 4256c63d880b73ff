"""Every recorded experiment, written down before it is run. One `Arm` is one row of a file in ``results/``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from svit_utils.data import Difficulty

# Easier PlantedShapes for a cold start: bright objects near the middle, then further off, then the standard pictures.
CURRICULUM = (Difficulty(brighter=1.0, shift=0.025), Difficulty(brighter=1.0, shift=0.14))
SEEDS = (0, 1, 2)
SWEEP = (0.0025, 0.005, 0.02, 0.1)


@dataclass(frozen=True)
class Arm:
    """One training run.

    Attributes:
        name: unique within its design.
        data: ``"planted"`` or ``"cifar10"``.
        model: name for `svit_utils.models.create_model`.
        img_size: pixels along a side.
        start: an embedded checkpoint, ``"pretrained"`` (local or downloaded timm weights), or ``"scratch"``.
        threshold: tau, or None for dense attention.
        tau_warmup: share of the steps over which tau rises linearly from 0 (0: full tau from the first step).
        empty_rows: see `svit_utils.thresholded_softmax`; without meaning for a dense arm.
        alternative: one of `svit_utils.attention.ALTERNATIVES` in place of the thresholded softmax; None otherwise.
        rho: how often a planted picture's ground belongs to its class, see `svit_utils.data.PlantedShapes`; in training
            and validation. Test pictures always have rho = 0.
        steps, batch_size, lr, weight_decay, schedule, warmup: the recipe; ``warmup`` is the learning rate's, in steps.
        augment: crop and flip, for CIFAR-10.
        curriculum: steps in each stage of `CURRICULUM` before the standard pictures: from a cold start a ViT stays at
            chance on those for a long time, while easier ones give it a first hold.
        precision: ``"fp32"`` or ``"bf16"``.
        compile: run through ``torch.compile``.
        seed: of initialisation, data order, augmentation.
        val_images, test_images: how many are evaluated, the first ones of each split.
        save_as: name of the checkpoint to ship, if any.
    """

    name: str
    data: str = "planted"
    model: str = "small_vit"
    img_size: int = 56
    start: str = "planted_dense_start"
    threshold: float | None = None
    tau_warmup: float = 0.0
    empty_rows: str = "dense"
    alternative: str | None = None
    rho: float = 0.0
    steps: int = 150
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: int = 10
    augment: bool = False
    curriculum: tuple[int, ...] = ()
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    val_images: int = 1000
    test_images: int = 2000
    save_as: str | None = None

    def small(self) -> Arm:
        """The same arm at a size that a check can rerun in seconds."""
        return replace(
            self,
            steps=min(self.steps, 4),
            batch_size=min(self.batch_size, 8),
            warmup=0,
            curriculum=tuple(min(steps, 2) for steps in self.curriculum),
            compile=False,
            val_images=min(self.val_images, 32),
            test_images=min(self.test_images, 100),
            save_as=None,
        )


@dataclass(frozen=True)
class Design:
    """One file ``results/<name>.csv``: its arms, in the order in which they run."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    # How far the small rerun of the first arm may be from the recorded small row.
    accuracy_band: float
    loss_band: float


def _planted_start() -> tuple[Arm, ...]:
    return (
        Arm(
            "start",
            start="scratch",
            steps=1200,
            curriculum=(150, 150),
            precision="bf16",
            lr=1e-3,
            warmup=50,
            save_as="planted_dense_start",
        ),
        # A second cosine from where the first ended.
        Arm("start-continued", steps=500, lr=7e-4, warmup=20, save_as="planted_dense_start"),
    )


def _planted_pairs() -> tuple[Arm, ...]:
    arms = []
    for seed in SEEDS:
        arms.append(Arm(f"dense-seed{seed}", seed=seed, save_as=f"planted_dense_seed{seed}"))
        arms.append(
            Arm(f"sparse-seed{seed}", threshold=0.01, tau_warmup=0.5, seed=seed, save_as=f"planted_sparse_seed{seed}")
        )
    return tuple(arms)


def _planted_sweep() -> tuple[Arm, ...]:
    return (
        *(Arm(f"tau{tau}", threshold=tau, tau_warmup=0.5) for tau in SWEEP),
        Arm("tau0.01-no-warmup", threshold=0.01),
    )


STUDY_SEEDS = (0, 1, 2, 3, 4)
STUDY_RHOS = (0.0, 0.9)
STUDY_ARMS = ("dense", "sparse", "warmup")
STUDY_CONTROLS = ("hard_cut", "top_k", "entmax15", "sparsemax")  # on the first three seeds


def study_arm(kind: str, rho: float, seed: int) -> Arm:
    """An arm of the study (results/study/PLAN.md): ``dense``, ``sparse``, ``warmup`` or one of `STUDY_CONTROLS`."""
    recipe = Arm(
        f"{kind}-rho{rho:g}-seed{seed}", rho=rho, seed=seed, precision="bf16", val_images=500, test_images=1000
    )
    if kind == "dense":
        return recipe
    if kind in ("sparse", "warmup"):
        return replace(recipe, threshold=0.01, tau_warmup=0.5 if kind == "warmup" else 0.0)
    return replace(recipe, alternative=kind)


def _study() -> tuple[Arm, ...]:
    # What decides comes first, in case the time runs out.
    main = [study_arm(kind, rho, seed) for rho in STUDY_RHOS for seed in STUDY_SEEDS for kind in STUDY_ARMS]
    controls = [study_arm(kind, rho, seed) for rho in STUDY_RHOS for seed in SEEDS for kind in STUDY_CONTROLS]
    return (*main[:15], *controls[:12], *main[15:], *controls[12:])


def _deit(name: str, threshold: float | None, tau_warmup: float, lr: float, seed: int) -> Arm:
    return Arm(
        name,
        data="cifar10",
        model="deit_tiny_patch16_224",
        img_size=224,
        start="pretrained",
        threshold=threshold,
        tau_warmup=tau_warmup,
        steps=450,
        batch_size=16,
        lr=lr,
        warmup=20,
        augment=True,
        precision="bf16",
        compile=True,
        seed=seed,
        val_images=500,
        test_images=2000,
    )


def _deit_cifar10() -> tuple[Arm, ...]:
    arms = []
    for seed in (0, 1):
        for lr in (5e-5, 3e-4):
            label = f"lr{lr:.0e}-seed{seed}"
            arms.append(_deit(f"dense-{label}", None, 0.0, lr, seed))
            arms.append(_deit(f"sparse0.01-{label}", 0.01, 0.0, lr, seed))
            arms.append(_deit(f"sparse0.01-warmup-{label}", 0.01, 0.5, lr, seed))
    arms.extend(_deit(f"sparse{tau}-warmup-lr3e-04-seed0", tau, 0.5, 3e-4, 0) for tau in SWEEP)
    return tuple(arms)


def _vit56_cifar10() -> tuple[Arm, ...]:
    recipe = Arm(
        "",
        data="cifar10",
        start="scratch",
        steps=800,
        lr=1e-3,
        warmup=40,
        augment=True,
        test_images=10_000,
        val_images=2000,
    )
    return (
        replace(recipe, name="dense", save_as="vit56_cifar10_dense"),
        replace(recipe, name="sparse", threshold=0.01, save_as="vit56_cifar10_sparse"),
    )


def _vit_base_smoke() -> tuple[Arm, ...]:
    recipe = Arm(
        "",
        data="cifar10",
        model="vit_base_patch16_224",
        img_size=224,
        start="scratch",
        steps=2,
        batch_size=2,
        lr=3e-4,
        warmup=0,
        augment=True,
        val_images=8,
        test_images=16,
    )
    return replace(recipe, name="dense"), replace(recipe, name="sparse", threshold=0.01)


DESIGNS: dict[str, Design] = {
    design.name: design
    for design in (
        Design("planted_start", "The dense start on PlantedShapes", _planted_start(), 0.10, 0.10),
        Design("planted_pairs", "Dense and sparse from one start, three seeds", _planted_pairs(), 0.05, 0.10),
        Design("planted_sweep", "tau, each fine-tuned from the same start", _planted_sweep(), 0.05, 0.20),
        Design("study", "The referee's arms: dense, sparse and controls from one dense start", _study(), 0.05, 0.20),
        Design("deit_cifar10", "DeiT-Tiny fine-tuned on CIFAR-10 at 224 px", _deit_cifar10(), 0.10, 0.20),
        Design("vit56_cifar10", "The small ViT from scratch on CIFAR-10 at 56 px", _vit56_cifar10(), 0.08, 0.10),
        Design("vit_base_smoke", "ViT-Base, two steps from random weights: that it runs", _vit_base_smoke(), 0.2, 0.3),
    )
}


def get_design(name: str) -> Design:
    """The design of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in DESIGNS:
        raise ValueError(f"unknown experiment {name!r}; known are {', '.join(DESIGNS)}")
    return DESIGNS[name]
