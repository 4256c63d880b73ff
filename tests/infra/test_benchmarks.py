"""The benchmarks measure what they say, and the table of targets reads what they wrote."""

from __future__ import annotations

import csv
import importlib.util
import math
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import accuracy, attention, measure, targets, tiles, variants
from benchmarks.measure import Plan
from svit_utils.attention import thresholded_attention
from svit_utils.paths import repo_root

QUICK = Plan(threads=(1,), seconds=0.1, most=3, quick=True)


def test_clustered_logits_leave_a_fifth_of_the_tiles():
    """Five groups in a row: at N = 2049 the tiles off the diagonal blocks have no survivor at tau = 0.01."""
    q, k, _ = variants.inputs(2049, logits="clustered")
    probs = (q[0, 0] @ k[0, 0].T / 8).softmax(dim=-1)
    share = float(tiles.empty_tiles(probs > 0.01).float().mean())
    assert 0.7 < share < 0.82  # four fifths, less the tiles that a border between groups crosses
    logits = (q[0] @ k[0].mT / 8)[:, :400, :400]
    assert float(logits.std()) == pytest.approx(2.0, abs=0.1)


def test_independent_logits_have_standard_deviation_two_and_no_empty_tile():
    q, k, _ = variants.inputs(577)
    assert float((q @ k.mT / 8).std()) == pytest.approx(2.0, abs=0.02)
    probs = (q[0, 0] @ k[0, 0].T / 8).softmax(dim=-1)
    assert float((probs <= 0.01).float().mean()) > 0.9
    assert not tiles.empty_tiles(probs[:576, :576] > 0.01).any()


def test_empty_tiles_by_hand():
    survives = torch.zeros(130, 130, dtype=torch.bool)
    survives[0, 0] = survives[70, 129] = True
    assert tiles.empty_tiles(survives).tolist() == [[False, True, True], [True, True, False], [True, True, True]]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_flex_attention_in_two_passes_is_the_formula():
    q, k, v = variants.inputs(65)
    out = variants.flex(0.01, "cpu")(q, k, v)
    wanted = thresholded_attention(q, k, v, 0.01, empty_rows="zero", backend="reference")
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("entmax") is None, reason="entmax is not installed")
def test_the_sparse_alternatives_are_sparse_and_sum_to_one():
    q, k, _ = variants.inputs(65)
    found = variants.variants(0.01, 65, "cpu", grad=True)
    identity = torch.eye(65).expand(*k.shape[:2], 65, 65)
    for name in ("entmax15", "sparsemax", "top-k"):
        weights = found[name](q, k, identity)  # with V = 1 the output is the map
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert float((weights == 0).float().mean()) > 0.4, name
    assert (weights > 0).sum(dim=-1).max() == 32


def _allocate(mebibytes):
    return partial(_touch, mebibytes)


def _touch(mebibytes):
    torch.ones(mebibytes * 2**18)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_is_that_of_one_call():
    big, small = measure.peak_growths(_allocate, [(200,), (20,)])
    assert big == pytest.approx(200, abs=8)
    assert small == pytest.approx(20, abs=8)  # not hidden by what the call before had


def test_rounds_follow_the_time_there_is(monkeypatch):
    calls = []
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) * 0.05)  # each call takes 50 ms
    times = measure.in_turn(
        {"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}, Plan(seconds=2.0, most=31)
    )
    assert [len(taken) for taken in times.values()] == [10, 10]
    assert all(value == pytest.approx(50) for taken in times.values() for value in taken)
    summary = measure.summarised({"a": [10.0, 20.0, 30.0], "b": [5.0, 10.0, 60.0]}, "a")
    assert summary["b"]["ratio_to_a"] == 0.5  # of the medians
    assert summary["a"]["ratio_q25"] == summary["a"]["ratio_q75"] == 1.0


def test_accuracy_against_float64():
    rows = accuracy.rows(QUICK)
    assert {row["quantity"] for row in rows} == set(accuracy.NAMES)
    for row in rows:
        if row["dtype"] == "float32":
            assert 0 < float(row["max_error"]) < 1e-4, row
        else:
            assert 1e-6 < float(row["max_error"]) < 0.05, row


def test_attention_rows_and_targets(tmp_path, monkeypatch):
    """From measuring to the table, with the variants that need no compiler."""
    few = ("sdpa", "plain formula", "tiled")
    every = variants.variants
    monkeypatch.setattr(attention, "variants", lambda *a, **s: {n: f for n, f in every(*a, **s).items() if n in few})
    rows = attention.rows(QUICK)
    assert {row["variant"] for row in rows} == set(few)
    assert {row["n"] for row in rows} == {65, 197}
    measured = [r["peak_growth_mib"] for r in rows if r["logits"] == "independent"]
    assert all(not math.isnan(m) for m in measured) or sys.platform != "linux"
    measure.write("attention", rows, tmp_path)
    measure.write("accuracy", accuracy.rows(QUICK), tmp_path)
    step = {"model": "vit_base_patch16_224", "img_size": 224, "what": "training step", "device_type": "cpu"}
    ratios = {"dense": 1.0, "sparse": 1.05, "sparse, untrained": 1.25}  # the worst of all rows is what counts
    measure.write("vit", [{**step, "variant": v, "ratio_to_dense": r} for v, r in ratios.items()], tmp_path)
    found = {row["target"]: row for row in targets.rows(tmp_path)}
    whole = found["ViT-Base training step at 224 px / dense, CPU"]
    assert (whole["met"], whole["worst"], whole["where"]) == ("no", 1.25, "sparse, untrained")
    assert found["GPU forward / SDPA, N <= 577"]["met"] == "not measured"
    forward = found["CPU forward / SDPA, one thread"]
    ratios = [r["ratio_to_sdpa"] for r in rows if (r["n"], r["variant"], r["direction"]) == (197, "tiled", "forward")]
    assert forward["worst"] == max(ratios)
    assert forward["met"] == ("yes" if max(ratios) <= 1.25 else "no")
    assert found["error against float64 / the reference's, float32"]["met"] == "yes"
    assert "not measured" in targets.printed(list(found.values()))
    with (tmp_path / "attention.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["commit"] is not None and first["torch"] == torch.__version__.split("+")[0]


def test_a_section_from_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--only",
        "tiles",
        "tracker_overhead",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiles.csv", "tracker_overhead.csv"]
    if not torch.cuda.is_available():
        done = subprocess.run(
            [*command, "--device", "cuda"], cwd=repo_root(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and "no GPU" in done.stderr
