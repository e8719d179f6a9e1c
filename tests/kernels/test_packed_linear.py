"""packed_linear and packed_linear_dynamic as ops: float64 oracles with derived bounds, opcheck, bad operands."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from packed_case import EPS, FEW, Case, columns, magnitudes, make_case, random_x, seeds, widths, zero_point_widths
from torch import Tensor

from bbb_ao.kernels import dequantize_packed, fake_quantize_activation, packed_linear, packed_linear_dynamic

act_widths = st.sampled_from([2, 4, 8])


def run(case: Case, x: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    return packed_linear(x, *case.operands(), bias, *case.settings(bits))


def run_dynamic(case: Case, x: Tensor, bits: int, act_bits: int, act_half_step: bool) -> Tensor:
    return packed_linear_dynamic(x, *case.operands(), None, *case.settings(bits), act_bits, act_half_step)


def dense_bound(mass: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """|error| of a product in `dtype` with float32 sums (float64 for float64).

    Each weight is rounded twice (times its scale, to dtype), the result once; a sum of K terms costs K roundings more.
    """
    wide = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
    return (3 * EPS[dtype] + (features + 2) * wide) * mass


@FEW
@given(
    seed=seeds,
    features=columns,
    bits=widths,
    zero_point_bits=zero_point_widths,
    half_step=st.booleans(),
    indexed=st.booleans(),
    magnitude=magnitudes,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_op_equals_float64_to_rounding(
    seed: int,
    features: int,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    indexed: bool,
    magnitude: float,
    dtype: torch.dtype,
) -> None:
    case = make_case(seed, features, zero_point_bits, half_step, indexed=indexed)
    x = random_x(seed, (3, case.in_features), magnitude, dtype)
    bias = random_x(seed + 7, (5,), magnitude, dtype)
    y = run(case, x, bits, bias)
    exact, mass, _ = case.linear(x, bits, bias)
    assert y.dtype == dtype
    error, bound = (y.double() - exact).abs(), dense_bound(mass, features, dtype)
    assert bool((error <= bound + 1e-38).all()), f"error {error.max()} above {bound[error > bound]}"


def test_float16_input() -> None:
    case = make_case(3, 160, indexed=True)
    x = random_x(3, (4, case.in_features), 1e-2, torch.float16)
    exact, mass, _ = case.linear(x, 4)
    # Half precision also loses what is below its smallest normal number, 2**-14, in steps of 2**-24.
    bound = dense_bound(mass, 160, torch.float16) + 2.0**-24 * (case.columns_of(x).abs().sum(-1, keepdim=True) + 1)
    assert bool(((run(case, x, 4).double() - exact).abs() <= bound).all())


@FEW
@given(seed=seeds, features=columns, bits=widths, zero_point_bits=zero_point_widths, half_step=st.booleans())
def test_dequantize_packed_is_exact_up_to_one_rounding(
    seed: int, features: int, bits: int, zero_point_bits: int, half_step: bool
) -> None:
    case = make_case(seed, features, zero_point_bits, half_step)
    weight = dequantize_packed(*case.operands()[:-1], *case.settings(bits), torch.float64)
    assert torch.equal(weight, case.weight(bits))
    narrow = dequantize_packed(*case.operands()[:-1], *case.settings(bits))
    assert torch.equal(narrow, case.weight(bits).float())


@FEW
@given(seed=seeds, features=columns, bits=st.integers(2, 4))
def test_half_step_needs_only_the_planes_of_its_width(seed: int, features: int, bits: int) -> None:
    case = make_case(seed, features)
    x = random_x(seed, (2, features))
    narrow = packed_linear(x, *case.operands(bits), None, *case.settings(bits))
    assert torch.equal(narrow, run(case, x, bits))


@FEW
@given(
    seed=seeds,
    features=columns,
    bits=widths,
    act_bits=act_widths,
    act_half_step=st.booleans(),
    indexed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_dynamic_op_equals_fake_quant_model(
    seed: int, features: int, bits: int, act_bits: int, act_half_step: bool, indexed: bool, dtype: torch.dtype
) -> None:
    case = make_case(seed, features, indexed=indexed)
    x = random_x(seed, (3, case.in_features), 1.0, dtype)
    gathered = case.columns_of(x).to(torch.float64 if dtype == torch.float64 else torch.float32)
    quantized = fake_quantize_activation(gathered.unflatten(-1, (-1, 32)), act_bits, act_half_step).flatten(-2)
    if case.index is not None:
        quantized = torch.where(case.index == case.in_features, 0.0, quantized)
    weight = case.weight(bits)
    exact, mass = quantized.double() @ weight.T, quantized.double().abs() @ weight.abs().T
    # One rounding more than packed_linear: the quantized activation is rounded to dtype.
    bound = dense_bound(mass, features, dtype) + EPS[dtype] * mass
    error = (run_dynamic(case, x, bits, act_bits, act_half_step).double() - exact).abs()
    assert bool((error <= bound).all()), f"error {error.max()}"


@pytest.mark.parametrize("act_half_step", [True, False])
def test_padding_columns_never_matter(act_half_step: bool) -> None:
    case = make_case(5, 96, indexed=True)
    assert case.index is not None
    padding = case.index == case.in_features
    other = Case(**{**vars(case), "parent": torch.where(padding, 255 - case.parent, case.parent)})
    x = random_x(5, (3, case.in_features))
    assert not torch.equal(case.weight(2), other.weight(2))
    assert torch.equal(run(case, x, 2), run(other, x, 2))
    for act_bits in (2, 4, 8):
        expected = run_dynamic(other, x, 2, act_bits, act_half_step)
        assert torch.equal(run_dynamic(case, x, 2, act_bits, act_half_step), expected)


def test_all_zero_groups_give_exact_zeros() -> None:
    case = make_case(1, 64)
    silent = Case(**{**vars(case), "scale_codes": torch.zeros_like(case.scale_codes)})
    x = random_x(1, (2, 64), 1e30)
    assert not run(silent, x, 2).any()
    assert not run_dynamic(case, torch.zeros(2, 64), 2, 2, True).any()


@pytest.mark.parametrize("bits", [2, 8])
def test_leading_shapes(bits: int) -> None:
    case = make_case(2, 96, indexed=True)
    x = random_x(2, (2, 3, case.in_features))
    for view in (x, x.flatten(0, 1), x[1, 2], x[:, :1]):
        y = run(case, view, bits)
        exact, mass, _ = case.linear(view, bits)
        assert y.shape == (*view.shape[:-1], 5)
        assert bool(((y.double() - exact).abs() <= dense_bound(mass, 96, torch.float32)).all())
    assert run(case, x[:0], bits).shape == (0, 3, 5)
    assert run_dynamic(case, x[:0], bits, 4, True).shape == (0, 3, 5)


def test_non_contiguous_input_gives_the_same() -> None:
    case = make_case(4, 64)
    x = random_x(4, (64, 6)).T
    for view in (x, x[::2], torch.cat([x, x], 1)[:, ::2], x[:1].expand(6, 64)):
        exact, mass, _ = case.linear(view, 4)
        bound = dense_bound(mass, 64, torch.float32)
        assert bool(((run(case, view, 4).double() - exact).abs() <= bound).all())
        apart = run_dynamic(case, view, 4, 8, True) - run_dynamic(case, view.contiguous(), 4, 8, True)
        # Quantizing to 8 bits changes |x| by at most half, so that the mass is at most that much larger.
        assert bool((apart.abs() <= 3 * bound).all())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("bits", "zero_point_bits", "indexed"), [(2, 4, True), (4, 0, False), (8, 8, True)])
def test_opcheck(rows: int, bits: int, zero_point_bits: int, indexed: bool) -> None:
    case = make_case(6, 160, zero_point_bits, indexed=indexed)
    x = random_x(6, (rows, case.in_features))
    operands = (x, *case.operands(bits), torch.randn(5), *case.settings(bits))
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear.default, operands)
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear_dynamic.default, (*operands, 4, True))


def test_bad_operands_are_refused() -> None:
    case = make_case(0, 64)
    high, mid, low, scale, exponent, zero, _ = case.operands()
    x = torch.zeros(2, 64)

    def call(x=x, low=low, scale=scale, zero=zero, index=None, bits=2, zero_point_bits=4):
        return packed_linear(x, high, mid, low, scale, exponent, zero, index, None, bits, zero_point_bits, True)

    with pytest.raises(ValueError, match="x must have 64 columns, as the stored weight: found 60"):
        call(x=torch.zeros(2, 60))
    with pytest.raises(TypeError, match="x must be floating point"):
        call(x=torch.zeros(2, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"index must have shape \(64,\): found \(8,\)"):
        call(index=torch.zeros(8, dtype=torch.int32))
    with pytest.raises(TypeError, match="scale must be uint8 E4M3 patterns"):
        call(scale=torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"zero_point must have shape \(5, 1\): found \(5, 2\)"):
        call(zero=torch.zeros(5, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="zero_point must be given with zero_point_bits = 4"):
        call(zero=None)
    with pytest.raises(ValueError, match="zero_point must be None with zero_point_bits = 0"):
        call(zero_point_bits=0)
    with pytest.raises(ValueError, match="8 bits need the plane low"):
        call(low=None, bits=8)
    with pytest.raises(ValueError, match="bits must be 2 to 8: found 9"):
        call(bits=9)
    with pytest.raises(ValueError, match="act_bits must be 2 to 8: found 1"):
        run_dynamic(case, x, 2, 1, True)
    with pytest.raises(RuntimeError, match="out of DATA bounds"):
        call(index=torch.full((64,), 65, dtype=torch.int32))


def test_op_reference_is_linear_on_the_dense_weight() -> None:
    case = make_case(9, 128)
    x = random_x(9, (7, 128))
    dense = dequantize_packed(*case.operands()[:-1], *case.settings(4))
    assert torch.equal(run(case, x, 4), F.linear(x, dense))
