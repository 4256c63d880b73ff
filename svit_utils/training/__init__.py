"""Training and evaluation: the recipe, the loop, checkpoints, profiles."""

from svit_utils.training.checkpoints import CheckpointError
from svit_utils.training.config import TrainConfig
from svit_utils.training.evaluation import Evaluation, evaluate
from svit_utils.training.loop import TrainResult, load_best, train
from svit_utils.training.outputs import OutputError
from svit_utils.training.profiles import PROFILES, DataSplits, Profile, build_data, build_model, get_profile
from svit_utils.training.schedules import lr_factor, tau_factor
from svit_utils.training.session import NonFiniteLossError
from svit_utils.training.sparsity_target import SparsityTarget
from svit_utils.training.stops import Stopped

__all__ = ["PROFILES", "CheckpointError", "DataSplits", "Evaluation", "NonFiniteLossError", "OutputError", "Profile"]
__all__ += ["Stopped", "TrainConfig", "TrainResult", "build_data", "build_model", "evaluate", "get_profile"]
__all__ += ["SparsityTarget", "load_best", "lr_factor", "tau_factor", "train"]
