"""Ranges narrower than a group's minimum and maximum: large weights are clipped so that the others get finer steps.

For every group, over factors a and b between `lowest` and 1,

    minimize sum_k h[k] * (w[k] - Q(clamp(w[k], a * lo, b * hi)))**2,   lo = min(w, 0), hi = max(w, 0),

with Q the fake quantization at one width on scales derived from the clipped group, and h the weight of column k: 1, or
the second moment of its input, which makes the sum the layer's squared error for uncorrelated inputs. Clipping the
weights themselves needs no state: scales derived from the clipped group are those of the narrower range.
"""

from itertools import product

import torch
from torch import Tensor

from bbb_ao.grid import Grid, fake_quantize_weight, group, scale_and_zero_point
from bbb_ao.kernels import group_range


def clip_ranges(
    weight: Tensor,
    grid: Grid,
    bits: int,
    importance: Tensor | None = None,
    *,
    asymmetric: bool = False,
    lowest: float = 0.5,
    steps: int = 10,
) -> Tensor:
    """The weight with every group clipped to the range that gives the smallest error of the module's equation.

    Args:
        weight: [out_features, stored_features], float32 or float64.
        bits: width at which the error is taken.
        importance: h, [stored_features], >= 0; None weighs all columns alike.
        asymmetric: search a and b apart, in (steps + 1)**2 trials; else a = b, in steps + 1.
        lowest: smallest factor, > 0 to 1; steps: intervals between it and 1.
    Returns:
        a tensor of the same shape and dtype; a group that no trial improves is unchanged.
    """
    groups = group(weight, grid.group_size)
    low, high = group_range(groups)
    importance = None if importance is None else importance.to(weight).unflatten(0, (-1, grid.group_size))
    factors = [1 - (1 - lowest) * step / steps for step in range(steps + 1)]
    pairs = product(factors, factors) if asymmetric else zip(factors, factors, strict=True)
    best = torch.full_like(low, torch.inf)
    chosen = (low, high)
    for a, b in pairs:
        clipped = _clamp(groups, low * a, high * b).flatten(1)
        quantized = fake_quantize_weight(clipped, *scale_and_zero_point(clipped, grid), bits, grid)
        squares = (group(quantized, grid.group_size) - groups).square()
        error = (squares if importance is None else squares * importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = (torch.where(better, low * a, chosen[0]), torch.where(better, high * b, chosen[1]))
    return _clamp(groups, *chosen).flatten(1)


def _clamp(groups: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(groups, low.unsqueeze(-1)), high.unsqueeze(-1))
