"""Models on the Hugging Face Hub: huggingface_hub's own requests, answered by a server on this machine.

The Hub itself is not at hand. The server keeps what is uploaded in a folder, and answers as the Hub's documented HTTP
interface does for small files.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from svit_course.notebooks import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys, timm, torch
from svit_utils import LearnableThreshold, densify, sparsify
from svit_utils.hub import load_from_hub, push_to_hub
from svit_utils.models import create_model

torch.manual_seed(0)
model = create_model("test_vit", num_classes=5).eval()
sparsify(model, LearnableThreshold(0.02, per="head"))
if len(sys.argv) > 1:  # what cannot be saved
    model.pretrained_cfg = {"architecture": "no_such_model"}
    push_to_hub(model, "someone/model")
name = push_to_hub(model, "someone/model", {"accuracy": 0.5}, token="hf_none")
assert name == "hf-hub:someone/model"
x = torch.randn(2, 3, 160, 160)
for address in ("someone/model", name):
    back, card = load_from_hub(address, token="hf_none")
    assert torch.equal(back(x), model(x)) and card["accuracy"] == 0.5
dense = timm.create_model(name, pretrained=True).eval()
assert torch.equal(dense(x), densify(model)(x))
print("all the same")
"""


class Hub(BaseHTTPRequestHandler):
    """The few addresses that an upload and a download of small files need."""

    folder: Path
    seen: list[str]

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.answer(200, {"url": f"http://{self.headers['Host']}/someone/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            self.answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    (self.folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"http://{self.headers['Host']}/someone/model/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer(200, {})

    def do_GET(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            file = self.folder / path.rpartition("/")[2]
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            content = file.read_bytes()
            return self.answer(200, content, ETag=f'"{len(content)}-{file.name}"', X_Repo_Commit=COMMIT)
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT} for p in self.folder.iterdir()
            ]
            return self.answer(200, json.dumps(entries).encode())
        siblings = [{"rfilename": each.name} for each in sorted(self.folder.iterdir())]
        return self.answer(200, {"id": "someone/model", "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    (tmp_path / "repository").mkdir()
    handler = type("Handler", (Hub,), {"folder": tmp_path / "repository", "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def run(server: ThreadingHTTPServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SVIT_"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.slow
def test_a_model_goes_up_and_comes_back_with_its_cut(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(hub.RequestHandlerClass.seen)
    assert done.stdout.strip() == "all the same"
    files = {path.name: path for path in (tmp_path / "repository").iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    assert config["architecture"] == "test_vit" and config["pretrained_cfg"]["num_classes"] == 5
    page = files["README.md"].read_text(encoding="utf-8")
    assert 'load_from_hub("someone/model")' in page and page.startswith("---\nlibrary_name: timm\n")


@pytest.mark.slow
def test_what_cannot_be_saved_is_not_uploaded(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "home", "without a name")
    assert done.returncode and "does not say which timm model it is" in done.stderr
    assert not hub.RequestHandlerClass.seen
