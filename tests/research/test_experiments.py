"""Recorded experiments: what a design writes, what it skips, and what a check of it finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from research import DESIGNS, Arm, Design, get_design, run_design
from research import check as check_module
from research import run as run_module
from svit_utils.files import read_rows
from svit_utils.records import pack, unpack

MICRO = Arm("", start="scratch", steps=2, batch_size=2, warmup=1, precision="fp32", val_images=4, test_images=9)
DESIGN = Design(
    "micro",
    "For this test",
    (
        replace(MICRO, name="dense", save_as="micro_dense", curriculum=(1,)),
        replace(MICRO, name="sparse", threshold=0.0052, tau_warmup=0.5),
        replace(MICRO, name="other-seed", seed=1),
    ),
    accuracy_band=0.0,
    loss_band=1e-4,
)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything an experiment writes goes here."""
    monkeypatch.setattr(run_module, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(run_module, "checkpoints_dir", lambda: tmp_path / "checkpoints")
    monkeypatch.setattr(run_module, "results_dir", lambda: tmp_path / "results")
    return tmp_path


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = run_module.run_arm

    def counted(design: Design, arm: Arm, **options: Any) -> Any:
        calls.append(f"{arm.name}/{options['size']}")
        return original(design, arm, **options)

    monkeypatch.setattr(run_module, "run_arm", counted)
    return calls


def test_a_design_leaves_rows_bits_and_the_checkpoint(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_runs(monkeypatch)
    path = run_design(DESIGN, only=["sparse"])  # a later arm first
    assert path == repo / "results" / "micro.csv" and calls == ["sparse/full"]
    run_design(DESIGN)
    assert calls == ["sparse/full", "dense/full", "dense/small", "other-seed/full"], "what is recorded is not run again"
    run_design(DESIGN)
    assert len(calls) == 4
    run_design(DESIGN, only=["sparse"], anew=True)
    assert calls[4:] == ["sparse/full"], "unless it is asked for"

    rows = read_rows(path)
    named = [("dense", "full"), ("dense", "small"), ("sparse", "full"), ("other-seed", "full")]
    assert [(row["name"], row["size"]) for row in rows] == named
    dense, _, sparse, other = rows
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


def test_a_row_that_the_design_no_longer_has_is_kept(repo: Path) -> None:
    path = run_design(DESIGN, only=["sparse"])
    renamed = replace(DESIGN, arms=(replace(DESIGN.arms[1], name="renamed"),))
    run_design(renamed)
    assert [row["name"] for row in read_rows(path)] == ["renamed", "renamed", "sparse"]


def test_unknown_names_are_refused(repo: Path) -> None:
    with pytest.raises(ValueError, match="micro has no arm absent; it has dense, sparse, other-seed"):
        run_design(DESIGN, only=["absent"])
    with pytest.raises(ValueError, match="unknown experiment 'absent'; known are planted_start"):
        get_design("absent")


def test_a_check_reruns_the_small_row_and_sees_a_change(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repo / "results"
    assert check_module.check_design(DESIGN, folder=folder).passed is None
    path = run_design(DESIGN, only=["dense"])
    assert check_module.check_design(DESIGN, folder=folder).passed is True
    small = read_rows(path)[1]
    path.write_text(path.read_text().replace(small["test_loss"], str(float(small["test_loss"]) + 0.01)))
    found = check_module.check_design(DESIGN, folder=folder)
    assert found.passed is False and "test_loss" in found.message


def test_bits_survive_packing() -> None:
    generator = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 2000):
        correct = generator.random(n) < 0.5
        assert len(pack(correct)) == 2 * -(-n // 8)
        np.testing.assert_array_equal(unpack(pack(correct), n), correct)


@pytest.mark.parametrize("design", DESIGNS.values(), ids=lambda design: design.name)
def test_designs_are_sound(design: Design) -> None:
    names = [arm.name for arm in design.arms]
    assert len(set(names)) == len(names)
    for arm in design.arms:
        small = arm.small()
        assert small.steps <= 4 and small.test_images <= 100 and small.save_as is None and not small.compile
        same = ("name", "data", "model", "start", "threshold", "tau_warmup", "empty_rows", "lr", "seed")
        assert all(getattr(small, key) == getattr(arm, key) for key in same), "only the size differs"
        for size in (arm, small):
            for steps in (*size.curriculum, size.steps):
                run_module._config(size, steps)  # the recipe is accepted
        json.dumps(arm.__dict__)
