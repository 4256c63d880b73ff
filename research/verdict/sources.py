"""What is recorded, as the ledger reads it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from research.markdown import DENSE, FROM_THE_FIRST_STEP, WARMED_UP, of_kind, own_rate
from research.verdict.line import HOW, given
from svit_utils.files import read_rows
from svit_utils.records import Row, correct_by_run, run_rows
from svit_utils.referee import Comparison, Interval, compare, paired_bootstrap

DEIT_KINDS = {"from the first step": FROM_THE_FIRST_STEP, "warmed up": WARMED_UP}


class Sources:
    """The recorded files of one folder, each read once.

    Args:
        folder: ``results/``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[tuple[str, str], Any] = {}

    def _study(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / "study" / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The plan's comparisons that it decides."""
        table = self._study("contrasts")
        return table[table["p_holm"].notna()]

    @cached_property
    def afterwards(self) -> pd.DataFrame:
        """Comparisons that no plan named."""
        return self._study("afterwards")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Every mean of the study: by kind, rho, seed, map, layer, head, metric."""
        return pd.read_csv(self.folder / "study" / "scores.csv")

    def second(self, table: str) -> list[Row]:
        """A table of the second study; no rows where it is not written yet."""
        if ("second", table) not in self._rows:
            self._rows["second", table] = read_rows(self.folder / "second" / "tables" / f"{table}.csv")
        return self._rows["second", table]

    def runs(self, experiment: str) -> dict[str, Row]:
        """The full-size runs of an experiment by name."""
        if ("runs", experiment) not in self._rows:
            self._rows["runs", experiment] = run_rows(experiment, self.folder)
        return self._rows["runs", experiment]

    @cached_property
    def _correct(self) -> dict[str, np.ndarray]:
        pairs = correct_by_run("planted_pairs", self.folder) | correct_by_run("planted_sweep", self.folder)
        found = {"planted": pairs} | {
            name: correct_by_run(name, self.folder) for name in ("deit_cifar10", "vit56_cifar10")
        }
        return {f"{name}/{run}": bits for name, runs in found.items() for run, bits in runs.items()}

    def correct(self, experiment: str, run: str) -> np.ndarray:
        """Which test pictures a run got right, as numbers [n]; ``planted`` has pairs and sweep."""
        return self._correct[f"{experiment}/{run}"].astype(float)

    def pair(self, experiment: str, sparse: str, dense: str) -> Interval:
        """Accuracy of two runs, sparse minus dense, with its interval over the pictures."""
        return paired_bootstrap(self.correct(experiment, sparse), self.correct(experiment, dense))

    @cached_property
    def small(self) -> str:
        """Where the first study was measured."""
        return f"PlantedShapes, small ViT, {given(self.runs('study').values())}"

    @cached_property
    def scratch(self) -> str:
        """Where the pair from scratch was measured."""
        return f"CIFAR-10, small ViT from scratch, {given(self.runs('vit56_cifar10').values())}"

    def deit_rate(self, how: str) -> str:
        """The rate that validation prefers for a setting of DeiT-Tiny: ``dense`` or a key of `DEIT_KINDS`."""
        return own_rate(self.runs("deit_cifar10"), *DEIT_KINDS.get(how, DENSE))

    def deit_rows(self, how: str, rate: str | None = None) -> dict[str, Row]:
        """The rows of a setting of DeiT-Tiny by seed, at one rate: by default that which validation prefers."""
        found = of_kind(self.runs("deit_cifar10"), *DEIT_KINDS.get(how, DENSE), rate or self.deit_rate(how))
        return {row["seed"]: row for _, row in sorted(found.items())}

    def deit(self, how: str, rate: str | None = None, dense_rate: str | None = None) -> Comparison:
        """A setting of DeiT-Tiny minus dense over both seeds, by default each at the rate that validation prefers."""
        sides = self.deit_rows(how, rate), self.deit_rows("dense", dense_rate)
        sparse, dense = (
            np.stack([self.correct("deit_cifar10", row["name"]) for row in rows.values()]) for rows in sides
        )
        return compare(sparse, dense)

    def deit_where(self, how: str) -> str:
        """Where a setting of DeiT-Tiny was measured."""
        return f"CIFAR-10, DeiT-Tiny, {given(self.deit_rows(how).values())}, {how}"

    @cached_property
    def groups(self) -> dict[str, list[Row]]:
        """Runs whose sparsity is told: where they were measured, and their rows."""
        study = self.runs("study")
        found = {
            f"{self.small}, {how}": [row for name, row in study.items() if name.startswith(f"{kind}-rho0-")]
            for kind, how in HOW.items()
        }
        found |= {self.deit_where(how): list(self.deit_rows(how).values()) for how in DEIT_KINDS}
        return found | {self.scratch: [self.runs("vit56_cifar10")["sparse"]]}

    def observed(self, kind: str, metric: str, source: str = "observed") -> pd.DataFrame:
        """The study's rows of a measure of sparsity at rho = 0, by layer, head and seed; ``source`` may be a null."""
        rows = self.scores[(self.scores["kind"] == kind) & (self.scores["rho"] == 0)]
        return rows[rows["metric"] == f"null:all:{source}:{metric}"]
