"""One process or several: found out, or refused where a launcher started several that would not know each other."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")
# How a launcher says the number of processes: torchrun and Accelerate, then those of MPI.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start() -> Accelerator:
    """Accelerate's view of the processes of this run; on a machine without a GPU they talk through gloo.

    Raises:
        ValueError: several processes were asked for, but they would be separate runs; says which command is right.
    """
    launched = next((int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()), 1)
    if launched == 1 and (asked := _asked_of_accelerate()) > 1:
        raise ValueError(
            f"`accelerate launch` was asked for {asked} processes but starts one on a CPU. Use "
            f"`torchrun --nproc_per_node {asked} -m svit_utils train ...`, or leave --num_processes out"
        )
    # Without this, torchrun's processes on a CPU do not find each other: each would be a run of its own.
    cpu = launched > 1 and not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available())
    if PartialState._shared_state and launched not in (1, PartialState().num_processes):
        raise ValueError(
            f"{launched} processes were started, but Accelerate sees {PartialState().num_processes}, so each would be "
            "a run of its own. On a CPU set ACCELERATE_USE_CPU=1 before the first Accelerator is made"
        )
    return Accelerator(mixed_precision="no", cpu=cpu)  # precision is torch's autocast around the forward pass


def end() -> None:
    """Close what `start` opened between the processes; for the last line of a program that is one of several.

    Left open, a thread of gloo's may abort the process while Python ends, after all work is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def by_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What ``action`` returns in the first process, or raises there, in all of them."""
    outcome: list = [None, None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as caught:
            error = outcome[1] = caught
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] if error is None else error
    return outcome[0]


def _asked_of_accelerate() -> int:
    """The number of processes that an `accelerate launch` above this process was asked for; 1 without one.

    Accelerate sets no variable that says so, so its command line is read.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which every `accelerate launch` sets
        return 1
    import psutil  # not at the top: most runs never get here

    with suppress(psutil.Error):
        for parent in psutil.Process().parents()[:3]:
            words = [word.replace("-", "_") for word in parent.cmdline()]
            if "launch" in words and any("accelerate" in word for word in words):
                for word, following in zip(words, [*words[1:], ""]):
                    name, _, value = word.partition("=")
                    if name == "__num_processes" and (value or following).isdigit():
                        return int(value or following)
    return 1
