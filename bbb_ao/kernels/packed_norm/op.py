"""torch.ops.bbb_ao.packed_linear_residual and packed_linear_normed: schemas, default implementations, shapes.

On NVIDIA GPUs `cuda` runs. They are for inference: neither has a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from bbb_ao.kernels.packed_linear.reference import check_exponent, check_input, check_weight, packed_linear_reference
from bbb_ao.kernels.packed_norm.reference import (
    add_residual,
    check_residual,
    check_squares,
    divide_by_norm,
    gate_halves,
    normed_features,
    square_sums,
    sum_dtype,
)


@torch.library.custom_op("bbb_ao::packed_linear_residual", mutates_args=())
def packed_linear_residual_op(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """residual + packed_linear(x, ...), and what a norm behind it needs; the equations stand in `packed_norm`.

    Args:
        x: [..., in_features]; it and everything from `high` on as in `packed_linear`.
        residual: [..., out_features], dtype of x. `decode` adds it before it rounds.
        norm_weight: [out_features], floating point.
    Returns:
        hidden: [..., out_features], dtype of x.
        weighted: the same shape and dtype, hidden * norm_weight.
        squares: [..., ceil(out_features / 16)], float32 (float64 if x is): sums of 16 channels of hidden**2.
    Raises:
        TypeError, ValueError: as `packed_linear`, or shapes that do not fit the product's.
    """
    operands = (high, mid, low, scale, scale_exponent, zero_point, index, bias)
    check_input(x, index, scale.shape[-1] * group_size)
    check_residual(x, residual, norm_weight, high.shape[0])
    product = packed_linear_reference(x, *operands, bits, zero_point_bits, half_step, group_size)
    return add_residual(product, residual, norm_weight)


@packed_linear_residual_op.register_fake
def _(x: Tensor, residual: Tensor, norm_weight: Tensor, high: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(x, high, *rest)
    check_residual(x, residual, norm_weight, high.shape[0])
    hidden = x.new_empty(*x.shape[:-1], high.shape[0])
    squares = x.new_empty(*x.shape[:-1], square_sums(high.shape[0]), dtype=sum_dtype(x.dtype))
    return hidden, torch.empty_like(hidden), squares


@torch.library.custom_op("bbb_ao::packed_linear_normed", mutates_args=())
def packed_linear_normed_op(
    weighted: Tensor,
    squares: Tensor,
    eps: float,
    gated: bool,
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
) -> Tensor:
    """packed_linear(weighted / sqrt(sum(squares) / in_features + eps), ...), gated or not; see `packed_norm`.

    Args:
        weighted, squares: as from `packed_linear_residual`; [..., in_features] and [..., ceil(in_features / 16)].
        eps: what is added to the mean of the squares.
        gated: whether SwiGLU of the product's halves is the result.
        the others: as in `packed_linear`.
    Returns:
        [..., out_features], or half as many with `gated`, dtype of `weighted`.
    Raises:
        TypeError, ValueError: as `packed_linear`, or `squares` that do not fit `weighted`; out_features to be gated
            that are odd.
    """
    operands = (high, mid, low, scale, scale_exponent, zero_point, index, bias)
    check_input(weighted, index, scale.shape[-1] * group_size)
    check_squares(weighted, squares)
    normed_features(high.shape[0], gated)
    x = divide_by_norm(weighted, squares, eps)
    y = packed_linear_reference(x, *operands, bits, zero_point_bits, half_step, group_size)
    return gate_halves(y) if gated else y


@packed_linear_normed_op.register_fake
def _(weighted: Tensor, squares: Tensor, eps: float, gated: bool, high: Tensor, *rest: Any) -> Tensor:
    check_operands(weighted, high, *rest)
    check_squares(weighted, squares)
    return weighted.new_empty(*weighted.shape[:-1], normed_features(high.shape[0], gated))


def check_operands(
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
) -> None:
    """Raise unless these are operands of `packed_linear`."""
    check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
    check_exponent(scale_exponent, high.shape[0])
    check_input(x, index, scale.shape[-1] * group_size)


@packed_linear_residual_op.register_kernel("cuda")
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here: Triton is present on Linux only.
    from bbb_ao.kernels.packed_norm.cuda import packed_linear_residual_cuda

    return packed_linear_residual_cuda(*operands)


@packed_linear_normed_op.register_kernel("cuda")
def _(*operands: Any) -> Tensor:
    from bbb_ao.kernels.packed_norm.cuda import packed_linear_normed_cuda

    return packed_linear_normed_cuda(*operands)
