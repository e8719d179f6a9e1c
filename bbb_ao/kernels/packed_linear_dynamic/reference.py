"""The packed linear layer with quantized activations, in plain torch: the fake-quant model on the dense weight.

    y[m, n] = sum_k xq[m, k] * w_r[n, k] + bias[n],   xq = fake_quantize_activation(x[m, index])

with xq = a * (codes + h - zero) for each token and group, a and zero of `quantize_activation`, w_r of `packed_linear`.
"""

from torch import Tensor

from bbb_ao.kernels.packed_linear.reference import packed_linear_reference
from bbb_ao.kernels.packed_row import expand_input, fake_quantize_input


def packed_linear_dynamic_reference(
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
    """See `packed_linear_dynamic`. xq is computed in float32 (float64 for float64 x) and rounded to x's dtype once."""
    columns = expand_input(x, index)
    quantized = fake_quantize_input(columns, index, x.shape[-1], act_bits, act_half_step, group_size)
    return packed_linear_reference(
        quantized.to(x.dtype),
        high,
        mid,
        low,
        scale,
        scale_exponent,
        zero_point,
        None,
        bias,
        bits,
        zero_point_bits,
        half_step,
        group_size,
    )
