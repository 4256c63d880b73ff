"""Ctrl-C, SIGTERM and what a run says: a checkpoint is written and the message names the step it will go on from.

SIGTERM is what SLURM, Kubernetes and ``timeout`` send before they kill; the plain lines are for their logs, where a
progress bar is silent, as it is under nohup.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import TensorDataset

import svit_utils
from svit_utils.__main__ import main
from svit_utils.attention import sparse_modules, sparsify
from svit_utils.training import NonFiniteLossError, Stopped, TrainConfig, train

CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, checkpoint_every=0, log_every=1)
SIGNALS = [signal.SIGINT, signal.SIGTERM]
SMOKE = ["train", "--profile", "smoke"]
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals as on POSIX")
pytestmark = posix


def micro_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(3)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**options | kwargs)


class Signalled(TensorDataset):
    """Sends the process signals while it reads the images numbered ``at``."""

    def __init__(self, at: tuple[int, ...] = (), number: int = signal.SIGINT) -> None:
        n = 24
        images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        super().__init__(images, torch.arange(n) % 4)
        self.at, self.number, self.seen = at, number, 0

    def __getitem__(self, index: int) -> Any:
        self.seen += 1
        if self.seen in self.at:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def run(data: Any = None, folder: Path | None = None, config: TrainConfig = CONFIG, model: Any = None) -> Any:
    return train(model or micro_vit(), data or Signalled(), None, config, out_dir=folder, progress=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 3, 5, 6])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_checkpoint_is_written_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, number: int, step: int, accumulation: int
) -> None:
    config = replace(CONFIG, grad_accumulation=accumulation, ema_decay=0.9)
    whole = micro_vit()
    run(config=config, model=whole)
    data = Signalled(at=((step - 1) * 4 * accumulation + 2,), number=number)
    with pytest.raises(Stopped) as caught:
        run(data, tmp_path, config)
    said = str(caught.value)
    assert f"after step {step} of 6; the same call goes on from the checkpoint of step {step} in {tmp_path}" in said
    assert caught.value.number == number and isinstance(caught.value, KeyboardInterrupt)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"] == step
    model = micro_vit()
    result = run(folder=tmp_path, config=config, model=model)
    assert same(model, whole) and [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]


def test_without_a_folder_nothing_is_promised() -> None:
    with pytest.raises(Stopped, match="after step 1 of 6; nothing is kept, since there is no out_dir"):
        run(Signalled(at=(1,)))


def test_a_second_ctrl_c_stops_at_once_and_the_message_is_true(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(Signalled(at=(2, 3)), tmp_path)
    assert not isinstance(caught.value, Stopped)
    assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "run.lock").exists()


def test_a_second_sigterm_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="by SIGTERM after step 1"):
        run(Signalled(at=(2, 3, 4), number=signal.SIGTERM), tmp_path)


def test_handlers_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    run()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(Stopped):
        run(Signalled(at=(2,)))
    assert [signal.getsignal(number) for number in SIGNALS] == before
    own: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: own.append(number))
    try:
        with pytest.raises(Stopped):
            run(Signalled(at=(2,), number=signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        assert own == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before[1])


def test_an_ignored_signal_stays_ignored() -> None:
    """A command in the background of a shell script starts with SIGINT ignored, as under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(Signalled(at=(2, 3, 4))).steps == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_a_thread() -> None:
    """Only the main thread may set handlers: elsewhere they stay as they are."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    assert results[0].steps == 6


def test_stopped_while_tau_rises(tmp_path: Path) -> None:
    """The model is left with the full tau, and so is the average, which a copy made at a small tau would not be."""
    config = replace(CONFIG, tau_warmup_steps=6, ema_decay=0.9, eval_every=1)
    model, whole = micro_vit(), micro_vit()
    for each in (model, whole):
        sparsify(each, 0.2)
    run(config=config, model=whole)
    with pytest.raises(Stopped):
        run(Signalled(at=(8 + 6,)), tmp_path, config, model)  # eight are looked at before the first step
    assert taus(model) == pytest.approx([0.2])
    again = micro_vit()
    sparsify(again, 0.2)
    for module in sparse_modules(again).values():
        module.threshold.set_warmup(0.1)  # as a model comes out of somebody's own loop
    seen: list[float] = []
    result = train(again, Signalled(), Watched(seen), config, out_dir=tmp_path, progress=False)
    assert taus(again) == taus(result.ema) == pytest.approx([0.2])
    assert not result.ema.training and same(again, whole)


def taus(model: nn.Module) -> list[float]:
    return [module.threshold.tau for module in sparse_modules(model).values()]


class Watched(Signalled):
    def __init__(self, seen: list[float]) -> None:
        super().__init__()
        self.notes = seen


def test_the_average_is_judged_at_the_full_tau() -> None:
    config = replace(CONFIG, tau_warmup_steps=6, ema_decay=0.9, eval_every=2)
    model = micro_vit()
    sparsify(model, 0.2)
    seen: list[float] = []
    original = VisionTransformer.forward

    def forward(self: Any, x: Any) -> Any:
        if not self.training and self is not model:
            seen.extend(taus(self))
        return original(self, x)

    VisionTransformer.forward = forward  # type: ignore[method-assign]
    try:
        result = train(model, Signalled(), Signalled(), config, progress=False)
    finally:
        VisionTransformer.forward = original  # type: ignore[method-assign]
    assert len(seen) >= 3 and seen == pytest.approx([0.2] * len(seen))
    assert taus(result.ema) == pytest.approx([0.2])


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_are_signalled_too(tmp_path: Path, number: int) -> None:
    """A terminal and a batch system signal the whole group: the loader's workers must let the step end.

    PyTorch's workers die of either signal (pytorch/pytorch has the reports), and the step under way with them.
    """
    code = f"""
import os, signal, torch, threading, time
from svit_utils.training import TrainConfig, train
from tests.training.test_signals import Signalled, micro_vit
class Slow(Signalled):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)
threading.Timer(1.0, lambda: os.killpg(os.getpgrp(), {int(number)})).start()
config = TrainConfig(steps=4000, batch_size=4, grad_accumulation=2, checkpoint_every=0, num_workers=2)
train(micro_vit(), Slow(), None, config, out_dir={str(tmp_path)!r}, progress=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(svit_utils.__file__).parents[1],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
        check=False,
    )
    assert re.search(r"Stopped: stopped by \S+ after step \d+ of 4000; the same call goes on", done.stderr), done.stderr
    assert (tmp_path / "checkpoint.pt").exists()


def test_the_command_says_where_it_goes_on(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from svit_utils.data import PlantedShapes

    original, calls = PlantedShapes.__getitems__, []

    def items(self: Any, indices: Any) -> Any:
        calls.extend([1] * (len(indices) > 1))  # single ones are looked at before the first step
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(PlantedShapes, "__getitems__", items)
        assert main([*SMOKE, "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert (
        f"stopped by SIGTERM after step 2 of 4; the same call goes on from the checkpoint of step 2 in {tmp_path}"
        in said
    )
    assert "step 1 of 4, loss " in said, "no terminal: plain lines"
    assert main([*SMOKE, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert f"going on after step 2 of 4, from the checkpoint in {tmp_path}" in said
    assert main([*SMOKE, "--out", str(tmp_path)]) == 0
    assert "all 4 steps are done, from the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["build_data", "build_model"])
def test_ctrl_c_before_the_first_step(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"svit_utils.training.{where}", interrupted)
    assert main([*SMOKE, "--out", str(tmp_path / "out")]) == 130
    assert "there is no checkpoint yet, so the same command starts again" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.lock").exists()


def test_ctrl_c_while_it_tests(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svit_utils.training.evaluate", interrupted)
    assert main([*SMOKE, "--out", str(tmp_path)]) == 130
    assert f"{tmp_path} holds a checkpoint of step 4, from which" in capsys.readouterr().err


def test_lines_come_now_and_then(capsys: Any) -> None:
    train(micro_vit(), Signalled(), None, replace(CONFIG, steps=200))
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"step (\d+) of 200", line)[1]) for line in lines] == [1, *range(20, 201, 20)]  # type: ignore[index]
    train(micro_vit(), Signalled(), None, CONFIG, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_slow_run_says_something_each_minute(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from svit_utils.training.progress import Reporter

    now = time.monotonic()
    monkeypatch.setattr("svit_utils.training.progress.time.monotonic", lambda: now)
    reporter = Reporter(0, 1000, True)
    for _ in range(50):
        now += 20
        reporter.step(1.0)
    reporter.close()
    steps = [int(m) for m in re.findall(r"step (\d+) of 1000", capsys.readouterr().err)]
    assert steps == [1, *range(4, 51, 3)]


def test_an_error_after_a_signal_names_the_last_checkpoint(tmp_path: Path) -> None:
    """Another process that died first breaks the connection: what is said is that the run was stopped."""

    class Broken(Signalled):
        def __getitem__(self, index: int) -> Any:
            item = super().__getitem__(index)
            if self.seen == 11:
                raise RuntimeError("connection closed by peer")
            return item

    config = replace(CONFIG, checkpoint_every=1)
    with pytest.raises(Stopped, match="after step 2 of 6; the same call goes on from the checkpoint of step 2"):
        run(Broken(at=(10,), number=signal.SIGTERM), tmp_path, config)
    with pytest.raises(RuntimeError, match="connection closed"):
        run(Broken(), tmp_path / "no signal", config)
    assert not issubclass(NonFiniteLossError, Stopped)


def test_finished_weights_are_those_of_the_whole_run(tmp_path: Path) -> None:
    """Stopped in the last step: what is missing is written when the run is called again."""
    with pytest.raises(Stopped, match="after step 6 of 6"):
        run(Signalled(at=(22,)), tmp_path)
    model = micro_vit()
    run(folder=tmp_path, model=model)
    assert torch.equal(load_file(tmp_path / "last.safetensors")["head.weight"], model.head.weight)
