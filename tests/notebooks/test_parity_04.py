"""Chapter 4's own functions compute what the package computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from svit_utils.attention import TokenSparsityTracker, sparsify, thresholded_softmax
from svit_utils.models import create_model
from svit_utils.records import correct_by_run, run_rows
from svit_utils.referee import compare, mean_interval, paired_bootstrap, sparsity_floor
from svit_utils.referee.nulls import queries_and_keys
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "04"
SCOPE = {
    "math": math,
    "np": np,
    "torch": torch,
    "stats": stats,
    "Fraction": Fraction,
    "TAU": 0.01,
    "SimpleNamespace": SimpleNamespace,
    "thresholded_softmax": thresholded_softmax,
}


def taught(name: str, needs: tuple[str, ...] = ()) -> Callable:
    return extract_function(CHAPTER, name, SCOPE, needs=needs)


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    easy = rng.random(300) < 0.8
    return easy & (rng.random(300) < 0.95), easy & (rng.random(300) < 0.9)


@pytest.fixture
def model() -> torch.nn.Module:
    model = create_model("small_vit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight"):
                parameter *= 8  # sharp enough that rows are only partly cut
    return model.eval()


def test_paired_interval(answers: tuple[np.ndarray, np.ndarray]) -> None:
    own = taught("paired_interval")(*answers, resamples=2000, seed=3)
    package = paired_bootstrap(*answers, resamples=2000, seed=3)
    np.testing.assert_allclose(own, (package.mean, package.low, package.high), rtol=0, atol=1e-12)


def test_quick_interval_is_near_the_bootstrap(answers: tuple[np.ndarray, np.ndarray]) -> None:
    difference = answers[0].astype(float) - answers[1]
    package = mean_interval(difference)
    np.testing.assert_allclose(taught("image_interval")(difference), (package.low, package.high), atol=0.005)


def test_seed_interval_is_students() -> None:
    runs = np.array([0.01, 0.03, -0.01])
    expected = stats.t.interval(0.95, 2, loc=runs.mean(), scale=stats.sem(runs))
    np.testing.assert_allclose(taught("seed_interval")(runs), expected)


def test_crossed_interval_of_one_run_is_the_one_over_images(answers: tuple[np.ndarray, np.ndarray]) -> None:
    difference = answers[0].astype(float) - answers[1]
    own, package = taught("crossed_interval")(difference[None], resamples=4000), mean_interval(difference)
    np.testing.assert_allclose(own, (package.low, package.high), atol=0.005)


def test_crossed_interval_is_the_one_that_compare_gives(answers: tuple[np.ndarray, np.ndarray]) -> None:
    runs = np.stack([np.roll(answers[0], 7 * s).astype(float) for s in range(3)])  # three runs that differ
    own = taught("crossed_interval")(runs - answers[1], resamples=4000)
    package = compare(runs, np.stack([answers[1]] * 3)).images
    np.testing.assert_allclose(own, (package.low, package.high), atol=0.005)


def test_a_fair_pair_differs_in_no_column_of_the_recipe() -> None:
    differences = extract_function(CHAPTER, "recipe_differences", SCOPE, needs=["RECIPE"])
    columns = differences.__globals__["RECIPE"]
    assert {"start", "steps", "lr", "seed", "precision", "test_images"} <= set(columns)
    assert not {"threshold", "tau_warmup", "name"} & set(columns)  # what defines the comparison
    assert differences(dict.fromkeys(columns, "1"), dict.fromkeys(columns, "1")) == []
    for column in columns:
        changed = dict.fromkeys(columns, "1") | {column: "2"}
        assert differences(dict.fromkeys(columns, "1"), changed) == [column]


def test_cut_share_is_the_trackers(model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 56, 56)
    sparsify(model, 0.01)
    with torch.no_grad(), TokenSparsityTracker(model) as tracker:
        found = queries_and_keys(model, images)
    table = tracker.table()
    # What holds of every head, whatever the weights: no more zeros applied than cut, and where no row fell back, as
    # many, with an effective support of at most the keys kept (Cauchy and Schwarz).
    assert (table["applied_sparsity"] <= table["cut_sparsity"] + 1e-9).all()
    whole = table[table["empty_rate"] == 0]
    assert len(whole) and np.allclose(whole["applied_sparsity"], whole["cut_sparsity"], atol=1e-9)
    assert (whole["effective_support"] <= whole["kept_mean"] + 1e-6).all()
    for name, (q, k) in found.items():
        seen = table[(table["layer"] == name) & (table["queries"] == "all")]["cut_sparsity"].to_numpy()
        own = taught("cut_share")(q @ k.transpose(-2, -1), 0.01).numpy()
        np.testing.assert_allclose(own, seen, atol=1e-4)
        assert 0 < own.mean() < 1


@pytest.mark.parametrize("tau", [0.01, 0.02, 0.1, 0.3, 0.34])
@pytest.mark.parametrize("tokens", [10, 50, 197])
def test_floor_is_reached_and_never_undercut(tokens: int, tau: float) -> None:
    floor = taught("sparsity_floor")(tokens, tau)
    survivors = min(tokens, math.ceil(1 / Fraction(str(tau))) - 1)
    fullest = torch.zeros(tokens, dtype=torch.float64)
    fullest[:survivors] = 1 / survivors
    assert 1 - taught("kept_by")(fullest, tau) / tokens == pytest.approx(floor) == sparsity_floor(tokens, tau)
    rows = thresholded_softmax(torch.randn(200, tokens, dtype=torch.float64) * 2, tau, empty_rows="zero")
    assert float((rows == 0).double().mean(-1).min()) >= floor - 1e-12


def test_shuffled_keys_keep_every_count() -> None:
    weights = thresholded_softmax(torch.randn(2, 3, 20, 20), 0.06)
    shuffled = taught("shuffle_keys")(weights, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shuffled.sort(-1).values, weights.sort(-1).values, rtol=0, atol=0)
    assert not torch.equal(shuffled, weights)


def test_object_share_by_hand() -> None:
    weights = torch.zeros(1, 1, 197, 197)
    weights[0, 0, 0, 1], weights[0, 0, 0, 196] = 0.3, 0.1
    masks = torch.zeros(1, 56, 56, dtype=torch.bool)
    masks[0, :4, :4] = True  # the whole first patch
    assert taught("object_share")(weights, masks) == pytest.approx(0.75)


def test_the_recorded_sweeps_lie_above_the_floor() -> None:
    """Whatever a model learnt, its cut share cannot be below what any row of 197 keys loses."""
    arms = {0.01: "sparse0.01-warmup-lr3e-04-seed0"} | {
        tau: f"sparse{tau}-warmup-lr3e-04-seed0" for tau in (0.0025, 0.005, 0.02, 0.1)
    }
    rows = run_rows("deit_cifar10") | run_rows("planted_sweep")
    for tau, arm in [*arms.items(), *((tau, f"tau{tau}") for tau in (0.0025, 0.005, 0.02, 0.1))]:
        assert float(rows[arm]["cut_sparsity"]) >= sparsity_floor(197, tau)
        assert float(rows[arm]["applied_sparsity"]) <= float(rows[arm]["cut_sparsity"]) + 1e-9


def test_what_the_page_says_of_the_warm_up_on_planted_shapes() -> None:
    """At 0.01 the recorded pair with a warm-up lies below the one without, by validation and by test."""
    pairs, sweep = correct_by_run("planted_pairs"), correct_by_run("planted_sweep")
    warmed = paired_bootstrap(pairs["sparse-seed0"], sweep["tau0.01-no-warmup"])
    assert -0.05 < warmed.low < warmed.high < 0
    validation = [
        run_rows(e)[arm]["val_accuracy"]
        for e, arm in (("planted_pairs", "sparse-seed0"), ("planted_sweep", "tau0.01-no-warmup"))
    ]
    assert float(validation[0]) < float(validation[1])
