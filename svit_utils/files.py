"""Files that are written whole or not at all, and tables as CSV."""

import csv
import io
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; at the end of the ``with`` block it is renamed to ``path``.

    A rename is atomic, so a reader finds the old file or the new one, never half of one. The folder is made if it is
    missing. Where the block raises, the old file stays and the temporary one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.touch()
        usual = partial.stat().st_mode  # as the umask says; safetensors makes its files readable for the owner only
        yield partial
        partial.chmod(usual)
        _rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename(partial: Path, path: Path) -> None:
    """Rename, waiting a little where Windows refuses because a virus scanner or another reader has ``path`` open."""
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8, None):
        try:
            return os.replace(partial, path)
        except PermissionError as error:
            if wait is None:
                reason = f"{error.strerror}: the folder is protected, or a program has the file open; close it there"
                raise PermissionError(error.errno, reason, str(path)) from error
            time.sleep(wait)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` (text as UTF-8), replacing an existing file whole or not at all; returns the path."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def write_rows(path: str | os.PathLike[str], columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a CSV file with a header, replacing an existing one whole or not at all; returns the path.

    Raises:
        ValueError: a row has a key that is not among ``columns``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_file(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, every value as text; no rows where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
