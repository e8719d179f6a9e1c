"""torch.ops.bbb_ao.packed_linear_dynamic: schema, default implementation (the reference) and shape function.

On NVIDIA GPUs `cuda` runs.
"""

from typing import Any

import torch
from torch import Tensor

from bbb_ao.kernels.packed_linear.gradient import backward_packed, save_packed
from bbb_ao.kernels.packed_linear.reference import check_exponent, check_input, check_weight
from bbb_ao.kernels.packed_linear_dynamic.reference import packed_linear_dynamic_reference


@torch.library.custom_op("bbb_ao::packed_linear_dynamic", mutates_args=())
def packed_linear_dynamic_op(
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
    return packed_linear_dynamic_reference(
        x,
        high,
        mid,
        low,
        scale,
        scale_exponent,
        zero_point,
        index,
        bias,
        bits,
        zero_point_bits,
        half_step,
        group_size,
        act_bits,
        act_half_step,
    )


@packed_linear_dynamic_op.register_fake
def _(
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
    check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
    check_exponent(scale_exponent, high.shape[0])
    check_input(x, index, scale.shape[-1] * group_size)
    return x.new_empty(*x.shape[:-1], high.shape[0])


@packed_linear_dynamic_op.register_kernel("cuda")
def _(*operands: Any) -> Tensor:
    # Imported here: Triton is present on Linux only.
    from bbb_ao.kernels.packed_linear_dynamic.cuda import packed_linear_dynamic_cuda

    return packed_linear_dynamic_cuda(*operands)


packed_linear_dynamic_op.register_autograd(backward_packed, setup_context=save_packed)
