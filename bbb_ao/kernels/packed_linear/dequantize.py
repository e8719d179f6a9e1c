"""The dense weight from its packed form, in Triton: for many rows, where a library's product takes most of the time.

w = e4m3 * (c_r + h - zeta * 2**(r-2)) * 2**(exponent + 2 - r), in float32 and rounded once to the wanted type; the
equations are those of `reference`.
"""

# pyright: reportCallIssue=false
# Triton types a launch as a call of the Python function.

import torch
import triton
import triton.language as tl
from torch import Tensor

from bbb_ao.kernels.packing.planes import BLOCK, stored_bits

ZERO_POINT_WIDTHS = (0, 1, 2, 4, 8)  # those whose codes do not cross bytes


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
    # [rows, quarter, half, word]: the low bytes of a quarter's words are its first half, the high bytes its second one.
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None, None, None]
    quarter = tl.arange(0, 4)[None, :, None, None]
    half = tl.arange(0, 2)[None, None, :, None]
    e = tl.arange(0, 16)[None, None, None, :]
    row = n.to(tl.int64)
    words = tl.pointer_type(tl.int16)
    read = (n < N) & (e < SPAN // 2)
    place = row * (K // 8) + block * 16 + e
    codes = (tl.load(high_ptr.to(words) + place, mask=read, other=0).to(tl.int32) >> (8 * half + 2 * quarter)) & 3
    if R > 2:
        mid = tl.load(mid_ptr.to(words) + place, mask=read, other=0).to(tl.int32)
        codes = codes * 4 + ((mid >> (8 * half + 2 * quarter)) & 3)
    if R > 4:
        place = row * (K // 4) + block * 32 + quarter % 2 * (SPAN // 2) + e
        low = tl.load(low_ptr.to(words) + place, mask=read, other=0).to(tl.int32)
        codes = codes * 16 + ((low >> (8 * half + 4 * (quarter // 2))) & 15)
    if ROUNDED:
        codes = tl.minimum((codes + 2 ** (R - BITS - 1)) >> (R - BITS), 2**BITS - 1)
    else:
        codes = codes >> (R - BITS)
    column = block * 128 + quarter * SPAN + half * (SPAN // 2) + e
    # In a full block a quarter lies in one group.
    group = (block * 128 + quarter * SPAN) // GROUP if LENGTH == 128 else column // GROUP
    known = n < N if LENGTH == 128 else read
    scale = tl.load(scale_ptr + row * (K // GROUP) + group, mask=known, other=0)
    # An E4M3 pattern at the top of a float32's mantissa is e4m3 * 2**-120.
    scale = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**120
    if EXPONENTS:
        exponent = tl.load(exponent_ptr + n, mask=n < N, other=0)
    else:
        exponent = tl.load(exponent_ptr)
    scale *= ((exponent + (127 + 2 - BITS)) << 23).to(tl.float32, bitcast=True)
    offset = 0.5 if HALF_STEP else 0.0
    if ZB == 0:
        value = (codes.to(tl.float32) + (offset - 2.0 ** (BITS - 1))) * scale
    else:
        zero = tl.load(zero_ptr + row * zero_bytes + group * ZB // 8, mask=known, other=0).to(tl.int32)
        zero = (zero >> (group * ZB % 8)) & (2**ZB - 1)
        value = (codes.to(tl.float32) + (offset - zero.to(tl.float32) * 2.0 ** (BITS - ZB))) * scale
    tl.store(weight_ptr + row * K + column, value.to(weight_ptr.dtype.element_ty), mask=read)


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
        dequantize_kernel[(triton.cdiv(rows, 32), blocks)](
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
            BN=32,
            num_warps=4,
        )
    return weight
