"""A part that is frozen and kept in eval mode: neither training nor evaluation wakes it, and a resume notices.

The situation of many public questions (Lightning changed its trainer for them): batch statistics of a frozen backbone
drift, and its dropout comes back, because something calls ``model.train()``.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from svit_utils import sparsify
from svit_utils.explain import attention_maps
from svit_utils.models import create_model
from svit_utils.training import CheckpointError, TrainConfig, evaluate, train
from svit_utils.training.evaluation import warn_of_empty_rows

CONFIG = TrainConfig(steps=3, batch_size=4, lr=1e-3)


class Stem(nn.Module):
    """A patch embedding with what behaves differently in training."""

    def __init__(self, patch_embed: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.norm, self.drop = patch_embed, nn.BatchNorm1d(96), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.patch_embed(x).transpose(1, 2)).transpose(1, 2))


def half_frozen(asleep: bool = True) -> Any:
    torch.manual_seed(0)
    model = create_model("small_vit", img_size=16)
    model.patch_embed = Stem(model.patch_embed)
    sparsify(model, 0.02)
    model.train()
    for part in (model.patch_embed, model.blocks[0]):
        part.requires_grad_(False).train(not asleep)
    return model


def data(n: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 3, 16, 16, generator=generator) + 2, torch.arange(n) % 10)


@pytest.mark.parametrize("validate", [False, True])
def test_training_leaves_a_sleeping_half_asleep(validate: bool) -> None:
    model = half_frozen()
    frozen = copy.deepcopy({name: value for name, value in model.state_dict().items() if "patch_embed" in name})
    seen = []
    model.patch_embed.drop.register_forward_hook(lambda module, *_: seen.append((module.training, model.training)))
    train(model, data(), data() if validate else None, CONFIG, progress=False)
    assert (False, True) in seen and not any(asleep for asleep, _ in seen)
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), f"{name}: batch statistics too"


def test_a_model_in_eval_mode_is_trained_as_a_whole() -> None:
    """As a loaded one is: nobody has said of any part that it should sleep."""
    model = half_frozen().eval()
    seen = []
    model.patch_embed.drop.register_forward_hook(lambda module, *_: seen.append(module.training))
    train(model, data(), None, CONFIG, progress=False)
    assert any(seen)


def test_another_half_asleep_is_another_run(tmp_path: Path) -> None:
    train(half_frozen(), data(), None, CONFIG, out_dir=tmp_path, progress=False)
    train(half_frozen(), data(), None, CONFIG, out_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"in eval mode was patch_embed, .*blocks\.0.* and is absent"):
        train(half_frozen(asleep=False), data(), None, CONFIG, out_dir=tmp_path, progress=False)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["evaluate", "warn_of_empty_rows"])
def test_looking_at_a_model_changes_no_mode(what: str, error: type[BaseException] | None) -> None:
    model = half_frozen()
    model.blocks[2].attn.attn_drop.eval()
    before = [part.training for part in model.modules()]
    statistics = model.patch_embed.norm.running_mean.clone()

    def fail(*_: object) -> None:
        if error is not None:
            raise error("stop")

    model.blocks[1].register_forward_hook(fail)
    look = (lambda: evaluate(model, data())) if what == "evaluate" else (lambda: warn_of_empty_rows(model, data()))
    if error is None:
        look()
    else:
        with pytest.raises(error):
            look()
    assert [part.training for part in model.modules()] == before
    assert torch.equal(model.patch_embed.norm.running_mean, statistics)


def test_maps_wait_for_the_step_of_a_training_run() -> None:
    """Between two steps, and never inside one, another thread sees the model; and training never sees it frozen."""
    model, modes, done = half_frozen(), [], threading.Event()
    model.patch_embed = model.patch_embed.patch_embed
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.blocks[3].register_forward_hook(lambda *_: modes.append((model.training, trainable[0].requires_grad)))

    def explain() -> None:
        while not done.is_set():
            attention_maps(model, data()[:1][0])

    thread = threading.Thread(target=explain)
    thread.start()
    try:
        train(model, data(), None, TrainConfig(steps=20, batch_size=4, lr=1e-3), progress=False)
    finally:
        done.set()
        thread.join(60)
    assert modes.count((True, True)) == 20 and not thread.is_alive()
