"""The weight grid: scales, codes, slices and their errors (design.md, sections 2.1, 2.7 and 2.9)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bbb_ao.errors import NumericsError
from bbb_ao.grid import (
    Grid,
    check_bits,
    dequantize_weight,
    fake_quantize_weight,
    group,
    quantize_weight,
    round_learned,
    scale_and_zero_point,
)
from bbb_ao.kernels import decode_scale, encode_scale, scale_exponent
from core.strategies import FEW, GRIDS, SOME, dtypes, grids, make_weight, weights, widths


def quantized(weight: Tensor, grid: Grid):
    scale, zero_point = scale_and_zero_point(weight, grid)
    return scale, zero_point, quantize_weight(weight, scale, zero_point, grid)


@SOME
@given(weights(dtype=dtypes), grids())
def test_scales_are_finite_and_zero_only_for_zero_groups(weight: Tensor, grid: Grid) -> None:
    scale, zero_point, stored = quantized(weight, grid)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(zero_point).all()
    empty = group(weight, grid.group_size).abs().amax(-1) == 0
    assert torch.equal(scale == 0, empty)
    assert torch.equal(scale, decode_scale(stored.scale, stored.scale_exponent))
    # The two NaN patterns are 0x7F and 0xFF; negative ones have the sign bit.
    assert int(stored.scale.max()) <= 0x7E
    assert ((zero_point >= 0) & (zero_point < 4)).all()


@SOME
@given(weights(dtype=dtypes), grids(), widths)
def test_zero_groups_give_exact_zeros_and_others_finite_values(weight: Tensor, grid: Grid, bits: int) -> None:
    scale, _, stored = quantized(weight, grid)
    dense = dequantize_weight(stored, bits, grid)
    assert torch.isfinite(dense).all()
    assert (group(dense, grid.group_size)[scale == 0] == 0).all()


@SOME
@given(weights(dtype=st.sampled_from([torch.float32, torch.bfloat16])), grids(), widths)
def test_fake_quantize_equals_stored_weight_bit_for_bit(weight: Tensor, grid: Grid, bits: int) -> None:
    scale, zero_point, stored = quantized(weight, grid)
    fake = fake_quantize_weight(weight, scale, zero_point, bits, grid)
    assert fake.dtype == weight.dtype
    assert torch.equal(fake, dequantize_weight(stored, bits, grid).to(weight.dtype))


@SOME
@given(weights(), grids(), widths)
def test_requantizing_is_idempotent(weight: Tensor, grid: Grid, bits: int) -> None:
    scale, zero_point, stored = quantized(weight, grid)
    dense = dequantize_weight(stored, bits, grid)
    # At `bits` the dequantized weight lies on its own level, so its parent code has the same top bits.
    again = quantize_weight(dense, scale, zero_point, grid)
    assert torch.equal(dequantize_weight(again, bits, grid), dense)
    assert torch.equal(again.scale, stored.scale)
    if bits == 8:
        live = (scale > 0).repeat_interleave(grid.group_size, 1)
        assert torch.equal(again.codes[live], stored.codes[live])


@SOME
@given(weights(), grids(), widths)
def test_error_is_within_half_a_step_and_the_distance_to_the_range(weight: Tensor, grid: Grid, bits: int) -> None:
    scale, zero_point, stored = quantized(weight, grid)
    error = group((dequantize_weight(stored, bits, grid).double() - weight.double()).abs(), grid.group_size)
    step = scale.double().unsqueeze(-1) * 2.0 ** (2 - bits)
    offset = zero_point.double().unsqueeze(-1) * 2.0 ** (bits - 2)
    levels = 2**bits if grid.half_step else 2**bits - 1
    w = group(weight, grid.group_size).double()
    outside = (-offset * step - w).clamp(min=0) + (w - (levels - offset) * step).clamp(min=0)
    # The integer grid rounds twice: to the parent's step and to this one.
    half = step / 2 if grid.half_step or bits == 8 else step / 2 + scale.double().unsqueeze(-1) * 2.0**-7
    slack = 2.0**-20 * (w.abs() + 4 * scale.double().unsqueeze(-1))
    assert (error <= half + outside + slack).all()


@FEW
@given(weights(), grids())
def test_closed_form_range_covers_the_group_to_the_rounding_of_its_scale(weight: Tensor, grid: Grid) -> None:
    scale, zero_point, _ = quantized(weight, grid)
    w = group(weight, grid.group_size).double()
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    s, zeta = scale.double(), zero_point.double()
    # Rounding to E4M3 moves each end by 1/16 of up to four steps, rounding the zero offset by half of its step.
    rounding = 0.5 * 4 / 2**grid.zero_point_bits if grid.zero_point_bits else 0.0
    # A full-size zero offset of 4 is none: it is clamped by one step of its own.
    margin = (0.26 + (2 * rounding if grid.half_step else rounding + 0.5)) * s
    # Scales far below the tensor's largest are E4M3's subnormal numbers, rounded to 2**-9 of the second level.
    margin = margin + 4 * 2.0**-10 * 2.0 ** scale_exponent(scale.amax()).double()
    assert (low >= -zeta * s - margin).all()
    assert (high <= (4 - zeta) * s + margin).all()


@pytest.mark.parametrize(
    ("grid", "bits", "expected"),
    [
        (Grid(), 2, 0.103),
        (Grid(), 4, 0.0069),
        (Grid(kind="integer", zero_point_bits=2), 2, 0.140),
    ],
)
def test_relative_squared_error_of_gaussian_weights(grid: Grid, bits: int, expected: float) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    _, _, stored = quantized(weight, grid)
    error = (dequantize_weight(stored, bits, grid) - weight).double().square().mean() / weight.double().square().mean()
    assert float(error) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("bits", range(2, 9))
def test_half_step_grid_is_unbiased_at_every_width(bits: int) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    scale, _, stored = quantized(weight, Grid())
    error = group(dequantize_weight(stored, bits, Grid()) - weight, 32) / scale.unsqueeze(-1)
    # Plain shifting is biased by -0.49 of a 2-bit step (design.md, section 2.9).
    assert abs(float(error.mean())) < 0.003


@pytest.mark.parametrize("magnitude", [-3.0, 1e-30, 0.1, 7.0])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_constant_groups_are_reproduced_to_the_grids_bound(magnitude: float, grid: Grid) -> None:
    weight = torch.full((2, 128), magnitude)
    _, _, stored = quantized(weight, grid)
    for bits in range(2, 9):
        error = (dequantize_weight(stored, bits, grid) - weight).abs() / abs(magnitude)
        # Half a step, a sixteenth that the scale's rounding may clip, and the largest zero offset below 4.
        clipped = 1.0 / 2**grid.zero_point_bits if grid.zero_point_bits else 0.0
        assert float(error.max()) <= 1.07 * (2.0**-bits * (1 if grid.zero_point_bits else 2) + 1 / 16 + clipped)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nan_and_infinity_never_become_finite(bad: float, grid: Grid) -> None:
    weight = make_weight(0, 2, 128)
    weight[1, 70] = bad
    scale, zero_point = scale_and_zero_point(weight, grid)
    for bits in (2, 4, 8):
        assert not torch.isfinite(fake_quantize_weight(weight, scale, zero_point, bits, grid)[1, 70])
    with pytest.raises(NumericsError, match="weight: expected finite values, got 1 NaN or infinite"):
        quantize_weight(weight, scale, zero_point, grid)
    fine = scale_and_zero_point(make_weight(0, 2, 128), grid)
    with pytest.raises(NumericsError, match="scale"):
        quantize_weight(make_weight(0, 2, 128), fine[0] * bad, fine[1], grid)


@pytest.mark.parametrize("bits", range(2, 9))
def test_ties_are_rounded_up(bits: int) -> None:
    # zeta = 2 and s_2 = 1: at the parent's width the value (k + 1/2) / 64 lies between two codes.
    grid = Grid(kind="integer", zero_point_bits=2, parent_bits=bits)
    k = torch.arange(-16, 16).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 2)
    weight = ((k + 0.5) * 2.0 ** (2 - bits)).unsqueeze(0)
    stored = quantize_weight(weight, torch.ones(1, 1), torch.full((1, 1), 2.0), grid)
    codes = stored.codes.int() >> (8 - bits)
    assert torch.equal(codes, (k + 1 + 2 ** (bits - 1)).unsqueeze(0).int())


def test_learned_scales_are_rounded_as_they_are_stored() -> None:
    scale = torch.tensor([[0.3, -0.7], [1e-9, 0.0]])
    zero_point = torch.tensor([[0.3, 9.0], [-1.0, 1.12]])
    rounded, offset = round_learned(scale, zero_point, Grid())
    exponent = scale_exponent(scale.abs().amax())
    assert torch.equal(rounded, decode_scale(encode_scale(scale.abs(), exponent), exponent))
    assert torch.equal(rounded > 0, scale != 0)
    assert offset.tolist() == [[0.25, 3.75], [0.0, 1.0]]
    assert (round_learned(scale, zero_point, Grid(zero_point_bits=0))[1] == 2).all()


def test_float32_scales_are_kept_and_cannot_be_packed() -> None:
    grid = Grid(scale_format="float32")
    weight = make_weight(3, 4, 64)
    scale, zero_point = scale_and_zero_point(weight, grid)
    groups = group(weight, 32)
    assert torch.equal(scale, groups.amax(-1) / 4 - groups.amin(-1) / 4)
    with pytest.raises(ValueError, match="e4m3"):
        quantize_weight(weight, scale, zero_point, grid)


@pytest.mark.parametrize("parent_bits", [2, 4, 6])
@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_a_narrower_parent_is_stored_in_the_top_bits(parent_bits: int, kind: str) -> None:
    grid = Grid(kind=kind, zero_point_bits=2, parent_bits=parent_bits)
    weight = make_weight(4, 3, 64)
    scale, zero_point, stored = quantized(weight, grid)
    assert (stored.codes & (2 ** (8 - parent_bits) - 1) == 0).all()
    for bits in range(2, parent_bits + 1):
        fake = fake_quantize_weight(weight, scale, zero_point, bits, grid)
        assert torch.equal(fake, dequantize_weight(stored, bits, grid)), bits


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "both"},
        {"group_size": 0},
        {"group_size": 48},
        {"group_size": -32},
        {"zero_point_bits": 9},
        {"zero_point_bits": -1},
        {"kind": "integer"},
        {"parent_bits": 1},
        {"parent_bits": 9},
        {"scale_format": "float16"},
    ],
)
def test_grid_refuses_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"expected|has 2"):
        Grid(**settings)


@pytest.mark.parametrize("bits", [0, 1, 9, 3.5, "2", True, None])
def test_check_bits_refuses_what_is_no_width(bits: object) -> None:
    with pytest.raises(ValueError, match="whole number from 2 to 8"):
        check_bits(bits)  # type: ignore[arg-type]


def test_group_names_the_shape_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"32 against shape \(2, 40\)"):
        group(torch.zeros(2, 40), 32)
    with pytest.raises(ValueError, match="matrix"):
        group(torch.zeros(2, 3, 32), 32)
