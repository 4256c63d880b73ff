"""The recipe in the terms of torch and timm: AdamW's parameter groups, the loss, and the share of tau in force."""

from collections.abc import Callable
from typing import Any, TypeAlias

from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from svit_utils.attention import Threshold, sparse_modules
from svit_utils.training.config import TrainConfig

# Without weight decay in any model; not every timm model lists all of them in its `no_weight_decay`.
EMBEDDINGS = ("pos_embed", "cls_token", "dist_token", "reg_token")


def param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """timm's parameter groups for AdamW.

    No weight decay on vectors, on what the model itself exempts, on position and class tokens and on learned
    thresholds; with ``config.layer_decay``, a learning rate for each layer.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    exempt |= {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in EMBEDDINGS}
    learned = {id(p) for threshold in distinct_thresholds(model) for p in threshold.parameters()}
    exempt |= {name for name, p in model.named_parameters() if id(p) in learned}
    names = tuple(sorted(exempt))
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=names, layer_decay=config.layer_decay
        )
        groups = [{**group, "lr": config.lr * group["lr_scale"]} for group in groups]
    return groups if config.threshold_lr is None else _apart(groups, learned, config.threshold_lr)


def _apart(groups: list[dict[str, Any]], learned: set[int], lr: float) -> list[dict[str, Any]]:
    """The groups with the learned thresholds in one of their own, at the rate ``lr``."""
    thresholds = [p for group in groups for p in group["params"] if id(p) in learned]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in learned]} for group in groups]
    return [*(group for group in rest if group["params"]), {"params": thresholds, "lr": lr, "weight_decay": 0.0}]


LossFunction: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class Loss:
    """Cross-entropy with label smoothing, or with timm's mixup and cutmix."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.smoothing = config.label_smoothing
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=int(model.num_classes),  # type: ignore[arg-type]
            )

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, a scalar, of ``images`` [B, 3, H, W] with ``labels`` [B]."""
        if self.mixup is None:
            return F.cross_entropy(forward(images).float(), labels, label_smoothing=self.smoothing)
        images, soft = self.mixup(images, labels)
        return F.cross_entropy(forward(images).float(), soft)


def distinct_thresholds(model: nn.Module) -> list[Threshold]:
    """Every threshold object of the model once, also where layers share it; none for a dense model."""
    thresholds = (module.threshold for module in sparse_modules(model).values())
    return list({id(threshold): threshold for threshold in thresholds if threshold is not None}.values())


def set_tau_share(thresholds: list[Threshold], share: float) -> None:
    """Put ``share`` of each tau into force: 0 cuts nothing, 1 is the full tau."""
    for threshold in thresholds:
        threshold.set_warmup(share)
