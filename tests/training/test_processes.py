"""Two processes do what one does: the same curve, every validation image once, one set of files, after a kill too.

torchrun on a CPU used to start two runs that did not know each other, and ``accelerate launch --cpu`` one without a
word; both are situations of accelerate's users.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset, TensorDataset

import svit_utils
from svit_utils.attention import LearnableThreshold, sparsify
from svit_utils.training import Stopped, TrainConfig, train
from svit_utils.training.processes import end, start

ROOT = Path(svit_utils.__file__).parents[1]
CONFIG = TrainConfig(
    steps=8, batch_size=8, lr=3e-3, tau_warmup_steps=3, ema_decay=0.9, eval_every=4, checkpoint_every=1, log_every=1
)
VALIDATION = 13  # odd: one process has an image more
LEARNED = ("model", "layer", "head")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="torchrun and signals as on POSIX")


def micro_vit(per: str) -> VisionTransformer:
    torch.manual_seed(3)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=4)
    sparsify(model, LearnableThreshold(0.15, per=per))
    return model


class Noted(Dataset):
    """Notes which images were asked for."""

    def __init__(self, n: int) -> None:
        x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
        self.inner, self.seen = TensorDataset(x, torch.arange(n) % 4), []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        return self.inner[index]


def one_run(folder: Path | None, per: str, batch_size: int, data: Any = None) -> tuple[Any, Any, Noted]:
    model, val = micro_vit(per), Noted(VALIDATION)
    result = train(
        model, data or Noted(40), val, replace(CONFIG, batch_size=batch_size), out_dir=folder, progress=False
    )
    return model, result, val


class Ends(Noted):
    """Sends a signal to this process in the middle of the run, but only where and when it is told to."""

    def __init__(self, number: int, active: bool) -> None:
        super().__init__(40)
        self.number, self.active = number, active

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        if self.active and len(self.seen) == 8 + 4 * 4:  # eight are looked at by the first process; step 5 or 6
            os.kill(os.getpid(), self.number)
        return item


def sharded(per: str) -> VisionTransformer:
    from accelerate import PartialState
    from torch.distributed.fsdp import fully_shard

    PartialState(cpu=True)  # starts gloo, as train would
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = micro_vit(per)
    if per != "model":  # a parameter that blocks share belongs to the whole model
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_runs(folder: Path, per: str, rank: int) -> dict[str, Any]:
    """One that is stopped and goes on, and one in one go: do they end alike, and what were the curves?"""
    from svit_utils.training.sharding import whole

    config = replace(CONFIG, batch_size=4, ema_decay=None)
    ends = []
    for name, data in (("stopped", Ends(signal.SIGTERM, rank == 1)), ("stopped", Noted(40)), ("whole", Noted(40))):
        model = sharded(per)
        try:
            result = train(model, data, Noted(VALIDATION), config, out_dir=folder / name, progress=False)
            ends.append({key: value.tolist() for key, value in whole(model.state_dict()).items()})
        except Stopped as stopped:
            ends.append(str(stopped))
    return {"ends": ends, "history": result.history}


def worker(folder: Path, again: bool) -> None:
    """What each of two processes does; ``again`` after one was killed."""
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {}
    if not again:
        for per in LEARNED:
            model, result, val = one_run(folder / per, per, 4)
            found[per] = {"history": result.history, "seen": val.seen, "accuracy": result.best_val_accuracy}
            found[per]["state"] = {name: value.tolist() for name, value in model.state_dict().items()}
        try:
            one_run(folder / "signalled", "head", 4, Ends(signal.SIGTERM, active=rank == 1))
        except Stopped as stopped:
            found["stopped"] = str(stopped)
        one_run(folder / "signalled", "head", 4)
        for per in LEARNED:
            try:
                found[f"sharded {per}"] = sharded_runs(folder / f"sharded {per}", per, rank)
            except ValueError as error:
                found["refused"] = str(error)
        (folder / f"rank{rank}.json").write_text(json.dumps(found))
    one_run(folder / "killed", "head", 4, Ends(signal.SIGKILL, active=rank == 1 and not again))
    end()


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(__file__, str(folder))
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-3000:]
    assert (folder / "killed" / "checkpoint.pt").exists() and not (folder / "killed" / "last.safetensors").exists()
    done = torchrun(__file__, str(folder), "again")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("per", LEARNED)
def test_the_curve_is_that_of_one_process(together: Any, per: str) -> None:
    """At the same global batch, learned thresholds, averages and validation included."""
    _, ranks = together
    model, result, _ = one_run(None, per, 8)
    for rank in ranks:
        found = rank[per]
        for name in ("loss", "lr", "tau_factor", "val_accuracy", "val_loss"):
            curve = [row[name] for row in found["history"] if name in row]
            expected = [row[name] for row in result.history if name in row]
            np.testing.assert_allclose(curve, expected, rtol=2e-4, atol=1e-6, err_msg=name)
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(found["state"][name], value.tolist(), atol=1e-3, err_msg=name)
    assert ranks[0][per]["state"] == ranks[1][per]["state"], "bit for bit the same in both"
    taus = [value for name, value in micro_vit(per).state_dict().items() if "threshold" in name]
    moved = [value for name, value in model.state_dict().items() if "threshold" in name]
    assert taus and all(not torch.equal(a, b) for a, b in zip(taus, moved)), "tau was trained"


@pytest.mark.slow
@pytest.mark.parametrize("per", LEARNED)
def test_a_sharded_model_does_the_same(together: Any, per: str) -> None:
    """With ``fully_shard`` (FSDP2), which refuses parameters without a dimension, as a learned tau once was."""
    folder, ranks = together
    if torch.__version__.startswith("2.7."):  # on CPUs it sums the gradients where it should take their mean
        assert all("makes the gradient 2 times too large: take a newer torch" in rank["refused"] for rank in ranks)
        return
    model, val = micro_vit(per), Noted(VALIDATION)
    result = train(model, Noted(40), val, replace(CONFIG, ema_decay=None), progress=False)
    for rank in ranks:
        assert "refused" not in rank
        stopped, resumed, in_one_go = rank[f"sharded {per}"]["ends"]
        assert "stopped by SIGTERM after step" in stopped and resumed == in_one_go, "bit for bit"
        for name in ("loss", "val_accuracy", "val_loss"):
            curve = [row[name] for row in rank[f"sharded {per}"]["history"] if name in row]
            expected = [row[name] for row in result.history if name in row]
            np.testing.assert_allclose(curve, expected, rtol=2e-4, atol=1e-6, err_msg=name)
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(in_one_go[name], value.tolist(), atol=1e-3, err_msg=name)
    kept = load_file(folder / f"sharded {per}" / "whole" / "last.safetensors")
    assert {name: value.shape for name, value in kept.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.slow
def test_every_validation_image_once(together: Any) -> None:
    _, ranks = together
    seen = [rank["layer"]["seen"] for rank in ranks]
    assert Counter(seen[0] + seen[1]) == Counter(dict.fromkeys(range(VALIDATION), 2))  # two validations
    assert ranks[0]["layer"]["accuracy"] == ranks[1]["layer"]["accuracy"]


@pytest.mark.slow
def test_one_set_of_files(together: Any) -> None:
    folder, _ = together
    for name in (*LEARNED, "signalled", "killed"):
        files = sorted(path.name for path in (folder / name).iterdir())
        assert files == ["best.safetensors", "checkpoint.pt", "last.safetensors", "metrics.csv"]
        steps = [line.split(",")[0] for line in (folder / name / "metrics.csv").read_text().splitlines()]
        assert steps == ["step", *map(str, range(1, 9))]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signalled", "killed"])
def test_it_goes_on_after_one_process_got_a_signal(together: Any, how: str) -> None:
    """SIGTERM to one: all stop at the same step. SIGKILL: both are started again. Both end as the unbroken run."""
    folder, ranks = together
    for name in ("last.safetensors", "best.safetensors"):
        broken, whole = load_file(folder / how / name), load_file(folder / "head" / name)
        assert all(torch.equal(broken[key], value) for key, value in whole.items())
    assert [rank["stopped"].partition(";")[0] for rank in ranks] == [ranks[0]["stopped"].partition(";")[0]] * 2
    assert "stopped by SIGTERM after step" in ranks[0]["stopped"]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    done = torchrun("-m", "svit_utils", "train", "--profile", "smoke", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("validation ") == 1 == done.stdout.count("profile smoke"), "the first process alone speaks"
    assert done.stderr.count("step 1 of 4") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    assert len((tmp_path / "out" / "metrics.csv").read_text().splitlines()) == 5


class Parent:
    def __init__(self, *words: str) -> None:
        self.words = list(words)

    def cmdline(self) -> list[str]:
        return self.words


@pytest.mark.parametrize(
    "words",
    [
        ("python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "svit_utils"),
        ("python", "/usr/bin/accelerate", "launch", "--num-processes=2", "--cpu", "train.py"),
        ("python", "-m", "accelerate.commands.launch", "launch", "--num_processes=2", "train.py"),
    ],
)
def test_a_launcher_that_starts_one_process_is_refused(words: tuple[str, ...], monkeypatch: Any) -> None:
    import psutil

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(psutil.Process, "parents", lambda self: [Parent("sh"), Parent(*words)])
    with pytest.raises(ValueError, match=r"asked for 2 processes but starts one .*torchrun --nproc_per_node 2"):
        start()


def test_a_launcher_of_one_process_is_fine(monkeypatch: Any) -> None:
    import psutil

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    words = ("python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "1", "train.py")
    monkeypatch.setattr(psutil.Process, "parents", lambda self: [Parent(*words)])
    assert start().num_processes == 1


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: Any) -> None:
    """An Accelerator was made before, without gloo: each process would be a run of its own."""
    start()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"2 processes were started, but Accelerate sees 1.*ACCELERATE_USE_CPU=1"):
        start()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), again=len(sys.argv) > 2)
