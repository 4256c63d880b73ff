"""Two runs that meet in one folder, and what the disk does to a run: full, cut off, or holding something else.

The situations are those of the reports of users of accelerate and pytorch-lightning whose second run wrote into the
first one's folder, whose disk filled up while a checkpoint was written, and whose machine lost its power.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

from svit_utils.__main__ import main
from svit_utils.files import replacing
from svit_utils.training import CheckpointError, OutputError, TrainConfig, train
from svit_utils.training import checkpoints as checkpoints_module
from svit_utils.training.outputs import LOCK, locked

CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, checkpoint_every=2, log_every=1)
SMOKE = ["train", "--profile", "smoke", "--out"]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def micro_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(3)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**options | kwargs)


def images(n: int = 24) -> TensorDataset:
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(n) % 4)


def run(folder: Path, config: TrainConfig = CONFIG, model: Any = None, **kwargs: Any) -> Any:
    return train(model or micro_vit(), images(), None, config, out_dir=folder, progress=False, **kwargs)


def fork(action: Any) -> int:
    """A child process that does ``action`` and ends with its exit status."""
    child = os.fork()
    if child == 0:
        try:
            status = action()
        except BaseException:
            status = 99
        os._exit(status or 0)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def held(tmp_path: Path) -> Any:
    """A folder that another process has locked: (folder, its pid)."""
    folder = tmp_path / "out"
    ready, write = os.pipe()

    def hold() -> int:
        with locked(folder):
            os.write(write, b"x")
            time.sleep(60)
        return 0

    child = fork(hold)
    os.read(ready, 1)
    yield folder, child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@needs_fork
@pytest.mark.parametrize("options", [["--dense"], ["--seed", "7"], [], ["--no-resume"]])
def test_a_second_command_is_told_who_holds_the_folder(held: Any, options: list[str], capsys: Any) -> None:
    folder, child = held
    before = sorted(path.name for path in folder.iterdir())
    assert main([*SMOKE, str(folder), *options]) == 2
    said = capsys.readouterr().err
    for word in ("another run is writing to", str(folder), f"process {child} on ", ", since 20", "another out_dir"):
        assert word in said
    assert sorted(path.name for path in folder.iterdir()) == before == [LOCK]


@needs_fork
def test_a_second_call_is_told_who_holds_the_folder(held: Any, tmp_path: Path) -> None:
    folder, child = held
    with pytest.raises(OutputError, match=f"another run is writing to .*process {child} on .*Wait for it, or choose"):
        run(folder)
    (tmp_path / "link").symlink_to(folder)  # the same folder by another name
    with pytest.raises(OutputError, match=f"process {child}"):
        run(tmp_path / "link")
    assert run(tmp_path / "other").steps == CONFIG.steps


@needs_fork
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def die() -> int:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert exit_status(fork(die)) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    assert run(tmp_path).steps == CONFIG.steps
    assert not (tmp_path / LOCK).exists()


def name_in_lock(folder: Path, **changes: Any) -> None:
    """A lock file as a living process of this machine would have left it, but for ``changes``."""
    with locked(folder):
        name = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(name | changes))


def test_a_lock_from_elsewhere_is_respected_and_the_remedy_said(tmp_path: Path) -> None:
    name_in_lock(tmp_path, host="node7", command="svit train --dense")
    with pytest.raises(OutputError, match=rf"on node7.*svit train --dense.*delete .*{LOCK}"):
        run(tmp_path)
    assert (tmp_path / LOCK).exists()


def test_a_requeued_job_goes_on_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_in_lock(tmp_path, host="node7", job="123")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert run(tmp_path).steps == CONFIG.steps


@pytest.mark.parametrize("change", [{"started": 1.0}, {"pid": "x"}, {"pid": 2**22 + 1}, {"pid": None}, {"pid": -1}])
def test_a_number_that_was_given_out_again_is_no_holder(tmp_path: Path, change: dict[str, Any]) -> None:
    name_in_lock(tmp_path, **{"pid": 1, "started": 1.0} | change)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_lock_file_damaged_by_a_power_cut_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert run(tmp_path).steps == CONFIG.steps


@needs_fork
def test_something_else_in_the_locks_place(tmp_path: Path) -> None:
    for make in (Path.mkdir, os.mkfifo):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder / LOCK)
        with pytest.raises(OutputError, match=f"{LOCK} is not a file: remove it"):
            run(folder)


def test_threads_of_one_process(tmp_path: Path) -> None:
    errors = []

    def other() -> None:
        try:
            run(tmp_path)
        except OutputError as error:
            errors.append(str(error))

    with locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert run(tmp_path).steps == CONFIG.steps, "the thread that holds it may go on"
        assert (tmp_path / LOCK).exists()
    assert len(errors) == 1 and "another thread of this process" in errors[0]
    assert not (tmp_path / LOCK).exists()
    run(tmp_path, resume=False)


@needs_fork
def test_of_many_starts_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    gone = fork(lambda: 0)
    os.waitpid(gone, 0)
    for start in range(10):  # also where a dead process's lock is to be taken over
        go, write = os.pipe()
        refused, tell = os.pipe()
        name_in_lock(tmp_path, pid=gone)

        def attempt(go: int = go, refused: int = refused, tell: int = tell) -> int:
            os.read(go, 1)
            try:
                with locked(tmp_path):
                    for _ in range(5):  # it stays inside until every other one has tried
                        assert select.select([refused], [], [], 60)[0]
                        os.read(refused, 1)
            except OutputError:
                os.write(tell, b"x")
                return 2
            return 0

        children = [fork(attempt) for _ in range(6)]
        os.write(write, b"x" * 6)
        assert sorted(exit_status(child) for child in children) == [0, 2, 2, 2, 2, 2], start


def test_partial_files_have_names_of_their_own(tmp_path: Path) -> None:
    """Two threads that write one file: the last one wins, whole."""
    inside, names = threading.Barrier(2), []

    def write(text: str) -> None:
        with replacing(tmp_path / "a") as partial:
            names.append(partial)
            partial.write_text(text)
            inside.wait(10)
            assert partial.read_text() == text
            inside.wait(10)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 2 and (tmp_path / "a").read_text() in ("one", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598\nmore"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, first: bool
) -> None:
    original, calls = torch.save, []

    def save(state: Any, file: Any) -> None:
        calls.append(1)
        if first or len(calls) > 1:
            file.write(b"half of it")
            raise error
        original(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module.torch, "save", save)
        with pytest.raises(OutputError) as caught:
            run(tmp_path)
    said = str(caught.value)
    assert "cannot write" in said and "checkpoint.pt" in said and "MiB are free" in said and "\n" not in said
    assert ("The checkpoint before it is kept" in said) == (not first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv"][first:]
    assert run(tmp_path).steps == CONFIG.steps


@pytest.mark.parametrize("name", ["metrics.csv", "last.safetensors", "checkpoint.pt"])
def test_a_folder_in_a_files_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for resume in (True, False):
        with pytest.raises((OutputError, CheckpointError), match=f"{name}"):
            run(tmp_path, resume=resume)


@needs_fork
@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint.pt"])
def test_a_named_pipe_does_not_hang(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((OutputError, CheckpointError), match=f"{name} is not a file: remove it"):
        run(tmp_path)


CUTS = {
    "zero bytes at the end": lambda rows: [*rows[:5], b"\0" * 4096],
    "zero bytes over a row": lambda rows: [*rows[:3], b"\0" * len(rows[3]), *rows[4:]],
    "zero bytes over the header": lambda rows: [b"\0" * len(rows[0]), *rows[1:]],
    "only zero bytes": lambda rows: [b"\0" * 512],
    "half a line": lambda rows: [*rows[:4], rows[4][:9]],
    "half a number": lambda rows: [*rows[:4], b"4,0.1,1e-"],
    "not text": lambda rows: [*rows[:4], b"\xff\xfe\x80\n"],
    "a quote": lambda rows: [*rows[:4], b'"4,0.3\n'],
    "nothing": lambda rows: [],
    "a line twice": lambda rows: [*rows[:4], *rows[2:]],
}


@pytest.mark.parametrize("cut", CUTS)
def test_curves_damaged_by_a_power_cut_do_not_block(tmp_path: Path, cut: str) -> None:
    whole = run(tmp_path / "whole")
    folder = tmp_path / "cut"
    stopped(folder, after=5)
    path = folder / "metrics.csv"
    path.write_bytes(b"".join(CUTS[cut](path.read_bytes().splitlines(keepends=True))))
    result = run(folder)
    steps = [row["step"] for row in result.history]
    assert steps == sorted(set(steps)) and steps[-2:] == [5, 6]
    expected = {row["step"]: row["loss"] for row in whole.history}
    assert all(row["loss"] == expected[row["step"]] for row in result.history if "loss" in row)
    text = path.read_text()
    assert text.startswith("step,loss") and "\0" not in text and len(text.splitlines()) == 1 + len(steps)


def stopped(folder: Path, after: int) -> None:
    """A run that broke off in the step after ``after``, with the checkpoint of the even step before."""

    class Breaks(TensorDataset):
        seen = 0

        def __getitem__(self, index: int) -> Any:
            Breaks.seen += 1
            if Breaks.seen > after * CONFIG.batch_size:
                raise ZeroDivisionError
            return super().__getitem__(index)

    with pytest.raises(ZeroDivisionError):
        train(micro_vit(), Breaks(*images().tensors), None, CONFIG, out_dir=folder, progress=False)


def changed(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The checkpoint with the entry ``a/b/c`` replaced, or removed where ``value`` is `GONE`."""
    *way, last = path.split("/")
    at: Any = state
    for step in way:
        at = at[int(step) if isinstance(at, (list, tuple)) or (isinstance(at, dict) and 0 in at) else step]
    if value is GONE:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return state


GONE = object()
NAN = float("nan")
MALFORMED: list[tuple[str, Any]] = [
    *[("run/step", value) for value in (10**6, -1, NAN, 2.5, "4", True, None, [4], torch.tensor(4))],
    *[("run/tail_sum", value) for value in (NAN, "x", None)],
    *[("run/tail_count", value) for value in (-1, 10**9, 0.5)],
    ("run/val_accuracy", "good"),
    ("run/seconds", "long"),
    ("run/unknown", 1),
    ("run/step", GONE),
    ("run/tail_sum", GONE),
    *[(name, GONE) for name in ("run", "model", "optimiser", "random", "fingerprint", "ema")],
    *[(name, 7) for name in ("run", "model", "optimiser", "random", "fingerprint", "sample")],
    *[("fingerprint", text) for text in ("", "{", "[]", "7", "null")],
    ("model/head.weight", torch.zeros(5, 8)),
    ("model/head.weight", torch.full((4, 8), NAN)),
    ("model/head.weight", torch.zeros(4, 8, dtype=torch.int64)),
    ("model/head.weight", "weights"),
    ("model/head.weight", GONE),
    ("model/unknown", torch.zeros(1)),
    ("optimiser/state", []),
    ("optimiser/state/0", {}),
    ("optimiser/state/0/exp_avg", torch.zeros(1)),
    ("optimiser/state/0/exp_avg", torch.full((8,), NAN)),
    ("optimiser/state/0/step", "four"),
    ("optimiser/param_groups", []),
    ("optimiser/param_groups/0/params", [0]),
    ("optimiser/state", GONE),
    ("ema/module.head.weight", torch.zeros(1)),
    ("ema/module.head.weight", torch.full((4, 8), NAN)),
    ("ema", None),
    ("ema", {}),
    ("random", []),
    ("random", [None]),
    ("random", [{}]),
    ("random/0/python", (3, (1, 2), None)),
    ("random/0/torch", torch.zeros(3, dtype=torch.uint8)),
    ("random/0/torch", GONE),
    ("random/0/numpy", "MT19937"),
    ("sample", {}),
    ("sample", None),
    ("sample/values", torch.zeros(2, 2)),
    ("sample/labels", "cat"),
    ("sample/shape", None),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    stopped_config = replace(CONFIG, ema_decay=0.9)
    run(folder, stopped_config)
    return folder / "checkpoint.pt"


@pytest.mark.parametrize("number", range(len(MALFORMED)), ids=lambda n: f"{MALFORMED[n][0]}-{n}")
def test_malformed_content_is_refused(tmp_path: Path, good: Path, number: int) -> None:
    """Files that torch.load reads without complaint, as another program or a bad disk might leave them."""
    path, value = MALFORMED[number]
    state = torch.load(good, weights_only=True)
    if path == "optimiser/state/0/exp_avg" and value.isnan().any():
        value = torch.full_like(state["optimiser"]["state"][0]["exp_avg"], NAN)
    torch.save(changed(state, path, value), tmp_path / "checkpoint.pt")
    model = micro_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt .*(delete it|resume=False)"):
        run(tmp_path, replace(CONFIG, ema_decay=0.9), model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "left as it was"
    assert run(tmp_path, replace(CONFIG, ema_decay=0.9), resume=False).steps == CONFIG.steps


@pytest.mark.parametrize("content", [7, "text", None, [], torch.zeros(3), {}])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"is damaged .*resume=False"):
        run(tmp_path)


def test_a_malformed_checkpoint_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    torch.save({"run": {"step": 10**6}}, tmp_path / "checkpoint.pt")
    assert main([*SMOKE, str(tmp_path)]) == 2
    assert "error: the checkpoint" in capsys.readouterr().err


def test_settings_of_the_optimiser_come_from_the_recipe(tmp_path: Path) -> None:
    """A checkpoint whose optimiser has another weight decay or betas does not bring them in without a word."""
    whole = micro_vit()
    run(tmp_path / "whole", model=whole)
    stopped(tmp_path / "cut", after=5)
    state = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=True)
    for group in state["optimiser"]["param_groups"]:
        group.update(weight_decay=100.0, betas=(0.0, 0.0), eps=1.0)
    torch.save(state, tmp_path / "cut/checkpoint.pt")
    model = micro_vit()
    run(tmp_path / "cut", model=model)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values()))
