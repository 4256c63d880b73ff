"""The explorer in Chromium, on a page and in JupyterLab, against the Python functions that are its reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from svit_course import notebooks
from svit_utils.show.explorer import ExplorerData, edges, explorer_html

pytest.importorskip("anywidget")
pytest.importorskip("playwright")
pytestmark = pytest.mark.browser

SHOTS = notebooks.ROOT / "build" / "browser"
START = {"picture": 0, "layer": 1, "head": 1, "token": 0, "tau": 0.02}
# The cell that the test in JupyterLab runs makes the same data.
MAKE = """
import torch
from timm.models.vision_transformer import VisionTransformer
from svit_utils.show.explorer import explorer_data

torch.manual_seed(0)
model = VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
with torch.no_grad():
    for block in model.blocks:
        block.attn.qkv.weight[:48] *= 12
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
masks = torch.zeros(2, 32, 32, dtype=torch.bool)
masks[:, 8:20, 12:30] = True
data = explorer_data(model, images, masks=masks, names=["one", "two"], threshold=0.02)
"""
FIGURE = "document.querySelector('.svit-explorer').explorer"


@pytest.fixture(scope="module")
def data() -> ExplorerData:
    names: dict[str, object] = {}
    exec(MAKE, names)
    found = names["data"]
    assert isinstance(found, ExplorerData)
    return found


@pytest.fixture
def shown(data: ExplorerData, page, tmp_path: Path):
    """The explorer on a page of its own."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Explorer</title>"
    body = f"<main><h1>Explorer</h1>{explorer_html(*data.packed(**START))}</main>"
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><html lang='en'>{head}<body>{body}</body></html>", "utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function(f"{FIGURE}?.words.textContent", timeout=20_000)
    return page


def compare(page, data: ExplorerData, **changes: object) -> None:
    """The weights on show are Python's: the same survivors, and values within what the bytes' error can do."""
    at = page.evaluate(f"changes => {{ {FIGURE}.set(changes); return {FIGURE}.state; }}", changes)
    numbers = page.evaluate(
        f"""() => Object.fromEntries(Object.entries({FIGURE}.numbers())
            .map(([name, row]) => [name, {{...row, weights: [...row.weights]}}]))"""
    )
    where = {name: at[name] for name in ("picture", "layer", "head", "token")}
    tau = float(np.float32(at["tau"]))
    dense = data.dense[tuple(where.values())]
    np.testing.assert_allclose(numbers["dense"]["weights"], dense, rtol=0.03, atol=1e-4)
    for name, sparse in (("drawn", False), ("sparse", True)):
        rows = (data.sparse if sparse else data.dense)[tuple(where.values())]
        expected = data.weights(**where, tau=tau, empty_rows=at["empty_rows"], sparse=sparse)
        found, weights = numbers[name], np.asarray(numbers[name]["weights"])
        capped = at["empty_rows"] == "cap" and rows.max() / 2 < tau
        if not capped:  # `cap` cuts such a row between two stops, where the error can tip a key over
            np.testing.assert_array_equal(weights > 0, expected > 0)
            assert found["kept"] == int((rows > tau).sum())
        assert found["empty"] == (not (rows > tau).any())
        assert found["mass"] == pytest.approx(float(rows[rows > tau].sum()), rel=0.03) or capped
        # A = R / Z: an error of 3 % in each p and in Z moves A by at most this.
        level = min(tau, float(rows.max()) / 2) if capped else tau
        z = float(np.maximum(rows - level, 0).sum()) or 1.0
        bound = 0.03 * (rows + expected * rows[rows > level].sum()) / z + (0.03 * level / z if capped else 0)
        assert (np.abs(weights - expected) <= 1.1 * bound + 1e-4).all()


def test_the_page_computes_what_python_computes(shown, data: ExplorerData) -> None:
    stops = [float(edge) for edge in edges(65)[10:-1:17]]
    places = itertools.product((0, 1), (0, 1), (0, 1, 2), (0, 1, 33, 64))
    modes = itertools.cycle(("dense", "zero", "top1", "cap"))
    for number, (picture, layer, head, token) in enumerate(places):
        tau = stops[number % len(stops)]
        compare(shown, data, picture=picture, layer=layer, head=head, token=token, tau=tau, empty_rows=next(modes))
    assert shown.problems == []


def test_every_fallback_of_an_empty_row_is_told(shown, data: ExplorerData) -> None:
    said = {
        "dense": "fell back to its softmax",
        "zero": "this row reads nothing",
        "top1": "reads its largest key alone",
        "cap": "came down to half of the largest",
    }
    for mode, words in said.items():
        compare(shown, data, token=20, tau=0.9, empty_rows=mode)
        text = shown.locator(".svit-explorer [role=status]").inner_text()
        assert "every key was lost" in text and words in text
    compare(shown, data, token=20, tau=1e-4, empty_rows="dense")
    assert "lost" not in shown.locator(".svit-explorer [role=status]").inner_text()


def state(page) -> dict:
    return page.evaluate(f"() => {FIGURE}.state")


def test_mouse_keyboard_and_labels(shown) -> None:
    picture = shown.locator("[data-panel=picture] canvas")
    box = picture.bounding_box()
    shown.mouse.click(box["x"] + box["width"] * 2.5 / 8, box["y"] + box["height"] * 5.5 / 8)
    assert state(shown)["token"] == 1 + 5 * 8 + 2
    picture.focus()
    for key, token in (("ArrowRight", 44), ("ArrowDown", 52), ("ArrowLeft", 51), ("ArrowUp", 43), ("Home", 0)):
        picture.press(key)
        assert state(shown)["token"] == token, key
    assert picture.get_attribute("aria-valuetext").startswith("class token; ")
    picture.press("ArrowRight")
    assert state(shown)["token"] == 43  # back to the patch that it came from
    for _ in range(9):
        picture.press("ArrowRight")
    assert state(shown)["token"] == 1 + 5 * 8 + 7  # stays inside
    drawn = shown.locator("[data-panel=drawn] canvas")
    drawn.click(position={"x": 3, "y": 3})
    assert state(shown)["token"] == 1
    slider = shown.get_by_role("slider", name="threshold tau")
    before = state(shown)["tau"]
    slider.press("ArrowRight")
    assert before < state(shown)["tau"] < before * 1.07
    assert slider.get_attribute("aria-valuetext").startswith("tau 0.0")
    sorted_row = shown.locator("canvas.sorted")
    low = sorted_row.bounding_box()
    shown.mouse.click(low["x"] + 200, low["y"] + (low["height"] - 20) / 2)  # the middle of four decades
    assert state(shown)["tau"] == pytest.approx(0.01, rel=0.1)
    for label, value, name in (("Head", "2", "head"), ("Layer", "0", "layer"), ("Picture", "1", "picture")):
        shown.get_by_label(label, exact=True).select_option(value)
        assert state(shown)[name] == int(value)
    shown.get_by_label("An empty row gets").select_option("top1")
    shown.get_by_label("Query", exact=True).select_option("0")
    assert (state(shown)["empty_rows"], state(shown)["token"]) == ("top1", 0)
    assert all(
        shown.locator(".svit-explorer canvas:not([aria-hidden])").evaluate_all("all => all.map(c => c.ariaLabel)")
    )
    assert shown.problems == []


def test_light_dark_phone_and_still(shown) -> None:
    background = f"() => getComputedStyle({FIGURE}.card).backgroundColor"
    shown.screenshot(path=SHOTS / "explorer-light.png", full_page=True)
    assert shown.evaluate(background) == "rgb(255, 255, 255)"
    shown.evaluate("() => document.body.setAttribute('style', 'background: #14181e; color: #ddd')")
    shown.wait_for_timeout(100)
    assert shown.evaluate(background) == "rgb(27, 29, 33)"
    shown.screenshot(path=SHOTS / "explorer-dark.png", full_page=True)
    shown.set_viewport_size({"width": 390, "height": 844})
    shown.wait_for_timeout(200)
    assert shown.evaluate("() => document.documentElement.scrollWidth") == 390
    sides = shown.locator("[data-panel] canvas").evaluate_all("all => all.map(c => [c.clientWidth, c.clientHeight])")
    assert all(width == pytest.approx(height, abs=1) and width > 130 for width, height in sides)
    shown.screenshot(path=SHOTS / "explorer-phone.png", full_page=True)
    # Nothing moves by itself, so a wish for reduced motion has nothing to switch off.
    style = shown.evaluate(f"() => {FIGURE}.root.querySelector('style').textContent")
    assert "animation" not in style and "transition" not in style


def test_a_move_takes_less_than_a_frame(shown) -> None:
    """The quickest of many: what else the machine does at the moment adds to all of them."""
    times = shown.evaluate(
        f"""() => [...Array(50).keys()].map(token => {{
            {FIGURE}.set({{ token: token + 1 }});
            return {FIGURE}.milliseconds;
        }})"""
    )
    assert 0 < min(times) < 16


def test_in_jupyterlab_with_and_without_a_kernel(lab: str, page, data: ExplorerData) -> None:
    cell = f"{MAKE}\nfrom svit_utils.show.widgets import Explorer\n\nexplorer = Explorer(data, **{START!r})\nexplorer"
    report = "print('tau', explorer.tau, 'token', explorer.token); explorer.head = 2"
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    content = {
        "cells": [{**code, "id": f"c{i}", "source": source} for i, source in enumerate((cell, report))],
        "metadata": notebooks.KERNEL,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    page.goto(f"{lab}/lab")
    [allowed] = [cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "_xsrf"]
    server = {"headers": {"X-XSRFToken": allowed}}
    page.request.put(f"{lab}/api/contents/explorer.ipynb", data={"type": "notebook", "content": content}, **server)
    page.goto(f"{lab}/lab/workspaces/explorer/tree/explorer.ipynb?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    page.wait_for_function("document.body.innerText.includes('Idle')", timeout=90_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("document.querySelector('.svit-explorer')?.explorer?.words.textContent", timeout=120_000)

    picture = page.locator("[data-panel=picture] canvas")
    picture.click(position={"x": 3, "y": 3})
    for key in ("ArrowDown", "ArrowRight", "ArrowDown"):  # JupyterLab's own arrow keys would leave the cell
        picture.press(key)
    assert state(page)["token"] == 1 + 2 * 8 + 1
    for token, tau, mode in ((18, 0.02, "dense"), (64, 0.1, "zero"), (0, 0.05, "top1"), (30, 0.0025, "cap")):
        compare(page, data, token=token, tau=tau, empty_rows=mode)
    page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("document.body.innerText.includes('tau 0.0025 token 30')", timeout=60_000)
    page.wait_for_function(f"{FIGURE}.state.head === 2", timeout=20_000)  # set in Python, shown here
    page.screenshot(path=SHOTS / "explorer-lab.png")

    for session in page.request.get(f"{lab}/api/sessions").json():
        page.request.delete(f"{lab}/api/sessions/{session['id']}", **server)
    for token in (5, 50):
        compare(page, data, token=token, tau=0.01, empty_rows="dense")
    assert [text for text in page.problems if "kernel" not in text.lower()] == []
