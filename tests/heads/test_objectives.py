"""Matching queries with targets: the cheapest one-to-one assignment."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from dinov3.errors import DinoError
from dinov3.heads.objectives import hungarian

pytest.importorskip("scipy")


def cheapest_by_trying_all(cost: torch.Tensor) -> float:
    n_queries, n_targets = cost.shape
    return min(
        sum(cost[q, t].item() for t, q in enumerate(chosen)) for chosen in permutations(range(n_queries), n_targets)
    )


def test_no_other_assignment_is_cheaper() -> None:
    cost = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rows, cols = hungarian(cost)
    assert rows.tolist() == sorted(rows.tolist())
    assert sorted(cols.tolist()) == [0, 1, 2, 3]
    assert cost[rows, cols].sum().item() == pytest.approx(cheapest_by_trying_all(cost))


def test_greedy_would_be_wrong() -> None:
    rows, cols = hungarian(torch.tensor([[1.0, 2.0], [2.0, 9.0]]))
    assert (rows.tolist(), cols.tolist()) == ([0, 1], [1, 0])


def test_more_targets_than_queries_leaves_targets_over() -> None:
    rows, cols = hungarian(torch.tensor([[5.0, 1.0, 3.0]]))
    assert (rows.tolist(), cols.tolist()) == ([0], [1])


def test_a_image_without_targets_matches_nothing() -> None:
    rows, cols = hungarian(torch.zeros(5, 0, dtype=torch.bfloat16))
    assert rows.shape == cols.shape == (0,)
    assert rows.dtype == cols.dtype == torch.int64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_are_refused_in_a_sentence(bad: float) -> None:
    cost = torch.zeros(3, 2)
    cost[1, 1] = bad
    with pytest.raises(DinoError, match=r"1 of the 6 matching costs .* NaN or infinite"):
        hungarian(cost)


def test_a_batch_of_costs_is_refused() -> None:
    with pytest.raises(DinoError, match="once an image"):
        hungarian(torch.zeros(2, 3, 2))
