"""What the README says can be typed: its lines of Python, and its ways to install the library."""

from __future__ import annotations

import contextlib
import io
import re

import pandas as pd
import pytest

from svit_course.notebooks import ROOT
from svit_utils import __version__

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = '"vit_base_patch16_224", pretrained=True'


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_dozen_lines_run_and_hide_no_column(width: int) -> None:
    """pandas shortens a wide table to a terminal's width: eight of twelve columns were not shown."""
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert code.count(MODEL) == 1
    code = code.replace(MODEL, '"test_vit", pretrained=False, img_size=224')  # the same with small weights
    printed, names = io.StringIO(), {}
    with pd.option_context("display.width", width), contextlib.redirect_stdout(printed):
        exec(code, names)
    table = names["tracker"].table()
    [header] = [line for line in printed.getvalue().splitlines() if "kept_mean" in line]
    assert header.split() == list(table.columns) and len(table.columns) >= 12
    assert len(printed.getvalue().split(header)[1].splitlines()) - 1 == 5 < len(table)
    assert str(names["tracker"].summary()).splitlines()[0] in printed.getvalue()


def test_the_wheel_that_is_named_is_the_one_that_is_made() -> None:
    assert set(re.findall(r"selectivevit-(\S+?)-py3-none-any\.whl", README)) == {__version__}
