"""The lines on the second study in results/README.md say what its tables hold, and nothing where they hold nothing."""

from __future__ import annotations

from pathlib import Path

from research.second.markdown import COLUMNS, MAP_COLUMNS, SETTINGS, second_sentence, second_table
from research.second.runs import PARTS
from research.second.tables import setting_of
from svit_utils.files import write_rows


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    write_rows(folder / "second" / "tables" / f"{name}.csv", rows[0], rows)


def test_every_setting_has_a_label() -> None:
    named = {setting_of(run.name) for part in PARTS.values() for run in part()}
    beside = {name for name in named if name.startswith(("start_", "per_head_from")) or name.endswith("_registers")}
    assert named - beside == set(SETTINGS)


def test_nothing_is_said_of_nothing(tmp_path: Path) -> None:
    assert second_table(tmp_path) == []


def test_a_line_has_the_numbers_of_its_rows(tmp_path: Path) -> None:
    settings = [
        {"setting": "dense", "steps": 450, "metric": "test_accuracy", "seeds": 5, "mean": 0.977},
        {"setting": "warmup", "steps": 450, "metric": "test_accuracy", "seeds": 5, "mean": 0.9565},
        {"setting": "warmup", "steps": 450, "metric": "val_applied_sparsity", "seeds": 5, "mean": 0.838},
        {"setting": "warmup", "steps": 150, "metric": "test_accuracy", "seeds": 2, "mean": 0.90},
    ]
    write(tmp_path, "settings", settings)
    margin = {"setting": "warmup", "steps": 450, "mean": -0.021, "low": -0.03, "high": -0.011, "result": "inferior"}
    write(tmp_path, "margins", [margin])
    head, *_, last = second_table(tmp_path)  # no map is scored yet: no columns for them, and no word
    assert head.count("|") == last.count("|") == len(COLUMNS) + 1 and last.endswith("| inferior |")
    assert "AP" not in second_sentence(tmp_path)
    contrast = {"setting": "warmup", "steps": "450", "other": "drawn", "measure": "attention", "mean": -0.04}
    write(tmp_path, "contrasts", [{**contrast, "low": -0.05, "high": -0.03, "result": "lower"}])
    head, rule, *lines = second_table(tmp_path)
    assert head.count("|") == rule.count("|") == len(COLUMNS) + len(MAP_COLUMNS) + 1
    assert lines == [
        "| tau 0.01, warmed up | 150 | 2 |  | 90.0 |  |  |  |  |",
        "| dense | 450 | 5 |  | 97.7 |  |  |  |  |",
        "| tau 0.01, warmed up | 450 | 5 | 84 | 95.7 | -2.1 [-3.0, -1.1] | inferior "
        "|  | -0.040 [-0.050, -0.030] lower |",
    ]
    assert "AP: average precision" in second_sentence(tmp_path)
    assert "12 of the 121 runs" in second_sentence(tmp_path)
    assert "Chosen" not in second_sentence(tmp_path)
    rows = [("accuracy", "dense", "open"), ("attention", "dense", "higher"), ("attention", "drawn", "lower")]
    base = {"setting": "tau0.005", "mean": -0.004, "low": -0.012, "high": 0.004}
    write(tmp_path, "confirmed", [{**base, "measure": m, "other": o, "result": r} for m, o, r in rows])
    assert (
        "tau 0.005 (= 1/N), warmed up, -0.4 [-1.2, +0.4] points, open; its map against the dense map: higher, "
        "against that drawn cut: lower." in second_sentence(tmp_path)
    )
