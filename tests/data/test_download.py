"""Servers that drip, that never end, that stop: a mirror that is no good is left soon, and the next one is used."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from svit_utils.data import DataNotFoundError, cifar, cifar10, download

BODY = bytes(range(256)) * 8
SIZE = len(BODY)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], str]]:
    """Starts a server that answers with a function; short spans, so that the tests are quick."""
    monkeypatch.setattr(download, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(download, "LEAST_RATE", 2000)
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(OSError):  # the client has gone, as it should
                    answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def drip(write: Callable[[bytes], object], content: bytes, pause: float = 0.05) -> None:
    for k in range(400):
        write(content[k % len(content) :][:1])
        time.sleep(pause)


def headers(request: BaseHTTPRequestHandler, **fields: str) -> None:
    request.send_response(200)
    for name, value in fields.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()


def dripping_headers(request: BaseHTTPRequestHandler) -> None:
    drip(request.wfile.write, b"HTTP/1.0 200 OK\r\nX-Wait: " + b"x" * 1000)


def dripping_status(request: BaseHTTPRequestHandler) -> None:
    drip(request.wfile.write, b"HTTP/1.0 200 " + b"O" * 1000)


def dripping_body(request: BaseHTTPRequestHandler) -> None:
    headers(request, Content_Length=str(SIZE))
    drip(request.wfile.write, BODY)


def dripping_chunks(request: BaseHTTPRequestHandler) -> None:
    request.protocol_version = "HTTP/1.1"
    headers(request, Transfer_Encoding="chunked")
    drip(lambda part: request.wfile.write(b"1\r\n" + part + b"\r\n"), BODY)


def dripping_chunk_size(request: BaseHTTPRequestHandler) -> None:
    request.protocol_version = "HTTP/1.1"
    headers(request, Transfer_Encoding="chunked")
    drip(request.wfile.write, b"0" * 1000)


def silent(request: BaseHTTPRequestHandler) -> None:
    time.sleep(20)


def stops_half_way(request: BaseHTTPRequestHandler) -> None:
    headers(request, Content_Length=str(SIZE))
    request.wfile.write(BODY[: SIZE // 2])
    time.sleep(20)


SLOW = [dripping_headers, dripping_status, dripping_body, dripping_chunks, dripping_chunk_size, silent, stops_half_way]


@pytest.mark.parametrize("answer", SLOW)
def test_a_slow_server_is_left_soon(
    answer: Callable[[BaseHTTPRequestHandler], None], serve: Callable[..., str], tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"too slow|timed out"):
        download.download(serve(answer), tmp_path / "a", SIZE)
    assert time.monotonic() - start < 5


def test_the_deadline(serve: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast enough, and yet it never comes to an end."""
    monkeypatch.setattr(download, "DEADLINE_S", 1.0)

    def steady(request: BaseHTTPRequestHandler) -> None:
        headers(request)
        for _ in range(400):
            request.wfile.write(BODY)
            time.sleep(0.05)

    with pytest.raises(TimeoutError, match="not done after 1 s"):
        download.download(serve(steady), tmp_path / "a", 10**9)


def test_an_endless_stream_stops_at_the_known_size(serve: Callable[..., str], tmp_path: Path) -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        headers(request)
        while True:
            request.wfile.write(BODY)

    with pytest.raises(ValueError, match="does not end after the archive's 10,000 bytes"):
        download.download(serve(endless), tmp_path / "a", 10_000)
    assert (tmp_path / "a").stat().st_size <= 10_000

    def announced(request: BaseHTTPRequestHandler) -> None:
        headers(request, Content_Length=str(10**12))
        request.wfile.write(BODY)

    with pytest.raises(ValueError, match="announces 1,000,000,000,000 bytes"):
        download.download(serve(announced), tmp_path / "b", SIZE)
    assert not (tmp_path / "b").exists() or (tmp_path / "b").stat().st_size == 0


def test_a_good_server_redirected_and_a_file(serve: Callable[..., str], tmp_path: Path) -> None:
    def good(request: BaseHTTPRequestHandler) -> None:
        headers(request, Content_Length=str(SIZE))
        request.wfile.write(BODY)

    url = serve(good)

    def elsewhere(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.end_headers()

    for source in (url, serve(elsewhere)):
        assert download.download(source, tmp_path / "a", SIZE) == SIZE
        assert (tmp_path / "a").read_bytes() == BODY
    assert download.download((tmp_path / "a").as_uri(), tmp_path / "b", SIZE) == SIZE


@pytest.mark.parametrize("what", ["the set", "the folder", "a loop"])
def test_a_dangling_link_is_said_at_once(what: str, serve: Callable[..., str], tmp_path: Path) -> None:
    asked = []
    link = tmp_path / cifar.FOLDER if what != "the folder" else tmp_path / "data"
    link.symlink_to(link if what == "a loop" else tmp_path / "gone")
    root = link if what == "the folder" else tmp_path
    with pytest.raises(DataNotFoundError, match=r"is a link to .*, which is not there: mend or remove it"):
        cifar10(root=root, mirrors=[serve(asked.append)])
    assert asked == []


def test_what_a_killed_download_left_goes_at_the_next_start(tmp_path: Path) -> None:
    program = (
        "import os, sys; from svit_utils.data import cifar; os.mkdir(os.path.join(sys.argv[1], cifar._owned() + 'x'))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)  # and the process is over
    [dead] = tmp_path.iterdir()
    (dead / "part").write_bytes(b"x" * 1000)
    own = tmp_path / (cifar._owned() + "y")  # of a process that runs: this one
    foreign = tmp_path / dead.name.replace(cifar._owned().rsplit("-", 2)[0], cifar._PARTIAL + "elsewhere")
    for folder in (own, foreign):
        folder.mkdir()
    cifar._remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([own.name, foreign.name])
