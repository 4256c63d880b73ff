"""Every block of notebooks/exports.md, as it stands there, with a small model in the place of the pretrained one."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from svit_course.notebooks import ROOT

PAGE = (ROOT / "notebooks" / "exports.md").read_text(encoding="utf-8")
START, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
PRETRAINED = '"vit_tiny_patch16_224", pretrained=True'
SMALL = '"vit_tiny_patch16_224", img_size=56, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5'


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def block(word: str) -> str:
    [found] = [each for each in BLOCKS if word in each]
    return found


def after(*words: str) -> dict[str, Any]:
    """The names after the page's first block and those in which the words stand."""
    assert START.count(PRETRAINED) == 1
    start = START.replace(PRETRAINED, SMALL).replace("224, 224", "56, 56")
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exec(start, scope)
        for parameter in scope["model"].parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # or attention is so flat that every row is empty
        for word in words:
            exec(block(word), scope)
    return scope


def agrees(scope: dict[str, Any]) -> None:
    """To 1e-4 at other batch sizes, where the cut is in force."""
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            expected, got = scope["model"](x), scope["run"](x)
        assert (expected - got).abs().max() < 1e-4, n
    with torch.no_grad():
        from svit_utils import densify

        dense = densify(scope["model"])(x)
    assert (dense - expected).abs().max() > 1e-2, "without the cut it would be another program"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_torch_export() -> None:
    agrees(after("torch.export.save"))


@needs("onnx", "onnxruntime", "onnxscript")
def test_onnx_dynamo() -> None:
    agrees(after("dynamo=True", "onnxruntime"))


@needs("onnx", "onnxruntime")
def test_onnx_legacy() -> None:
    agrees(after("dynamo=False", "onnxruntime"))


def test_torch_jit_trace() -> None:
    agrees(after("torch.jit.trace"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or not shutil.which(os.environ.get("CXX", "g++")), reason="needs C++")
def test_aot_inductor() -> None:
    agrees(after("aoti_compile_and_package"))


def test_every_block_of_the_page_is_tried() -> None:
    tried = (
        "torch.export.save",
        "dynamo=True",
        "dynamo=False",
        "onnxruntime",
        "torch.jit.trace",
        "aoti_compile",
        "push_to_hub",
    )
    assert len(BLOCKS) == len(tried) and all(block(word) for word in tried)
