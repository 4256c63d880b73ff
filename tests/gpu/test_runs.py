"""Workers, budgets, tables, a training step, and the whole of ``python -m benchmarks.gpu`` at small size."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import deit, planted, targets
from benchmarks.gpu.engine import Engine, Mode
from benchmarks.gpu.plan import Clock, Plan, Table
from benchmarks.gpu.runs import Kind, evaluate, follow, state_of
from benchmarks.gpu.workers import each
from svit_utils.attention import learnable_thresholds, sparse_modules
from svit_utils.files import read_rows
from svit_utils.models import create_model
from svit_utils.paths import repo_root
from svit_utils.training import TrainConfig
from svit_utils.training.recipe import distinct_thresholds, param_groups, set_tau_share
from svit_utils.training.schedules import lr_factor, tau_factor


def work(item: int) -> int:
    """For other processes: twice the number; 3 ends its process, 4 raises, 5 takes its time."""
    if item == 3:
        os._exit(7)
    if item == 4:
        raise ValueError("four")
    if item == 5:
        time.sleep(60)
    return 2 * item


@pytest.mark.parametrize("processes", [1, 2])
def test_each(processes):
    items = [1, 2, 4, 6] if processes == 1 else [1, 2, 3, 4, 6]
    found = {outcome.item: outcome for outcome in each(work, items, processes, Clock(900))}  # enough on a busy machine
    assert {item: found[item].result for item in items} == {i: None if i in (3, 4) else 2 * i for i in items}
    assert "ValueError: four" in found[4].error
    assert processes == 1 or found[3].error == "the process died with exit code 7"


def test_the_clock_ends_what_is_under_way():
    started = time.monotonic()
    assert [outcome.item for outcome in each(work, [1, 5], 2, Clock(20))] in ([1], [])
    assert time.monotonic() - started < 40
    assert list(each(work, [1, 2], 1, Clock(-1))) == []
    assert [o.item for o in each(work, [4, 1], 1, Clock(9), stop_early=True)] == [4]


def plan(tmp_path, **changes) -> Plan:
    return replace(Plan("cpu", tmp_path), **changes)


def test_tables_grow_row_by_row_and_say_where_they_come_from(tmp_path):
    table = Table(tmp_path / "train.csv", plan(tmp_path))
    table.add({"name": "a", "correct": "ff"}, seed=3)
    again = Table(tmp_path / "train.csv", plan(tmp_path))
    again.add({"name": "b", "more": 1})
    rows = read_rows(tmp_path / "train.csv")
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["seed"] == "3"
    assert rows[1]["torch"] and {"device", "driver", "triton", "timm", "commit"} <= set(rows[1])
    assert list(rows[0])[-1] == "correct"
    assert again.has(name="a") and again.has(name="b", more=1) and not again.has(name="c")


def small(kind: Kind) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind.put_into(create_model("small_vit", img_size=16, depth=2))


KINDS = [Kind("dense"), Kind("fixed", 0.05), Kind("learnt", 0.05, learnable=True), Kind("k", k=4)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_plain_loop_and_a_restart_forgets(kind):
    config = TrainConfig(steps=4, batch_size=4, lr=1e-3, warmup_steps=1, tau_warmup_steps=2 if kind.tau else 0)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16, generator=g), torch.arange(4)) for _ in range(4)]
    engine = Engine(small(kind), (4, 3, 16, 16), config, Mode(compile=False, graph=False))
    state = state_of(small(kind))
    found = []
    for _ in range(2):
        engine.restart(state)
        for at, (images, labels) in enumerate(batches):
            engine.step(images, labels, at, config)
        found.append(state_of(engine.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in state)

    model = small(kind).train()
    optimiser = torch.optim.AdamW(param_groups(model, config), lr=config.lr, fused=True)
    for at, (images, labels) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * lr_factor(at, 4, 1)
        set_tau_share(distinct_thresholds(model), tau_factor(at, config.tau_warmup_steps))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    for name, value in model.state_dict().items():
        kept = torch.ones(len(value), dtype=torch.bool) if value.ndim else ...
        if name.endswith("qkv.bias"):  # the keys' bias has gradient 0, and AdamW makes steps of its rounding
            kept[len(value) // 3 : 2 * len(value) // 3] = False
        torch.testing.assert_close(found[0][name][kept], value[kept], rtol=1e-4, atol=1e-5, msg=name)


def test_one_engine_serves_every_fixed_tau():
    model = small(Kind("fixed", 0.05))
    Kind("other", 0.2).set(model)
    assert [float(m.threshold.tau) for m in sparse_modules(model).values()] == pytest.approx([0.2, 0.2])
    learned = small(Kind("learnt", 0.05, learnable=True))
    Kind("learnt", 0.3, learnable=True).set(learned)  # comes with the weights instead
    assert [float(t.tau.detach()) for t in learnable_thresholds(learned).values()] == pytest.approx([0.05, 0.05])


def test_a_run_can_be_repeated_and_its_curve_ends_at_its_last_step(tmp_path):
    data = deit.load(plan(tmp_path))
    assert data is not None and "PlantedShapes" in data.source
    config = TrainConfig(steps=6, batch_size=8, lr=1e-3, seed=1)
    engine = Engine(create_model("small_vit", img_size=32, depth=1), (8, 3, 32, 32), config, Mode(False, False))
    state, found = state_of(engine.model), []
    for _ in range(2):
        engine.restart(state)
        row, curve = follow(engine, data, config, "r", {3, 6})
        found.append((row["train_loss"], row["test_loss"], row["correct"]))
    assert found[0] == found[1]
    assert [point["step"] for point in curve] == [3, 6] and curve[-1]["epoch"] == 1.0
    right, loss = evaluate(engine, data.test, batch=7)
    assert (round(float(right.float().mean()), 4), round(loss, 4)) == (row["test_accuracy"], row["test_loss"])


def test_the_plan_of_the_runs(tmp_path):
    names = [run.name for run in deit.planned()]
    assert names[:4] == [f"dense-lr3e-04-seed{s}" for s in (0, 1, 2)] + ["tau0.01-lr3e-04-seed0"]
    assert len(names) == len(set(names)) == 24 and names[12].startswith("tau0.005") and "learnt" in names[-1]
    config = deit.recipe(Plan("cuda", tmp_path), deit.planned()[3], 9000)
    assert (config.steps, config.tau_warmup_steps, config.batch_size) == (4 * 562, 2 * 562, 16)
    assert sorted(deit.half_epochs(config, 9000)) == [281 * i for i in range(1, 9)]
    table = Table(tmp_path / "train.csv", Plan("cuda", tmp_path))
    assert len(list(planted.planned(table.plan, table))) == 15
    table.rows = [{"experiment": "planted", "kind": "tau0.01", "applied_sparsity": "0.9"}]
    last = list(planted.planned(table.plan, table))[-1]
    assert last == (Kind("top-k", k=20), 4)


def test_targets_say_what_was_not_measured(tmp_path):
    assert {row["met"] for row in targets.rows(tmp_path)} == {"not measured"}
    table = Table(tmp_path / "attention.csv", Plan("cuda", tmp_path))
    common = {"variant": "triton", "logits": "clustered", "tiles_visited": 0.22}
    table.add({**common, "n": 197, "direction": "forward", "ratio_to_sdpa": 1.2})
    table.add({**common, "n": 4097, "direction": "forward", "ratio_to_sdpa": 1.1})
    table.add({**common, "n": 4097, "direction": "forward+backward", "ratio_to_sdpa": 1.5})
    found = {row["target"]: row["met"] for row in targets.rows(tmp_path)}
    assert [found[name] for name in found][:4] == ["yes", "yes", "no", "yes"]


@pytest.mark.slow
def test_everything_at_small_size(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("PARTS", None)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repo_root(), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = ("prove", "card", "attention", "vit", "throughput", "train", "curves", "targets")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv" for name in names}
    tables = {name: read_rows(tmp_path / f"{name}.csv") for name in names}
    for rows in tables.values():
        assert rows and all(row["size"] == "small" and row["torch"] and row["device"] for row in rows)
    assert {row["passed"] for row in tables["prove"]} <= {"True", ""}
    assert [row["kind"] for row in tables["train"]] == [
        *("dense", "tau0.01", "tau0.005", "learnt-per-layer"),
        *("dense", "tau0.01", "tau0.005", "top-k"),
    ]
    assert all(row["attention_average_precision"] for row in tables["train"] if row["experiment"] == "planted")
    assert {row["met"] for row in tables["targets"]} == {"rehearsal", "not measured"}
    again = subprocess.run(
        [*command, "--parts", "train"], cwd=repo_root(), env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and again.stdout.count("recorded already") == 8


def test_what_the_command_line_refuses(tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.gpu", *options]
        return subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, check=False)

    wrong = run("--parts", "prove,fly")
    assert wrong.returncode == 2 and "unknown part fly" in wrong.stderr
    if not torch.cuda.is_available():
        missing = run("--device", "cuda", "--parts", "prove", "--out", str(tmp_path))
        assert missing.returncode == 2 and "DEVICE=cpu" in missing.stderr
