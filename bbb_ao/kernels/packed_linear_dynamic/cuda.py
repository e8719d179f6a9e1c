"""The packed linear layer with quantized activations on an NVIDIA GPU.

Activations of at most 32 bits are gathered and fake-quantized by one kernel; then `packed_linear_cuda` runs.
"""

import torch
from torch import Tensor

from bbb_ao.kernels.fake_quantize.launch import gathered_rows
from bbb_ao.kernels.packed_linear.cuda import packed_linear_cuda
from bbb_ao.kernels.packed_linear.reference import check_input
from bbb_ao.kernels.packed_linear_dynamic.reference import packed_linear_dynamic_reference


def packed_linear_dynamic_cuda(
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
    """See `packed_linear_dynamic`."""
    check_input(x, index, scale.shape[-1] * group_size)
    weight = (high, mid, low, scale, scale_exponent, zero_point)
    settings = (bits, zero_point_bits, half_step, group_size)
    if x.dtype == torch.float64:
        return packed_linear_dynamic_reference(x, *weight, index, bias, *settings, act_bits, act_half_step)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device_of(x):
        quantized = gathered_rows(rows, index, act_bits, act_half_step, group_size)
    return packed_linear_cuda(quantized, *weight, None, bias, *settings).view(*x.shape[:-1], high.shape[0])
