"""The strategies themselves."""

import torch
from hypothesis import find, given, settings

from core.strategies import SOME, grids, weights


@SOME
@given(weights())
def test_weights_are_finite_and_fit_all_group_sizes(weight: torch.Tensor) -> None:
    assert torch.isfinite(weight).all()
    assert weight.shape[1] % 64 == 0


def test_strategies_reach_the_extremes() -> None:
    few = settings(max_examples=2000, derandomize=True, database=None, deadline=None)
    find(weights(), lambda w: bool((w == 0).all()), settings=few)
    find(weights(), lambda w: 0 < float(w.abs().max()) < 2**-126, settings=few)
    find(weights(), lambda w: float(w.abs().max()) > 2e37, settings=few)
    find(weights(), lambda w: bool((w[:, :32] == 0).all()) and not bool((w == 0).all()), settings=few)
    find(grids(), lambda grid: grid.kind == "integer", settings=few)
    find(grids(), lambda grid: grid.group_size == 64, settings=few)
