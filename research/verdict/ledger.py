"""``results/verdict/ledger.csv``, line by line: every sentence of the card, and what each experiment says of it."""

from __future__ import annotations

from collections.abc import Iterator

from research.verdict import accuracy, maps, second, shares
from research.verdict.line import Line
from research.verdict.sources import Sources

PARTS = (
    (accuracy.more_accurate, second.more_accurate),
    (accuracy.gap_grows, second.gap_grows),
    (shares.sparsity,),
    (shares.tokens,),
    (shares.importance,),
    (shares.diffuse,),
    (accuracy.no_compromise, second.no_compromise),
    (accuracy.ideal, second.ideal),
    (accuracy.harmful,),
    (shares.parameters,),
    (shares.one_tau, second.one_tau),
    (maps.on_the_object, second.on_the_object),
    (maps.faithful,),
    (maps.background,),
    (maps.noise,),
    (maps.alternatives,),
)


def lines(sources: Sources) -> Iterator[Line]:
    """All lines, the lines of one sentence together."""
    found = [line for parts in PARTS for part in parts for line in part(sources)]
    claims = list(dict.fromkeys(line.claim for line in found))
    yield from sorted(found, key=lambda line: claims.index(line.claim))
