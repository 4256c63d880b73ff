"""Download one file of known size, from a server that may be slow, endless or silent."""

import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TIMEOUT_S = 30.0  # without a byte, and the span over which the rate is measured
LEAST_RATE = 20_000  # bytes a second; a slower server is given up
DEADLINE_S = 3600.0  # for the whole file


def download(source: str, path: Path, size: int) -> int:
    """Write what ``source`` (http, https or file) serves to ``path``; returns the number of bytes.

    Raises:
        ValueError: more than ``size`` bytes, or fewer than the server announced.
        TimeoutError: slower than `LEAST_RATE`, in its headers or its body, or not done within `DEADLINE_S`.
        OSError, http.client.HTTPException: what the network and the server can do wrong.
    """
    from tqdm.auto import tqdm

    request = urllib.request.Request(source, headers={"User-Agent": "svit-utils"})
    with _watched() as (opener, received), opener.open(request, timeout=TIMEOUT_S) as answer, path.open("wb") as file:
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        if total > size:
            raise ValueError(f"announces {total:,} bytes, and the archive has {size:,}")
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
            read = getattr(answer, "read1", answer.read)  # a file's answer has `read` only
            while part := read(1 << 16):
                done += len(part)
                if done > size:
                    raise ValueError(f"does not end after the archive's {size:,} bytes")
                file.write(part)
                received(len(part))
                bar.update(len(part))
    if total and done != total:
        raise ValueError(f"ended after {done:,} of {total:,} bytes")
    return done


@contextmanager
def _watched() -> Iterator[tuple[urllib.request.OpenerDirector, Callable[[int], None]]]:
    """(opener, a function that is told of every part): shuts the connections of a server that is too slow.

    A socket's own timeout starts anew with every byte, so that a byte a second would keep it waiting for ever.
    """
    sockets: list[socket.socket] = []
    counted, over, fault = [0], threading.Event(), ""

    def watch() -> None:
        nonlocal fault
        start, before = time.monotonic(), 0
        while not fault and not over.wait(TIMEOUT_S):
            if counted[0] - before < LEAST_RATE * TIMEOUT_S:
                fault = f"too slow: {counted[0] - before:,} bytes in {TIMEOUT_S:g} s"
            elif time.monotonic() - start > DEADLINE_S:
                fault = f"not done after {DEADLINE_S:g} s"
            before = counted[0]
        for made in sockets if fault else ():
            with suppress(OSError):  # closed by now
                made.shutdown(socket.SHUT_RDWR)

    def received(amount: int) -> None:
        counted[0] += amount

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield _opener(sockets), received
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise (TimeoutError(fault) if fault else error) from error
    finally:
        over.set()
    if fault:
        raise TimeoutError(fault)


def _opener(sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """An opener that leaves the socket of each connection, redirections included, in ``sockets``."""

    def keeping(kind: Any) -> Any:
        class Kept(kind):
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        return Kept

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(keeping(http.client.HTTPConnection), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(keeping(http.client.HTTPSConnection), req)

    return urllib.request.build_opener(Http, Https)
