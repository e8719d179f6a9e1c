"""Gradients of fake quantization: the equations with every floor's derivative taken as 1."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bbb_ao.grid import Grid, fake_quantize_weight, group, round_learned, scale_and_zero_point
from bbb_ao.kernels import dequantize, fake_quantize, quantize, slice_codes
from core.strategies import FEW, grids, make_weight, seeds, widths


def composite(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, half_step: bool) -> Tensor:
    """fake_quantize step by step, differentiated by autograd."""
    codes = slice_codes(quantize(weight, scale, zero_point, half_step), bits, half_step)
    return dequantize(codes, scale, zero_point, bits, half_step)


def gradients(function, weight: Tensor, scale: Tensor, zero_point: Tensor, upstream: Tensor) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in (weight, scale, zero_point)]
    return list(torch.autograd.grad(function(*inputs), inputs, upstream))


@FEW
@given(seeds, widths, grids())
def test_backward_equals_autograd_through_the_steps(seed: int, bits: int, grid: Grid) -> None:
    weight = group(make_weight(seed, 3, 128, "outlier").double(), grid.group_size)
    scale, zero_point = scale_and_zero_point(weight.flatten(1), grid)
    # A scale that is too small clips some weights, and zero offsets between their levels are as learned ones.
    scale, zero_point = scale * 0.6, zero_point * 0.9 + 0.13
    upstream = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = gradients(lambda *a: fake_quantize(*a, bits, grid.half_step), weight, scale, zero_point, upstream)
    steps = gradients(lambda *a: composite(*a, bits, grid.half_step), weight, scale, zero_point, upstream)
    for name, mine, other in zip(("weight", "scale", "zero_point"), ours, steps, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_gradient_is_straight_through_inside_and_zero_outside(kind: str, bits: int) -> None:
    grid = Grid(kind=kind, zero_point_bits=2)
    weight = torch.linspace(-4.0, 4.0, 64).unsqueeze(0).requires_grad_()
    scale, zero_point = torch.ones(1, 2), torch.full((1, 2), 2.0)
    (gradient,) = torch.autograd.grad(fake_quantize_weight(weight, scale, zero_point, bits, grid).sum(), weight)
    w, step = weight.detach(), 2.0 ** (2 - bits)
    # Half-step: [-2, 2). Integer: what rounds to a code at the parent's width and then, unclamped, at this one.
    low, high = (-2.0, 2.0) if kind == "half_step" else (-2 - 2.0**-7, 2 - step / 2 - 2.0**-7)
    inside = (w >= low) & (w < high)
    assert torch.equal(gradient, inside.float())
    assert 0 < inside.sum() < 64


@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_closed_form_gradient_goes_through_minimum_and_maximum(kind: str) -> None:
    grid = Grid(kind=kind, zero_point_bits=2, scale_format="float32")
    weight = make_weight(5, 2, 64).double().requires_grad_()
    scale, _ = scale_and_zero_point(weight, grid)
    (gradient,) = torch.autograd.grad(scale.sum(), weight)
    steps = 4.0 if kind == "half_step" else 3.5
    groups = group(weight.detach(), 32)
    expected = torch.zeros_like(groups)
    expected.scatter_(-1, groups.argmax(-1, keepdim=True), 1 / steps)
    expected.scatter_(-1, groups.argmin(-1, keepdim=True), -1 / steps)
    torch.testing.assert_close(gradient, expected.flatten(1))


@FEW
@given(seeds, widths, grids())
def test_gradients_are_finite_where_groups_are_zero_constant_or_subnormal(seed: int, bits: int, grid: Grid) -> None:
    weight = make_weight(seed, 4, 192)
    weight[:, :64], weight[:, 64:128] = 0.0, 0.25
    weight[3] *= 1e-41
    weight.requires_grad_()
    scale, zero_point = scale_and_zero_point(weight, grid)
    fake_quantize_weight(weight, scale, zero_point, bits, grid).square().sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_learned_scale_and_zero_point_follow_their_gradient() -> None:
    grid = Grid()
    weight = make_weight(6, 4, 64)
    scale, zero_point = (t.requires_grad_() for t in scale_and_zero_point(weight * 0.5, grid))
    before = None
    optimizer = torch.optim.Adam([scale, zero_point], 0.005)
    for _ in range(60):
        fake = fake_quantize_weight(weight, *round_learned(scale, zero_point, grid), 2, grid)
        loss = (fake - weight).square().mean()
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before is not None
    assert loss.item() < 0.7 * before
