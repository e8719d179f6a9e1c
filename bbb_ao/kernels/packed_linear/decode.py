"""One or two rows through a packed weight on an NVIDIA GPU (compute capability 8.0 or higher), written in Gluon.

The product runs on tensor cores with the weight as the first operand, in mma.m16n8k16 on 16 rows of it. What makes it
cheap, about 1.7 instructions for a 2-bit weight (counted in the machine code; a shift, a mask and a conversion for each
code take 6.75):

- A code is not converted. Masked in place, two codes of a 32-bit word are two 16-bit floats whose exponent field is 0 or
  1, where floats are equally spaced: code * 2**place in units of the smallest subnormal. The tensor core multiplies
  subnormal numbers exactly; the activation carries the missing power of two (bfloat16) or the sum does (float16).
- A lane of each quad holds another block of 128 columns, and the second operand is block diagonal: its column c is the
  activation of block c // 2 and zero elsewhere. So the sums of eight groups come out as the eight columns of one
  accumulator, each group's scale and zero offset are decoded once, and one row of activations fills all columns.
- Warps of a program share its rows and take different blocks; their sums meet at the end in a fixed order, so results
  do not change from run to run.

With c the codes, sum over the columns k of group g of x[k] * c[n, k] and X[g] = sum of x[k]:

    y[n] = 2**(exponent + 2 - R) * sum_g e4m3[n, g] * (sum_k x[k] * c[n, k] - (zeta[n, g] * 2**(R-2) - H) * X[g])

R is the width of the container, 2, 4 or 8; a narrower code is its top bits, H = 2**(R - bits) / 2 on the half-step grid.
Activations of a magnitude of 2**63 and more overflow in bfloat16.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

ROWS = 16  # of the weight, in one mma
UNIT = 512  # columns that a warp takes at once: one block for each lane of a quad


@gluon.constexpr_function
def _masked(hb, place, mask):
    """PTX: the codes at bit `place` of the low (hb = 0) or high bytes of two 16-bit words, left where they are."""
    pair = (mask << place) * 0x00010001
    shift = "shr.b32 t, $1, 8; and.b32 $0, t, " if hb else "and.b32 $0, $1, "
    return "{ .reg .b32 t; " + shift + str(pair) + "; }"


@gluon.constexpr_function
def _times(dtype):
    """PTX: product of two pairs of 16-bit floats."""
    if dtype == gl.bfloat16:
        # Compute capability 8.0 has no product of its own: a * b - 0.
        return "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
    return "mul.rn.f16x2 $0, $1, $2;"


@gluon.constexpr_function
def _quad_layout(warps):
    """[warps, 16, 4]: rows r and r + 8 of column q in lane 4 * r + q, as the accumulator has columns 2q and 2q + 1."""
    warp_bases = [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 8, 0]], lanes, warp_bases, [], [warps, 16, 4])


@gluon.jit
def _two_words(FIRST: gl.constexpr, a, b):
    """PTX on pairs of 16-bit words of two planes."""
    return gl.inline_asm_elementwise(FIRST, "=r,r,r", [a, b], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def _assemble(high, mid, low_even, low_odd, R: gl.constexpr):
    """Words of R-bit codes from words of the planes; see `packing.words`."""
    if R == 2:
        return (high,)
    LOW_PAIR: gl.constexpr = "{ .reg .b32 t, u; and.b32 t, $1, 0x33333333; shl.b32 t, t, 2; and.b32 u, $2, 0x33333333; or.b32 $0, t, u; }"
    even = _two_words(LOW_PAIR, high, mid)
    HIGH_PAIR: gl.constexpr = "{ .reg .b32 t, u; and.b32 t, $1, 0xCCCCCCCC; shr.b32 u, $2, 2; and.b32 u, u, 0x33333333; or.b32 $0, t, u; }"
    odd = _two_words(HIGH_PAIR, high, mid)
    if R == 4:
        return (even, odd)
    LOWER: gl.constexpr = "{ .reg .b32 t, u; and.b32 t, $1, 0x0F0F0F0F; shl.b32 t, t, 4; and.b32 u, $2, 0x0F0F0F0F; or.b32 $0, t, u; }"
    UPPER: gl.constexpr = "{ .reg .b32 t, u; and.b32 t, $1, 0xF0F0F0F0; shr.b32 u, $2, 4; and.b32 u, u, 0x0F0F0F0F; or.b32 $0, t, u; }"
    return (
        _two_words(LOWER, even, low_even),
        _two_words(LOWER, odd, low_odd),
        _two_words(UPPER, even, low_even),
        _two_words(UPPER, odd, low_odd),
    )


@gluon.jit
def _load_planes(high_ptr, mid_ptr, low_ptr, row, block, offset, NB: gl.constexpr, R: gl.constexpr):
    """16-bit words of every plane that R needs, for one tile of 16 rows; block and offset (16-bit words in it)."""
    mask = block + row * 0 < NB
    place = (row * NB + block).to(gl.int64)
    words = gl.pointer_type(gl.int16)
    high = gl.load(high_ptr.to(words) + place * 16 + offset, mask=mask, other=0)
    mid = high
    even = high
    odd = high
    if R > 2:
        mid = gl.load(mid_ptr.to(words) + place * 16 + offset, mask=mask, other=0)
    if R > 4:
        even = gl.load(low_ptr.to(words) + place * 32 + offset, mask=mask, other=0)
        odd = gl.load(low_ptr.to(words) + place * 32 + 16 + offset, mask=mask, other=0)
    return high, mid, even, odd


@gluon.jit
def _load_scales(scale_ptr, zero_ptr, row, block, NB: gl.constexpr, ZB: gl.constexpr):
    """Packed scales and zero offsets of a block's four groups, [warps, 16, 4] int32."""
    mask = block + row * 0 < NB
    place = row * NB + block
    scale = gl.load(scale_ptr.to(gl.pointer_type(gl.int32)) + place, mask=mask, other=0)
    if ZB == 8:
        zero = gl.load(zero_ptr.to(gl.pointer_type(gl.int32)) + place, mask=mask, other=0)
    elif ZB == 4:
        zero = gl.load(zero_ptr.to(gl.pointer_type(gl.int16)) + place, mask=mask, other=0).to(gl.int32)
    elif ZB == 2:
        zero = gl.load(zero_ptr + place, mask=mask, other=0).to(gl.int32)
    else:
        zero = scale
    return scale, zero


@gluon.jit
def _group_factors(scale, zero, FIRST: gl.constexpr, SECOND: gl.constexpr, ZB: gl.constexpr, ZMUL: gl.constexpr,
                   ZADD: gl.constexpr, layout: gl.constexpr):
    """(scale, offset) of the groups FIRST and SECOND of each block, side by side: [warps, 16, 8] float32."""
    DECODE: gl.constexpr = (
        "{ .reg .b16 a, b, c, d; .reg .b32 s, p; shr.b32 s, $2, "
        + str(16 * (FIRST // 2))
        + "; cvt.u16.u32 a, s; cvt.rn.f16x2.e4m3x2 p, a; mov.b32 {c, d}, p; cvt.f32.f16 $0, c; cvt.f32.f16 $1, d; }"
    )
    even, odd = gl.inline_asm_elementwise(DECODE, "=f,=f,r", [scale], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)
    if FIRST == SECOND:
        if FIRST % 2 == 0:
            odd = even
        else:
            even = odd
    shape: gl.constexpr = [scale.shape[0], 16, 8]
    factor = gl.convert_layout(gl.join(even, odd).reshape(shape), layout)
    if ZB == 0:
        offset = gl.full(shape, ZMUL * 2.0 + ZADD, gl.float32, layout=layout)
    else:
        z0 = ((zero >> (ZB * FIRST)) & (2**ZB - 1)).to(gl.float32) * ZMUL + ZADD
        z1 = ((zero >> (ZB * SECOND)) & (2**ZB - 1)).to(gl.float32) * ZMUL + ZADD
        offset = gl.convert_layout(gl.join(z0, z1).reshape(shape), layout)
    return factor, offset


@gluon.jit
def _gather(x_ptr, index_ptr, row, column, mask, in_features, INDEXED: gl.constexpr):
    """x[row, index[column]], 0 where masked or padding."""
    if INDEXED:
        column = gl.load(index_ptr + column, mask=mask, other=in_features)
        mask = column < in_features
    return gl.load(x_ptr + row * in_features + column, mask=mask, other=0.0)


@gluon.jit
def decode_kernel(x_ptr, high_ptr, mid_ptr, low_ptr, scale_ptr, exponent_ptr, zero_ptr, index_ptr, bias_ptr, y_ptr,
                  in_features, N, NB: gl.constexpr, R: gl.constexpr, MASK: gl.constexpr, H: gl.constexpr,
                  ZB: gl.constexpr, M: gl.constexpr, EXPONENTS: gl.constexpr, INDEXED: gl.constexpr,
                  BIASED: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr):
    """y[m, n] for M = 1 or 2 rows of x and 16 * TILES rows of the weight; NB blocks of 128 columns."""
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 16)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 16)
    q_layout: gl.constexpr = _quad_layout(WARPS)
    BF16: gl.constexpr = x_ptr.dtype.element_ty == gl.bfloat16
    # A subnormal bfloat16 counts 2**-133, a subnormal float16 2**-24.
    UP: gl.constexpr = 2.0**64 if BF16 else 1.0
    UNITS: gl.constexpr = 2.0**-69 if BF16 else 2.0**-24
    SETS: gl.constexpr = R // 2
    ITERATIONS: gl.constexpr = (NB + 4 * WARPS - 1) // (4 * WARPS)
    ZMUL: gl.constexpr = 2.0 ** (R - ZB) if ZB > 0 else 2.0 ** (R - 2)
    # Quad lane q, word e of its 16: two runs of 8 words, 64 bytes apart, so that a quad reads whole sectors.
    aw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, a_layout)))[:, None, None]
    an = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, a_layout)))[None, :, None]
    ak = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, a_layout)))[None, None, :]
    a_block = ak % 16 // 8 * 2 + ak // 32
    a_word = ak // 16 % 2 * 8 + ak % 8
    bw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None]
    bk = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    bc = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, b_layout)))[None, None, :]
    b_block = bk % 16 // 8 * 2 + bk // 32
    b_word = bk // 16 % 2 * 8 + bk % 8
    qw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, q_layout)))[:, None, None]
    qn = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, q_layout)))[None, :, None]
    qc = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, q_layout)))[None, None, :]
