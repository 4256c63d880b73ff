"""Training and evaluation: the recipe, the loop, checkpoints, profiles."""

from svit_utils.training.checkpoints import CheckpointError
from svit_utils.training.evaluation import Evaluation, evaluate
from svit_utils.training.loop import NonFiniteLossError, OutputError, TrainConfig, TrainResult, load_best, train
from svit_utils.training.schedules import lr_factor, tau_factor

__all__ = [
    "CheckpointError",
    "Evaluation",
    "NonFiniteLossError",
    "OutputError",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_best",
    "lr_factor",
    "tau_factor",
    "train",
]
