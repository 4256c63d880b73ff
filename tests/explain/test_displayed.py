"""Dense attention drawn as if it had been cut."""

from __future__ import annotations

import pytest
import torch

from svit_utils.explain import displayed, displayed_top

P = torch.tensor([[10.0, 6, 3, 1]], dtype=torch.float64) / 20


def test_displayed_is_the_operator_on_the_probabilities() -> None:
    torch.testing.assert_close(displayed(P, 0.1)[0], torch.tensor([8.0, 4, 1, 0], dtype=torch.float64) / 13)
    torch.testing.assert_close(displayed(P, 0.0), P)
    torch.testing.assert_close(displayed(P, 0.6), P)  # an empty row falls back


def test_displayed_keeps_exact_zeros() -> None:
    row = torch.tensor([[0.7, 0.3, 0.0]])
    assert displayed(row, 0.0)[0, 2] == 0 and torch.isfinite(displayed(row, 0.1)).all()


def test_displayed_top_keeps_as_many_as_asked() -> None:
    # Cut at the largest that has to go: 3/20, leaving 7 and 3; at 1/20, leaving 9, 5, 2.
    two, three = torch.tensor([7.0, 3, 0, 0]) / 10, torch.tensor([9.0, 5, 2, 0]) / 16
    rows = displayed_top(P.expand(4, 4), torch.tensor([1, 2, 3, 4]))
    expected = torch.stack([torch.tensor([1.0, 0, 0, 0]), two, three, P[0].float()]).double()
    torch.testing.assert_close(rows, expected)
    assert (rows > 0).sum(-1).tolist() == [1, 2, 3, 4]


def test_displayed_top_with_ties_and_bad_counts() -> None:
    tied = torch.full((1, 4), 0.25)
    torch.testing.assert_close(displayed_top(tied, torch.tensor([2])), tied)  # nothing is above the level: left alone
    with pytest.raises(ValueError, match="counts must lie in 1 to 4"):
        displayed_top(P, torch.tensor([5]))
    with pytest.raises(ValueError, match="one number per row"):
        displayed_top(P, torch.tensor([1, 2]))
