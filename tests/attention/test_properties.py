"""Facts about one row of thresholded attention, on rows drawn with a stated number of survivors.

p = softmax(s), J = {j : p_j > tau}, k = |J|, r_j = p_j - tau on J, Z = sum(r). Everything in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from svit_utils.attention import EMPTY_ROWS, RelativeThreshold, thresholded_attention, thresholded_softmax

EXAMPLES = 200
every_row = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
GAP = 1e-4  # no probability this near to tau, so that rounding moves nothing across it


@dataclass(frozen=True)
class Row:
    scores: torch.Tensor  # [N]
    tau: float

    @property
    def p(self) -> torch.Tensor:
        return self.scores.softmax(-1)

    @property
    def kept(self) -> int:
        return int((self.p > self.tau).sum())

    @property
    def kind(self) -> str:
        if self.kept == 0:
            return "empty"
        if self.kept == 1:
            return "single"
        return "partly cut" if self.kept < len(self.scores) else "whole"


@st.composite
def rows(draw, kinds=("partly cut", "empty", "single", "whole"), most=12, ties=True) -> Row:
    """A row and a tau that lies between two of its sorted probabilities, so that the wanted number survives."""
    n = draw(st.integers(3, most))
    spread = draw(st.sampled_from([0.3, 1.0, 3.0]))
    scores = torch.tensor(draw(st.lists(st.integers(-30, 30), min_size=n, max_size=n)), dtype=torch.float64) / 15
    scores = scores * spread
    p = scores.softmax(-1).sort(descending=True).values
    kind = draw(st.sampled_from(kinds))
    kept = {"empty": 0, "single": 1, "whole": n}.get(kind) if kind != "partly cut" else draw(st.integers(2, n - 1))
    high = min(0.99, 2 * float(p[0])) if kept == 0 else float(p[kept - 1])
    low = 0.0 if kept == n else float(p[kept])
    assume(high - low > 3 * GAP)
    tau = low + (high - low) * draw(st.floats(0.1, 0.9))
    assume(float((p - tau).abs().min()) > GAP)
    if not ties:
        assume(float(p[0] - p[1]) > GAP)
    return Row(scores, tau)


def weights(row: Row, mode: str) -> torch.Tensor:
    return thresholded_softmax(row.scores, row.tau, empty_rows=mode)


def l1(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().sum())


def test_the_strategy_draws_every_kind_of_row():
    seen: Counter[str] = Counter()

    @every_row
    @given(rows())
    def draw(row):
        seen[row.kind] += 1

    draw()
    total = seen.total()
    assert total >= EXAMPLES
    floors = {"partly cut": 0.15, "empty": 0.15, "single": 0.15, "whole": 0.05}
    assert {kind: seen[kind] / total >= floor for kind, floor in floors.items()} == dict.fromkeys(floors, True), seen


# --- 1 and 2: how many survive ----------------------------------------------------------------------------------


@every_row
@given(rows())
def test_bound_on_survivors(row):
    kept = int((weights(row, "zero") > 0).sum())
    z = float((row.p - row.tau).clamp(min=0).sum())
    assert kept == row.kept
    assert kept <= math.ceil(1 / Fraction(row.tau)) - 1
    assert kept * row.tau <= 1 - z + 1e-12


@pytest.mark.parametrize("tau, most", [(0.01, 99), (0.02, 49), (0.1, 9), (0.3, 3), (0.5, 1)])
def test_the_bound_is_reached(tau, most):
    """`most` equal keys above tau, the remaining mass spread over many keys that are cut."""
    each = (tau + 1 / most) / 2
    rest = 1 - most * each
    p = torch.cat([torch.full((most,), each), torch.full((1000,), rest / 1000)]).double()
    assert int((thresholded_softmax(p.log(), tau, empty_rows="zero") > 0).sum()) == most
    assert most == math.ceil(1 / Fraction(str(tau))) - 1


@every_row
@given(rows(), st.floats(0.0, 1.0))
def test_supports_are_nested_in_tau(row, part):
    larger = weights(row, "zero") > 0
    smaller = weights(Row(row.scores, row.tau + part * (0.999 - row.tau)), "zero") > 0
    assert not (smaller & ~larger).any()


@every_row
@given(st.integers(1, 300), st.floats(0.001, 0.99), rows(most=12))
def test_a_row_can_lose_every_key_exactly_when_n_tau_reaches_1(n, tau, row):
    assume(abs(n * tau - 1) > 1e-9)
    uniform = thresholded_softmax(torch.zeros(n, dtype=torch.float64), tau, empty_rows="zero")
    assert bool((uniform == 0).all()) == (n * tau >= 1)
    m = len(row.scores)
    below = row.tau / (m * max(row.tau, 1 / m)) * 0.999  # m * below < 1: whatever the scores, a key survives
    assert m * below < 1
    assert (thresholded_softmax(row.scores, below, empty_rows="zero") > 0).any()


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_a_uniform_row_at_exactly_n_tau_1_is_empty(n):
    assert not thresholded_softmax(torch.zeros(n, dtype=torch.float64), 1 / n, empty_rows="zero").any()


# --- invariances ------------------------------------------------------------------------------------------------


@every_row
@given(rows(ties=False), st.sampled_from(EMPTY_ROWS), st.floats(-50, 50))
def test_shifting_the_scores_changes_nothing(row, mode, shift):
    torch.testing.assert_close(weights(Row(row.scores + shift, row.tau), mode), weights(row, mode), atol=1e-8, rtol=0)


@every_row
@given(st.data(), st.sampled_from(EMPTY_ROWS))
def test_permuting_the_keys_permutes_the_weights(data, mode):
    row = data.draw(rows(ties=mode != "top1"))  # a tied largest key is chosen by its place
    order = torch.tensor(data.draw(st.permutations(range(len(row.scores)))))
    torch.testing.assert_close(
        weights(Row(row.scores[order], row.tau), mode), weights(row, mode)[order], atol=1e-8, rtol=0
    )


@every_row
@given(st.data(), st.sampled_from(EMPTY_ROWS), st.booleans())
def test_masked_keys_change_nothing(data, mode, relative):
    row = data.draw(rows())
    n = len(row.scores)
    places = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 2 * n - 1), min_size=n, max_size=n))))
    threshold = RelativeThreshold(row.tau * n) if relative else row.tau
    if relative:  # float32: stay away from tau by more than its rounding, and below 1
        assume(row.tau < 0.95)
    padded = torch.full((2 * n,), -math.inf, dtype=torch.float64)
    padded[places] = row.scores
    expected = torch.zeros(2 * n, dtype=torch.float64)
    expected[places] = thresholded_softmax(row.scores, threshold, empty_rows=mode)
    torch.testing.assert_close(thresholded_softmax(padded, threshold, empty_rows=mode), expected, atol=1e-8, rtol=0)
    # The same through q, k, v and a mask: the masked keys hold anything at all.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.full((2 * n,), 7.0, dtype=torch.float64)
    k[places] = row.scores
    mask = torch.zeros(2 * n, dtype=torch.bool)
    mask[places] = True
    v = torch.randn(1, 1, 2 * n, 3, dtype=torch.float64)
    out, a = thresholded_attention(
        q, k[None, None, :, None], v, threshold, scale=1.0, attn_mask=mask, empty_rows=mode, return_weights=True
    )
    torch.testing.assert_close(a.flatten(), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(out.flatten(), expected @ v[0, 0], atol=1e-7, rtol=0)


@every_row
@given(rows(), st.sampled_from(EMPTY_ROWS))
def test_a_row_with_a_survivor_follows_the_formula_in_every_mode(row, mode):
    r = (row.p - row.tau).clamp(min=0)
    a = weights(row, mode)
    if mode == "cap" and float(row.p.max()) < 2 * row.tau:
        r = (row.p - row.p.max() / 2).clamp(min=0)
    if r.sum() > 0:
        torch.testing.assert_close(a, r / r.sum(), atol=1e-9, rtol=0)
    total = 0.0 if mode == "zero" and row.kept == 0 else 1.0
    assert float(a.sum()) == pytest.approx(total, abs=1e-12)


# --- 4: jumps ---------------------------------------------------------------------------------------------------


def from_probabilities(p: list[float], tau: float, mode: str) -> torch.Tensor:
    return thresholded_softmax(torch.tensor(p, dtype=torch.float64).log(), tau, empty_rows=mode)


EPS = 1e-9


@every_row
@given(st.integers(3, 300), st.floats(1.05, 3.0))
def test_jump_when_the_last_key_dies(n, multiple):
    tau = multiple / n
    assume(tau < 0.9)

    def jump(mode):
        sides = ([x] + [(1 - x) / (n - 1)] * (n - 1) for x in (tau + EPS, tau - EPS))
        return l1(*(from_probabilities(p, tau, mode) for p in sides))

    assert jump("zero") == pytest.approx(1.0, abs=1e-6)
    assert jump("dense") == pytest.approx(2 * (1 - tau), abs=1e-6)
    assert jump("top1") <= 0.003
    assert jump("cap") <= 1e-4


def test_the_dense_jump_reaches_1_98_at_tau_one_hundredth():
    n, tau = 197, 0.01
    sides = ([x] + [(1 - x) / (n - 1)] * (n - 1) for x in (tau + EPS, tau - EPS))
    assert l1(*(from_probabilities(p, tau, "dense") for p in sides)) == pytest.approx(1.98, abs=1e-6)


@every_row
@given(st.integers(4, 300), st.floats(1.1, 3.0))
def test_jumps_of_two_largest_keys(n, multiple):
    """top1 jumps by 1 when two tied keys die together, by 2 when the largest changes among cut keys; cap never."""
    tau = multiple / n
    assume(tau < 0.45)

    def row(a, b):
        return [a, b] + [(1 - a - b) / (n - 2)] * (n - 2)

    def dying(mode):
        return l1(*(from_probabilities(row(x, x), tau, mode) for x in (tau + EPS, tau - EPS)))

    largest = tau * 0.99

    def changing(mode):
        pairs = ((largest + EPS, largest - EPS), (largest - EPS, largest + EPS))
        return l1(*(from_probabilities(row(*pair), tau, mode) for pair in pairs))

    assert dying("top1") == pytest.approx(1.0, abs=1e-6)
    assert dying("zero") == pytest.approx(1.0, abs=1e-6)
    assert dying("cap") <= 1e-4
    assert changing("top1") == pytest.approx(2.0, abs=1e-6)
    assert changing("zero") == 0.0
    assert changing("dense") <= 1e-4
    assert changing("cap") <= 1e-4


@every_row
@given(st.data(), st.sampled_from(["anywhere", "at the largest", "at half the largest"]))
def test_cap_has_no_jump_anywhere(data, place):
    row = data.draw(rows())
    n = len(row.scores)
    top = float(row.p.max())
    tau = {"anywhere": row.tau, "at the largest": top, "at half the largest": top / 2}[place]
    assume(tau < 1)
    size = 1e-9
    change = torch.tensor(data.draw(st.lists(st.floats(-size, size), min_size=n, max_size=n)), dtype=torch.float64)
    before = thresholded_softmax(row.scores, tau, empty_rows="cap")
    after = thresholded_softmax(row.scores + change, tau, empty_rows="cap")
    # |dp|_1 <= 2 size, every r_j moves by at most |dp_j| + |dp_max| / 2, and Z >= p_max / 2 >= 1 / (2 N).
    assert l1(before, after) <= 8 * n * n * size
    assert float(after.sum()) == pytest.approx(1.0, abs=1e-12)


@every_row
@given(rows(kinds=("partly cut", "whole"), ties=False), st.sampled_from(EMPTY_ROWS))
def test_cutting_a_key_that_is_not_the_last_is_continuous(row, mode):
    p = row.p.sort(descending=True).values
    edge = float(p[row.kept - 1])  # the smallest survivor, at least one larger key remains
    z = float((p - edge).clamp(min=0).sum())
    assume(z > 1e-3)
    lower, upper = (thresholded_softmax(row.scores, edge + d, empty_rows=mode) for d in (-EPS, EPS))
    assert l1(lower, upper) <= 8 * len(p) * EPS / z
    if mode != "cap":
        assert int((lower > 0).sum()) > int((upper > 0).sum())


# --- 5: gradients -----------------------------------------------------------------------------------------------


def formulas(p, tau, v, do, mode):
    """dS [N], dV [N, D] and dtau as derived by hand."""
    top = int(p.argmax())
    capped = mode == "cap" and float(p[top]) < 2 * tau
    cut = float(p[top]) / 2 if capped else tau
    inside = (p > cut).double()
    if not inside.any():
        if mode == "dense":
            return p * (v @ do - do @ (p @ v)), torch.outer(p, do), 0.0
        one = torch.nn.functional.one_hot(torch.tensor(top), len(p)).double() * (mode == "top1")
        return torch.zeros_like(p), torch.outer(one, do), 0.0
    r = (p - cut) * inside
    z = r.sum()
    a = r / z
    d = do @ (a @ v)
    g_total = (do @ (inside @ v) - inside.sum() * d) / z
    g = inside * (v @ do - d) / z
    if not capped:
        return p * (g - tau * g_total), torch.outer(a, do), -float(g_total)
    g[top] = g[top] - g_total / 2
    return p * (g - p @ g), torch.outer(a, do), 0.0


@pytest.mark.parametrize("mode", EMPTY_ROWS)
def test_gradients_follow_the_formulas(mode):
    seen: Counter[str] = Counter()

    @every_row
    @given(rows(ties=False), st.integers(0, 2**31 - 1))
    def check(row, seed):
        p = row.p
        assume(abs(float(p.max()) - 2 * row.tau) > GAP)
        if mode == "cap":
            assume(float((p - p.max() / 2).abs().min()) > GAP)
        g = torch.Generator().manual_seed(seed)
        v, do = (torch.randn(*s, 3, generator=g, dtype=torch.float64) for s in ((len(p),), ()))
        scores, v = row.scores.clone().requires_grad_(), v.requires_grad_()
        tau = torch.tensor(row.tau, dtype=torch.float64, requires_grad=True)
        out = thresholded_softmax(scores, tau, empty_rows=mode) @ v
        grads = torch.autograd.grad(out @ do, (scores, v, tau), allow_unused=True, materialize_grads=True)
        expected = formulas(p, row.tau, v.detach(), do, mode)
        for got, want in zip(grads, expected):
            want = torch.as_tensor(want, dtype=torch.float64)
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-8)
        seen[row.kind] += 1
        seen["cut keys with a gradient"] += bool((grads[0][p <= row.tau].abs() > 1e-9).any()) and row.kept > 1

    check()
    assert min(seen[kind] for kind in ("partly cut", "empty", "single")) >= 20, seen
    assert seen["cut keys with a gradient"] >= 20


@every_row
@given(rows(kinds=("single",), ties=False), st.sampled_from(["zero", "dense", "top1"]))
def test_a_single_survivor_has_no_gradient(row, mode):
    jacobian = torch.autograd.functional.jacobian(
        lambda s: thresholded_softmax(s, row.tau, empty_rows=mode), row.scores
    )
    assert float(jacobian.abs().max()) < 1e-9


@every_row
@given(rows(), st.integers(0, 2**31 - 1))
def test_gradients_through_q_and_k(row, seed):
    """dQ = dS K scale and dK = dS^T Q scale, several queries and heads at once, dtau summed over the rows."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(1, 2, n, 3, generator=g, dtype=torch.float64) for n in (3, 5, 5, 3))
    p = (q @ k.transpose(-2, -1) * 3**-0.5).softmax(-1)
    assume(float((p - row.tau).abs().min()) > GAP)
    leaves = [t.requires_grad_() for t in (q, k, v, torch.tensor(row.tau, dtype=torch.float64))]
    out = thresholded_attention(*leaves[:3], leaves[3])
    dq, dk, dv, dtau = torch.autograd.grad(out, leaves, do, allow_unused=True, materialize_grads=True)
    ds, want_dv, want_dtau = torch.zeros_like(p), torch.zeros_like(v), 0.0
    with torch.no_grad():
        for h in range(2):
            for i in range(3):
                one = formulas(p[0, h, i].detach(), row.tau, v[0, h], do[0, h, i], "dense")
                ds[0, h, i] = one[0]
                want_dv[0, h] += one[1]
                want_dtau += one[2]
        torch.testing.assert_close(dq, ds @ k * 3**-0.5, atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(dk, ds.transpose(-2, -1) @ q * 3**-0.5, atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(dv, want_dv, atol=1e-9, rtol=1e-8)
        assert float(dtau) == pytest.approx(want_dtau, rel=1e-8, abs=1e-9)
