"""One second level of the scales for each row: rows of several tensors, stacked, give each tensor's own product."""

import pytest
import torch
from packed_case import Case, make_case, random_x
from torch import Tensor

from bbb_ao.kernels import dequantize_packed, packed_linear, packed_linear_dynamic
from bbb_ao.kernels.packed_row import packed_linear_row

FEATURES, ROWS = 160, (5, 7, 2)


def cases(zero_point_bits: int = 4, half_step: bool = True) -> list[Case]:
    found = [make_case(seed, FEATURES, zero_point_bits, half_step, rows) for seed, rows in enumerate(ROWS)]
    assert len({int(case.exponent) for case in found}) == len(ROWS)
    return found


def stack(parts: list[Case], bits: int) -> tuple[Tensor | None, ...]:
    columns = list(zip(*(part.operands(bits) for part in parts), strict=True))
    high, mid, low, scale, _, zero, index = [None if c[0] is None else torch.cat(c) for c in columns[:4]] + [
        None,
        None if columns[5][0] is None else torch.cat(columns[5]),
        columns[6][0],
    ]
    exponent = torch.cat([part.exponent.expand(len(part.parent)) for part in parts])
    assert (exponent.dtype, exponent.shape) == (torch.int32, (sum(ROWS),))
    return high, mid, low, scale, exponent, zero, index


@pytest.mark.parametrize(("bits", "zero_point_bits", "half_step"), [(2, 4, True), (4, 0, True), (8, 2, False)])
def test_stacked_rows_equal_the_single_tensors(bits: int, zero_point_bits: int, half_step: bool) -> None:
    parts = cases(zero_point_bits, half_step)
    operands, settings = stack(parts, bits), parts[0].settings(bits)
    weight = dequantize_packed(*operands[:6], *settings, dtype=torch.float64)
    assert torch.equal(weight, torch.cat([part.weight(bits) for part in parts]))
    x = random_x(0, (3, FEATURES), dtype=torch.float64)
    for act_bits in (None, 4):

        def call(operands, act_bits=act_bits):
            if act_bits is None:
                return packed_linear(x, *operands, None, *settings)
            return packed_linear_dynamic(x, *operands, None, *settings, act_bits, True)

        expected = torch.cat([call(part.operands(bits)) for part in parts], -1)
        torch.testing.assert_close(call(operands), expected, rtol=1e-12, atol=0)
    row = x[:1].float()
    expected = torch.cat([packed_linear_row(row, *part.operands(bits), None, *settings[:3]) for part in parts], -1)
    assert torch.equal(packed_linear_row(row, *operands, None, *settings[:3]), expected)


def test_opcheck_and_gradient_with_an_exponent_for_each_row() -> None:
    parts = cases()
    operands, settings = stack(parts, 4), parts[0].settings(4)
    x = random_x(0, (3, FEATURES)).requires_grad_()
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear.default, (x, *operands, None, *settings))
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear_dynamic.default, (x, *operands, None, *settings, 4, True))
    (gradient,) = torch.autograd.grad(packed_linear(x, *operands, None, *settings).sum(), x)
    weight = torch.cat([part.weight(4) for part in parts])
    torch.testing.assert_close(gradient, weight.sum(0).expand(3, -1).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exponent", [torch.zeros(3, dtype=torch.int32), torch.zeros(14), torch.zeros(14, 1)])
def test_other_exponents_are_refused(exponent: Tensor) -> None:
    parts = cases()
    high, mid, low, scale, _, zero, index = stack(parts, 2)
    operands = (torch.zeros(2, FEATURES), high, mid, low, scale, exponent, zero, index, None, *parts[0].settings(2))
    with pytest.raises(ValueError, match=r"scale_exponent must be an int32 scalar or \[out_features\] = \[14\]: found"):
        packed_linear(*operands)
