"""How sparse the attention of a model is, layer by layer and head by head, in one streaming pass.

The numbers come from the weights that are multiplied with V, while the model runs; no map is kept. Two sparsities
are reported, because they differ where a row falls back: ``cut_sparsity``, the share of probabilities that do not
exceed tau, and ``applied_sparsity``, the share of exact zeros among the weights that were used.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svit_utils.attention.module import RowObserver, SparseAttentionMixin
from svit_utils.attention.rows import AttentionRows
from svit_utils.exclusive import exclusive
from svit_utils.files import write_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHARES = ("cut_sparsity", "applied_sparsity", "empty_rate", "kept_mass", "effective_support")
COLUMNS = ("kept_mean", "kept_p10", "kept_p50", "kept_p90", *SHARES)


@dataclass(frozen=True)
class TrackerSummary:
    """Means over layers and heads of the ``all`` rows of the table, and a warning where most rows are empty."""

    layers: int
    heads: int
    rows: int
    kept_mean: float
    cut_sparsity: float
    applied_sparsity: float
    empty_rate: float
    kept_mass: float
    effective_support: float
    warning: str | None

    def __str__(self) -> str:
        text = (
            f"{self.layers} layers, {self.heads} heads, {self.rows} attention rows: "
            f"{self.kept_mean:.1f} keys kept per row, {self.cut_sparsity:.1%} cut, "
            f"{self.applied_sparsity:.1%} applied, {self.empty_rate:.1%} of the rows empty, "
            f"kept mass {self.kept_mass:.3f}, effective support {self.effective_support:.1f}"
        )
        return f"{text}\nWARNING: {self.warning}" if self.warning else text


class TokenSparsityTracker:
    """Collects the statistics of every sparse attention module of a model while it runs.

        with TokenSparsityTracker(model) as tracker:
            model(images)
        tracker.table()

    Statistics are taken over queries with at least one allowed key and over allowed keys only. The survivors of a row
    are S = {j : p_j > tau}; a row is empty when S is. Under ``empty_rows="cap"`` tau is the row's own. A module that
    stands in several places of the model has a row for each; what gradient checkpointing computes again is not counted.
    The ``with`` block has the model alone, see `svit_utils.exclusive`, and what any thread computes with it counts.

    Args:
        model: a model with sparse attention; to watch a dense one, `sparsify` it with threshold 0.

    Raises:
        ValueError: the model has no sparse attention.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules(remove_duplicate=False)  # a module used in several places has a name for each
        found = [(name, module) for name, module in modules if isinstance(module, SparseAttentionMixin)]
        if not found:
            raise ValueError("the model has no sparse attention to track; call sparsify(model, threshold) first")
        self._names = [name for name, _ in found]
        self._observers = {m: self._observer_of([name for name, other in found if other is m]) for _, m in found}
        self._with_class_token = {name for name in self._names if has_class_token(model, name)}
        self._totals: dict[tuple[str, str], _Totals] = {}
        self._turns = _Turns()
        self._adding = threading.Lock()
        self._model, self._entered = model, list[ExitStack]()

    def __enter__(self) -> TokenSparsityTracker:
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._model, block=True))
            stack.callback(self._model.register_forward_pre_hook(self._turns).remove)
            for module, observer in self._observers.items():
                if observer not in module.row_observers:  # entered twice, it still counts once
                    stack.callback(_take_out, module, observer)
                    module.row_observers.append(observer)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()

    def reset(self) -> None:
        """Forget everything seen so far."""
        self._totals.clear()

    def table(self) -> pd.DataFrame:
        """One row per layer, head and query set, with the statistics of the queries seen.

        ``queries`` is ``"all"`` or ``"class"`` (the class token's row alone; absent in models without one).
        ``kept_mean`` is the mean number of survivors of a row; ``kept_p10``, ``kept_p50``, ``kept_p90`` its
        percentiles, each a number that occurred. Means over the rows are ``cut_sparsity``, the share of keys with
        p <= tau; ``applied_sparsity``, the share of exact zeros among the weights that multiply V; ``empty_rate``, the
        share of rows without a survivor; ``kept_mass``, the survivors' sum of p; and ``effective_support``, 1 over the
        sum of the squared weights: k for weights spread evenly over k keys, more than ``kept_mean`` where empty rows
        fall back to their softmax.

        Raises:
            ValueError: nothing was recorded yet.
        """
        if not self._totals:
            raise ValueError("nothing recorded yet: run the model inside `with TokenSparsityTracker(model):`")
        import pandas as pd

        rows = [
            {"layer": layer, "head": head, "queries": queries, **statistics}
            for layer in self._names
            for queries in ("all", "class")
            if (layer, queries) in self._totals
            for head, statistics in enumerate(self._totals[layer, queries].per_head())
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "queries", *COLUMNS])

    def summary(self) -> TrackerSummary:
        """The whole model in one line; warns when more than half of the rows are empty."""
        table = self.table()
        table = table[table["queries"] == "all"]
        means = table[list(COLUMNS)].mean()
        rows = sum(int(t.queries.sum()) for (_, queries), t in self._totals.items() if queries == "all")
        empty = float(means["empty_rate"])
        warning = None
        if empty > 0.5:
            warning = (
                f"{empty:.0%} of the attention rows lose every key, so the empty_rows mode decides what the model "
                "does. tau is too high for attention this flat; this is usual in a randomly initialised model"
            )
        shares = {name: float(means[name]) for name in ("kept_mean", *SHARES)}
        return TrackerSummary(table["layer"].nunique(), len(table), rows, **shares, warning=warning)

    def heatmap(self, column: str = "cut_sparsity", queries: str = "all") -> Figure:
        """A layers x heads picture of one column of `table`.

        Raises:
            ValueError: an unknown column or query set.
        """
        from matplotlib.figure import Figure

        table = self.table()
        sets = sorted(set(table["queries"]))
        if column not in COLUMNS or queries not in sets:
            allowed = f"column must be one of {', '.join(COLUMNS)} and queries one of {', '.join(sets)}"
            raise ValueError(f"{allowed}; got {column!r}, {queries!r}")
        values = table[table["queries"] == queries].pivot(index="layer", columns="head", values=column)
        values = values.loc[[name for name in self._names if name in values.index]]
        figure = Figure(figsize=(2.2 + 0.5 * values.shape[1], 1.2 + 0.35 * values.shape[0]), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(values.to_numpy(), cmap="cividis", aspect="auto")
        axes.set_xticks(range(values.shape[1]))
        axes.set_yticks(range(values.shape[0]), values.index)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        figure.colorbar(image, label=f"{column} ({queries} queries)")
        return figure

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write table and summary as JSON; an existing file is replaced whole or not at all."""
        content = {"summary": asdict(self.summary()), "table": self.table().to_dict(orient="records")}
        return write_file(path, json.dumps(content, indent=1) + "\n")

    def _observer_of(self, places: list[str]) -> RowObserver:
        """What is called at each call of a module: the calls belong to its places in turn."""

        def observe(module: SparseAttentionMixin, rows: AttentionRows) -> None:
            if torch._C._current_graph_task_id() != -1 or torch.jit.is_tracing():
                return  # in a backward pass, gradient checkpointing repeats a call that was counted
            name = self._turns.next_of(module, places)
            with self._adding:
                for queries, part in (("all", rows), ("class", rows.first())):
                    if queries == "all" or name in self._with_class_token:
                        self._totals.setdefault((name, queries), _Totals(rows.kept.shape[1])).add(part)

        return observe


class _Turns:
    """Which place of a module has its turn. A pass begins anew, also where the last one did not call them all.

    As a forward pre-hook it learns of each pass. A copy of the model gets one of its own, with which nobody counts.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, nn.Module], Iterator[str]] = {}  # by thread: each has passes of its own

    def __call__(self, *_: object) -> None:
        for key in [key for key in list(self._places) if key[0] == threading.get_ident()]:
            del self._places[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Turns, ()

    def next_of(self, module: nn.Module, places: list[str]) -> str:
        """The name for this call of the module."""
        return next(self._places.setdefault((threading.get_ident(), module), cycle(places)))


def _take_out(module: SparseAttentionMixin, observer: RowObserver) -> None:
    if observer in (found := module.__dict__.get("row_observers", [])):  # gone where the module was made dense
        found.remove(observer)


class _Totals:
    """Running sums per head, and a histogram of survivors for the percentiles."""

    def __init__(self, heads: int) -> None:
        self.queries = torch.zeros(heads, dtype=torch.int64)
        self.sums = {n: torch.zeros(heads, dtype=torch.float64) for n in ("keys", "kept", "zeros", "mass", "support")}
        self.empty = torch.zeros(heads, dtype=torch.int64)
        self.histogram = torch.zeros(heads, 1, dtype=torch.int64)  # [H, largest number of keys + 1]

    def add(self, rows: AttentionRows) -> None:
        valid = rows.valid
        self.queries += valid.sum(dim=(0, 2)).cpu()
        for name, total in self.sums.items():
            # Summed on the device in its own precision, then added up in float64 (absent on some devices).
            total += torch.where(valid, getattr(rows, name), 0).sum(dim=(0, 2)).cpu()
        self.empty += (valid & (rows.kept == 0)).sum(dim=(0, 2)).cpu()
        width = int(rows.keys.max()) + 1 if rows.keys.numel() else 1
        if width > self.histogram.shape[1]:
            self.histogram = nn.functional.pad(self.histogram, (0, width - self.histogram.shape[1]))
        for head in range(len(self.queries)):
            counts = torch.bincount(rows.kept[:, head][valid[:, head]].cpu(), minlength=self.histogram.shape[1])
            self.histogram[head] += counts

    def per_head(self) -> Iterator[dict[str, Any]]:
        for head, queries in enumerate(self.queries.tolist()):
            sums = {name: float(total[head]) for name, total in self.sums.items()}
            queries, keys = max(queries, 1), max(sums["keys"], 1.0)
            yield {
                "kept_mean": sums["kept"] / queries,
                "kept_p10": self._percentile(head, 10),
                "kept_p50": self._percentile(head, 50),
                "kept_p90": self._percentile(head, 90),
                "cut_sparsity": 1 - sums["kept"] / keys,
                "applied_sparsity": sums["zeros"] / keys,
                "empty_rate": int(self.empty[head]) / queries,
                "kept_mass": sums["mass"] / queries,
                "effective_support": sums["support"] / queries,
            }

    def _percentile(self, head: int, percent: int) -> int:
        """The smallest count that at least ``percent`` in a hundred of the queries do not exceed."""
        # In integers: compared with a float, int64 counts would be rounded to float32.
        reached = 100 * self.histogram[head].cumsum(0) >= percent * int(self.queries[head])
        return int(reached.to(torch.uint8).argmax())


def has_class_token(model: nn.Module, layer: str = "") -> bool:
    """Whether the first token is a class token (timm's ``cls_token``): in any part of the model, or where ``layer`` is.

    The smallest part that holds the layer and has such an attribute, be it None, decides: a model may have two towers.
    """
    parts = layer.split(".") if layer else []
    for depth in range(len(parts), -1, -1):
        part = model.get_submodule(".".join(parts[:depth]))
        inside = [part] if layer and hasattr(part, "cls_token") else part.modules()
        if tokens := [module.cls_token for module in inside if hasattr(module, "cls_token")]:
            return any(token is not None for token in tokens)
    return False
