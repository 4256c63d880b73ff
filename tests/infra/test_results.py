"""README and recorded results agree, and the shipped checkpoints are what their cards say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from research.check import check_experiment
from research.plans import EXPERIMENTS
from research.verdict.sources import Sources
from svit_utils import sparsify
from svit_utils.data import PlantedShapes
from svit_utils.files import read_rows
from svit_utils.models import load_embedded, read_card
from svit_utils.paths import checkpoints_dir, results_dir
from svit_utils.training import evaluate
from tools import readme_results

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = sorted(checkpoints_dir().glob("*.safetensors"))
PLANTED = [path for path in CHECKPOINTS if path.stem.startswith("planted")]
PROVENANCE = ("command", "torch", "timm", "device", "threads", "commit", "date", "seed", "empty_rows")


def test_the_readme_shows_what_the_results_hold() -> None:
    now = readme_results.README.read_text(encoding="utf-8")
    assert now == readme_results.readme(now, Sources(results_dir())), "run `make results`"


def test_the_page_of_results_shows_what_they_hold() -> None:
    now = readme_results.PAGE.read_text(encoding="utf-8")
    assert now == readme_results.results_page(now, results_dir()), "run `make results`"


def test_the_readme_is_short() -> None:
    """Its long tables are in results/README.md: what is left fits on a screen."""
    text = readme_results.README.read_text(encoding="utf-8")
    for name, most in (("result", 8), ("results", 12), ("cost", 6)):
        part = text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
        assert 3 <= len(part.strip().splitlines()) + 2 <= most, name


def test_a_missing_marker_is_seen() -> None:
    with pytest.raises(ValueError):
        readme_results.stamped("no marker", "results", "x")
    text = "<!-- results: begin -->\nold\n<!-- results: end -->\nrest"
    assert readme_results.stamped(text, "results", "new\n") == (
        "<!-- results: begin -->\n\nnew\n\n<!-- results: end -->\nrest"
    )


def test_every_recorded_row_says_where_it_comes_from() -> None:
    rows = [row for name in EXPERIMENTS for row in read_rows(results_dir() / f"{name}.csv")]
    assert len(rows) > 10
    for row in rows:
        assert all(row[key] != "" for key in PROVENANCE), row["name"]
        assert "/" not in row["command"].replace("svit_utils/", ""), row["command"]


def test_checkpoints_are_small_and_carry_a_card() -> None:
    assert len(PLANTED) >= 7
    for path in CHECKPOINTS:
        assert path.stat().st_size < 4e6
        card = read_card(path)
        assert {"data", "steps", "seed", "test_accuracy", "empty_rows", "commit"} <= set(card), path.name


@pytest.mark.parametrize("path", PLANTED, ids=lambda p: p.stem)
def test_an_erased_object_leaves_chance(path: Path) -> None:
    model = load_embedded(path.stem)
    tau = read_card(path)["threshold"]
    if tau != "None":  # the file holds plain weights; the model it was trained as is cut
        sparsify(model, float(tau))
    whole = evaluate(model, PlantedShapes("test", 200)).accuracy
    erased = evaluate(model, PlantedShapes("test", 200, erase_object=True)).accuracy
    assert whole > 0.8
    assert erased < 0.2  # chance is 0.1; four standard deviations of 200 guesses are 0.085


def test_the_dense_start_is_right_on_unseen_pictures() -> None:
    torch.manual_seed(0)
    assert evaluate(load_embedded("planted_dense_start"), PlantedShapes("test", 1000)).accuracy >= 0.95


def test_a_result_still_comes_out_of_this_code_and_the_check_can_fail(tmp_path: Path) -> None:
    def passed(folder: Path | None = None) -> list[bool | None]:
        return [check.passed for check in check_experiment(experiment, folder=folder)]

    experiment = EXPERIMENTS["planted_start"]
    assert passed() == [True]
    text = (results_dir() / "planted_start.csv").read_text(encoding="utf-8")
    small = next(row for row in read_rows(results_dir() / "planted_start.csv") if row["size"] == "small")
    wrong = text.replace(small["test_loss"], str(float(small["test_loss"]) + 1.0))
    (tmp_path / "planted_start.csv").write_text(wrong, encoding="utf-8")
    assert passed(tmp_path) == [False]
    assert passed(tmp_path / "none") == [None]


def test_a_sparse_result_still_comes_out_of_this_code() -> None:
    (_, sparse) = check_experiment(EXPERIMENTS["planted_pairs"])
    assert sparse.run == "sparse-seed0" and sparse.passed is True, sparse.message
    assert all(f"{name} " in sparse.message for name in ("cut_sparsity", "kept_mass", "effective_support"))
