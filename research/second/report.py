"""The second study's files of tables, from its recorded scores and nothing else: the same rows give the same bytes.

``settings.csv``: each setting's accuracy, sparsity and maps, means over its seeds. ``contrasts.csv``: the plan's
comparisons. ``margins.csv``: which settings are not inferior to dense attention by more than a point. ``choice.csv``:
the candidates for the version that holds; ``confirmed.csv``: what became of the one that was chosen.
``progress.csv``: how many runs are planned and recorded, by part, setting and budget.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from research.rows import write_csvs
from research.second.choice import choice_table, confirmed_table
from research.second.runs import chosen_setting
from research.second.tables import contrast_table, margin_table, progress_table, setting_table
from research.study.studies import Study, get_study


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """All tables by file name; `confirmed` only once a setting is chosen."""
    found = {
        "settings": setting_table(study),
        "contrasts": contrast_table(study),
        "margins": margin_table(study),
        "choice": choice_table(study),
        "progress": progress_table(study),
    }
    chosen = chosen_setting(study.out)
    if chosen is not None:
        found["confirmed"] = confirmed_table(get_study("confirmed"), chosen)
    return {name: table for name, table in found.items() if len(table)}


def write_tables(study: Study, out: str | Path | None = None) -> list[Path]:
    """Write `tables` as CSV into ``tables/`` of the study, or of ``out``."""
    return write_csvs(tables(study), (study.out if out is None else Path(out)) / "tables")
