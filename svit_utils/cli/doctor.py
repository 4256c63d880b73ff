"""``python -m svit_utils doctor``: what is installed, on which device, and which data and weights are found.

Only the standard library is imported at the top. Every other package is tried in a process of its own, so that one
that cannot be imported, or that takes the interpreter down with it, is a line of the report and not its end.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svit_utils import paths

# Import name -> name of the distribution, where the two differ.
_DISTRIBUTIONS = {"pytorch_grad_cam": "grad-cam", "PIL": "pillow"}
_LIBRARIES = "torch torchvision timm numpy scipy pandas statsmodels safetensors accelerate captum pytorch_grad_cam"
NEEDED = {name: _DISTRIBUTIONS.get(name, name) for name in f"{_LIBRARIES} networkx matplotlib PIL psutil tqdm".split()}
FOR_NOTEBOOKS = {"ipywidgets": "ipywidgets", "anywidget": "anywidget", "jupyterlab": "jupyterlab", "nbval": "nbval"}

# What an import says when torch and torchvision come from different builds or releases.
MISMATCH_SIGNS: tuple[str, ...] = ("torchvision::nms", "Couldn't load custom C++ ops", "undefined symbol")
MISMATCH_SIGNS += ("compiled with different CUDA", "partially initialized module 'torchvision'")

# Imports the modules it is given, one after the other, and prints a line of JSON for each.
_PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    found = {"module": name}
    try:
        module = importlib.import_module(name)
        found["version"] = str(getattr(module, "__version__", ""))
        if name == "torch":
            found["device"] = "cpu"
            if module.cuda.is_available():
                found["device"] = "cuda (" + module.cuda.get_device_name(0) + ")"
            elif getattr(module.backends, "mps", None) is not None and module.backends.mps.is_available():
                found["device"] = "mps"
            found["threads"] = module.get_num_threads()
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"
    print("\\nsvit-doctor " + json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Import:
    """One package: its version, and the error if it cannot be imported. `details` holds torch's device and threads."""

    module: str
    distribution: str
    version: str | None
    error: str | None
    details: dict[str, object] = field(default_factory=dict)

    @property
    def missing(self) -> bool:
        """Not installed, as against installed and broken."""
        return self.error is not None and self.version is None


def try_imports(packages: Mapping[str, str], timeout: float = 300.0) -> list[Import]:
    """Import each module (import name -> distribution name) in another interpreter and say how it went.

    They share one interpreter, which is quick; when a module takes it down, the ones after it get a new one.
    """
    left, answers = list(packages), {}
    while left:
        command = [sys.executable, "-c", _PROBE, *left]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=timeout, check=False)
            output, fate = done.stdout, f"the import ended the interpreter (exit status {done.returncode})"
        except subprocess.TimeoutExpired as expired:
            raw = expired.stdout or b""
            output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            fate = f"the import did not end within {timeout:.0f} s"
        for line in output.splitlines():
            if line.startswith("svit-doctor "):
                found = json.loads(line.removeprefix("svit-doctor "))
                answers[found.pop("module")] = found
        left = [module for module in left if module not in answers]
        if left:  # the first one without an answer is the one that brought the interpreter down
            answers[left.pop(0)] = {"error": fate}
    return [_as_import(module, name, answers[module]) for module, name in packages.items()]


def _as_import(module: str, distribution: str, found: dict[str, Any]) -> Import:
    try:
        version: str | None = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = found.get("version") or None
    details = {key: value for key, value in found.items() if key not in ("version", "error")}
    return Import(module, distribution, version, found.get("error"), details)


def advice(imports: Iterable[Import]) -> list[str]:
    """What to do about each package that cannot be imported; a mismatch of torch and torchvision comes first."""
    by_name = {item.module: item for item in imports}
    broken = [item for item in by_name.values() if item.error]
    lines = []
    mismatched = [item for item in broken if any(sign in str(item.error) for sign in MISMATCH_SIGNS)]
    if mismatched:
        torch, vision = by_name.get("torch"), by_name.get("torchvision")
        lines.append(
            f"torch ({_version(torch)}) and torchvision ({_version(vision)}) do not match: they come from different "
            "releases or builds, and torchvision's operators cannot be loaded "
            "(the error is known as 'operator torchvision::nms does not exist'). "
            "Install the two together, from one place: "
            "pip uninstall -y torch torchvision && pip install --no-cache-dir 'torch==2.13.0' 'torchvision==0.28.0' "
            "(or `make clean environment` in the repository). timm needs torchvision, so it fails for the same reason."
        )
    for item in broken:
        if item in mismatched or (mismatched and item.module == "timm"):
            continue
        if item.missing:
            lines.append(f"{item.distribution} is not installed: pip install '{item.distribution}'")
        else:
            lines.append(f"{item.distribution} {_version(item)} is installed but cannot be imported ({item.error})")
    return lines


def _version(item: Import | None) -> str:
    return (item and item.version) or "not installed"


def data_lines() -> list[str]:
    """What is found of data, weights, checkpoints and results, one line each."""
    data, weights = paths.data_dir(), paths.weights_dir()
    checkpoints, results = paths.checkpoints_dir(), paths.results_dir()
    lines = ["PlantedShapes: generated, always there"]
    cifar = data / "cifar-10-batches-py"
    state = "found" if (cifar / "data_batch_1").is_file() else "not found (downloaded when a chapter asks for it)"
    lines.append(f"CIFAR-10: {state}, {cifar}")
    if weights is None:
        lines.append("local weights: SVIT_WEIGHTS_DIR is not set (timm downloads pretrained weights when asked)")
    else:
        lines.append(f"local weights: {_names(weights, '*.safetensors')}, {weights}")
    lines.append(f"embedded checkpoints: {_names(checkpoints, '*.safetensors')}, {checkpoints}")
    lines.append(f"recorded results: {_names(results, '*.csv')}, {results}")
    return lines


def _names(folder: Path, pattern: str) -> str:
    if not folder.is_dir():
        return "the folder does not exist"
    names = sorted(path.stem for path in folder.glob(pattern))
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def run() -> int:
    """Print the report; 0 when everything the library needs can be imported, else 1."""
    print(f"python       {platform.python_version()}  {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")
    tried = try_imports({**NEEDED, **FOR_NOTEBOOKS})
    imports, extra = tried[: len(NEEDED)], tried[len(NEEDED) :]
    for item in imports + extra:
        state = item.version or ("installed" if not item.error else "not installed")
        problem = f"  CANNOT BE IMPORTED: {item.error}" if item.error and not item.missing else ""
        note = "  (for the notebooks and their tests only)" if item in extra and item.error else ""
        print(f"{item.distribution:<12} {state}{problem}{note}")
    torch = imports[0]
    if not torch.error:
        print(f"\ndevice       {torch.details.get('device')}, {torch.details.get('threads')} threads")
        print(f"profile      {os.environ.get('SVIT_PROFILE') or 'SVIT_PROFILE is not set'}")
    print("", *data_lines(), "", sep="\n")
    cures = advice(imports)
    for line in cures:
        print(f"PROBLEM: {line}")
    print("Something needs care, see above." if cures else "All is well.")
    return 1 if cures else 0
