"""Packed products with a norm between them on an NVIDIA GPU: one launch each where `packed_linear` runs `decode` once.

Everything else, by the rule of `packed_linear.cuda`, is that product and plain torch around it.
"""

import torch
from torch import Tensor

from bbb_ao.kernels.packed_linear.cuda import aligned_rows, multiply, runs_decode_once
from bbb_ao.kernels.packed_linear.launch import decode_linear
from bbb_ao.kernels.packed_norm.decode import normed_decode_kernel
from bbb_ao.kernels.packed_norm.op import check_operands
from bbb_ao.kernels.packed_norm.reference import (
    add_residual,
    check_residual,
    check_squares,
    divide_by_norm,
    gate_halves,
    normed_features,
    square_sums,
)


def packed_linear_residual_cuda(
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
    """See `packed_linear_residual`."""
    planes, scales = (high, mid, low), (scale, scale_exponent, zero_point)
    settings = (bits, zero_point_bits, half_step, group_size)
    check_operands(x, *planes, *scales, index, bias, *settings)
    check_residual(x, residual, norm_weight, high.shape[0])
    if not runs_decode_once(x, planes, scales, settings):
        return add_residual(multiply(x, planes, scales, index, bias, settings), residual, norm_weight)
    weighted = x.new_empty(residual.shape)
    squares = x.new_empty(*x.shape[:-1], square_sums(high.shape[0]), dtype=torch.float32)
    rows = aligned_rows(x)
    hidden = decode_linear(
        rows,
        planes,
        scales,
        index,
        bias,
        settings,
        name="residual decode",
        kernel=normed_decode_kernel,
        eps=0.0,
        in_squares_ptr=squares,  # not read
        residual_ptr=residual.contiguous(),
        norm_weight_ptr=norm_weight.contiguous(),
        weighted_ptr=weighted,
        squares_ptr=squares,
        SQUARES=0,
        RESIDUAL=True,
        GATED=False,
    )
    return hidden.view(residual.shape), weighted, squares


def packed_linear_normed_cuda(
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
    """See `packed_linear_normed`."""
    planes, scales = (high, mid, low), (scale, scale_exponent, zero_point)
    settings = (bits, zero_point_bits, half_step, group_size)
    check_operands(weighted, *planes, *scales, index, bias, *settings)
    check_squares(weighted, squares)
    out_features = normed_features(high.shape[0], gated)
    if not runs_decode_once(weighted, planes, scales, settings):
        y = multiply(divide_by_norm(weighted, squares, eps), planes, scales, index, bias, settings)
        return gate_halves(y) if gated else y
    squares = squares.contiguous()
    rows = aligned_rows(weighted)
    y = weighted.new_empty(*weighted.shape[:-1], out_features)
    decode_linear(
        rows,
        planes,
        scales,
        index,
        bias,
        settings,
        name="gated decode" if gated else "normed decode",
        kernel=normed_decode_kernel,
        y=y,
        eps=eps,
        in_squares_ptr=squares,
        # The rest is not used.
        residual_ptr=rows,
        norm_weight_ptr=rows,
        weighted_ptr=rows,
        squares_ptr=squares,
        SQUARES=squares.shape[-1],
        RESIDUAL=False,
        GATED=gated,
    )
    return y
