"""The card's sentences about accuracy: more accurate, a gap that grows, no compromise, an ideal and a harmful tau."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from research.verdict.line import BOTH, HOW, OWN, SINGLE, Line, both_intervals, given, level, quality, seeds, sentence
from research.verdict.sources import DEIT_KINDS, Sources
from svit_utils.records import Row
from svit_utils.referee import Comparison, Interval
from svit_utils.show.charts import CARD_TABLE

MORE_ACCURATE, GROWS = "more accurate", "the gap grows over the epochs"
NO_COMPROMISE, IDEAL, HARMFUL = "no compromise in accuracy", "tau = 0.01 is ideal", "tau = 0.10 is harmful"
ANY_TAU = (0.0025, 0.005, 0.01, 0.02, 0.1)
TOKENS = 197
RATES = ("5e-05", "0.0003")


def more_accurate(sources: Sources) -> Iterator[Line]:
    """Sparse minus dense, on every model that was trained for it."""
    last = CARD_TABLE.iloc[-1]
    claimed = f"claimed {last['ViT-Base']:.2f} to {last['SelectiveViT']:.2f}"
    claimed += f" ({last['SelectiveViT'] - last['ViT-Base']:+.2f} points); not run"
    command = "not testable here; `train --profile paper` on a GPU, several seeds"
    yield Line(MORE_ACCURATE, "CIFAR-10, ViT-Base", claimed, command, OWN)
    for kind, how in HOW.items():
        row = of_study(sources, kind)
        measured = f"{sentence(row, 100, 1)} points, {seeds(row)}"
        yield Line(MORE_ACCURATE, f"{sources.small}, {how}", measured, SINGLE[quality(row)], BOTH)
    for how in DEIT_KINDS:
        yield deit_line(sources, how)
    pair = sources.pair("vit56_cifar10", "sparse", "dense")
    measured = f"{sentence(pair, 100, 1)} points, one pair"
    yield Line(MORE_ACCURATE, sources.scratch, measured, "open (one pair)", OWN)


def of_study(sources: Sources, kind: str) -> Row:
    """The first study's comparison of a kind of model's accuracy with dense."""
    rows = sources.judged.query("family == 'accuracy' and first == @kind")
    (row,) = rows.to_dict("records")
    return row


def two(found: Comparison) -> str:
    """A comparison of two seeds with both of its intervals, in points."""
    both = (("crossed", found.images), ("student", found.seeds))
    ends = {f"{name}_{end}": getattr(of, end) for name, of in both for end in ("low", "high")}
    return both_intervals({"mean": found.mean, **ends}, 100, 1)


def deit_line(sources: Sources, how: str) -> Line:
    """A setting of DeiT-Tiny minus dense, each side at its own rate, beside the comparisons at equal rates."""
    found, rates = sources.deit(how), (sources.deit_rate(how), sources.deit_rate("dense"))
    answer = SINGLE[quality({"result": found.verdict(found.p_value), "better": "higher"})]
    if answer == "open" and found.images.excludes_zero():
        answer = f"open ({'better' if found.mean > 0 else 'worse'} in these runs, too few seeds)"
    measured = f"minus dense at its own rate ({rates[1]}) {two(found)} points, {found.n_seeds} seeds"
    for rate in RATES:
        if (rate, rate) != rates:
            measured += f"; both at {rate}: {two(sources.deit(how, rate, rate))}"
    return Line(MORE_ACCURATE, sources.deit_where(how), measured, answer, OWN)


def gap_grows(sources: Sources) -> Iterator[Line]:
    """The card's lead over the epochs. What the first study's budgets say: nothing; the second's are in `second`."""
    leads = (f"{row['SelectiveViT'] - row['ViT-Base']:+.2f} at {row['epoch']:.0f}" for _, row in CARD_TABLE.iterrows())
    claimed = f"claimed {', '.join(leads)} epochs; not run"
    wanted = "not testable here; accuracy of both models along the way, several seeds"
    yield Line(GROWS, "CIFAR-10, ViT-Base", claimed, wanted, OWN)
    budgets = "; ".join(given(sources.runs(name).values()) for name in ("deit_cifar10", "vit56_cifar10"))
    once = f"recorded at the end of one budget each: {budgets}"
    yield Line(GROWS, "DeiT-Tiny, and the small ViT from scratch", once, "open (one budget per model)", OWN)


@dataclass(frozen=True)
class Swept:
    """One tau of a sweep: its run, and its accuracy minus dense's, at the same rate and at dense's own."""

    row: Row
    minus_dense: Interval
    minus_own: Interval | None


@dataclass(frozen=True)
class Sweep:
    """One pair of models for each tau, all warmed up.

    Attributes:
        where: data, model, steps and rate.
        experiment: as `Sources.correct` takes it.
        of: tau -> what was found.
    """

    where: str
    experiment: str
    of: dict[float, Swept]

    def losing(self, own: bool = False) -> list[float]:
        """The thresholds whose whole interval lies below 0; ``own``: against dense at its own rate."""
        intervals = {tau: found.minus_own if own else found.minus_dense for tau, found in self.of.items()}
        return [tau for tau, interval in intervals.items() if interval is not None and interval.high < 0]


@cache
def sweeps(sources: Sources) -> list[Sweep]:
    """The small ViT's and DeiT-Tiny's, seed 0."""
    rows = sources.runs("planted_pairs") | sources.runs("planted_sweep")
    names = {tau: "sparse-seed0" if tau == 0.01 else f"tau{tau}" for tau in ANY_TAU}
    small = {tau: Swept(rows[name], sources.pair("planted", name, "dense-seed0"), None) for tau, name in names.items()}
    deit = sources.runs("deit_cifar10")
    names = {tau: f"sparse{tau}-warmup-lr3e-04-seed0" for tau in ANY_TAU}
    own = sources.deit_rows("dense")["0"]["name"]
    of_deit = {
        tau: Swept(deit[name], *(sources.pair("deit_cifar10", name, dense) for dense in ("dense-lr3e-04-seed0", own)))
        for tau, name in names.items()
    }
    return [
        Sweep(f"PlantedShapes, small ViT, {given(found.row for found in small.values())}", "planted", small),
        Sweep(f"CIFAR-10, DeiT-Tiny, {given(found.row for found in of_deit.values())}", "deit_cifar10", of_deit),
    ]


def harmful(sources: Sources) -> Iterator[Line]:
    """tau = 0.1, and which smaller ones lose as well."""
    for sweep in sweeps(sources):
        found = sweep.of[0.1]
        also = ", ".join(str(tau) for tau in sweep.losing() if tau < 0.1) or "no other"
        measured = (
            f"{sentence(found.minus_dense, 100, 1)} points, one pair; smaller thresholds that lose as well: {also}"
        )
        if found.minus_own is not None:
            also = ", ".join(str(tau) for tau in sweep.losing(own=True) if tau < 0.1)
            measured += f"; minus dense at its own rate {sentence(found.minus_own, 100, 1)}, and {also} lose"
        answer = "holds in this pair" if found.minus_dense.high < 0 else "open (one pair)"
        yield Line(HARMFUL, sweep.where, measured, answer, OWN)


def no_compromise(sources: Sources) -> Iterator[Line]:
    """About 70 % cut, and nothing lost? The tau of each sweep that cuts nearest to 70 %."""
    for kind, how in HOW.items():
        row, where = of_study(sources, kind), f"{sources.small}, {how}"
        cut = level([float(run["cut_sparsity"]) for run in sources.groups[where]])
        measured = f"tau 0.01, {cut} cut: {sentence(row, 100, 1)} points, {seeds(row)}"
        yield Line(NO_COMPROMISE, where, measured, SINGLE[quality(row)], BOTH)
    for sweep in sweeps(sources):
        tau = nearest_to_seventy(sweep)
        found = sweep.of[tau]
        cut_there, mass = (float(found.row[name]) for name in ("cut_sparsity", "kept_mass"))
        measured = f"nearest to 70 %: tau {tau} = {tau * TOKENS:.2f}/N, {cut_there:.1%} cut, "
        measured += f"{TOKENS * (1 - cut_there):.0f} tokens and {mass:.0%} of the attention kept: "
        measured += f"{sentence(found.minus_dense, 100, 1)} points"
        if found.minus_own is not None:
            measured += f"; minus dense at its own rate {sentence(found.minus_own, 100, 1)}"
        yield Line(NO_COMPROMISE, sweep.where, f"{measured}; one pair", "open (one seed; no margin was fixed)", OWN)


def nearest_to_seventy(sweep: Sweep) -> float:
    """The tau whose run cuts most nearly 70 % of the weights."""
    return min(sweep.of, key=lambda tau: abs(float(sweep.of[tau].row["cut_sparsity"]) - 0.70))


def preferred(sweep: Sweep) -> float:
    """The tau that validation prefers."""
    return max(sweep.of, key=lambda tau: float(sweep.of[tau].row["val_accuracy"]))


def ideal(sources: Sources) -> Iterator[Line]:
    """0.01 beside the tau that validation prefers."""
    for sweep in sweeps(sources):
        best = preferred(sweep)
        apart = sources.pair(sweep.experiment, sweep.of[0.01].row["name"], sweep.of[best].row["name"])
        side = "less" if apart.high < 0 else "more" if apart.low > 0 else "not clearly more or less"
        measured = f"validation prefers {best} of {len(sweep.of)}; 0.01 minus {best} {sentence(apart, 100, 1)} points"
        answer = f"open (one seed; {side} accurate than {best} in it; maps not scored)"
        yield Line(IDEAL, sweep.where, measured, answer, OWN)
