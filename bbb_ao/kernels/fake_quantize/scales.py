"""E4M3 scales with a second level: an 8-bit code for each group and one power of two for each tensor (or token).

scale = e4m3(code) * 2**exponent. The second level keeps the largest scale at most 448 and is a power of two, so that
it survives any cast of a module, and so that every 2-bit weight is exact in bfloat16 with zero offsets in quarter steps
(every 4-bit one too, where the offset is whole; with quarter steps a 4-bit weight takes one bit more than it has).
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9
# Limits of the second level: every scale from 2**-109 to 2**128 stays a normal float32, also divided by 64.
EXPONENT_MIN, EXPONENT_MAX = -100, 119
SCALE_SMALLEST = E4M3_SMALLEST * 2.0**EXPONENT_MIN


def scale_exponent(largest: Tensor) -> Tensor:
    """Smallest exponent e such that `largest <= 448 * 2**e`.

    Args:
        largest: the largest scale of each tensor or token, any shape, floating point, >= 0.
    Returns:
        exponent, int32, same shape, between -100 and 119; 0 where `largest` is 0.
    """
    # 448 is 7/8 * 2**9, and frexp gives a mantissa in [1/2, 1). Dividing by 448 instead would underflow to 0.
    mantissa, exponent = torch.frexp(largest.detach())
    exponent = torch.where(mantissa > 0.875, exponent - 8, exponent - 9).clamp(EXPONENT_MIN, EXPONENT_MAX)
    return torch.where(largest == 0, torch.zeros_like(exponent), exponent).to(torch.int32)


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2**exponent, exactly, in `dtype`; exponent int32, any shape."""
    return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent)


def encode_scale(scale: Tensor, exponent: Tensor, up: bool = False) -> Tensor:
    """Round scales to E4M3, to nearest or up. A positive scale never becomes 0, and none exceeds 448 * 2**exponent.

    NaN and infinity become E4M3's NaN, so that they reach whoever checks for them.

    Args:
        scale: floating point, >= 0.
        exponent: int32, broadcastable to `scale`, from `scale_exponent`.
        up: take the next larger number where the nearest one is smaller.
    Returns:
        E4M3 bit patterns, uint8, the shape of `scale`.
    """
    scale = scale.detach()
    ratio = (scale / power_of_two(exponent, scale.dtype)).clamp(E4M3_SMALLEST, E4M3_MAX)
    # |scale| * 0 is NaN for NaN and infinity, and never -0, whose pattern would be a negative scale.
    ratio = torch.where((scale > 0) & torch.isfinite(scale), ratio, scale.abs() * 0)
    nearest = ratio.to(torch.float32).to(torch.float8_e4m3fn)
    code = nearest.view(torch.uint8)
    # Patterns of positive numbers are in the order of the numbers; 448 is the largest ratio, so none becomes NaN.
    return code + (nearest.to(ratio.dtype) < ratio) if up else code


def decode_scale(code: Tensor, exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale = e4m3(code) * 2**exponent, exactly.

    Args:
        code: E4M3 bit patterns, uint8.
        exponent: int32, broadcastable to `code`.
    Returns:
        scales of `dtype` (float32 or float64), the shape of `code`.
    """
    return code.view(torch.float8_e4m3fn).to(dtype) * power_of_two(exponent, dtype)


class _RoundScale(torch.autograd.Function):
    """Rounding to E4M3 whose gradient is the identity."""

    @staticmethod
    def forward(ctx, scale: Tensor, exponent: Tensor, up: bool) -> Tensor:
        return decode_scale(encode_scale(scale, exponent, up), exponent, scale.dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def round_scale(scale: Tensor, exponent: Tensor, up: bool = False) -> Tensor:
    """decode_scale(encode_scale(scale, exponent, up), exponent) with a straight-through gradient for `scale`."""
    return _RoundScale.apply(scale, exponent, up)  # type: ignore[return-value]
