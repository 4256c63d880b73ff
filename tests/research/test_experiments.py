"""Recorded experiments: what they write and skip, what a check finds, and that the plan is what was recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from research import check as check_module
from research import training as training_module
from research.__main__ import main
from research.plans import EXPERIMENTS, PLANTED, Experiment, Run, changed, get_experiment, planned_rows
from research.training import run_experiment, stages
from svit_utils.files import read_rows, write_rows
from svit_utils.paths import results_dir
from svit_utils.records import pack, planned_runs, unpack

MICRO = changed(PLANTED, start="scratch", steps=2, batch_size=2, warmup_steps=1, val_images=4, test_images=9)
EXPERIMENT = Experiment(
    "micro",
    "For this test",
    (
        Run("dense", "dense", MICRO, save_as="micro_dense", curriculum=(1,)),
        Run("sparse", "warmup", changed(MICRO, threshold=0.0052, tau_warmup_steps=1)),
        Run("other-seed", "dense", changed(MICRO, seed=1)),
    ),
    accuracy_band=0.0,
    loss_band=1e-4,
)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything an experiment writes goes here."""
    monkeypatch.setattr(training_module, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(training_module, "checkpoints_dir", lambda: tmp_path / "checkpoints")
    monkeypatch.setattr(training_module, "results_dir", lambda: tmp_path / "results")
    return tmp_path


def without(row: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in row.items() if name not in names}


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = training_module.train_run

    def counted(experiment: Experiment, run: Run, **options: Any) -> Any:
        calls.append(f"{run.name}/{options['size']}")
        return original(experiment, run, **options)

    monkeypatch.setattr(training_module, "train_run", counted)
    return calls


def test_an_experiment_leaves_rows_bits_and_the_checkpoint(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_runs(monkeypatch)
    path = run_experiment(EXPERIMENT, only=["sparse"])  # a later run first
    of_sparse = ["sparse/full", "sparse/small"]
    assert path == repo / "results" / "micro.csv" and calls == of_sparse
    run_experiment(EXPERIMENT)
    assert calls == [*of_sparse, "dense/full", "dense/small", "other-seed/full"], "what is recorded is not run again"
    run_experiment(EXPERIMENT)
    assert len(calls) == 5
    run_experiment(EXPERIMENT, only=["sparse"], repeat=True)
    assert calls[5:] == of_sparse, "unless it is asked for"

    rows = read_rows(path)
    both = [(name, size) for name in ("dense", "sparse") for size in ("full", "small")]
    named = [*both, ("other-seed", "full")]
    assert [(row["name"], row["size"]) for row in rows] == named
    dense, _, sparse, _, other = rows
    assert dense["threshold"] == "" and dense["cut_sparsity"] == ""
    assert sparse["threshold"] == "0.0052" and 0 < float(sparse["cut_sparsity"]) < 1
    assert dense["seed"] == "0" and other["seed"] == "1" and dense["test_loss"] != other["test_loss"]
    assert all(row["torch"] and row["commit"] is not None and row["device"] for row in rows)

    bits = read_rows(path.with_name("micro_correct.csv"))
    assert [(b["name"], b["size"]) for b in bits] == named
    for row, b in zip(rows, bits):
        correct = unpack(b["correct"], int(b["n"]))
        assert len(correct) == int(b["n"]) == 9
        assert round(float(correct.mean()), 4) == float(row["test_accuracy"])

    with safe_open(repo / "checkpoints" / "micro_dense.safetensors", framework="pt") as file:
        card = file.metadata()
    assert card["test_accuracy"] == dense["test_accuracy"] and card["steps"] == "2" and card["seed"] == "0"
    assert [p.name for p in (repo / "checkpoints").iterdir()] == ["micro_dense.safetensors"], "none of the small row"


def test_a_row_of_a_run_that_is_no_longer_planned_is_kept(repo: Path) -> None:
    path = run_experiment(EXPERIMENT, only=["sparse"])
    renamed = replace(EXPERIMENT, runs=(replace(EXPERIMENT.runs[1], name="renamed"),))
    run_experiment(renamed)
    assert [row["name"] for row in read_rows(path)] == ["renamed", "renamed", "sparse", "sparse"]


def test_columns_that_came_later_are_filled_from_the_plan_in_older_rows(repo: Path) -> None:
    path = run_experiment(EXPERIMENT, only=["sparse"])
    rows = read_rows(path)
    later = ("rho", "alternative")
    write_rows(path, [name for name in rows[0] if name not in later], [without(row, *later) for row in rows])
    (repo / "build" / "experiments" / "micro" / "rows" / "sparse-full.json").unlink()  # as after `make clean`
    run_experiment(EXPERIMENT, only=["other-seed"])
    assert [row["name"] for row in read_rows(path)] == ["sparse", "sparse", "other-seed"]
    assert read_rows(path)[:2] == rows and list(read_rows(path)[0]) == list(rows[0])


def test_unknown_names_are_refused(repo: Path) -> None:
    with pytest.raises(ValueError, match="micro has no run absent; it has dense, sparse, other-seed"):
        run_experiment(EXPERIMENT, only=["absent"])
    with pytest.raises(ValueError, match="unknown experiment 'absent'; known are planted_start"):
        get_experiment("absent")


def test_a_check_reruns_the_small_row_and_sees_a_change(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repo / "results"

    def passed() -> list[tuple[str, bool | None]]:
        return [(check.run, check.passed) for check in check_module.check_experiment(EXPERIMENT, folder=folder)]

    assert passed() == [("dense", None), ("sparse", None)]
    path = run_experiment(EXPERIMENT, only=["dense"])
    assert passed() == [("dense", True), ("sparse", None)]
    small = read_rows(path)[1]
    path.write_text(path.read_text().replace(small["test_loss"], str(float(small["test_loss"]) + 0.01)))
    found = check_module.check_experiment(EXPERIMENT, folder=folder)[0]
    assert found.passed is False and "test_loss" in found.message


def test_a_check_compares_every_column_that_both_have(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repo / "results"
    path = run_experiment(EXPERIMENT, only=["dense", "sparse"])
    rows = read_rows(path)
    recorded = next(row for row in rows if (row["name"], row["size"]) == ("sparse", "small"))
    now = {**recorded, "seconds": 0.0, "commit": "another", "later": 1}  # neither is compared
    monkeypatch.setattr(check_module, "train_run", lambda *_, **__: (now, None))

    def check(**changes: str) -> check_module.Check:
        write_rows(path, rows[0], [{**row, **changes} if row is recorded else row for row in rows])
        return check_module.check_experiment(EXPERIMENT, folder=folder)[1]

    assert check().passed is True
    measured = {"train_loss", "val_accuracy", "test_accuracy", "test_loss", *training_module.SPARSITY}
    bands = check_module.bands(EXPERIMENT, now)
    assert set(bands) == measured
    for name, value in recorded.items():
        if name in ("name", "size"):  # they say which row it is
            continue
        if name in check_module.ORIGIN:
            assert check(**{name: "other"}).passed is True, name
            continue
        outside = str(float(value) + 1.01 * bands[name] + 1e-9) if name in measured else f"{value}0"
        found = check(**{name: outside})
        assert found.passed is False and f"{name} {value} (recorded {outside}" in found.message, name
        assert (value == "") or check(**{name: ""}).passed is False, name
        assert name not in measured or check(**{name: str(float(value) + 0.99 * bands[name])}).passed is True, name


def test_a_sparse_run_of_every_file_is_repeated() -> None:
    assert [run.name for run in EXPERIMENT.repeated] == ["dense", "sparse"]
    for experiment in EXPERIMENTS.values():
        kinds = {run.kind for run in experiment.runs} - {"dense"}
        repeated = experiment.repeated
        assert repeated[0] is experiment.runs[0] and len(repeated) <= 2
        assert any(run.kind != "dense" for run in repeated) == bool(kinds), experiment.name
        rows = read_rows(results_dir() / f"{experiment.name}.csv")
        small = [row["name"] for row in rows if row["size"] == "small"]
        assert small == [run.name for run in repeated], f"`python -m research experiment {experiment.name}`"
        cut = [row["cut_sparsity"] != "" for row in rows if row["size"] == "small"]
        assert cut == [run.kind != "dense" for run in repeated]


def test_bits_survive_packing() -> None:
    generator = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 2000):
        correct = generator.random(n) < 0.5
        assert len(pack(correct)) == 2 * -(-n // 8)
        np.testing.assert_array_equal(unpack(pack(correct), n), correct)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_experiments_are_sound(experiment: Experiment) -> None:
    names = [run.name for run in experiment.runs]
    assert len(set(names)) == len(names)
    for run in experiment.runs:
        small = run.small()
        full, columns = run.columns(), small.columns()
        assert columns["steps"] <= 4 and columns["test_images"] <= 100
        assert columns["save_as"] is None and not columns["compile"]
        same = ("name", "data", "model", "start", "threshold", "tau_warmup", "empty_rows", "lr", "seed")
        assert all(columns[key] == full[key] for key in same), "only the size differs"
        for size in (run, small):
            parts = stages(size, None)  # type: ignore[arg-type]
            assert [config.steps for config, _ in parts] == [*size.curriculum, size.profile.config.steps]
        json.dumps(full)


def test_a_kind_goes_with_its_warm_up_and_normaliser() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of dense, sparse, warmup, hard_cut, .*, got 'relu'"):
        Run("a", "relu", MICRO)
    for kind in ("dense", "sparse"):
        with pytest.raises(ValueError, match=f"a: tau_warmup_steps does not go with the kind '{kind}'"):
            Run("a", kind, changed(MICRO, tau_warmup_steps=1))
    with pytest.raises(ValueError, match="tau_warmup_steps does not go with the kind 'warmup'"):
        Run("a", "warmup", MICRO)
    with pytest.raises(ValueError, match="`learned` goes with the kind 'learned'"):
        Run("a", "learned", MICRO)
    for kind, normaliser in (("top_k", "entmax15"), ("sparse", "topk"), ("hard_cut", "thresholded")):
        with pytest.raises(ValueError, match=f"a: the kind '{kind}' has another normaliser than the profile"):
            Run("a", kind, changed(MICRO, normaliser=normaliser))


def as_text(columns: dict[str, Any]) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in columns.items()}


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_what_is_planned_is_what_was_recorded(experiment: Experiment) -> None:
    runs = {run.name: run for run in experiment.runs}
    rows = read_rows(results_dir() / f"{experiment.name}.csv")
    assert {row["name"] for row in rows if row["size"] == "full"} == set(runs)
    for row in rows:
        run = runs[row["name"]] if row["size"] == "full" else runs[row["name"]].small()
        planned = as_text(run.columns())
        recorded = {name: value for name, value in row.items() if name in planned}
        assert list(recorded) == [name for name in planned if name in recorded], "the same columns, in the same order"
        assert recorded == {name: planned[name] for name in recorded}


def test_the_table_of_what_is_planned_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--out", str(tmp_path)]) == 0
    written = tmp_path / "planned.csv"
    assert capsys.readouterr().out == f"{written}\n"
    assert (results_dir() / "planned.csv").read_bytes() == written.read_bytes(), "run `python -m research plan`"
    assert [row for name in EXPERIMENTS for row in planned_runs(name)] == [as_text(row) for row in planned_rows()]
    assert [run["name"] for run in planned_runs("planted_start")] == ["start", "start-continued"]
    with pytest.raises(ValueError, match="unknown experiment 'absent'; planned are: planted_start, "):
        planned_runs("absent")
    with pytest.raises(ValueError, match="planned are: none"):
        planned_runs("study", tmp_path / "absent")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("experiment absent", "unknown experiment 'absent'; known are planted_start, "),
        ("experiment planted_pairs --runs absent", "planted_pairs has no run absent; it has dense-seed0, "),
        ("experiment --runs dense", "--runs needs the name of an experiment"),
        ("experiment planted_pairs --threads 0", "--threads must be at least 1, got 0"),
        ("study --profile absent", "unknown study 'absent': allowed are 'full', 'deit', 'smoke'"),
        ("study --parts absent", "unknown part absent: allowed are train, localisation, "),
        ("study --runs absent", "unknown run absent: allowed are dense-rho0-seed0, "),
        ("study --jobs 0", "jobs must be at least 1, got 0"),
        ("study --out somewhere", "--out goes with --tables only"),
    ],
)
def test_bad_options_end_with_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1 and printed.out == ""


def test_the_commands_are_listed_without_importing_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{experiment.name}: {experiment.title}\n" in listed for experiment in EXPERIMENTS.values())
    for bad in ([], ["absent"]):
        with pytest.raises(SystemExit) as caught:
            main(bad)
        assert caught.value.code == 2
    quick = """import sys; from research.__main__ import main
try: main(["--help"])
finally: assert "torch" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and all(name in found.stdout for name in ("experiment", "study", "plan"))
