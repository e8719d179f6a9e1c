"""Three to eight rows through a packed weight on an NVIDIA GPU, in Gluon. It needs compute capability 8.9 (E4M3).

As in `decode`, the weight is the first operand of mma.m16n8k16 and its codes are masked in place, and

    y[m, n] = 2**(exponent + 2 - R) * sum_g e4m3[n, g] * (sum_k x[m, k] * c[n, k] - u[n, g] * X[m, g])

with u = zeta * 2**(R-2) - H and X[m, g] the sum of x[m, k] over the columns k of group g. But the second operand holds
eight rows of x, so that the lanes of a quad share a block of 128 columns: lane q has bytes 8 q and on of its 32 bytes.
Sums of a group's 32 columns come out in the accumulator, and are scaled and added in float32. X is what a weight of
codes 1 would give.

Warps of a program share its tiles of 16 rows of the weight; each takes SPAN blocks side by side, whose scales it reads
at once. A program goes from tiles to tiles, and keeps its part of x in registers where its warps have all columns
between them. The sums of the warps meet behind each tile in a fixed order. As in `decode`, activations of a magnitude
of 2**63 and more overflow in bfloat16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bbb_ao.kernels.packed_linear import ptx
from bbb_ao.kernels.packed_linear.blocks import (
    assemble,
    gather,
    group_offset,
    group_scale,
    let_next_launch,
    load_planes,
    load_scales,
    row_biases,
    start_launch,
    tile_factors,
    wait_for_launches,
)
from bbb_ao.kernels.packed_linear.decode import accumulator_layout, code_unit, codes_in_place, factor_of_codes


@gluon.constexpr_function
def _packed_layout(warps, span):
    """[warps, 16, span]: rows r and r + 8 of all blocks in the lanes of quad r."""
    warp_bases = [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    blocks = [[0, 0, 1 << i] for i in range(span.bit_length() - 1)]
    return gl.DistributedLinearLayout([*blocks, [0, 8, 0]], lanes, warp_bases, [], [warps, 16, span])


@gluon.jit
def _of_block(packed, BLOCK: gl.constexpr, SPAN: gl.constexpr, layout: gl.constexpr):
    """One block's column of [warps, 16, SPAN], as [warps, 16, 1]."""
    part = packed
    if SPAN == 4:
        part = packed.reshape([packed.shape[0], 16, 2, 2]).split()[BLOCK % 2]
    if SPAN == 1:
        one = part.reshape([packed.shape[0], 16])
    else:
        one = part.split()[BLOCK // (SPAN // 2)]
    return gl.convert_layout(one, gl.SliceLayout(2, layout), assert_trivial=True).expand_dims(2)


@gluon.jit
def _operands(
    x_ptr, index_ptr, block, places, M, in_features, NB: gl.constexpr, R: gl.constexpr, INDEXED: gl.constexpr
):
    """x of a block as second operands, for each quarter and half of a group: [warps, 16, 8]."""
    dtype = x_ptr.dtype.element_ty
    warp, word, m = places
    operands = ()
    for quarter in gl.static_range(4):
        for hb in gl.static_range(2):
            column = (block + warp) * 128 + 32 * quarter + 16 * hb + word
            mask = (block + warp < NB) & (m < M) & (word < 16)
            x = gather(x_ptr, index_ptr, m, column, mask, in_features, INDEXED)
            factor = gl.full(x.shape, factor_of_codes(quarter, R, dtype), dtype, layout=x.type.layout)
            x = gl.inline_asm_elementwise(ptx.product(dtype), "=r,r,r", [x, factor], dtype=dtype, is_pure=True, pack=2)
            operands = operands + (x,)
    return operands


@gluon.jit
def _sums(operands, x_ptr, R: gl.constexpr, acc_layout: gl.constexpr, a_layout: gl.constexpr):
    """X of each quarter's group in the units of a product: [warps, 16, 8], every row the same."""
    dtype = x_ptr.dtype.element_ty
    W: gl.constexpr = operands[0].shape[0]
    sums = ()
    for quarter in gl.static_range(4):
        one = gl.full([W, 16, 16], 2 ** ptx.place(quarter, R), gl.int16, layout=a_layout).to(dtype, bitcast=True)
        acc = gl.zeros([W, 16, 8], gl.float32, layout=acc_layout)
        for hb in gl.static_range(2):
            acc = mma_v2(one, operands[2 * quarter + hb], acc)
        # Rows r and r + 8 are one lane's: with one of them for both, half the registers will do.
        half, _ = acc.reshape([W, 2, 8, 8]).permute((0, 2, 3, 1)).split()
        both = gl.join(half, half).permute((0, 3, 1, 2)).reshape([W, 16, 8])
        sums = sums + (gl.convert_layout(both, acc_layout, assert_trivial=True),)
    return sums


@gluon.jit
def _read_x(
    x_ptr,
    index_ptr,
    base,
    places,
    M,
    in_features,
    NB: gl.constexpr,
    R: gl.constexpr,
    INDEXED: gl.constexpr,
    SPAN: gl.constexpr,
    acc_layout: gl.constexpr,
    a_layout: gl.constexpr,
):
    """For each of SPAN blocks (operands, sums)."""
    blocks = ()
    for i in gl.static_range(SPAN):
        operands = _operands(x_ptr, index_ptr, base + i, places, M, in_features, NB, R, INDEXED)
        blocks = blocks + ((operands, _sums(operands, x_ptr, R, acc_layout, a_layout)),)
    return blocks


@gluon.jit
def _places(
    WARPS: gl.constexpr, SPAN: gl.constexpr, a_layout: gl.constexpr, b_layout: gl.constexpr, s_layout: gl.constexpr
):
    """Places in a tile: (row, block of the warp, word) of planes, (row, block) of scales; in x: (block, word, row)."""
    an = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, a_layout)))[None, :, None]
    a_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, a_layout)))[:, None, None] * SPAN
    a_word = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, a_layout)))[None, None, :]
    sn = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, s_layout)))[None, :, None]
    s_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, s_layout)))[:, None, None] * SPAN
    s_block = s_warp + gl.arange(0, SPAN, layout=gl.SliceLayout(0, gl.SliceLayout(1, s_layout)))[None, None, :]
    b_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None] * SPAN
    b_word = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    bm = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, b_layout)))[None, None, :]
    return (an, a_warp, a_word, sn, s_block), (b_warp, b_word, bm)


@gluon.jit
def _load_tile(weight, places, tile, base, N, NB: gl.constexpr, R: gl.constexpr, ZB: gl.constexpr, SPAN: gl.constexpr):
    """(planes of each of SPAN blocks, packed scales and zero offsets) of the 16 rows from `tile` on."""
    high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr = weight
    an, a_warp, word, sn, s_block = places
    row = gl.minimum(tile + an, N - 1)
    planes = ()
    for i in gl.static_range(SPAN):
        planes = planes + (load_planes(high_ptr, mid_ptr, low_ptr, row, base + a_warp + i, word, NB, R, gl.int16),)
    return planes, load_scales(scale_ptr, zero_ptr, gl.minimum(tile + sn, N - 1), base + s_block, NB, NB, ZB)


@gluon.jit
def _add_block(
    total,
    words,
    scale,
    zero,
    of_x,
    x_ptr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
):
    """total + the products of a tile's words with a block of x."""
    dtype = x_ptr.dtype.element_ty
    layout: gl.constexpr = total.type.layout
    operands, sums = of_x
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


@gluon.jit
def _add_tile(
    total,
    planes,
    scale,
    zero,
    blocks,
    x_ptr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    SPAN: gl.constexpr,
):
    """total + the products of a tile's blocks with those of x, as from `_load_tile` and `_read_x`."""
    layout: gl.constexpr = total.type.layout
    for i in gl.static_range(SPAN):
        words = assemble(planes[i][0], planes[i][1], planes[i][2], planes[i][3], R)
        s = _of_block(scale, i, SPAN, layout)
        z = _of_block(zero, i, SPAN, layout)
        total = _add_block(total, words, s, z, blocks[i], x_ptr, R, MASK, H, ZB)
    return total


@gluon.constexpr_function
def _sums_layout(warps):
    """[warps, 16 rows of the weight, 8 of x], all warps in each thread."""
    return gl.BlockedLayout([warps, 1, 1], [1, 16, 2], [1, 1, warps], [0, 1, 2])


@gluon.jit
def _store(total, y_ptr, factor, bias_ptr, n, N, M, BIASED: gl.constexpr):
    """Sum a tile over its warps, scale by the factor of its rows n, [16, 1], add the bias and write."""
    bias = row_biases(bias_ptr, n, N, BIASED)
    total = gl.convert_layout(total, _sums_layout(total.shape[0]))
    y = gl.sum(total, 0) * (1.0 / code_unit(y_ptr.dtype.element_ty))
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, y.type.layout))[None, :]
    y = y * factor + bias
    gl.store(y_ptr + m.to(gl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (m < M))


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
    EXPONENTS: gl.constexpr,
    INDEXED: gl.constexpr,
    BIASED: gl.constexpr,
    TILES: gl.constexpr,
    SPAN: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[m, n] for M <= 8 rows of x, 16 * TILES rows of the weight at a time; NB blocks of 128 columns."""
    start_launch(fresh, PDL)
    let_next_launch(PDL)
    acc_layout: gl.constexpr = accumulator_layout(WARPS)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 4)
    s_layout: gl.constexpr = _packed_layout(WARPS, SPAN)
    TURN: gl.constexpr = WARPS * SPAN
    TURNS: gl.constexpr = (NB + TURN - 1) // TURN
    of_weight, of_x = _places(WARPS, SPAN, a_layout, b_layout, s_layout)
    weight = (high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr)
    step = gl.num_programs(0) * 16 * TILES
    start = gl.program_id(0) * 16 * TILES
    planes, packed = _load_tile(weight, of_weight, start, 0, N, NB, R, ZB, SPAN)
    place = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(0, _sums_layout(WARPS))))[:, None]
    factors = tile_factors(exponent_ptr, place, start, 16, N, R, EXPONENTS, TILES)
    wait_for_launches(PDL)
    zeros = gl.zeros([WARPS, 16, 8], gl.float32, layout=acc_layout)
    if TURNS == 1:
        blocks = _read_x(x_ptr, index_ptr, 0, of_x, M, in_features, NB, R, INDEXED, SPAN, acc_layout, a_layout)
    for first in range(start, N, step):
        totals = ()
        for _ in gl.static_range(TILES):
            totals = totals + (zeros,)
        for turn in range(TURNS):
            if TURNS > 1:
                blocks = _read_x(
                    x_ptr, index_ptr, turn * TURN, of_x, M, in_features, NB, R, INDEXED, SPAN, acc_layout, a_layout
                )
            added = ()
            for tile in gl.static_range(TILES):
                words = planes
                scale, zero = packed
                # The next tile's loads go out before this one's work.
                if tile + 1 < TILES:
                    following = first + (tile + 1) * 16
                    base = turn * TURN
                else:
                    ends = turn + 1 == TURNS
                    following = gl.where(ends, first + step, first)
                    base = gl.where(ends, 0, (turn + 1) * TURN)
                planes, packed = _load_tile(weight, of_weight, following, base, N, NB, R, ZB, SPAN)
                total = _add_tile(totals[tile], words, scale, zero, blocks, x_ptr, R, MASK, H, ZB, SPAN)
                added = added + (total,)
            totals = added
        for tile in gl.static_range(TILES):
            _store(totals[tile], y_ptr, factors[tile], bias_ptr, first + 16 * tile + place, N, M, BIASED)
        if EXPONENTS:
            factors = tile_factors(exponent_ptr, place, first + step, 16, N, R, EXPONENTS, TILES)
