"""One row of dynamically quantized activations through a packed weight, in integers.

It needs compute capability 8.9 (E4M3).

With c the weight's codes, b the activation's, and sums over the columns k of group g that are no padding:

    y[n] = 2**(exponent + 2 - R) * sum_g e4m3[n, g] * t[n, g],   X[g] = sum_k (b[k] - v[g])
    t[n, g] = a[g] * (sum_k c[n, k] * b[k] - v[g] * sum_k c[n, k] - u[n, g] * X[g])

u = zeta * 2**(R-2) - H is the weight's offset and v = zero - h the activation's (`quantize_activation`), a its scale.
R is the width of the container, as in `packed_linear.decode`, which this follows:

- Every program quantizes the whole row (`quantize_row`); its first planes are under way meanwhile.
- Codes of the weight are masked in place, four to a word: c * 2**place as signed bytes. A field at the top of its byte
  has the highest bit turned over, which makes it (c - 2**(R-1)) * 2**place, and u smaller by 2**(R-1).
- The second operand is block diagonal: column 2 q has the codes of the quad's block q, column 2 q + 1 has ones, for
  the sum of c. Both sums of a row and group come out in the lane that has the group's scale.
- Accumulators start at the bits of 1.5 * 2**23, so that a sum is a float32 less that number: |sums| are at most 2**19.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bbb_ao.kernels.packed_linear import ptx
from bbb_ao.kernels.packed_linear.blocks import (
    assemble,
    group_offset,
    group_scale,
    let_next_launch,
    load_tile,
    places_of_sums,
    quad_layout,
    quad_places,
    start_launch,
    step_start,
    store_tile,
    tile_biases,
    tile_factors,
    tile_places,
    turns_of_warps,
    wait_for_launches,
)
from bbb_ao.kernels.packed_linear_dynamic.quantize_row import MAGIC_BITS, quantized_row

MAGIC = gl.constexpr(12582912.0)  # the float32 of MAGIC_BITS
DIAGONAL = gl.constexpr("{ .reg .b32 t; and.b32 t, $1, $3; and.b32 $0, $2, $4; or.b32 $0, $0, t; }")


@gluon.constexpr_function
def _masked(bit, mask, R):
    """$0 = four codes at `bit` of the bytes of $1, left where they are; signed ones at a byte's top."""
    mask = (mask << bit) * 0x01010101
    if bit + R < 8:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; mov.b32 t, 0x80808080; lop3.b32 $0, $1, {mask}, t, 0x6A; }}"  # ($1 & mask) ^ t


@gluon.constexpr_function
def _factor_layout(warps):
    """[warps, 4 blocks, 4 quarters]: lanes of column q of a quad have block q's four quarters."""
    warp_bases = [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2]], lanes, warp_bases, [], [warps, 4, 4])


@gluon.constexpr_function
def _byte_layout(warps):
    """[4 quarters, warps, 128]: lanes of column q of a quad have bytes 32 q and on, as in an operand."""
    warp_bases = [[0, 1 << i, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 0, 32], [0, 0, 64], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    registers = [*([0, 0, 1 << i] for i in range(5)), [1, 0, 0], [2, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [4, warps, 128])


@gluon.constexpr_function
def _down(quarter, R):
    """What a code of a quarter is smaller by in its signed byte."""
    return 2.0 ** (R - 1) if ptx.place(quarter, R) + R == 8 else 0.0


@gluon.jit
def _quarters(value, DIM: gl.constexpr, layout: gl.constexpr):
    """[m, n, 4] as four tensors of `layout`: [m, 1, n] with DIM = 1, [m, n, 1] with DIM = 2."""
    even, odd = value.reshape([value.shape[0], value.shape[1], 2, 2]).split()
    result = ()
    for quarter in gl.static_range(4):
        part = (even if quarter % 2 == 0 else odd).split()[quarter // 2]
        part = gl.convert_layout(part, gl.SliceLayout(DIM, layout), assert_trivial=True)
        result = result + (part.expand_dims(DIM),)
    return result


@gluon.jit
def _block_diagonal(codes, ones, codes_mask, ones_mask):
    """The second operand: codes and ones of every block, where their masks are set."""
    parts = [codes, ones, codes_mask, ones_mask]
    return gl.inline_asm_elementwise(DIAGONAL, "=r,r,r,r,r", parts, dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _codes(words, QUARTER: gl.constexpr, R: gl.constexpr, MASK: gl.constexpr):
    """The codes of one quarter as signed bytes."""
    masked: gl.constexpr = _masked(ptx.place(QUARTER, R), MASK, R)
    return gl.inline_asm_elementwise(masked, "=r,r", [words], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit(do_not_specialize=["fresh"])
def dynamic_decode_kernel(
    x_ptr,
    high_ptr,
    mid_ptr,
    low_ptr,
    scale_ptr,
    exponent_ptr,
    zero_ptr,
    index_ptr,
    bias_ptr,
    y_ptr,
    in_features,
    N,
    fresh,
    NB: gl.constexpr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    ACT_BITS: gl.constexpr,
    ACT_HALF: gl.constexpr,
    EXPONENTS: gl.constexpr,
    INDEXED: gl.constexpr,
    BIASED: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[n] for one row of x and 16 * TILES rows of the weight; NB blocks of 128 columns."""
    start_launch(fresh, PDL)
    let_next_launch(PDL)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 32)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 32)
    q_layout: gl.constexpr = quad_layout(WARPS)
    byte_layout: gl.constexpr = _byte_layout(WARPS)
    factor_layout: gl.constexpr = _factor_layout(WARPS)
    TURNS: gl.constexpr = turns_of_warps(NB, WARPS)
    places = tile_places(16, WARPS, a_layout)
    bk = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    bc = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, b_layout)))[None, None, :]
    diagonal = quad_places(bk, 16)[0] == bc // 2
    full = gl.full([1, 128, 8], -1, gl.int8, layout=b_layout)
    codes_mask = gl.where(diagonal & (bc % 2 == 0), full, 0)
    ones_mask = gl.where(diagonal & (bc % 2 == 1), full, 0)
    first = gl.program_id(0) * 16 * TILES
    weight = (high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr)
    loaded = ()
    for step in gl.static_range(min(AHEAD, TILES * TURNS)):
        row, block = step_start(first, step, 16, TILES, WARPS)
        loaded = loaded + (load_tile(weight, places, row, block, N, NB, R, ZB, gl.int8),)
    place = places_of_sums(1, WARPS, acc_layout)
    factors = tile_factors(exponent_ptr, place, first, 16, N, R, EXPONENTS, TILES)
    # The compiler moves no load over a barrier: those of the planes are under way while the row is quantized.
    tl.debug_barrier()
    wait_for_launches(PDL)
    biases = tile_biases(bias_ptr, place, first, 16, N, BIASED, TILES)
    stored = quantized_row(x_ptr, index_ptr, in_features, NB, TURNS, R, ACT_BITS, ACT_HALF, INDEXED, WARPS)
    zeros = gl.zeros([WARPS, 16, 4], gl.float32, layout=q_layout)
    start = gl.full([WARPS, 16, 8], MAGIC_BITS, gl.int32, layout=acc_layout)
    totals = ()
    for _ in gl.static_range(TILES):
        totals = totals + (zeros,)
    for turn in gl.static_range(TURNS):
        codes = _quarters(stored[turn][0].load(byte_layout).permute((1, 2, 0)), 2, b_layout)
        present = codes
        if INDEXED:
            present = _quarters(stored[turn][4].load(byte_layout).permute((1, 2, 0)), 2, b_layout)
        operands = ()
        for quarter in gl.static_range(4):
            one = present[quarter] if INDEXED else gl.full_like(codes[quarter], 1)
            operands = operands + (_block_diagonal(codes[quarter], one, codes_mask, ones_mask),)
        of_product = _quarters(stored[turn][1].load(factor_layout), 1, q_layout)
        of_count = _quarters(stored[turn][2].load(factor_layout), 1, q_layout)
        of_offset = _quarters(stored[turn][3].load(factor_layout), 1, q_layout)
        added = ()
        for tile in gl.static_range(TILES):
            # The loads of a later step go out before this one's work.
            if turn * TILES + tile + AHEAD < TURNS * TILES:
                row, block = step_start(first, turn * TILES + tile + AHEAD, 16, TILES, WARPS)
                loaded = loaded + (load_tile(weight, places, row, block, N, NB, R, ZB, gl.int8),)
            planes, packed = loaded[turn * TILES + tile]
            words = assemble(planes[0], planes[1], planes[2], planes[3], R)
            scale, zero = packed
            total = totals[tile]
            for quarter in gl.static_range(4):
                a = _codes(words[quarter % (R // 2)], quarter, R, MASK)
                sums = mma_v2(a, operands[quarter], start).to(gl.float32, bitcast=True) - MAGIC
                product, count = sums.reshape([WARPS, 16, 4, 2]).split()
                product = gl.convert_layout(product, q_layout, assert_trivial=True)
                count = gl.convert_layout(count, q_layout, assert_trivial=True)
                s = group_scale(scale, quarter)
                u = group_offset(zero, quarter, R, ZB, -H - _down(quarter, R))
                t = product * of_product[quarter] - count * of_count[quarter] - u * of_offset[quarter]
                total += s * t
            added = added + (total,)
        totals = added
    for tile in gl.static_range(TILES):
        store_tile(totals[tile], y_ptr, factors[tile], biases[tile], first + 16 * tile + place, N, 1, 1.0)
