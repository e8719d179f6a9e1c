"""The public doors of fake quantization, and the rule that picks the implementation.

Triton runs for CUDA tensors of at most 32 bits; the plain torch reference for everything else (CPU, and float64 on any
device). There is no fallback: on CUDA a missing Triton or a kernel that does not compile is an error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels.fake_quantize import op, reference


def uses_triton(tensor: Tensor) -> bool:
    """Whether fake quantization of this tensor runs in Triton; the module's rule."""
    return tensor.is_cuda and tensor.element_size() <= 4


def fake_quantize_closed_form(
    weight: Tensor,
    bits: int,
    half_step: bool,
    zero_point_bits: int,
    e4m3: bool = True,
    group_size: int = 32,
    parent_bits: int = 8,
    detach: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """fake_quantize(weight, *derive_scale(weight)), fused; equations in `reference`.

    Args:
        weight: [out_features, in_features], floating point; group_size divides in_features.
        detach: the scales pass no gradient.
        dtype: of the result; None takes weight's.
    Returns:
        [out_features, in_features], computed in float32 (float64 for float64).
    Gradient: straight through inside the range, zero outside; through each group's minimum and maximum.
    """
    dtype = dtype or weight.dtype
    if uses_triton(weight):
        settings = (bits, parent_bits, group_size, half_step, zero_point_bits, e4m3, False, detach, 0)
        return op.closed_form_op(weight, *settings, dtype)[0]
    groups = (weight if weight.element_size() >= 4 else weight.float()).unflatten(1, (-1, group_size))
    source = groups.detach() if detach else groups
    scale, zero_point = reference.derive_scale(source, half_step, zero_point_bits, e4m3)
    return reference.fake_quantize(groups, scale, zero_point, bits, half_step, parent_bits).flatten(1).to(dtype)


def fake_quantize_given(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    half_step: bool,
    group_size: int = 32,
    parent_bits: int = 8,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.fake_quantize` of a matrix at scales that are parameters, or rounded already.

    Args:
        weight: [out_features, in_features]; scale, zero_point: [out_features, groups].
        dtype: of the result; None takes weight's.
    Returns:
        [out_features, in_features].
    """
    dtype = dtype or weight.dtype
    if uses_triton(weight) and uses_triton(scale):
        return op.given_op(weight, scale.float(), zero_point.float(), bits, parent_bits, group_size, half_step, dtype)
    groups = weight.unflatten(1, (-1, group_size))
    return reference.fake_quantize(groups, scale, zero_point, bits, half_step, parent_bits).flatten(1).to(dtype)


def fake_quantize_tokens(
    x: Tensor,
    bits: int,
    half_step: bool,
    group_size: int = 32,
    padding: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.fake_quantize_activation` of whole rows.

    Args:
        x: [..., features], floating point; group_size divides features.
        padding: trailing features that are padding; they stay zero, and get no gradient.
        dtype: of the result; None takes x's.
    Returns:
        [..., features], computed in float32 (float64 for float64).
    """
    dtype = dtype or x.dtype
    if uses_triton(x):
        return op.closed_form_op(x, bits, bits, group_size, half_step, 0, True, True, False, padding, dtype)[0]
    compute = x if x.element_size() >= 4 else x.float()
    groups = compute.unflatten(-1, (-1, group_size))
    rounded = reference.fake_quantize_activation(groups, bits, half_step).flatten(-2)
    if padding:
        rounded = F.pad(rounded[..., : x.shape[-1] - padding], (0, padding))
    return rounded.to(dtype)
