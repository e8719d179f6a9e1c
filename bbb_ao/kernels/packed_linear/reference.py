"""The packed linear layer in plain torch: dequantize the weight once, then one dense product.

    w[n, k] = s_r[n, g] * (c_r[n, k] + h - zeta[n, g] * 2**(r-2)),   g = k // group_size,   h = 1/2 or 0
    s_r = e4m3(scale) * 2**scale_exponent[n] * 2**(2-r),   zeta = z * 4 / 2**zero_point_bits   (design.md, section 2.9)
    y[m, n] = sum_k x[m, index[k]] * w[n, k] + bias[n]

This is the oracle of every other implementation, and the path for many rows on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels.fake_quantize import decode_scale, dequantize, slice_codes
from bbb_ao.kernels.packed_row import expand_input
from bbb_ao.kernels.packing import unpack_codes, unpack_planes
from bbb_ao.kernels.packing.dense import packed_bytes
from bbb_ao.kernels.packing.planes import check_planes, stored_bits


def packed_linear_reference(
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
) -> Tensor:
    """See `packed_linear`. The product runs in x's dtype, on weights rounded to it once."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize_packed(
        high, mid, low, scale, scale_exponent, zero_point, bits, zero_point_bits, half_step, group_size, dtype
    )
    return F.linear(expand_input(x, index), weight.to(x.dtype), bias)


def dequantize_packed(
    high: Tensor,
    mid: Tensor | None,
    low: Tensor | None,
    scale: Tensor,
    scale_exponent: Tensor,
    zero_point: Tensor | None,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight at `bits` bits, columns as stored (split channels are not merged).

    Args:
        dtype: float32 or float64; the others as in `packed_linear`.
    Returns:
        [out_features, K] of `dtype`.
    Raises:
        TypeError, ValueError: as `packed_linear`.
    """
    check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
    check_exponent(scale_exponent, high.shape[0])
    groups = scale.shape[-1]
    codes = _read_codes(high, mid, low, groups * group_size, bits, half_step).unflatten(-1, (groups, group_size))
    # [1, 1] or [out_features, 1]
    step = decode_scale(scale, scale_exponent.view(-1, 1), dtype)
    if zero_point is None:
        offset = torch.full_like(step, 2.0)
    else:
        offset = unpack_codes(zero_point, zero_point_bits, groups).to(dtype) * (4 / 2**zero_point_bits)
    return dequantize(codes, step, offset, bits, half_step).flatten(-2)


def check_weight(
    high: Tensor,
    mid: Tensor | None,
    low: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    zero_point_bits: int,
    group_size: int,
) -> None:
    """Raise unless the tensors form a packed weight; see `packed_linear`."""
    if scale.dtype != torch.uint8:
        raise TypeError(f"scale must be uint8 E4M3 patterns: found {scale.dtype}; use encode_scale")
    if scale.dim() != 2 or scale.shape[0] != high.shape[0]:
        raise ValueError(f"scale must be [out_features, groups] = [{high.shape[0]}, ...]: found {tuple(scale.shape)}")
    groups = scale.shape[1]
    check_planes(high, mid, low, groups * group_size, bits)
    if zero_point is None and zero_point_bits > 0:
        raise ValueError(f"zero_point must be given with zero_point_bits = {zero_point_bits}; or set that to 0")
    if zero_point is not None and zero_point_bits == 0:
        raise ValueError("zero_point must be None with zero_point_bits = 0, which fixes the zero offset at 2")
    if zero_point is not None and tuple(zero_point.shape) != (high.shape[0], packed_bytes(groups, zero_point_bits)):
        expected = (high.shape[0], packed_bytes(groups, zero_point_bits))
        raise ValueError(f"zero_point must have shape {expected}: found {tuple(zero_point.shape)}")


def check_exponent(scale_exponent: Tensor, rows: int) -> None:
    """Raise unless `scale_exponent` is an int32 scalar, or has one element for each of the weight's rows."""
    shape = tuple(scale_exponent.shape)
    if scale_exponent.dtype != torch.int32 or shape not in ((), (rows,)):
        raise ValueError(
            f"scale_exponent must be an int32 scalar or [out_features] = [{rows}]: "
            f"found {scale_exponent.dtype} {list(shape)}"
        )


def check_input(x: Tensor, index: Tensor | None, features: int) -> None:
    """Raise unless x, gathered by `index`, has `features` columns; see `packed_linear`."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point: found {x.dtype}")
    if index is not None and tuple(index.shape) != (features,):
        raise ValueError(f"index must have shape ({features},): found {tuple(index.shape)}")
    if index is None and x.shape[-1] != features:
        raise ValueError(f"x must have {features} columns, as the stored weight: found {x.shape[-1]}; pass an index")


def _read_codes(
    high: Tensor, mid: Tensor | None, low: Tensor | None, features: int, bits: int, half_step: bool
) -> Tensor:
    """c_r from the planes that hold it; planes that are not stored count as zero bits of the parent code."""
    if half_step or bits >= stored_bits(mid, low):
        return unpack_planes(high, mid, low, features, bits)
    # Rounding takes one bit below the slice, no more: floor((floor(c / 2**m) + 1) / 2) = floor((c + 2**m) / 2**(m+1)).
    return slice_codes(unpack_planes(high, mid, low, features, bits + 1), bits, half_step, bits + 1)
