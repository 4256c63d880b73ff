"""Chapter 10 has the numbers of the package and of the ledger; its rule is chapter 9's, which is tested there."""

from __future__ import annotations

import numpy as np
import pytest

from research.markdown import difference
from research.verdict.line import sentence
from research.verdict.sources import Sources
from svit_utils.paths import results_dir
from svit_utils.records import correct_by_run
from svit_utils.referee import compare, paired_bootstrap
from tests.notebooks.notebook_functions import extract_function

CHAPTER = "10"


def test_a_difference_is_written_as_in_the_summary() -> None:
    written = extract_function(CHAPTER, "written")
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.7
    interval = paired_bootstrap(b.astype(float), a.astype(float))
    assert written(interval) == difference(a, b) == sentence(interval, 100, 1)
    assert written(interval, 1, 3) == sentence(interval)


def test_deit_is_compared_as_in_the_ledger() -> None:
    scope = {"np": np, "compare": compare, "deit": correct_by_run("deit_cifar10")}
    pair = extract_function(CHAPTER, "deit_pair", scope)
    ledger = Sources(results_dir()).deit("warmed up")
    assert pair("3e-04", "5e-05") == ledger and ledger.images.high < 0 < ledger.seeds.high


@pytest.mark.parametrize(("kind", "source"), [("sparse", "observed"), ("warmup", "gaussian")])
def test_the_share_cut_is_the_ledgers(kind: str, source: str) -> None:
    sources = Sources(results_dir())
    share = extract_function(CHAPTER, "cut_share", {"scores": sources.scores})
    rows = sources.observed(kind, "cut_sparsity", source).groupby("seed")["value"].mean()
    np.testing.assert_allclose(share(kind, source), rows.to_numpy())
    assert len(rows) == 5
