"""The grid's arithmetic on groups: rounding, slices, E4M3 scales and their second level (design.md, section 2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbb_ao.kernels import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    decode_scale,
    dequantize,
    derive_scale,
    encode_scale,
    fake_quantize,
    floor_straight_through,
    power_of_two,
    quantize,
    round_half_up,
    round_scale,
    round_zero_point,
    scale_exponent,
    slice_codes,
)

torch.set_num_threads(1)
FEW = settings(deadline=None, derandomize=True, max_examples=40, database=None)
seeds = st.integers(0, 2**31 - 1)
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_half_step_slices_are_shifts(bits: int) -> None:
    expected = ALL_CODES >> (8 - bits)
    assert torch.equal(slice_codes(ALL_CODES, bits, True), expected)
    assert torch.equal(slice_codes(ALL_CODES.float(), bits, True), expected.float())


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_slices_are_rounded_and_clamped(bits: int) -> None:
    half = 0 if bits == 8 else 2 ** (7 - bits)
    expected = [min((code + half) >> (8 - bits), 2**bits - 1) for code in range(256)]
    assert slice_codes(ALL_CODES, bits, False).tolist() == expected
    assert slice_codes(ALL_CODES.float(), bits, False).tolist() == expected


@pytest.mark.parametrize("parent_bits", range(2, 9))
def test_slices_of_slices_are_slices_on_the_half_step_grid(parent_bits: int) -> None:
    for bits in range(1, parent_bits + 1):
        nested = slice_codes(slice_codes(ALL_CODES, parent_bits, True), bits, True, parent_bits)
        assert torch.equal(nested, slice_codes(ALL_CODES, bits, True))


@FEW
@given(seeds, st.integers(2, 8), st.integers(0, 15), st.sampled_from([1e-30, 1.0, 1e30]))
def test_every_width_quantized_directly_is_a_slice(seed: int, bits: int, quarters: int, magnitude: float) -> None:
    weight = random(seed, 4, 3, 32) * magnitude
    scale = (random(seed, 4, 3).abs() + 0.1) * magnitude
    zero_point = torch.full((4, 3), quarters / 4)
    direct = quantize(weight, scale, zero_point, True, bits)
    assert torch.equal(direct, slice_codes(quantize(weight, scale, zero_point, True), bits, True))


@FEW
@given(seeds, st.integers(2, 8), st.booleans(), st.integers(2, 8))
def test_fake_quantize_equals_its_steps_bit_for_bit(seed: int, bits: int, half_step: bool, parent_bits: int) -> None:
    bits = min(bits, parent_bits)
    weight = random(seed, 2, 3, 32)
    scale, zero_point = derive_scale(weight, half_step, 4 if half_step else 2)
    codes = slice_codes(quantize(weight, scale, zero_point, half_step, parent_bits), bits, half_step, parent_bits)
    expected = dequantize(codes, scale, zero_point, bits, half_step)
    assert torch.equal(fake_quantize(weight, scale, zero_point, bits, half_step, parent_bits), expected)


def test_rounding_is_half_up_and_passes_the_gradient() -> None:
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49, -0.51], requires_grad=True)
    rounded = round_half_up(values)
    assert rounded.tolist() == [-2, -1, 0, 1, 2, 3, 0, -1]
    rounded.sum().backward()
    assert (values.grad == 1).all()
    assert floor_straight_through(torch.tensor([-0.1, 0.9])).tolist() == [-1, 0]


@pytest.mark.parametrize("zero_point_bits", range(1, 9))
def test_zero_offsets_lie_on_their_grid_below_four(zero_point_bits: int) -> None:
    values = torch.linspace(-1, 5, 601)
    rounded = round_zero_point(values, zero_point_bits)
    step = 4 / 2**zero_point_bits
    assert torch.equal(rounded / step, (rounded / step).round())
    assert rounded.min() == 0
    assert rounded.max() == 4 - step
    inside = (values > 0) & (values < 4 - step)
    assert ((rounded - values).abs()[inside] <= step / 2 + 1e-6).all()


@FEW
@given(seeds, st.integers(-149, 127), st.sampled_from([torch.float32, torch.float64]))
def test_second_level_is_the_smallest_that_holds_the_largest_scale(seed: int, power: int, dtype: torch.dtype) -> None:
    largest = torch.ldexp(random(seed, 50).abs().to(dtype) + 0.5, torch.tensor(power))
    largest = torch.cat([largest, torch.ldexp(torch.tensor([0.875, 0.5, 1.0], dtype=dtype), torch.tensor(power))])
    largest = largest[(largest > 0) & torch.isfinite(largest)]
    exponent = scale_exponent(largest)
    assert exponent.dtype == torch.int32
    exact, values = largest.double(), exponent.double()
    free = (exponent > EXPONENT_MIN) & (exponent < EXPONENT_MAX)
    assert (exact <= 448 * 2.0**values)[exponent < EXPONENT_MAX].all()
    assert (exact > 448 * 2.0 ** (values - 1))[free].all()


def test_second_level_of_nothing_is_zero() -> None:
    assert scale_exponent(torch.tensor([0.0, 448.0, 449.0, 1e-45])).tolist() == [0, 0, 1, EXPONENT_MIN]


@pytest.mark.parametrize("exponent", [EXPONENT_MIN, -7, 0, 31, EXPONENT_MAX])
def test_decoding_and_encoding_are_inverse_for_every_scale(exponent: int) -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8)
    level = torch.tensor(exponent, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        scale = decode_scale(codes, level, dtype)
        assert torch.isfinite(scale).all()
        assert (scale[1:] / 64 >= torch.finfo(torch.float32).tiny).all()
        assert torch.equal(encode_scale(scale, level), codes)
        assert torch.equal(round_scale(scale, level), scale)
    assert (power_of_two(level, torch.float64) == 2.0**exponent).all()


def test_scales_are_rounded_to_nearest_and_never_to_zero() -> None:
    level = torch.tensor(0, dtype=torch.int32)
    scale = torch.tensor([0.0, -0.0, 1e-30, 2.0**-11, 1.06, 1.07, 447.0, 1e9])
    assert decode_scale(encode_scale(scale, level), level).tolist() == [0, 0, 2**-9, 2**-9, 1.0, 1.125, 448, 448]
    # A scale of -0 would be stored as a negative one.
    assert int(encode_scale(scale, level).max()) <= 0x7E
    bad = encode_scale(torch.tensor([float("nan"), float("inf")]), level)
    assert torch.isnan(decode_scale(bad, level)).all()


@FEW
@given(seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1e-4, 1.0, 100.0]))
def test_scales_rounded_up_are_the_smallest_that_are_not_smaller(seed: int, dtype: torch.dtype, size: float) -> None:
    level = torch.tensor(3, dtype=torch.int32)
    scale = (random(seed, 100).abs().to(dtype) * size).clamp(max=448 * 8)
    up = encode_scale(scale, level, up=True)
    assert (decode_scale(up, level, dtype) >= scale).all()
    below = decode_scale((up.int() - 1).clamp(min=0).to(torch.uint8), level, dtype)
    assert ((below < scale) | (up <= 1)).all()
    exact = decode_scale(up, level, dtype)
    assert torch.equal(encode_scale(exact, level, up=True), up)
    limits = torch.tensor([0.0, 448.0 * 8, 1e9], dtype=dtype)
    assert encode_scale(limits, level, up=True).tolist() == [0, 0x7E, 0x7E]
    assert torch.isnan(decode_scale(encode_scale(torch.tensor([float("inf")]), level, up=True), level)).all()


@pytest.mark.parametrize(
    ("bits", "zero_point_bits", "half_step"), [(2, 4, True), (2, 2, False), (4, 2, False), (4, 0, True)]
)
def test_dequantized_levels_are_exact_in_bfloat16(bits: int, zero_point_bits: int, half_step: bool) -> None:
    scale = decode_scale(torch.arange(0x7F, dtype=torch.uint8), torch.tensor(-7, dtype=torch.int32)).unsqueeze(1)
    offsets = torch.arange(2**zero_point_bits) * 4 / 2**zero_point_bits if zero_point_bits else torch.tensor([2.0])
    codes = torch.arange(2**bits).expand(0x7F, len(offsets), -1)
    levels = dequantize(codes, scale.expand(-1, len(offsets)), offsets.expand(0x7F, -1), bits, half_step)
    assert torch.equal(levels.bfloat16().float(), levels)


@FEW
@given(seeds, st.sampled_from([1e-45, 3e-45, 1e-40, 1e-38, 1.0, 3e38]), st.booleans())
def test_only_zero_groups_have_no_scale(seed: int, magnitude: float, half_step: bool) -> None:
    weight = (random(seed, 2, 4, 32).clamp(-1, 1).double() * magnitude).float()
    weight[0, 0], weight[1, 1] = 0.0, -0.0
    for zero_point_bits in (0, 4) if half_step else (2,):
        for e4m3 in (True, False):
            scale, zero_point = derive_scale(weight, half_step, zero_point_bits, e4m3)
            assert torch.isfinite(scale).all()
            assert torch.isfinite(zero_point).all()
            assert torch.equal(scale == 0, (weight == 0).all(-1))
