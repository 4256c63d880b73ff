"""A run killed at any moment, also inside the writing of a checkpoint, ends with the same weights, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401 - a run of a sparse model begins with the tracker's table: the children must not load it each
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import Dataset

from svit_utils.attention import sparsify
from svit_utils.training import TrainConfig, train
from svit_utils.training import checkpoints as checkpoints_module

KILLS = 20
CALLS = 900_000  # of the 2.9 million that a run makes
CONFIG = TrainConfig(
    steps=120,
    batch_size=4,
    lr=3e-3,
    warmup_steps=5,
    tau_warmup_steps=40,
    mixup=0.3,
    label_smoothing=0.1,
    ema_decay=0.9,
    grad_accumulation=2,
    eval_every=20,
    checkpoint_every=3,
    log_every=4,
)

# Children come from a server that has imported torch but never run autograd: a process that has run it cannot be forked
# safely (torch refuses), and importing torch again in each of the many would take minutes.
SERVER = None if not hasattr(os, "fork") else multiprocessing.get_context("forkserver")
pytestmark = pytest.mark.skipif(SERVER is None, reason="needs fork, which starts without importing torch again")


class Noisy(Dataset):
    """Images that draw from all three global generators, as augmentations do."""

    def __init__(self, size: int) -> None:
        self.images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(()) + random.random() + np.random.rand()  # noqa: NPY002
        return self.images[index] + 0.1 * noise.float(), index % 4


def micro_vit(dropout: float = 0.1) -> VisionTransformer:
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=4, proj_drop_rate=dropout
    )
    sparsify(model, 0.2)
    return model


def _run(folder: Path) -> None:
    torch.set_num_threads(1)
    train(micro_vit(), Noisy(30), Noisy(8), CONFIG, out_dir=folder, progress=False)


def _run_and_die_after(folder: Path, calls: int) -> None:
    """Dies at the given call of a Python or C function, wherever in the run that is: no clock has a part in it."""
    left = calls

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    _run(folder)
    sys.setprofile(None)


def _run_and_die_writing(folder: Path, after: int) -> None:
    """Dies by its own hand halfway through the bytes of a checkpoint."""
    torch.set_num_threads(1)
    written = 0
    original = torch.save

    def half(state: Any, file: Any) -> None:
        nonlocal written
        written += 1
        original(state, file)
        if written > after:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints_module.torch.save = half  # type: ignore[assignment]
    train(micro_vit(), Noisy(30), Noisy(8), CONFIG, out_dir=folder, progress=False)


def _fork(target: Any, *args: Any) -> Any:
    assert SERVER is not None
    SERVER.set_forkserver_preload([__name__])
    process = SERVER.Process(target=target, args=args)
    process.start()
    return process


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    process = _fork(_run, folder)
    process.join()
    assert process.exitcode == 0
    return folder


def _same(a: Path, b: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"
    rows = [[line.rsplit(",", 1)[0] for line in (x / "metrics.csv").read_text().splitlines()] for x in (a, b)]
    assert rows[0] == rows[1], "metrics.csv, seconds aside"
    assert len(rows[0]) == 1 + CONFIG.steps // CONFIG.log_every


def test_killed_at_twenty_moments(unbroken: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    killed, steps = 0, set()
    for _ in range(6 * KILLS):
        process = _fork(_run_and_die_after, tmp_path, draw.randrange(CALLS))
        process.join()
        if process.exitcode == 0:  # it came to its end: begin again until there have been enough kills
            _same(unbroken, tmp_path)
            for file in tmp_path.iterdir():
                file.unlink()
            continue
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        if (tmp_path / "checkpoint.pt").exists():
            steps.add(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"])
        if killed == KILLS:
            break
    assert killed == KILLS
    assert len(steps) >= 4, f"the kills fell at too few steps to show anything: {steps}"
    process = _fork(_run, tmp_path)
    process.join()
    assert process.exitcode == 0
    _same(unbroken, tmp_path)


def test_killed_inside_the_writing_of_a_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    for after in (0, 7):  # the very first checkpoint, and a later one with a good one before it
        process = _fork(_run_and_die_writing, tmp_path, after)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list(tmp_path.glob(".checkpoint.pt.*.partial"))
        assert (tmp_path / "checkpoint.pt").exists() == (after > 0)
    process = _fork(_run, tmp_path)
    process.join()
    assert process.exitcode == 0
    _same(unbroken, tmp_path)


def test_the_seed_matters(unbroken: Path, tmp_path: Path) -> None:
    """Else the equalities above would say nothing."""
    from dataclasses import replace

    train(micro_vit(), Noisy(30), Noisy(8), replace(CONFIG, seed=1), out_dir=tmp_path, progress=False)
    a, b = load_file(unbroken / "last.safetensors"), load_file(tmp_path / "last.safetensors")
    assert not torch.equal(a["head.weight"], b["head.weight"])
