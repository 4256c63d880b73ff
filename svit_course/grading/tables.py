"""Tables that grading writes and reads again after a spreadsheet has saved them in its own way."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from svit_course.grading.submissions import JOINERS
from svit_utils.files import write_rows

MESSAGE = 2000  # characters of a message
Row = dict[str, str]
_FORMULA = re.compile(r"'*[=+\-@]")  # what a spreadsheet computes, or what was already kept from it


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file that a spreadsheet opens without running anything; columns that a row lacks stay empty."""
    write_rows(path, columns, ({name: _harmless(str(row.get(name, ""))) for name in columns} for row in rows))


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a table; nothing where there is no file.

    It may be separated by commas, by semicolons (as Excel writes it in German) or by tabs, in UTF-8, UTF-16 or in the
    code page of Western Windows.

    Raises:
        ValueError: it is no CSV.
    """
    if not path.is_file():
        return [], []
    text = _decoded(path.read_bytes())
    if text[:4].lower() == "sep=":  # a line for Excel alone
        text = text.partition("\n")[2]
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        rows = [{key.strip(): _honest(value or "") for key, value in row.items() if key} for row in reader]
        return [name.strip() for name in reader.fieldnames or ()], rows
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def number(value: float) -> str:
    """As it stands in a table: without zeros that say nothing."""
    return f"{value:g}"


def short(text: str) -> str:
    """A line of sane length without control characters."""
    text = " ".join(writable(text).split())
    return f"{text[:MESSAGE]} …" if len(text) > MESSAGE else text


def writable(text: str) -> str:
    """What cannot be printed, lone surrogates and what steers a terminal included, as escapes; spaces stay."""
    return "".join(c if c.isprintable() or c.isspace() or c in JOINERS else ascii(c)[1:-1] for c in text)


def _harmless(text: str) -> str:
    """A cell of sane length that a spreadsheet does not take for a formula, without control characters."""
    text = short(text)
    return f"'{text}" if _FORMULA.match(text) else text


def _honest(text: str) -> str:
    """What `_harmless` was given, as far as names and comments go."""
    return text[1:] if text[:1] == "'" and _FORMULA.match(text) else text
