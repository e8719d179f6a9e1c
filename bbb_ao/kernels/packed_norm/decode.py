"""`packed_linear.decode` with the residual sum behind it, or on an input whose norm is still to be divided by.

The latter also writes SwiGLU of its two halves: a tile then has rows of both, a row and its partner in one lane.

In Gluon, for one or two rows; it needs compute capability 8.9 (E4M3). What a tile of the output needs besides the
product is read before the product, so that nothing waits for memory behind it.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bbb_ao.kernels.packed_linear.blocks import (
    let_next_launch,
    places_of_sums,
    row_biases,
    row_sums,
    start_launch,
    tile_factors,
    wait_for_launches,
)
from bbb_ao.kernels.packed_linear.decode import (
    accumulator_layout,
    code_unit,
    rows_of_tile,
    start_tiles,
    tile_step,
    tile_totals,
)


@gluon.constexpr_function
def _parts_layout(parts, warps):
    """All of `parts` numbers, a power of two of at least 32, in each warp."""
    return gl.BlockedLayout([parts // 32], [32], [warps], [0])


@gluon.jit
def _reciprocal_norms(squares_ptr, eps, in_features, M: gl.constexpr, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row from COUNT sums of squares, in every warp: tuple of M float32."""
    PARTS: gl.constexpr = max(32, triton.next_power_of_2(COUNT))
    part = gl.arange(0, PARTS, layout=_parts_layout(PARTS, WARPS))
    norms = ()
    for m in gl.static_range(M):
        total = gl.sum(gl.load(squares_ptr + m * COUNT + part, mask=part < COUNT, other=0.0), 0)
        norms = norms + (gl.rsqrt(total / in_features + eps),)
    return norms


@gluon.jit
def _read_rows(
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    rows,
    N,
    M: gl.constexpr,
    BIASED: gl.constexpr,
    RESIDUAL: gl.constexpr,
):
    """(for each row of x what is added to the sums; norm weights) of these rows of the weight."""
    layout: gl.constexpr = rows.type.layout
    norm_weight = gl.zeros([16], gl.float32, layout=layout)
    bias = norm_weight + row_biases(bias_ptr, rows, N, BIASED)
    added = ()
    for m in gl.static_range(M):
        if RESIDUAL:
            added = added + (bias + gl.load(residual_ptr + m * N + rows, mask=rows < N, other=0.0).to(gl.float32),)
        else:
            added = added + (bias,)
    if RESIDUAL:
        norm_weight = gl.load(norm_weight_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)
    return added, norm_weight


@gluon.jit
def _store_gated(value, y_ptr, row, first, N, WARPS: gl.constexpr):
    """silu(gate) * up of a tile's eight gates and the eight numbers behind them, to [.., N / 2]."""
    pairs: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    gate, up = gl.convert_layout(value.reshape([2, 8]).permute((1, 0)), pairs).split()
    places = first + gl.arange(0, 8, layout=gate.type.layout)
    gated = gate / (1.0 + gl.exp(-gate)) * up
    gl.store(y_ptr + row * (N // 2) + places, gated.to(y_ptr.dtype.element_ty), mask=places < N // 2)


@gluon.jit(do_not_specialize=["fresh"])
def normed_decode_kernel(
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
    eps,
    in_squares_ptr,
    residual_ptr,
    norm_weight_ptr,
    weighted_ptr,
    squares_ptr,
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
    SQUARES: gl.constexpr,
    RESIDUAL: gl.constexpr,
    GATED: gl.constexpr,
):
    """`decode_kernel`; of x divided by its norm where SQUARES, how many sums of squares a row has, is not 0.

    With RESIDUAL, y is the sum with the residual, and the other outputs of `packed_linear_residual` are written. With
    GATED, y is silu(first half) * second half of the outputs.
    """
    start_launch(fresh, PDL)
    let_next_launch(PDL)
    weight = (high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr)
    started = start_tiles(weight, N, NB, R, ZB, TILES, WARPS, AHEAD, GATED)
    first = started[0]
    place = rows_of_tile(places_of_sums(M, WARPS, accumulator_layout(WARPS)), N, GATED)
    factors = tile_factors(exponent_ptr, place, first, tile_step(GATED), N, R, EXPONENTS, TILES)
    wait_for_launches(PDL)
    read = ()
    for tile in gl.static_range(TILES):
        rows = first + tile_step(GATED) * tile + place
        read = read + (_read_rows(bias_ptr, residual_ptr, norm_weight_ptr, rows, N, M, BIASED, RESIDUAL),)
    if SQUARES > 0:
        norms = _reciprocal_norms(in_squares_ptr, eps, in_features, M, SQUARES, WARPS)
    totals = tile_totals(
        started, weight, x_ptr, index_ptr, in_features, N, NB, R, MASK, H, ZB, M, INDEXED, TILES, WARPS, AHEAD, GATED
    )
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    UNIT: gl.constexpr = 1.0 / code_unit(x_ptr.dtype.element_ty)
    for tile in gl.static_range(TILES):
        added, norm_weight = read[tile]
        sums = row_sums(totals[tile], M, UNIT)
        rows = first + tile_step(GATED) * tile + place
        for m in gl.static_range(M):
            value = sums[m] * factors[tile]
            if SQUARES > 0:
                value *= norms[m]
            value += added[m]
            if GATED:
                _store_gated(value, y_ptr, m, first + tile_step(GATED) * tile, N, WARPS)
            else:
                value = value.to(dtype)
                gl.store(y_ptr + m * N + rows, value, mask=rows < N)
            if RESIDUAL:
                # The norm is of what later layers read: the rounded sum.
                wide = value.to(gl.float32)
                gl.store(weighted_ptr + m * N + rows, (wide * norm_weight).to(dtype), mask=rows < N)
                part = first // 16 + tile
                total = gl.sum(gl.where(rows < N, wide * wide, 0.0), 0)
                gl.store(squares_ptr + m * ((N + 15) // 16) + part, total, mask=part * 16 < N)
