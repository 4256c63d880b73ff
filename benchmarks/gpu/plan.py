"""How much to do on which device, the clock that every part looks at, and the tables that are written as it goes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from svit_utils.files import read_rows, write_rows
from svit_utils.paths import repo_root
from svit_utils.provenance import provenance

Row = dict[str, Any]
ABOUT = "about.json"  # beside what `benchmarks.gpu.pack` packs: the commit it was packed at


@dataclass(frozen=True)
class Plan:
    """What to do, where, and for how long.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``; on the CPU everything is small and the kernels are interpreted.
        out: folder of the CSV files.
        packs: folders with what `benchmarks.gpu.pack` packed.
        prove_seconds, measure_seconds, train_seconds: each part's budget.
        processes: that prove cases and compile, at a time.
        train_images: training pictures to use at most.
    """

    device: str
    out: Path
    packs: tuple[Path, ...] = ()
    prove_seconds: float = 120.0
    measure_seconds: float = 240.0
    train_seconds: float = 300.0
    processes: int = 1
    train_images: int | None = None

    @property
    def small(self) -> bool:
        """Whether this is a rehearsal at small size."""
        return self.device == "cpu"

    @property
    def size(self) -> str:
        """What the rows say of it, as the other results do."""
        return "small" if self.small else "full"


class Clock:
    """Seconds since it was made, against a budget."""

    def __init__(self, budget: float) -> None:
        self.budget, self.started = budget, time.monotonic()

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds that remain; negative when the budget is overdrawn."""
        return self.budget - self.spent()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        return self.left() >= seconds


class Table:
    """A CSV file to which rows are added one by one; after each the file is complete. Rows that are there stay."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.rows: list[Row] = list(read_rows(path))

    def add(self, row: Row, *, seed: int | None = None) -> None:
        """Add a row with its provenance and write the file."""
        self.extend([row], seed=seed)

    def extend(self, rows: Iterable[Row], *, seed: int | None = None) -> None:
        """Add rows with their provenance and write the file once."""
        source = origin(self.plan.packs)
        self.rows += [{"size": self.plan.size, **row, **source, "seed": row.get("seed", seed)} for row in rows]
        self._write()

    def keep(self, wanted: Any) -> None:
        """Forget the rows for which ``wanted(row)`` is false: they are about to be measured again."""
        self.rows = [row for row in self.rows if wanted(row)]

    def has(self, **values: Any) -> bool:
        """Whether a row of this size with these values, as they are written, is there."""
        values = {"size": self.plan.size, **values}
        return any(all(str(row.get(k, "")) == str(v) for k, v in values.items()) for row in self.rows)

    def _write(self) -> None:
        own = dict.fromkeys(column for row in self.rows for column in row)
        last = [column for column in (*_SOURCE, *_LONG) if column in own]
        columns = [column for column in own if column not in last] + last
        write_rows(self.path, columns, self.rows)


_SOURCE: tuple[str, ...] = ("seed", "device", "driver", "python", "torch", "cuda", "triton", "timm", "torchvision")
_SOURCE += ("threads", "commit", "dirty", "date", "command")
_LONG = ("correct",)  # a column of hundreds of digits stands last


@cache
def origin(packs: tuple[Path, ...] = ()) -> Row:
    """`svit_utils.provenance` with the GPU's driver, CUDA and Triton; the commit of the pack where there is no git."""
    found = provenance(cuda=torch.version.cuda or "", driver=_driver(), triton=_version("triton"))
    del found["seed"]
    found["command"] = found["command"].replace("python -m gpu", "python -m benchmarks.gpu")
    if not found["commit"]:
        for about in map(about_pack, packs):
            if about:
                found |= {"commit": about["commit"], "dirty": about["dirty"]}
                break
    return found


def about_pack(folder: Path) -> Row:
    """What a pack says of itself; {} where there is none."""
    path = folder / ABOUT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _driver() -> str:
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    return ""


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def default_out(device: str) -> Path:
    """``results/gpu`` of the repository; for a rehearsal ``build/gpu-cpu``."""
    return (repo_root() or Path.cwd()) / ("results/gpu" if device == "cuda" else "build/gpu-cpu")


def default_packs() -> tuple[Path, ...]:
    """Where `benchmarks.gpu.pack` puts its two parts."""
    build = (repo_root() or Path.cwd()) / "build" / "gpu"
    return build / "pack", build / "more"
