"""A few rows through a packed weight on an NVIDIA GPU, in Gluon. It needs compute capability 8.9 (E4M3).

As in `decode`, the weight is the first operand of mma.m16n8k16 and its codes are masked in place, and

    y[m, n] = 2**(exponent + 2 - R) * sum_g e4m3[n, g] * (sum_k x[m, k] * c[n, k] - u[n, g] * X[m, g])

with u = zeta * 2**(R-2) - H and X[m, g] the sum of x[m, k] over the columns k of group g. But the second operand holds
rows of x, eight to a product, so that the lanes of a quad share a block of 128 columns: lane q has bytes 8 q and on of
its 32 bytes. Sums of a group's 32 columns come out in the accumulator, and are scaled and added in float32. X is what a
weight of codes 1 would give.

Warps of a program share its tiles of 16 rows of the weight and take different blocks; their sums meet at the end in a
fixed order. Every program reads all of x, a block at a time for all of its tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bbb_ao.kernels.packed_linear import ptx
from bbb_ao.kernels.packed_linear.blocks import (
    assemble,
    finished,
    gather,
    group_offset,
    group_scale,
    let_next_launch,
    load_planes,
    load_scales,
    start_launch,
    wait_for_launches,
)
from bbb_ao.kernels.packed_linear.decode import accumulator_layout, code_unit, codes_in_place, factor_of_codes


@gluon.jit
def _operands(
    x_ptr, index_ptr, block, word, m, M, in_features, NB: gl.constexpr, R: gl.constexpr, INDEXED: gl.constexpr
):
    """x of a block as second operands, for each quarter and half of a group: [warps, 16, rows]."""
    dtype = x_ptr.dtype.element_ty
    operands = ()
    for quarter in gl.static_range(4):
        for hb in gl.static_range(2):
            column = block * 128 + 32 * quarter + 16 * hb + word
            mask = (block < NB) & (m < M) & (word < 16)
            x = gather(x_ptr, index_ptr, m, column, mask, in_features, INDEXED)
            factor = gl.full(x.shape, factor_of_codes(quarter, R, dtype), dtype, layout=x.type.layout)
            x = gl.inline_asm_elementwise(ptx.product(dtype), "=r,r,r", [x, factor], dtype=dtype, is_pure=True, pack=2)
            operands = operands + (x,)
    return operands


@gluon.jit
def _sums(operands, x_ptr, R: gl.constexpr, acc_layout: gl.constexpr, a_layout: gl.constexpr):
    """X of each quarter's group in the units of a product: [warps, 16, rows], every row the same."""
    dtype = x_ptr.dtype.element_ty
    shape: gl.constexpr = [operands[0].shape[0], 16, operands[0].shape[2]]
    sums = ()
    for quarter in gl.static_range(4):
        one = gl.full([shape[0], 16, 16], 2 ** ptx.place(quarter, R), gl.int16, layout=a_layout).to(dtype, bitcast=True)
        acc = gl.zeros(shape, gl.float32, layout=acc_layout)
        for hb in gl.static_range(2):
            acc = mma_v2(one, operands[2 * quarter + hb], acc)
        # Rows r and r + 8 are one lane's: with one of them for both, half the registers will do.
        half, _ = acc.reshape([shape[0], 2, 8, shape[2]]).permute((0, 2, 3, 1)).split()
        both = gl.join(half, half).permute((0, 3, 1, 2)).reshape(shape)
        sums = sums + (gl.convert_layout(both, acc_layout, assert_trivial=True),)
    return sums


@gluon.jit
def _load_tile(weight, places, tile, block, N, NB: gl.constexpr, R: gl.constexpr, ZB: gl.constexpr):
    """(planes, packed scales and zero offsets) of the 16 rows from `tile` on, in each warp's block."""
    high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr = weight
    an, a_warp, word, sn, s_warp = places
    planes = load_planes(
        high_ptr, mid_ptr, low_ptr, gl.minimum(tile + an, N - 1), block + a_warp, word, NB, R, gl.int16
    )
    return planes, load_scales(scale_ptr, zero_ptr, gl.minimum(tile + sn, N - 1), block + s_warp, NB, NB, ZB)


@gluon.jit
def _add_block(
    total,
    words,
    packed,
    operands,
    sums,
    x_ptr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
):
    """total + the products of a tile's words with a block of x."""
    dtype = x_ptr.dtype.element_ty
    layout: gl.constexpr = total.type.layout
    scale, zero = packed
    for quarter in gl.static_range(4):
        acc = gl.zeros(total.shape, gl.float32, layout=layout)
        for hb in gl.static_range(2):
            a = codes_in_place(words[quarter % (R // 2)], x_ptr, hb, ptx.place(quarter, R), MASK)
            acc = mma_v2(a, operands[2 * quarter + hb], acc)
        factor = group_scale(scale, quarter)
        if dtype != gl.bfloat16:
            factor *= 2.0 ** -ptx.place(quarter, R)
        total += factor * (acc - group_offset(zero, quarter, R, ZB, -H) * sums[quarter])
    return total


@gluon.jit(do_not_specialize=["M", "fresh"])
def few_rows_kernel(
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
    M,
    fresh,
    NB: gl.constexpr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    BM: gl.constexpr,
    EXPONENTS: gl.constexpr,
    INDEXED: gl.constexpr,
    BIASED: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[m, n] for M <= BM rows of x and 16 * TILES rows of the weight; NB blocks of 128 columns."""
    start_launch(fresh, PDL)
    let_next_launch(PDL)
    acc_layout: gl.constexpr = accumulator_layout(WARPS)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 4)
    an = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, a_layout)))[None, :, None]
    a_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, a_layout)))[:, None, None]
    a_word = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, a_layout)))[None, None, :]
    sn = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, acc_layout)))[None, :, None]
    s_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, acc_layout)))[:, None, None]
    b_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None]
    b_word = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    bm = gl.arange(0, BM, layout=gl.SliceLayout(0, gl.SliceLayout(1, b_layout)))[None, None, :]
    places = (an, a_warp, a_word, sn, s_warp)
    weight = (high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr)
    first = gl.program_id(0) * 16 * TILES
    planes, packed = _load_tile(weight, places, first, 0, N, NB, R, ZB)
    wait_for_launches(PDL)
    zeros = gl.zeros([WARPS, 16, BM], gl.float32, layout=acc_layout)
    totals = ()
    for _ in gl.static_range(TILES):
        totals = totals + (zeros,)
    for base in range(0, NB, WARPS):
        operands = _operands(x_ptr, index_ptr, base + b_warp, b_word, bm, M, in_features, NB, R, INDEXED)
        sums = _sums(operands, x_ptr, R, acc_layout, a_layout)
        added = ()
        for tile in gl.static_range(TILES):
            words = assemble(planes[0], planes[1], planes[2], planes[3], R)
            now = packed
            # The next tile's loads go out before this one's work.
            following = first + (tile + 1) % TILES * 16
            planes, packed = _load_tile(weight, places, following, base + (tile + 1) // TILES * WARPS, N, NB, R, ZB)
            added = added + (_add_block(totals[tile], words, now, operands, sums, x_ptr, R, MASK, H, ZB),)
        totals = added
    UNIT: gl.constexpr = 1.0 / code_unit(x_ptr.dtype.element_ty)
    for tile in gl.static_range(TILES):
        y = gl.sum(totals[tile], 0) * UNIT
        n = first + 16 * tile + gl.arange(0, 16, layout=gl.SliceLayout(1, y.type.layout))[:, None]
        m = gl.arange(0, BM, layout=gl.SliceLayout(0, y.type.layout))[None, :]
        y = finished(y, exponent_ptr, bias_ptr, n, N, R, EXPONENTS, BIASED)
        gl.store(y_ptr + m.to(gl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (m < M))
