"""The dequantization kernel against the reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_case import FEW, columns, make_case, seeds, widths

from bbb_ao.kernels import dequantize_packed

pytest.importorskip("triton", reason="the kernel needs Triton, whose interpreter runs it on a CPU")
from bbb_ao.kernels.packed_linear.dequantize import ZERO_POINT_WIDTHS, dequantize_dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@FEW
@given(
    seed=seeds,
    features=columns,
    bits=widths,
    half_step=st.booleans(),
    zero_point_bits=st.sampled_from(ZERO_POINT_WIDTHS),
    stored=st.sampled_from([2, 4, 8]),
    row_exponents=st.booleans(),
)
def test_dense_weights_equal_the_reference(
    seed: int, features: int, bits: int, half_step: bool, zero_point_bits: int, stored: int, row_exponents: bool
) -> None:
    case = make_case(seed, features, zero_point_bits if half_step else 2, half_step, rows=70)
    operands = case.operands(max(stored, bits))[:6]
    if row_exponents:
        operands = (*operands[:4], case.exponent + torch.arange(70, dtype=torch.int32) % 3, operands[5])
    moved = [None if operand is None else operand.to(DEVICE) for operand in operands]
    settings = (*case.settings(bits),)
    expected = dequantize_packed(*operands, *settings)  # type: ignore[arg-type]
    got = dequantize_dense(*moved, *settings, torch.float32)  # type: ignore[arg-type]
    # Powers of two and small integers: every step is exact but one product.
    torch.testing.assert_close(got.cpu(), expected, rtol=2.0**-23, atol=0)
