"""Chapter 3 teaches what the library runs: its functions, taken from the notebook, against the package's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from svit_utils import sparsify
from svit_utils.attention import sparse_modules
from svit_utils.models import create_model
from svit_utils.training import TrainConfig, lr_factor, tau_factor, train
from svit_utils.training.recipe import param_groups
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "03_fine_tuning"


def taught(name: str, **namespace: Any) -> Any:
    return extract_function(CHAPTER, name, {"math": math, "torch": torch, "F": F} | namespace)


def tiny() -> nn.Module:
    torch.manual_seed(3)
    model = create_model("small_vit", img_size=16)  # 4 x 4 tokens and a class token
    for block in model.blocks:  # as peaked as after training, so that rows are partly cut
        block.attn.qkv.weight.data[: 2 * 96] *= 8
    return model


def pictures(n: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 10)


@pytest.mark.parametrize("steps, warmup", [(60, 3), (7, 0), (5, 4), (2109, 100)])
def test_learning_rate(steps: int, warmup: int) -> None:
    share = taught("lr_share")
    for step in range(steps):
        assert share(step, steps, warmup) == pytest.approx(lr_factor(step, steps, warmup, "cosine"), abs=1e-12)


@pytest.mark.parametrize("ramp", [0, 1, 3, 30])
def test_threshold(ramp: int) -> None:
    assert [taught("tau_share")(step, ramp) for step in range(40)] == [tau_factor(step, ramp) for step in range(40)]


def test_parameter_groups() -> None:
    model = tiny()
    theirs = {
        id(p): group["weight_decay"] for group in param_groups(model, TrainConfig(steps=1)) for p in group["params"]
    }
    ours = {id(p): group["weight_decay"] for group in taught("parameter_groups")(model, 0.05) for p in group["params"]}
    assert ours == theirs and set(ours.values()) == {0.0, 0.05}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_steps(sparse: bool, tmp_path: Path) -> None:
    """Weights after some steps, and Adam's moments, which are the gradients; over the end of an epoch."""
    config = TrainConfig(
        steps=6, batch_size=8, lr=2e-3, warmup_steps=2, tau_warmup_steps=4 if sparse else 0, seed=2, log_every=1
    )
    data = pictures()
    lr_share, tau_share = taught("lr_share"), taught("tau_share")
    batch_indices = taught("batch_indices")
    step_once = taught("training_step", sparse_modules=sparse_modules)

    ours, theirs = tiny(), tiny()
    if sparse:
        sparsify(ours, 0.1)
        sparsify(theirs, 0.1)
    ours.train()
    optimiser = torch.optim.AdamW(taught("parameter_groups")(ours, config.weight_decay))
    losses = []
    for step in range(config.steps):
        images, labels = data[batch_indices(len(data), config.batch_size, step, config.seed)]
        lr = config.lr * lr_share(step, config.steps, config.warmup_steps)
        losses.append(step_once(ours, optimiser, images, labels, lr, tau_share(step, config.tau_warmup_steps)))
    result = train(theirs, data, None, config, out_dir=tmp_path, progress=False)

    np.testing.assert_allclose(losses, [row["loss"] for row in result.history], rtol=1e-5)
    for name, value in theirs.cpu().state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True, map_location="cpu")["optimiser"]
    moments = sorted(float(entry["exp_avg"].abs().sum()) for entry in state["state"].values())
    own = sorted(float(entry["exp_avg"].abs().sum()) for entry in optimiser.state.values())
    np.testing.assert_allclose(own, moments, rtol=1e-3, atol=1e-8)
    assert max(own) > 0
    if sparse:  # and the cut made a difference, else the two arms would be one test
        dense = tiny()
        train(dense, data, None, TrainConfig(**{**config.__dict__, "tau_warmup_steps": 0}), progress=False)
        assert any(not torch.equal(value, ours.state_dict()[name]) for name, value in dense.cpu().state_dict().items())
