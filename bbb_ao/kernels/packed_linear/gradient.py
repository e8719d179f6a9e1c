"""Gradients of the packed operators: the packed weight is frozen, x and the bias are not.

    dL/dx[m, i] = sum over k with index[k] = i of sum_n dL/dy[m, n] * w[n, k],   dL/dbias[n] = sum_m dL/dy[m, n]

Quantized activations pass the gradient straight through. So adapters can be trained around a packed layer, and a
model with trainable parameters elsewhere compiles.
"""

from typing import Any

import torch
from torch import Tensor

from bbb_ao.kernels.packed_linear.reference import dequantize_packed


def save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass reads; `inputs` are the operator's, in its order."""
    x, high, mid, low, scale, exponent, zero_point, index, bias, *settings = inputs
    ctx.save_for_backward(high, mid, low, scale, exponent, zero_point, index)
    # (bits, zero_point_bits, half_step, group_size); those of the activations do not matter here.
    ctx.settings = settings[:4]
    ctx.in_features, ctx.inputs, ctx.has_bias = x.shape[-1], len(inputs), bias is not None


def backward_packed(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x and bias in their places, None for everything else."""
    high, mid, low, scale, exponent, zero_point, index = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        weight = dequantize_packed(high, mid, low, scale, exponent, zero_point, *ctx.settings, dtype=dtype)
        columns = gradient @ weight.to(gradient.dtype)
        gradients[0] = columns
        if index is not None:
            padded = columns.new_zeros(*columns.shape[:-1], ctx.in_features + 1)
            gradients[0] = padded.index_add(-1, index, columns)[..., : ctx.in_features]
    if ctx.has_bias and ctx.needs_input_grad[8]:
        gradients[8] = gradient.flatten(0, -2).sum(0)
    return tuple(gradients)
