"""The mutants are the faults they are named after, and unbroken code stays unbroken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import mutants
from tools.mutant_site import sitecustomize

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
TAU = 0.1
EXPECTED = {
    "": [0.4 / 0.65, 0.2 / 0.65, 0.05 / 0.65, 0.0],
    "softmax": PROBABILITIES,
    "tau2": [0.3 / 0.4, 0.1 / 0.4, 0.0, 0.0],
    "norenorm": [0.4, 0.2, 0.05, 0.0],
}
PROGRAM = f"""
import torch
from svit_utils import thresholded_softmax, thresholded_attention
scores = torch.tensor({PROBABILITIES}, dtype=torch.float64).log()
print(*thresholded_softmax(scores, {TAU}).tolist())
q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
_, weights = thresholded_attention(q, scores.reshape(1, 1, 4, 1), torch.ones(1, 1, 4, 1, dtype=torch.float64), {TAU},
                                   return_weights=True)
print(*weights.flatten().tolist())
"""


@pytest.mark.parametrize("mutant", list(EXPECTED))
def test_both_ways_to_the_operator_are_broken(mutant: str, tmp_path: Path) -> None:
    assert set(EXPECTED) - {""} == set(sitecustomize.MUTANTS)
    log = tmp_path / "called"
    environment = os.environ | {"SVIT_MUTANT": mutant, "SVIT_MUTANT_LOG": str(log)}
    environment["PYTHONPATH"] = os.pathsep.join([str(mutants.SITE), str(mutants.notebooks.ROOT)])
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        torch.testing.assert_close([float(word) for word in line.split()], EXPECTED[mutant], rtol=0, atol=1e-12)
    assert len(done.stdout.splitlines()) == 2
    assert log.is_file() == bool(mutant)


def test_the_quickest_chapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(f"{name}.ipynb") for name in ("a", "b", "c")]
    monkeypatch.setattr(mutants.notebooks, "ROOT", tmp_path)
    assert mutants.quickest(paths, 2) == paths[:2]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "walkthrough.csv").write_text("chapter,minutes\na,2\nb,1\nc,0.5\n")
    assert mutants.quickest(paths, 2) == paths[1:]
