"""The packed linear layer's public door."""

from torch import Tensor

from bbb_ao.kernels.packed_linear.op import packed_linear_op
from bbb_ao.kernels.packed_linear.reference import check_exponent, check_input, check_weight
from bbb_ao.kernels.packed_row import packed_linear_row, takes_row_path


def packed_linear(
    x: Tensor,
    high: Tensor,
    mid: Tensor | None,
    low: Tensor | None,
    scale: Tensor,
    scale_exponent: Tensor,
    zero_point: Tensor | None,
    index: Tensor | None,
    bias: Tensor | None,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    group_size: int = 32,
) -> Tensor:
    """Linear layer on a packed weight at `bits` bits.

    y[m, n] = sum_k x[m, index[k]] * w_r[n, k] + bias[n], w_r as in `reference`. One compiled row on a CPU takes a fused
    path (`takes_row_path`); everything else is torch.ops.bbb_ao.packed_linear.

    Args:
        x: [..., in_features], floating point.
        high, mid, low: planes of the parent codes, uint8, layout of `packing.planes`; planes that `bits` does not need
            may be None. On the integer grid a slice is rounded by the bits below it that are stored.
        scale: [out_features, K / group_size], uint8, E4M3 patterns of the 2-bit scale.
        scale_exponent: int32, a scalar, or [out_features] where rows of several tensors are stacked.
        zero_point: [out_features, ceil(K / group_size * zero_point_bits / 8)], uint8, from `pack_codes`; None with
            zero_point_bits = 0, which fixes the zero offset at 2.
        index: int32 [K]; stored column k reads channel index[k] of x, or 0 where index[k] == in_features. None: x has
            K columns.
        bias: [out_features], dtype of x, or None.
        bits: 2 to 8.
        half_step: the half-step grid, else the integer grid.
        group_size: columns that share a scale.
    Returns:
        [..., out_features], dtype of x.
    Raises:
        TypeError: x is not floating point, or a packed tensor not uint8.
        ValueError: shapes that do not fit together, or a plane that `bits` needs is missing.
    Gradient: for x and bias; the packed weight is frozen (train on the fake-quantized one).
    """
    operands = (x, high, mid, low, scale, scale_exponent, zero_point, index, bias, bits, zero_point_bits, half_step)
    if takes_row_path(x, high, mid, low, bits, zero_point_bits, half_step, group_size):
        check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
        check_exponent(scale_exponent, high.shape[0])
        check_input(x, index, scale.shape[-1] * group_size)
        return packed_linear_row(*operands)
    return packed_linear_op(*operands, group_size)
