"""Chapter 9 writes out the plan's rule and follows paths through layers; they are the package's.

What it says of the recorded tables is asserted there; what it no longer shows is asserted here.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from research.second.runs import PARTS
from research.zeros import reachability
from svit_utils.files import read_rows
from svit_utils.paths import results_dir
from svit_utils.records import planned_runs, run_rows, verdict
from svit_utils.referee import holm
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "09_the_study"
STUDY = results_dir() / "study"
PLANNED = {"dense": 5, "sparse": 5, "warmup": 5, "hard_cut": 3, "top_k": 3, "entmax15": 3, "sparsemax": 3}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("residual", [False, True])
def test_reached(residual: bool) -> None:
    by_hand = extract_function(CHAPTER, "reached", {"torch": torch})
    maps = [(2 * torch.randn(3, 2, 11, 11, generator=generator(layer)) - 3).relu() for layer in range(4)]
    by_layers = [float(reachability(maps[-depth:], residual)[-1, :, 0, 1:].double().mean()) for depth in range(1, 5)]
    got = by_hand(maps, residual=residual)
    assert got.tolist() == pytest.approx(by_layers, abs=1e-6) and 0 < by_layers[0] < 1
    # One row that fell back reaches everything, unless it is left out; then it is as if it read nothing.
    full = [layer.clone() for layer in maps]
    full[2][:, 0, 5] = 1.0
    empty = [layer.clone() for layer in maps]
    empty[2][:, 0, 5] = 0.0
    assert by_hand(full, 10, residual).tolist() == by_hand(empty, None, residual).tolist()


def test_verdict() -> None:
    by_hand = extract_function(CHAPTER, "verdict_by_hand")
    outcomes, good = ("higher", "lower", "open"), {"first": "higher", "second": "lower"}
    for four in itertools.product(outcomes, repeat=4):
        results = {"first": list(four[:2]), "second": list(four[2:])}
        assert by_hand(results, good) == verdict(results, good)


def test_the_second_plan_is_the_one_that_is_carried_out() -> None:
    """The chapter counts the plan's runs by part in the recorded table."""
    table = read_rows(results_dir() / "second" / "tables" / "progress.csv")
    written = {part: sum(int(row["planned"]) for row in table if row["part"] == part) for part in PARTS}
    assert written == {part: len(list(runs())) for part, runs in PARTS.items()}
    assert sum(written.values()) == 121


def study_table(name: str) -> pd.DataFrame:
    return pd.read_csv(STUDY / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])


def test_every_planned_run_is_recorded_and_scored() -> None:
    assert [row["name"] for row in planned_runs("study")] == list(run_rows("study"))
    means = study_table("means")
    measured = {"localisation": "energy_in_mask", "background": "accuracy", "sparsity": "tracker:cut_sparsity"}
    for part, metric in measured.items():
        these = means[(means["part"] == part) & (means["metric"] == metric) & (means["kind"] != "baselines")]
        seeds = these.groupby(["kind", "rho"])["seeds"].max().to_dict()
        assert seeds == {(kind, rho): n for kind, n in PLANNED.items() for rho in (0.0, 0.9)}, part
    faithful = means[(means["part"] == "faithfulness") & (means["metric"] == "deletion")]
    assert faithful.groupby("kind")["seeds"].max().to_dict() == {"dense": 5, "sparse": 5, "warmup": 5}


def test_results_follow_from_corrected_p_values() -> None:
    """Holm's correction within each family, then the plan's rule, give what the table says."""
    contrasts = study_table("contrasts")
    judged = contrasts[contrasts["p_holm"].notna()]
    for family, group in judged.groupby("family"):
        np.testing.assert_allclose(holm(group["p"]), group["p_holm"], rtol=2e-3)  # four digits are recorded
        decided = (group["p_holm"] < 0.05) & (group["mean"] != 0) & (group["seeds"] > 1)
        says = np.where(decided, np.where(group["mean"] > 0, "higher", "lower"), "open")
        doubtful = (group["p_holm"] - 0.05).abs() < 1e-4
        assert ((says == group["result"]) | doubtful).all(), family
    assert len(judged) == 152


def test_at_rho_09_nothing_is_above_the_drawing() -> None:
    """Described, not judged: the forty comparisons of localisation where grounds go with the class."""
    contrasts = study_table("contrasts")
    tempted = contrasts[contrasts["family"] == "at rho 0.9"]
    up = tempted[tempted["low"] > 0]
    assert len(tempted) == 40 and int((tempted["high"] < 0).sum()) == 31
    assert set(zip(up["map"], up["metric"], up["second"], strict=True)) == {("rollout", "energy_in_mask", "dense")}
    matched = contrasts[contrasts["family"] == "matched"]
    assert len(matched) == 4 and (matched["high"] < 0).all()  # also with as many keys as the sparse map


def test_known_levels_of_the_scores() -> None:
    """A uniform map has the object's share of the picture as its energy and as its average precision."""
    means = study_table("means")
    uniform = means[(means["kind"] == "baselines") & (means["map"] == "uniform")].set_index("metric")["mean"]
    assert uniform["energy_in_mask"] == pytest.approx(uniform["average_precision"], abs=1e-3)
    scores = pd.read_csv(STUDY / "scores.csv", dtype=str, keep_default_na=False)
    heads = scores[(scores["part"] == "localisation") & (scores["head"] != "")]
    assert heads["value"].astype(float).between(0, 1).all()
    floor = scores.loc[scores["metric"] == "null:all:observed:floor", "value"].astype(float)
    assert len(floor) and (floor - 98 / 197).abs().max() < 1e-6
