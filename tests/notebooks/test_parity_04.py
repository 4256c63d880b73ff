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

from svit_utils.attention import TokenSparsityTracker, sparse_modules, sparsify, thresholded_softmax
from svit_utils.explain import attention_maps
from svit_utils.models import create_model
from svit_utils.referee import mean_interval, paired_bootstrap
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
    own, package = taught("crossed_interval")(difference[None]), mean_interval(difference)
    np.testing.assert_allclose((own.mean, own.low, own.high), (package.mean, package.low, package.high), atol=0.005)


def test_queries_and_keys_give_the_weights_of_the_model_and_their_gradient(model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 56, 56)
    sparsify(model, 0.01)
    observed: dict[str, torch.Tensor] = {}
    names = {id(module): name for name, module in sparse_modules(model).items()}
    for module in sparse_modules(model).values():
        module.observers.append(lambda m, record: observed.__setitem__(names[id(m)], record.weights))
    found = taught("queries_and_keys")(model, images)
    assert list(found) == list(observed) == [f"blocks.{i}.attn" for i in range(4)]
    q, k = found["blocks.3.attn"]
    own = thresholded_softmax(q @ k.transpose(-2, -1), 0.01)
    package = observed["blocks.3.attn"]
    torch.testing.assert_close(own, package, rtol=1e-4, atol=1e-5)
    maps = attention_maps(model, images)["blocks.3.attn"]
    torch.testing.assert_close(own, maps, rtol=1e-4, atol=1e-5)

    towards, parameter = torch.randn_like(own), model.blocks[1].attn.qkv.weight
    own_gradient, gradient = (
        torch.autograd.grad((w * towards).sum(), parameter, retain_graph=True)[0] for w in (own, package)
    )
    assert gradient.abs().max() > 0
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_cut_share_is_the_trackers(model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 56, 56)
    sparsify(model, 0.01)
    with torch.no_grad(), TokenSparsityTracker(model) as tracker:
        found = taught("queries_and_keys")(model, images)
    table = tracker.table()
    for name, (q, k) in found.items():
        seen = table[(table["layer"] == name) & (table["queries"] == "all")]["cut_sparsity"].to_numpy()
        own = taught("cut_share")(q @ k.transpose(-2, -1), 0.01).numpy()
        np.testing.assert_allclose(own, seen, atol=1e-4)
        assert 0 < own.mean() < 1


@pytest.mark.parametrize("tau", [0.01, 0.02, 0.1, 0.3, 0.34])
@pytest.mark.parametrize("tokens", [10, 50, 197])
def test_floor_is_reached_and_never_undercut(tokens: int, tau: float) -> None:
    floor = taught("sparsity_floor")(tokens, tau)
    fullest = taught("sparsest_and_fullest")(tokens, tau)[1]
    assert fullest == pytest.approx(floor)
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


def test_verdicts() -> None:
    judge = taught("judge")
    above, across = SimpleNamespace(low=0.1, high=0.2), SimpleNamespace(low=-0.1, high=0.2)
    below = SimpleNamespace(low=-0.2, high=-0.1)
    assert judge(above, above) == "holds"
    assert judge(below, below) == "does not hold: sparse is worse"
    assert judge(across, above) == "open: no difference shown"
    one_seed = "one seed does not speak of the method"
    assert judge(across) == f"open: no difference shown; {one_seed}"
    assert judge(above) == f"open: sparse is better in this pair; {one_seed}"
    assert judge(below) == f"open: sparse is worse in this pair; {one_seed}"
    assert judge(below, across).startswith("does not hold in these runs") and "too few seeds" in judge(below, across)
    assert judge(above, across).startswith("open: better in these runs")
    assert judge() == judge(above, None) == "not testable here"


def test_the_verdict_shows_both_intervals_and_how_many_seeds_it_has() -> None:
    gain = taught("gain", needs=("points", "judge"))
    crossed, student = (
        SimpleNamespace(mean=-0.06, low=-0.08, high=-0.04),
        SimpleNamespace(mean=-0.06, low=-0.2, high=0.1),
    )
    both = "-6.0 [-8.0, -4.0] points, crossed; -6.0 [-20.0, +10.0] points, Student's t"
    assert both in gain([crossed, student])
    assert "-6.0 [-8.0, -4.0] points, one seed, images only" in gain([crossed]) and gain([crossed]).startswith("open")
    assert gain([]) == gain([None, None]) == "not testable here"


def test_what_arms_were_trained_with() -> None:
    given = taught("given")
    rows = {"sparse": {"steps": "450", "lr": "0.0003"}, "dense": {"steps": "450", "lr": "5e-05"}}
    design = SimpleNamespace(rows=rows)
    assert given(design, "sparse") == given(design, "sparse", "sparse") == "450 steps, rate 0.0003"
    assert given(design, "sparse", "dense") == "450 steps, rate 0.0003; dense 5e-05"
    assert given(design, "not run") == "not tested"


def test_harm_is_of_the_pair_and_names_the_usual_tau() -> None:
    harm = taught("harm", needs=("points",))
    worse, better = SimpleNamespace(mean=-0.2, low=-0.3, high=-0.1), SimpleNamespace(mean=0.2, low=0.1, high=0.3)
    assert harm(worse, better).startswith("holds in this pair: -20.0 [-30.0, -10.0]")
    assert "(tau = 0.01: +20.0 [+10.0, +30.0])" in harm(worse, better)
    assert harm(better).startswith("does not hold in this pair") and "(tau = 0.01: not tested)" in harm(better)
    assert harm(SimpleNamespace(mean=0.0, low=-0.1, high=0.1)).startswith("open: ")
    assert harm(None, worse) == "not testable here"


@pytest.mark.parametrize(
    ("cut", "applied", "verdict"),
    [(0.88, 0.72, "holds, roughly"), (0.65, 0.2, "holds, roughly"), (0.9, 0.85, "does not")],
)
def test_about_seventy_per_cent_is_cut_or_applied(cut: float, applied: float, verdict: str) -> None:
    sentence = taught("sparsity_sentence", needs=("number", "sparsity_floor"))
    rows = {"sparse": {"cut_sparsity": str(cut), "applied_sparsity": str(applied)}}
    said = sentence(SimpleNamespace(rows=rows, correct={"sparse": np.ones(3, bool)}), ["sparse", "not run"])
    assert said.startswith(verdict) and f"{cut:.0%} cut, {applied:.0%} applied (1 run(s))" in said
    assert sentence(SimpleNamespace(rows={}, correct={}), ["sparse"]) == "not testable here"
