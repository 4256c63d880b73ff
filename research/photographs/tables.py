"""The study's tables, from its recorded rows and nothing else: the same rows give the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from research.photographs.finetuned import SETTINGS
from research.photographs.maps import BASELINES, MASKS, models
from research.rows import write_csvs
from research.study.store import read_images
from svit_utils.files import read_rows
from svit_utils.records import unpack
from svit_utils.referee import Interval, compare, paired_bootstrap

TOKENS = 197
METRICS = ("average_precision", "pointing_game", "energy_in_mask", "iou_at_mask_area")
# Pictures that a run on ImageNet reads: the training set (1,281,167) that many times.
IMAGENET, EPOCHS = 1_281_167, {"DeiT's own schedule": 300, "fine-tuning": 30, "one epoch": 1}
SHARES = ("applied_sparsity", "empty_rate", "kept_mass", "sink_mean", "sink_max")


def spread(name: str, interval: Interval | None) -> dict[str, Any]:
    """An interval as three columns; empty without one."""
    values = (np.nan,) * 3 if interval is None else (interval.mean, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values))


def right(row: dict[str, str], column: str = "correct") -> np.ndarray:
    """Which pictures a recorded row got right, as 0 and 1 [n]."""
    return unpack(row[column], int(row["images"])).astype(float)


def threshold_table(folder: Path) -> pd.DataFrame:
    """A row a tau: accuracy and probe with their differences from tau = 0, and the shares."""
    rows = read_rows(folder / "thresholds.csv")
    dense = {float(row["tau"]): row for row in rows}.get(0.0)
    table = []
    for row in rows:
        probed = row["probe_correct"] != ""
        minus = paired_bootstrap(right(row), right(dense)) if dense not in (None, row) else None  # type: ignore[arg-type]
        found = {"tau": float(row["tau"]), "tau_times_n": float(row["tau"]) * TOKENS, "images": int(row["images"])}
        found |= {"accuracy": right(row).mean(), "accuracy_of_ten": float(row["accuracy_of_ten"])}
        found |= spread("minus_dense", minus)
        found["probe"] = right(row, "probe_correct").mean() if probed else np.nan
        probes = probed and dense not in (None, row)
        against = paired_bootstrap(right(row, "probe_correct"), right(dense, "probe_correct")) if probes else None  # type: ignore[arg-type]
        table.append(found | spread("probe_minus_dense", against) | {name: float(row[name]) for name in SHARES})
    return pd.DataFrame(table)


def finetuned_table(folder: Path) -> pd.DataFrame:
    """A row a setting: means over the seeds recorded, and accuracy minus dense of the same seeds."""
    rows = {(row["setting"], row["seed"]): row for row in read_rows(folder / "finetuned.csv")}
    table = []
    for setting in SETTINGS:
        own = {seed: row for (name, seed), row in rows.items() if name == setting.name}
        if not own:
            continue
        pairs = [(row, rows["dense", seed]) for seed, row in own.items() if ("dense", seed) in rows]
        difference = None
        if setting.name != "dense" and pairs:
            difference = compare(*([right(row) for row in side] for side in zip(*pairs))).wider
        found: dict[str, Any] = {"setting": setting.name, "seeds": len(own)}
        found["accuracy"] = np.mean([right(row).mean() for row in own.values()])
        found |= spread("minus_dense", difference)
        for name in SHARES:
            values = [float(row[name]) for row in own.values() if row[name] != ""]
            found[name] = np.mean(values) if values else np.nan
        table.append(found)
    return pd.DataFrame(table)


def drawn_partner(model: str, name: str) -> str | None:
    """The dense model's map that is drawn through the cut of ``model``: its name; None where there is none."""
    found = re.fullmatch(r"tau([\d.]+)(-warmed)?(-trained)?", model)
    return None if found is None or name not in ("attention", "rollout") else f"{name}_drawn{found[1]}"


def map_table(folder: Path) -> pd.DataFrame:
    """A row for each model, map, mask and subset of the pictures: mean scores, and average precision against others.

    ``minus_centre``: the centre baseline; ``minus_dense``: the dense model's map of that name, for trained models that
    of the dense model trained alike; ``minus_drawn``: the untrained dense model's map drawn through the same cut.
    """
    names = [name for name in (*models(), BASELINES) if (folder / "images" / f"{name}.csv.gz").is_file()]
    scores = {name: read_images(folder / "images" / f"{name}.csv.gz") for name in names}
    if BASELINES not in scores:
        return pd.DataFrame()
    base, table = scores[BASELINES], []
    for model in names:
        maps = dict.fromkeys(key.split(":")[1] for key in scores[model] if key.count(":") == 2)
        for name in maps:
            for mask in MASKS:
                off = base[f"{mask}:off_centre"] > 0.5
                for subset, chosen in {"every": np.ones_like(off), "off-centre": off}.items():
                    if chosen.sum() < 2:
                        continue
                    table.append(_map_row(scores, (model, name, mask), subset, chosen))
    return pd.DataFrame(table)


def _map_row(
    scores: dict[str, dict[str, np.ndarray]], place: tuple[str, str, str], subset: str, chosen: np.ndarray
) -> dict[str, Any]:
    model, name, mask = place
    row: dict[str, Any] = {"model": model, "map": name, "mask": mask, "subset": subset, "pictures": int(chosen.sum())}
    row |= {metric: scores[model][f"{mask}:{name}:{metric}"][chosen].mean() for metric in METRICS}
    own = scores[model][f"{mask}:{name}:average_precision"]
    plain = "dense-trained" if model.endswith("-trained") else "dense"
    drawn = drawn_partner(model, name)
    others = {"centre": (BASELINES, "centre"), "dense": (plain, name), "drawn": ("dense", drawn)}
    for label, (other, theirs) in others.items():
        values = scores.get(other, {}).get(f"{mask}:{theirs}:average_precision")
        same = values is None or (other, theirs) == (model, name)
        against = None if same else paired_bootstrap(own[chosen], values[chosen])  # type: ignore[index]
        row |= spread(f"minus_{label}", against)
    return row


def imagenet_table(folder: Path) -> pd.DataFrame:
    """Hours of one core that ImageNet takes, from the rates: training in bf16, and reading from shards."""
    rows = read_rows(folder / "throughput.csv")
    rate = {(row["what"], row["attention"], row["precision"]): float(row["per_core_second"]) for row in rows}
    table = []
    for schedule, epochs in EPOCHS.items() if rate else ():
        pictures = IMAGENET * epochs
        for attention in ("dense", "cut"):
            training = pictures / rate["training", attention, "bf16"] / 3600
            reading = pictures / rate["read from shards", "", ""] / 3600
            found = {"schedule": schedule, "epochs": epochs, "attention": attention, "pictures": pictures}
            table.append(found | {"training_core_hours": training, "reading_core_hours": reading})
    return pd.DataFrame(table)


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """All tables by file name, those without a row left out."""
    found = {"thresholds": threshold_table(folder), "finetuned": finetuned_table(folder)}
    found |= {"maps": map_table(folder), "imagenet": imagenet_table(folder)}
    return {name: table for name, table in found.items() if len(table)}


def write_tables(folder: Path) -> Path:
    """Write `tables` as CSV into ``tables/`` of ``folder``, from the rows in it."""
    write_csvs(tables(folder), folder / "tables")
    return folder / "tables"
