"""The search of narrower ranges: what it minimizes, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from bbb_ao.clipping import clip_ranges
from bbb_ao.grid import Grid, fake_quantize_weight, group, scale_and_zero_point
from core.strategies import generator

GRIDS = [
    Grid(scale_format="float32"),
    Grid(zero_point_bits=0, scale_format="float32"),
    Grid("integer", zero_point_bits=2, scale_format="float32"),
    Grid(group_size=64),
]


def heavy(seed: int = 0) -> Tensor:
    """[6, 128] with a few large values, so that narrower ranges pay."""
    weight = torch.randn(6, 128, generator=generator(seed))
    return weight * torch.rand(6, 128, generator=generator(seed + 1)).pow(-0.5).clamp(max=10)


def errors(weight: Tensor, clipped: Tensor, grid: Grid, bits: int, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of each group, [rows, groups]."""
    quantized = fake_quantize_weight(clipped, *scale_and_zero_point(clipped, grid), bits, grid)
    squares = (quantized - weight).square() * (1 if importance is None else importance)
    return group(squares, grid.group_size).sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.kind}{grid.zero_point_bits}g{grid.group_size}")
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_group_has_the_best_of_the_trials(grid: Grid, asymmetric: bool) -> None:
    weight = heavy()
    clipped = clip_ranges(weight, grid, 2, asymmetric=asymmetric, lowest=0.4, steps=3)
    groups = group(weight, grid.group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    factors = [1.0, 0.8, 0.6, 0.4]
    trials = [
        errors(weight, groups.clamp(low * a, high * b).flatten(1), grid, 2)
        for a in factors
        for b in (factors if asymmetric else [a])
    ]
    # E4M3's power of two belongs to the whole tensor, so that a group's error may differ by its rounding.
    slack = 1e-5 if grid.scale_format == "float32" else 0.02
    found = errors(weight, clipped, grid, 2)
    torch.testing.assert_close(found, torch.stack(trials).amin(0), rtol=slack, atol=0)
    assert found.sum() < 0.98 * trials[0].sum(), "this weight gains by it"


def test_importance_moves_the_range_to_the_columns_that_count() -> None:
    weight, grid = heavy(), Grid()
    importance = torch.ones(128)
    importance[::32] = 0.0
    weight[:, ::32] = 30.0
    weighted = clip_ranges(weight, grid, 2, importance, lowest=0.1, steps=9)
    plain = clip_ranges(weight, grid, 2, lowest=0.1, steps=9)
    weighted_error = errors(weight, weighted, grid, 2, importance).sum()
    assert weighted_error < 0.5 * errors(weight, plain, grid, 2, importance).sum()


def test_wide_codes_zeros_and_the_whole_range_stay() -> None:
    weight = heavy()
    weight[0, :32] = 0.0
    assert torch.equal(clip_ranges(weight, Grid(), 2, lowest=1.0, steps=1), weight)
    assert torch.equal(clip_ranges(weight, Grid(), 2)[0, :32], weight[0, :32])
    clipped = clip_ranges(weight, Grid(), 8)
    assert (errors(weight, clipped, Grid(), 8) <= errors(weight, weight, Grid(), 8) * 1.02).all()
    assert clip_ranges(weight.double(), Grid(), 4).dtype == torch.float64
