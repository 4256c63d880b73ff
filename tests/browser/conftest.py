"""JupyterLab on a copy of the notebooks, and a page of headless Chromium that notes what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from svit_course import notebooks
from tools.book import find_chromium

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> str:
    try:
        return find_chromium()
    except RuntimeError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab of this environment; the notebooks are copied, so that saving changes nothing."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(notebooks.NOTEBOOKS, home / "notebooks", ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The reader's own settings, kernels and workspaces stay out of the test, and the news question does not pop up.
    own = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    settings = home / "JUPYTER_CONFIG_DIR" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}), encoding="utf-8"
    )
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}", "--port-retries=0"]
    command += ["--ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root", f"--ServerApp.root_dir={home}"]
    log = (home / "log.txt").open("wb")
    # As in an environment that `make environment` has just made, whatever was set there since.
    own["JUPYTER_CONFIG_PATH"] = str(notebooks.ROOT / "tools" / "jupyter" / "everyone")
    environment = os.environ | own | {"SVIT_PROFILE": "cpu", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    text = Path(log.name).read_text(encoding="utf-8", errors="replace")
                    pytest.fail(f"JupyterLab did not start:\n{text[-2000:]}")
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


@pytest.fixture
def page(chromium: str, tmp_path: Path):
    """A page with `.problems`: errors of the console and of scripts, and requests that left this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=chromium,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 1000},
        )
        page = context.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if _elsewhere(request.url) else None)
        page.problems = problems
        yield page
        context.close()


def _elsewhere(url: str) -> bool:
    return url.startswith(("http:", "https:", "ws:", "wss:")) and "127.0.0.1" not in url.split("/")[2]
