"""The public door of the packed linear layer with quantized activations."""

from torch import Tensor

from bbb_ao.kernels.packed_linear.reference import check_exponent, check_input, check_weight
from bbb_ao.kernels.packed_linear_dynamic.op import packed_linear_dynamic_op
from bbb_ao.kernels.packed_row import packed_linear_row, takes_row_path


def packed_linear_dynamic(
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
    group_size: int,
    act_bits: int,
    act_half_step: bool,
) -> Tensor:
    """`packed_linear` on activations quantized per token and group of `group_size` columns, after the gather.

    Args:
        act_bits: width of the activation codes, 2 to 8.
        act_half_step: the half-step grid for activations, else the integer grid.
        The others are those of `packed_linear`. Padding (index[k] == in_features) stays exactly 0; without an index
        every column counts as data, so padding that a producer delivers must be marked by one.
    Returns:
        [..., out_features], dtype of x.
    Raises:
        TypeError, ValueError: as `packed_linear`; ValueError also where act_bits is not 2 to 8.
    Gradient: for x, straight through its quantization, and bias; the packed weight is frozen.
    """
    if not 2 <= act_bits <= 8:
        raise ValueError(f"act_bits must be 2 to 8: found {act_bits}; use packed_linear for unquantized activations")
    operands = (x, high, mid, low, scale, scale_exponent, zero_point, index, bias, bits, zero_point_bits, half_step)
    if takes_row_path(x, high, mid, low, bits, zero_point_bits, half_step, group_size):
        check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
        check_exponent(scale_exponent, high.shape[0])
        check_input(x, index, scale.shape[-1] * group_size)
        return packed_linear_row(*operands, act_bits, act_half_step)
    return packed_linear_dynamic_op(*operands, group_size, act_bits, act_half_step)
