"""One or two rows through a packed weight on an NVIDIA GPU, in Gluon. It needs compute capability 8.9 (E4M3).

The product runs on tensor cores with the weight as the first operand, in mma.m16n8k16 on 16 rows of it. What makes it
cheap, about 1.7 instructions for a 2-bit weight (counted in the machine code; a shift, a mask and a conversion for each
code take 6.75):

- A code is not converted. Masked in place, two codes of a 32-bit word are two 16-bit floats whose exponent field is 0
  or 1, where floats are equally spaced: code * 2**place in units of the smallest subnormal. The tensor core multiplies
  subnormal numbers exactly; the activation carries the missing power of two (bfloat16) or the sum does (float16).
- A lane of each quad holds another block of 128 columns, and the second operand is block diagonal: its column c is the
  activation of block c // 2 and zero elsewhere. So the sums of eight groups come out as the eight columns of one
  accumulator, each group's scale and zero offset are decoded once, and one row of activations fills all columns.
- Warps of a program share its rows and take different blocks; their sums meet at the end in a fixed order, so results
  do not change from run to run.

With c the codes, sum over the columns k of group g of x[k] * c[n, k] and X[g] = sum of x[k]:

    y[n] = 2**(exponent + 2 - R) * sum_g e4m3[n, g] * (sum_k x[k] * c[n, k] - (zeta[n, g] * 2**(R-2) - H) * X[g])

R is the width of the container, 2, 4 or 8; a narrower code is its top bits, and H = 2**(R - bits) / 2 on the half-step
grid. Activations of a magnitude of 2**63 and more overflow in bfloat16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bbb_ao.kernels.packed_linear import ptx
from bbb_ao.kernels.packed_linear.blocks import (
    assemble,
    gather,
    let_next_launch,
    load_tile,
    places_of_sums,
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


@gluon.constexpr_function
def factor_of_codes(quarter, R, dtype):
    """What the activation carries for the codes of a quarter."""
    return 2.0 ** (64 - ptx.place(quarter, R)) if dtype == gl.bfloat16 else 1.0


@gluon.jit
def codes_in_place(words, x_ptr, HB: gl.constexpr, PLACE: gl.constexpr, MASK: gl.constexpr):
    """The codes of one quarter in the low or high bytes of 16-bit words, read as x's type of float."""
    dtype = x_ptr.dtype.element_ty
    return gl.inline_asm_elementwise(ptx.masked(HB, PLACE, MASK), "=r,r", [words], dtype=dtype, is_pure=True, pack=2)


@gluon.jit
def _group_factors(
    scale,
    zero,
    FIRST: gl.constexpr,
    SECOND: gl.constexpr,
    ZB: gl.constexpr,
    ZMUL: gl.constexpr,
    ZADD: gl.constexpr,
    layout: gl.constexpr,
):
    """(scale, offset) of the groups FIRST and SECOND of each block, side by side: [warps, 16, 8] float32."""
    decode: gl.constexpr = ptx.decode_pair(FIRST // 2)
    even, odd = gl.inline_asm_elementwise(
        decode, "=f,=f,r", [scale], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
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
def _block_diagonal(
    x_ptr,
    index_ptr,
    block,
    diagonal,
    word,
    odd,
    in_features,
    NB: gl.constexpr,
    R: gl.constexpr,
    M: gl.constexpr,
    INDEXED: gl.constexpr,
):
    """The second operands, in the order of the products: for each flush, half of a group, and group of a flush.

    With one row of x a flush has two groups, in even and odd columns; with two rows it has one, for both rows.
    """
    dtype = x_ptr.dtype.element_ty
    operands = ()
    for flush in gl.static_range(2 * M):
        for hb in gl.static_range(2):
            if M == 1:
                quarter = 2 * flush + odd
                row = 0
            else:
                quarter = flush
                row = odd
            column = block * 128 + 32 * quarter + 16 * hb + word
            x = gather(x_ptr, index_ptr, row, column, diagonal & (block < NB), in_features, INDEXED)
            for par in gl.static_range(3 - M):
                factor = gl.full(x.shape, factor_of_codes(flush * (3 - M) + par, R, dtype), dtype, layout=x.type.layout)
                if M == 1:
                    factor = gl.where(odd == par, factor, 0.0)
                operands = operands + (
                    gl.inline_asm_elementwise(
                        ptx.product(dtype), "=r,r,r", [x, factor], dtype=dtype, is_pure=True, pack=2
                    ),
                )
    return operands


@gluon.jit
def _group_sums(
    x_ptr,
    index_ptr,
    base,
    in_features,
    NB: gl.constexpr,
    M: gl.constexpr,
    INDEXED: gl.constexpr,
    WARPS: gl.constexpr,
    UNITS: gl.constexpr,
    acc_layout: gl.constexpr,
):
    """X of each flush's groups, in the accumulator's columns and units: tuple of [warps, 1, 8] float32."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    i = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    block = base + warp * 4 + column // 2
    sums = ()
    for flush in gl.static_range(2 * M):
        if M == 1:
            quarter = 2 * flush + column % 2
            row = 0
        else:
            quarter = flush
            row = column % 2
        x = gather(x_ptr, index_ptr, row, block * 128 + 32 * quarter + i, block + i * 0 < NB, in_features, INDEXED)
        total = gl.sum(x.to(gl.float32), 2) * UNITS
        sums = sums + (gl.convert_layout(total, gl.SliceLayout(1, acc_layout)).expand_dims(1),)
    return sums


@gluon.jit
def _add_flush(
    total,
    words,
    scale,
    zero,
    operands,
    sums,
    x_ptr,
    FLUSH: gl.constexpr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    M: gl.constexpr,
):
    """total + scale * (sum of x * codes - offset * X) for the groups of a flush, in the accumulator's columns."""
    layout: gl.constexpr = total.type.layout
    FIRST: gl.constexpr = FLUSH * (3 - M)
    SECOND: gl.constexpr = FIRST + 2 - M
    ZMUL: gl.constexpr = 2.0 ** (R - ZB) if ZB > 0 else 2.0 ** (R - 2)
    acc = gl.zeros(total.shape, gl.float32, layout=layout)
    for hb in gl.static_range(2):
        for par in gl.static_range(3 - M):
            a = codes_in_place(words[(FIRST + par) % (R // 2)], x_ptr, hb, ptx.place(FIRST + par, R), MASK)
            acc = mma_v2(a, operands[(FLUSH * 2 + hb) * (3 - M) + par], acc)
    if x_ptr.dtype.element_ty != gl.bfloat16:
        column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
        acc *= gl.where(column % 2 == 0, 2.0 ** -ptx.place(FIRST, R), 2.0 ** -ptx.place(SECOND, R))
    factor, offset = _group_factors(scale, zero, FIRST, SECOND, ZB, ZMUL, -H, layout)
    return total + factor * (acc - offset * sums[FLUSH])


@gluon.constexpr_function
def accumulator_layout(warps):
    """[warps, 16 rows of the weight, 8 columns]; each warp has products of its own."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def tile_step(gated):
    """Rows from one tile's first to the next one's."""
    return 8 if gated else 16


@gluon.constexpr_function
def code_unit(dtype):
    """What a code counts in a product: a subnormal bfloat16 2**-133 less the activation's 2**64, a float16 2**-24."""
    return 2.0**-69 if dtype == gl.bfloat16 else 2.0**-24


@gluon.jit
def rows_of_tile(place, N, GATED: gl.constexpr):
    """Rows of the weight at places 0 to 15 of a tile, behind its first.

    With GATED, a tile has eight rows of the weight's first half and those as far into the second.
    """
    if GATED:
        place = place % 8 + place // 8 * (N // 2)
    return place


@gluon.jit
def start_tiles(
    weight,
    N,
    NB: gl.constexpr,
    R: gl.constexpr,
    ZB: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    GATED: gl.constexpr = False,
):
    """(a program's first row of the weight, places in a tile, planes and packed scales of its first AHEAD steps).

    Nothing but constants is read.
    """
    a_layout: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(WARPS), 16)
    plain = tile_places(8, WARPS, a_layout)
    an, a_first, a_block, a_word = plain[0]
    qn, q_first, q_block = plain[1]
    places = ((rows_of_tile(an, N, GATED), a_first, a_block, a_word), (rows_of_tile(qn, N, GATED), q_first, q_block))
    first = gl.program_id(0) * tile_step(GATED) * TILES
    loaded = ()
    for step in gl.static_range(min(AHEAD, TILES * turns_of_warps(NB, WARPS))):
        row, block = step_start(first, step, tile_step(GATED), TILES, WARPS)
        loaded = loaded + (load_tile(weight, places, row, block, N, NB, R, ZB, gl.int16),)
    return first, places, loaded


@gluon.jit
def tile_totals(
    started,
    weight,
    x_ptr,
    index_ptr,
    in_features,
    N,
    NB: gl.constexpr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    M: gl.constexpr,
    INDEXED: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    GATED: gl.constexpr = False,
):
    """Sums of each of a program's tiles, for `row_sums`, from what `start_tiles` gave."""
    acc_layout: gl.constexpr = accumulator_layout(WARPS)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 16)
    UNITS: gl.constexpr = code_unit(x_ptr.dtype.element_ty)
    TURNS: gl.constexpr = turns_of_warps(NB, WARPS)
    first, places, loaded = started
    bw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None]
    bk = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    bc = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, b_layout)))[None, None, :]
    b_block, b_word = quad_places(bk, 8)
    zeros = gl.zeros([WARPS, 16, 8], gl.float32, layout=acc_layout)
    totals = ()
    for _ in gl.static_range(TILES):
        totals = totals + (zeros,)
    for turn in gl.static_range(TURNS):
        base = turn * WARPS * 4
        operands = _block_diagonal(
            x_ptr,
            index_ptr,
            base + bw * 4 + b_block,
            b_block == bc // 2,
            b_word,
            bc % 2,
            in_features,
            NB,
            R,
            M,
            INDEXED,
        )
        sums = _group_sums(x_ptr, index_ptr, base, in_features, NB, M, INDEXED, WARPS, UNITS, acc_layout)
        added = ()
        for tile in gl.static_range(TILES):
            # The loads of a later step go out before this one's work.
            if turn * TILES + tile + AHEAD < TURNS * TILES:
                row, block = step_start(first, turn * TILES + tile + AHEAD, tile_step(GATED), TILES, WARPS)
                loaded = loaded + (load_tile(weight, places, row, block, N, NB, R, ZB, gl.int16),)
            planes, packed = loaded[turn * TILES + tile]
            scale, zero = packed
            words = assemble(planes[0], planes[1], planes[2], planes[3], R)
            total = totals[tile]
            for flush in gl.static_range(2 * M):
                total = _add_flush(total, words, scale, zero, operands, sums, x_ptr, flush, R, MASK, H, ZB, M)
            added = added + (total,)
        totals = added
    return totals


@gluon.jit(do_not_specialize=["fresh"])
def decode_kernel(
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
    M: gl.constexpr,
    EXPONENTS: gl.constexpr,
    INDEXED: gl.constexpr,
    BIASED: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[m, n] for M = 1 or 2 rows of x and 16 * TILES rows of the weight; NB blocks of 128 columns."""
    start_launch(fresh, PDL)
    let_next_launch(PDL)
    weight = (high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr)
    started = start_tiles(weight, N, NB, R, ZB, TILES, WARPS, AHEAD)
    first = started[0]
    place = places_of_sums(M, WARPS, accumulator_layout(WARPS))
    # Not behind the product, where all would wait for them.
    factors = tile_factors(exponent_ptr, place, first, 16, N, R, EXPONENTS, TILES)
    wait_for_launches(PDL)
    biases = tile_biases(bias_ptr, place, first, 16, N, BIASED, TILES)
    totals = tile_totals(
        started, weight, x_ptr, index_ptr, in_features, N, NB, R, MASK, H, ZB, M, INDEXED, TILES, WARPS, AHEAD
    )
    UNIT: gl.constexpr = 1.0 / code_unit(x_ptr.dtype.element_ty)
    for tile in gl.static_range(TILES):
        store_tile(totals[tile], y_ptr, factors[tile], biases[tile], first + 16 * tile + place, N, M, UNIT)
