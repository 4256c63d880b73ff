"""The study: which cells it has, what it writes, that it resumes, and that its tables follow from what is recorded."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.study import get_study, run_study
from research.study import run as run_module
from research.study.parts import PARTS, Scores
from research.study.profiles import StudyProfile
from research.study.run import arm_kind, belongs, read_images, write_images
from research.study.tables import LOCALISATION, contrast_table, contrasts, write_tables
from svit_utils.files import read_rows
from svit_utils.paths import results_dir
from svit_utils.records import verdict

FULL = get_study("full")
STUDY = results_dir() / "study"


def test_the_design_is_the_plans() -> None:
    kinds = [(arm_kind(arm), arm.rho, arm.seed) for arm in FULL.design.arms]
    assert len(kinds) == len(set(kinds)) == 54
    main = {(kind, rho, seed) for kind in ("dense", "sparse", "warmup") for rho in (0.0, 0.9) for seed in range(5)}
    rest = {(k, rho, s) for k in ("hard_cut", "top_k", "entmax15", "sparsemax") for rho in (0.0, 0.9) for s in range(3)}
    assert set(kinds) == main | rest
    recipes = {(a.steps, a.batch_size, a.lr, a.schedule, a.start, a.precision, a.empty_rows) for a in FULL.design.arms}
    assert recipes == {(150, 64, 5e-4, "cosine", "planted_dense_start", "bf16", "dense")}
    by_family: dict[str, int] = {}
    for contrast in contrasts():
        if contrast.judged:
            by_family[contrast.family] = by_family.get(contrast.family, 0) + 1
    assert by_family == {"localisation": 40, "faithfulness": 46, "accuracy": 2, "background": 12, "alternatives": 52}
    assert sum(belongs("faithfulness", arm) for arm in FULL.design.arms) == 15
    with pytest.raises(ValueError, match="unknown study 'large'"):
        get_study("large")


def test_images_come_back_and_the_bytes_do_not_depend_on_the_hour(tmp_path: Path) -> None:
    images = {"a:x": np.array([0.125, np.nan, 1.0]), "b:y": np.array([1e-7, 2.0])}
    write_images(tmp_path / "one.csv.gz", images)
    write_images(tmp_path / "two.csv.gz", images)
    assert (tmp_path / "one.csv.gz").read_bytes() == (tmp_path / "two.csv.gz").read_bytes()
    back = read_images(tmp_path / "one.csv.gz")
    np.testing.assert_array_equal(back["a:x"], images["a:x"])
    np.testing.assert_array_equal(back["b:y"], images["b:y"])


def small_study(tmp_path: Path) -> StudyProfile:
    smoke = get_study("smoke")
    arms = tuple(arm for arm in smoke.design.arms if arm.rho == 0 and arm_kind(arm) in ("dense", "sparse", "warmup"))
    return replace(smoke, design=replace(smoke.design, arms=arms), out=tmp_path / "study")


def record(profile: StudyProfile, shift: dict[str, float]) -> None:
    """Scores per image as a study would leave them: each kind's value, a little noise, the same for all maps."""
    for arm in profile.design.arms:
        rng = np.random.default_rng(arm.seed)
        images = {
            f"{name}:{metric}": shift[arm_kind(arm)] + 0.01 * rng.standard_normal(40)
            for name in ("attention", "rollout", "grad_cam", "attention_displayed", "rollout_displayed")
            for metric in LOCALISATION
        }
        write_images(profile.out / "images" / f"{arm.name}-localisation.csv.gz", images)


def test_a_planted_difference_is_found_with_its_sign_and_equal_arms_are_open(tmp_path: Path) -> None:
    smoke = small_study(tmp_path)
    arms = tuple(
        replace(arm, name=arm.name.replace("seed0", f"seed{seed}"), seed=seed)
        for arm in smoke.design.arms
        if arm.seed == 0
        for seed in range(5)
    )
    profile = replace(smoke, design=replace(smoke.design, arms=arms), resamples=10_000)
    record(profile, {"dense": 0.5, "sparse": 0.6, "warmup": 0.4})
    table = contrast_table(profile)
    judged = table[table["family"] == "localisation"]
    assert len(judged) == 40 and (judged["seeds"] == 5).all() and (judged["images"] == 40).all()
    assert set(judged[judged["first"] == "sparse"]["result"]) == {"higher"}
    assert set(judged[judged["first"] == "warmup"]["result"]) == {"lower"}
    assert ((judged["low"] <= judged["mean"]) & (judged["mean"] <= judged["high"])).all()
    assert (judged["p_holm"] >= judged["p"]).all()
    # The noise is the same in each arm, map by map: against its own map only the planted difference is left.
    own = judged[(judged["first"] == "sparse") & (judged["second"] == "dense")]
    assert len(own) == 12
    np.testing.assert_allclose(own["mean"], 0.1, atol=1e-4)  # four digits are stored
    record(profile, {"dense": 0.5, "sparse": 0.5, "warmup": 0.5})
    assert set(contrast_table(profile)["result"].replace("", "open")) == {"open"}


def test_the_rule_of_the_plan() -> None:
    assert verdict({"a": ["higher", "higher"], "b": ["open", "open"]}) == "holds"
    assert verdict({"a": ["higher", "open"], "b": ["open", "open"]}) == "open", "it has to beat the drawing too"
    assert verdict({"a": ["higher", "higher"], "b": ["lower", "open"]}) == "open"
    assert verdict({"a": ["open", "lower"], "b": ["open", "open"]}) == "does not hold"
    assert verdict({"a": ["lower"]}, {"a": "lower"}) == "holds"
    assert verdict({"a": ["open"]}) == "open"


def test_a_study_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = small_study(tmp_path)
    asked: list[tuple[str, ...]] = []
    stop_after = 3

    def each(work: Any, tasks: list[tuple[str, ...]], jobs: int, what: str, study: StudyProfile | None = None) -> None:
        del work, jobs, what
        for count, task in enumerate(tasks):
            if study is None:
                continue
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(task[1:])
            scores = Scores()
            scores.add("anything", count, map="attention")
            cell = {"cell": "/".join(task[1:]), "kind": "dense", "rho": 0.0, "seed": count, "part": task[1]}
            run_module._record(study, {**cell, "empty_rows": "dense", "commit": "abc"}, scores)

    monkeypatch.setattr(run_module, "_each", each)
    with pytest.raises(KeyboardInterrupt):
        run_study(profile)
    assert [row["cell"] for row in read_rows(profile.out / "cells.csv")] == ["/".join(task) for task in asked]
    first = list(asked)
    stop_after = 10_000
    run_study(profile)
    assert len(asked) == len(set(asked)), "no cell twice"
    assert asked[:3] == first
    expected = {(part, arm.name) for arm in profile.design.arms for part in PARTS if belongs(part, arm)}
    assert set(asked) == expected | {("localisation", "baselines")}
    (profile.out / "cells.csv").unlink()
    asked.clear()
    run_study(profile, parts=["background"], arms=["dense-rho0-seed0"])
    assert asked == [("background", "dense-rho0-seed0")]
    with pytest.raises(ValueError, match="unknown part speed"):
        run_study(profile, parts=["speed"])
    with pytest.raises(ValueError, match="unknown arm dense: allowed are dense-rho0-seed0"):
        run_study(profile, arms=["dense"])


@pytest.mark.skipif(not (STUDY / "cells.csv").is_file(), reason="the study is not recorded here")
def test_the_tables_of_deit_follow_too_and_one_seed_decides_nothing(tmp_path: Path) -> None:
    deit = get_study("deit")
    written = {path.name: path for path in write_tables(deit, tmp_path)}
    for name, path in written.items():
        assert path.read_bytes() == (deit.out / "tables" / name).read_bytes(), name
    with written["contrasts.csv"].open(newline="") as file:
        assert {(row["seeds"], row["result"]) for row in csv.DictReader(file)} == {("1", "open")}


def test_the_recorded_tables_follow_from_the_recorded_scores_byte_for_byte(tmp_path: Path) -> None:
    for path in write_tables(FULL, tmp_path):
        assert path.read_bytes() == (STUDY / "tables" / path.name).read_bytes(), f"run `make study-tables`: {path.name}"


@pytest.mark.skipif(not (STUDY / "cells.csv").is_file(), reason="the study is not recorded here")
def test_every_cell_says_where_it_comes_from() -> None:
    cells = read_rows(STUDY / "cells.csv")
    assert len(cells) > 50 and len({cell["cell"] for cell in cells}) == len(cells)
    for cell in cells:
        assert all(cell[key] for key in ("command", "torch", "timm", "device", "threads", "commit", "date")), cell[
            "cell"
        ]
        assert cell["dirty"] == "False", cell["cell"]
    with open(STUDY / "scores.csv", newline="", encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    assert {row["part"] for row in scores} == set(PARTS)
    assert all(np.isfinite(float(row["value"])) for row in scores if row["metric"] in LOCALISATION)
