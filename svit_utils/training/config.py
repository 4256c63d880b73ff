"""The recipe of a training run, as one frozen dataclass."""

from dataclasses import dataclass

from svit_utils.training.schedules import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Steps are optimiser steps; ``batch_size`` is per process and micro-batch.

    Attributes:
        steps: length of the run.
        batch_size: images per process and forward pass.
        lr: peak learning rate of AdamW.
        weight_decay: on matrices only; not on norms, biases, position and class tokens, thresholds.
        warmup_steps: linear warm-up of the learning rate.
        schedule: ``"cosine"``, ``"onecycle"`` or ``"constant"``, see `lr_factor`.
        layer_decay: factor on the learning rate from each layer to the one below (timm's), or None.
        tau_warmup_steps: steps over which tau rises linearly from 0.
        threshold_lr: peak learning rate of learnable thresholds; None for that of the other parameters.
        label_smoothing: in [0, 1).
        mixup, cutmix: alpha of timm's Mixup, 0 for none.
        ema_decay: decay of an exponential moving average of the weights, or None.
        grad_accumulation: micro-batches per step.
        clip_grad: largest gradient norm, or None.
        precision: ``"fp32"`` or ``"bf16"`` (autocast; the cut stays in float32).
        compile: run the model through ``torch.compile``.
        seed: of the data order and the random generators.
        num_workers: processes that load data; resuming is exact only with 0.
        eval_every: steps between evaluations on the validation set (0: only at the end).
        checkpoint_every: steps between checkpoints (0: only at the end). They are written only with ``out_dir``.
        log_every: steps between rows of metrics.csv.
    """

    steps: int
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: str = "cosine"
    layer_decay: float | None = None
    tau_warmup_steps: int = 0
    threshold_lr: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    grad_accumulation: int = 1
    clip_grad: float | None = 1.0
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    num_workers: int = 0
    eval_every: int = 0
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "mixup", "cutmix", "num_workers", "eval_every", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("ema_decay", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1) or be None, got {value}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive or None, got {self.clip_grad}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, 2**31), got {self.seed}")
        if self.threshold_lr is not None and not self.threshold_lr > 0:
            raise ValueError(f"threshold_lr must be positive or None, got {self.threshold_lr}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {self.schedule!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must lie in [0, steps = {self.steps}], got {self.warmup_steps}")
        if not 0 <= self.tau_warmup_steps <= self.steps:
            raise ValueError(f"tau_warmup_steps must lie in [0, steps = {self.steps}], got {self.tau_warmup_steps}")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch_size, got {self.batch_size}")
