"""The library stays small, its files and functions stay readable, and nobody reaches into a neighbour's private parts.

Which package may import which is the contract in pyproject.toml, checked by import-linter in ``make lint``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from svit_utils.paths import repo_root

ROOT = repo_root()
PACKAGES = ("svit_utils", "svit_course", "research", "benchmarks", "tools")
# 9,000 for the library as it was when it was put in order; the rest came since and could not be done without.
ADDED = (
    1368,  # runs that share a folder, stop and go on, and use several processes; pictures and weights of every kind
    15,  # localisation on a map's own grid
    170,  # thresholds that learn to share out a sparsity
    277,  # threads that share a model
    113,  # what hosts do to a sparse model: empty it, copy it, parametrize it, load its weights elsewhere
    65,  # --normaliser, and the options of the cut checked together
    3,  # edges on a grid of tokens
    499,  # maps of every call of a module, of every head and precision; what cannot be explained is refused
    31,  # types that users of the library see, and what they are told where ipywidgets is missing
    212,  # kernels that waste nothing on a GPU: tiles without survivors, rounded weights, one launch for each gradient
    78,  # block diagrams, and the pictures that come with the book
    63,  # forest plots; rows of attention, and maps, beside their picture
    21,  # Colab's torch is too old, or pip fails; what the profile gpu takes
    94,  # models on the Hub
    18,  # Windows: files that are open, locks, consoles without Greek letters
    289,  # the explorer: rows packed for pages without a kernel
    24,  # tiles of several pairs; where they overtake the formula, as measured
    62,  # a study's comparisons as one forest plot
    12,  # the tracker's columns defined, supported families named
    607,  # photographs with COCO's masks, shards that go on with the next batch, `explain --masks`
    26,  # fully_shard tried out before it is trusted with gradients
    786,  # gradient-weighted maps, relevance, occlusion, integrated gradients; interventions; SaCo
    178,  # rollout as a graph
)
LIBRARY_LINES, FILE_LINES, FUNCTION_LINES = 9000 + sum(ADDED), 400, 80
# A kernel is one function by its nature: what it keeps on the chip cannot be handed to another.
KERNELS = "svit_utils/attention/backends/kernels.py"


def sources() -> list[Path]:
    assert ROOT is not None
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    assert ROOT is not None
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_library_is_small() -> None:
    count = sum(lines(path) for path in sources() if name_of(path).startswith("svit_utils/"))
    assert 1000 < count <= LIBRARY_LINES, f"svit_utils has {count} lines"


def test_no_file_is_long() -> None:
    long = {name_of(path): lines(path) for path in sources() if lines(path) > FILE_LINES}
    long.pop(KERNELS, None)
    assert not long


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_is_long() -> None:
    long = {
        f"{name_of(path)}: {name}": length
        for path in sources()
        if name_of(path) != KERNELS
        for name, length in functions(path)
        if length > FUNCTION_LINES
    }
    assert not long


def test_nothing_private_is_imported_from_a_neighbour() -> None:
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                found += [f"{name_of(path)}: {a.name}" for a in node.names if a.name.startswith("_")]
    assert not found


@pytest.mark.parametrize("module", ["svit_utils", "svit_utils.attention"])
def test_the_operator_comes_without_pandas_and_matplotlib(module: str) -> None:
    program = f"import sys, {module}; print([m for m in ('pandas', 'matplotlib', 'captum') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
