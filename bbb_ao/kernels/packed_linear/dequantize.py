"""The dense weight from its packed form, in Triton: for many rows, where a library's product takes most of the time.

w = e4m3 * (c_r + h - zeta * 2**(r-2)) * 2**(exponent + 2 - r), in float32 and rounded once to the wanted type; the
equations are those of `reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bbb_ao.kernels.packing.planes import BLOCK, stored_bits

ZERO_POINT_WIDTHS = (0, 1, 2, 4, 8)  # those whose codes do not cross bytes


@triton.jit
def _word_codes(high_ptr, mid_ptr, low_ptr, place, low_place, QUARTER: tl.constexpr, R: tl.constexpr, mask):
    """R-bit codes of one quarter of a block, read from the bytes that hold them."""
    codes = (tl.load(high_ptr + place, mask=mask, other=0).to(tl.int32) >> (2 * QUARTER)) & 3
    if R > 2:
        mid = (tl.load(mid_ptr + place, mask=mask, other=0).to(tl.int32) >> (2 * QUARTER)) & 3
        codes = codes * 4 + mid
    if R > 4:
        low = (tl.load(low_ptr + low_place, mask=mask, other=0).to(tl.int32) >> (4 * (QUARTER // 2))) & 15
        codes = codes * 16 + low
    return codes


@triton.jit
def dequantize_kernel(
    high_ptr,
    mid_ptr,
    low_ptr,
    scale_ptr,
    exponent_ptr,
    zero_ptr,
    weight_ptr,
    N,
    K,
    zero_bytes,
    first_block,
    LENGTH: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    HALF_STEP: tl.constexpr,
    ZB: tl.constexpr,
    GROUP: tl.constexpr,
    EXPONENTS: tl.constexpr,
    BN: tl.constexpr,
):
    """One block of LENGTH columns of BN rows; LENGTH is 128, or 32, 64 or 96 for the last block of a row."""
    SPAN: tl.constexpr = LENGTH // 4
    block = first_block + tl.program_id(1)
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    # 16 consecutive columns are the low, the next ones the high bytes of a quarter's 16-bit words.
    e = tl.arange(0, 16)[None, :]
    mask = (n < N) & (e < SPAN // 2)
    if EXPONENTS:
        exponent = tl.load(exponent_ptr + n, mask=n < N, other=0)
    else:
        exponent = tl.load(exponent_ptr)
    power = ((exponent + (127 + 2 - BITS)) << 23).to(tl.float32, bitcast=True)
    row = n.to(tl.int64)
    for quarter in tl.static_range(4):
        for hb in tl.static_range(2):
            byte = 2 * e + hb
            place = row * (K // 4) + block * 32 + byte
            low_place = row * (K // 2) + block * 64 + (quarter % 2) * SPAN + byte
            codes = _word_codes(high_ptr, mid_ptr, low_ptr, place, low_place, quarter, R, mask)
            if ROUNDED:
                codes = tl.minimum((codes + 2 ** (R - BITS - 1)) >> (R - BITS), 2**BITS - 1)
            else:
                codes = codes >> (R - BITS)
            column = block * 128 + quarter * SPAN + hb * (SPAN // 2) + e
            group = column // GROUP
            scale = tl.load(scale_ptr + row * (K // GROUP) + group, mask=mask, other=0)
            # An E4M3 pattern at the top of a float32's mantissa is e4m3 * 2**-120.
            scale = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120
            offset = 0.5 if HALF_STEP else 0.0
            if ZB == 0:
                value = codes.to(tl.float32) + (offset - 2.0 ** (BITS - 1))
            else:
                bit = group * ZB
                zero = tl.load(zero_ptr + row * zero_bytes + bit // 8, mask=mask, other=0).to(tl.int32)
                zero = (zero >> (bit % 8)) & (2**ZB - 1)
                value = codes.to(tl.float32) + (offset - zero.to(tl.float32) * 2.0 ** (BITS - ZB))
            tl.store(weight_ptr + row * K + column, (value * scale * power).to(weight_ptr.dtype.element_ty), mask=mask)


def dequantize_dense(
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
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_packed` for float32, bfloat16 and float16 weights and zero_point_bits of ZERO_POINT_WIDTHS."""
    rows, features = high.shape[0], scale.shape[1] * group_size
    weight = torch.empty(rows, features, dtype=dtype, device=high.device)
    # Rounding takes one bit below the slice.
    rounded = not half_step and bits < stored_bits(mid, low)
    container = next(width for width in (2, 4, 8) if width >= bits + rounded)
    tail = features % BLOCK
    for length, first, blocks in ((BLOCK, 0, features // BLOCK), (tail, features // BLOCK, 1)):
        if length == 0 or blocks == 0 or rows == 0:
            continue
        dequantize_kernel[(triton.cdiv(rows, 16), blocks)](
            high,
            high if mid is None else mid,
            high if low is None else low,
            scale,
            scale_exponent,
            scale if zero_point is None else zero_point,
            weight,
            rows,
            features,
            0 if zero_point is None else zero_point.shape[1],
            first,
            LENGTH=length,
            R=container,
            BITS=bits,
            ROUNDED=rounded,
            HALF_STEP=half_step,
            ZB=zero_point_bits,
            GROUP=group_size,
            EXPONENTS=scale_exponent.dim() == 1,
            BN=16,
            num_warps=2,
        )
    return weight
