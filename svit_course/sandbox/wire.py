"""What goes between the grader and its sandboxes: a short line of JSON, and bytes. Nothing is unpickled.

The bytes are a notebook, pictures, or arrays as `encode` writes them; the grader hands them on and does not look into
them.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

_ARRAY = "__array__"
_KINDS = "biufc"  # numbers and booleans
KINDS = {"missing": list, "defined": list, "origin": list, "ready": bool, "bytes": int}  # the others are texts
LINE = 64 * 2**10  # bytes of the line
LONGEST = 16 * 2**20  # bytes that a sandbox may send; a function that returns gigabytes is not believed, and not read


def send(stream: Any, message: dict[str, Any], data: bytes = b"") -> None:
    """Write one message."""
    stream.write(packed(message, data))
    stream.flush()


def packed(message: dict[str, Any], data: bytes) -> bytes:
    """The bytes of one message."""
    return (encode({**message, "bytes": len(data)}) + "\n").encode() + data


def receive(stream: Any) -> tuple[dict[str, Any], bytes] | None:
    """Read one message, from somebody who is trusted; None at the end."""
    line = stream.readline()
    if not line:
        return None
    message: dict[str, Any] = json.loads(line)
    return message, stream.read(message.pop("bytes"))


def unpacked(got: bytearray | bytes) -> tuple[dict[str, Any], bytes] | int:
    """The message, from somebody who is not trusted; or how many bytes it takes to know more.

    Raises:
        ValueError: it is none, or too long.
    """
    end = got.find(b"\n", 0, LINE + 1)
    if end < 0 and len(got) <= LINE:
        return len(got) + 1
    message = decode(bytes(got[:end])) if end >= 0 else None
    if not isinstance(message, dict) or any(type(value) is not KINDS.get(key, str) for key, value in message.items()):
        raise ValueError("not a message")
    size = message.pop("bytes", -1)
    if not 0 <= size <= LONGEST or len(got) > end + 1 + size:
        raise ValueError("not a message")
    return (message, bytes(got[end + 1 :])) if len(got) == end + 1 + size else end + 1 + size


def encode(message: Any) -> str:
    """One line of text. Arrays of anything but numbers become a description."""
    return json.dumps(message, default=_array)


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in _KINDS:
            data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            return {_ARRAY: [value.dtype.str, list(value.shape), data]}
        return f"<array of {value.dtype}>"
    return f"<{type(value).__name__}>"


def decode(line: str | bytes) -> Any:
    """The message of a line.

    Raises:
        ValueError: it is not one that `encode` wrote.
    """
    try:
        return json.loads(line, object_hook=_restored)
    except Exception as error:  # a sandbox may write anything: nesting that is too deep, shapes that are no numbers
        raise ValueError(f"not a message ({type(error).__name__})") from error


def _restored(found: dict[str, Any]) -> Any:
    if set(found) != {_ARRAY}:
        return found
    kind, shape, data = found[_ARRAY]
    dtype = np.dtype(str(kind))
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise ValueError(f"no array of {dtype} is expected")
    return np.frombuffer(base64.b64decode(data), dtype=dtype).reshape([int(n) for n in shape]).copy()
