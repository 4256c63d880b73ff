"""Writing recorded CSV files: where a row came from, rows added to a file, and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svit_utils.files import read_rows, write_rows
from svit_utils.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd


def origin(**extra: Any) -> dict[str, Any]:
    """`provenance` of rows that have a seed of their own, or none."""
    return {key: value for key, value in provenance(**extra).items() if key != "seed"}


def replace_rows(
    path: Path,
    new: Sequence[Mapping[str, Any]],
    *,
    key: Sequence[str],
    order: Callable[[Mapping[str, Any]], Any],
    columns: Iterable[str],
) -> None:
    """Write ``new`` rows into a CSV file, in place of those that agree with one of them in the columns ``key``.

    Args:
        path: the file; made if it is missing.
        new: the rows.
        key: what names a row.
        order: sorts all rows.
        columns: the file's, in order; those that only older rows have are kept, after them.
    """

    def name(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in key)

    replaced = {name(row) for row in new}
    rows = sorted([*(row for row in read_rows(path) if name(row) not in replaced), *new], key=order)
    write_rows(path, dict.fromkeys([*columns, *(column for row in rows for column in row)]), rows)


def write_csvs(tables: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write each table as ``<name>.csv`` into ``folder``, with four significant digits; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        paths.append(folder / f"{name}.csv")
        table.to_csv(paths[-1], index=False, float_format="%.4g", lineterminator="\n")
    return paths
