"""torch.ops.bbb_ao.fake_quantize_closed_form and .fake_quantize_given: the Triton path, with its gradients.

Only the inputs are kept for the backward pass (and one int32 for each row), which derives codes and scales anew from
them. Triton is imported by the first call, so that a machine without it can import the package. Which tensors come here
is decided in `dispatch`.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("bbb_ao::fake_quantize_closed_form", mutates_args=())
def closed_form_op(
    x: Tensor,
    bits: int,
    parent_bits: int,
    group_size: int,
    half_step: bool,
    zero_point_bits: int,
    e4m3: bool,
    activation: bool,
    detach: bool,
    padding: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x on the grid of its own minima and maxima, in `dtype`, and `launch.largest_scales`; see `launch.Settings`."""
    from bbb_ao.kernels.fake_quantize import launch

    x = x.contiguous()
    settings = launch.Settings(
        bits, parent_bits, group_size, half_step, zero_point_bits, e4m3, activation, detach, padding
    )
    with torch.cuda.device_of(x):
        largest = launch.largest_scales(x, settings)
        return launch.forward(x, largest, None, None, settings, dtype), largest


@closed_form_op.register_fake
def _(
    x: Tensor,
    bits: int,
    parent_bits: int,
    group_size: int,
    half_step: bool,
    zero_point_bits: int,
    e4m3: bool,
    activation: bool,
    detach: bool,
    padding: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if activation else 1
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=torch.int32)


@torch.library.custom_op("bbb_ao::fake_quantize_closed_form_backward", mutates_args=())
def closed_form_backward_op(
    gradient: Tensor,
    x: Tensor,
    largest: Tensor,
    bits: int,
    parent_bits: int,
    group_size: int,
    half_step: bool,
    zero_point_bits: int,
    e4m3: bool,
    activation: bool,
    detach: bool,
    padding: int,
) -> Tensor:
    """The gradient for x, in its dtype."""
    from bbb_ao.kernels.fake_quantize import launch

    settings = launch.Settings(
        bits, parent_bits, group_size, half_step, zero_point_bits, e4m3, activation, detach, padding
    )
    with torch.cuda.device_of(x):
        return launch.backward(gradient.contiguous(), x.contiguous(), largest, None, None, settings)[0]


@closed_form_backward_op.register_fake
def _(gradient: Tensor, x: Tensor, largest: Tensor, *settings: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save_closed_form(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *settings, _ = inputs
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _backward_closed_form(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, largest = ctx.saved_tensors
    return closed_form_backward_op(gradient, x, largest, *ctx.settings), *[None] * (len(ctx.settings) + 1)


closed_form_op.register_autograd(_backward_closed_form, setup_context=_save_closed_form)


@torch.library.custom_op("bbb_ao::fake_quantize_given", mutates_args=())
def given_op(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    parent_bits: int,
    group_size: int,
    half_step: bool,
    dtype: torch.dtype,
) -> Tensor:
    """weight [out_features, in_features] on the grid of scale and zero_point, float32 [out_features, groups]."""
    from bbb_ao.kernels.fake_quantize import launch

    settings = launch.Settings(bits, parent_bits, group_size, half_step, 0, False)
    with torch.cuda.device_of(weight):
        largest = scale.new_empty(1, dtype=torch.int32)
        operands = (weight.contiguous(), largest, scale.contiguous(), zero_point.contiguous())
        return launch.forward(*operands, settings, dtype)


@given_op.register_fake
def _(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    parent_bits: int,
    group_size: int,
    half_step: bool,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("bbb_ao::fake_quantize_given_backward", mutates_args=())
def given_backward_op(
    gradient: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    parent_bits: int,
    group_size: int,
    half_step: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for weight, scale and zero_point."""
    from bbb_ao.kernels.fake_quantize import launch

    settings = launch.Settings(bits, parent_bits, group_size, half_step, 0, False)
    with torch.cuda.device_of(weight):
        largest = scale.new_empty(1, dtype=torch.int32)
        operands = (weight.contiguous(), largest, scale.contiguous(), zero_point.contiguous())
        to_weight, to_scale, to_zero = launch.backward(gradient.contiguous(), *operands, settings)
    assert to_scale is not None, "the scale is given"
    assert to_zero is not None, "the zero offset is given"
    return to_weight, to_scale, to_zero


@given_backward_op.register_fake
def _(gradient: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return weight.new_empty(weight.shape), scale.new_empty(scale.shape), zero_point.new_empty(zero_point.shape)


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:-1]


def _backward_given(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = given_backward_op(gradient, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *[None] * (len(ctx.settings) + 1)


given_op.register_autograd(_backward_given, setup_context=_save_given)
