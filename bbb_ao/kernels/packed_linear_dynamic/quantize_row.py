"""The row of activations of `decode`: quantized by every program, into shared memory.

Codes, scales and zero offsets are those of `quantize_activation`. A quotient by a scale is a product with its
reciprocal as a sum of two numbers, exact to 2**-46; quotients by a scale of 4 bits are at least 2**-29 away from where
rounding goes the other way. So they are those of a division, for magnitudes up to 2**100.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bbb_ao.kernels.fake_quantize import triton_kernels
from bbb_ao.kernels.fake_quantize.reference import SCALE_UP_BITS
from bbb_ao.kernels.packed_linear.blocks import gather

_round_e4m3 = gluon.jit(triton_kernels._round_e4m3.fn)
_scale_exponent = gluon.jit(triton_kernels._scale_exponent.fn)
UP_BITS = gl.constexpr(SCALE_UP_BITS)
MAGIC_BITS = gl.constexpr(0x4B400000)  # 1.5 * 2**23, where float32 numbers are 1 apart
BELOW_ONE = gl.constexpr(1.0 - 2.0**-24)
RECIPROCAL = gl.constexpr("rcp.approx.ftz.f32 $0, $1;")
ADD = gl.constexpr("add.rn.sat.f32 $0, $1, $2;")
ADD_DOWN = gl.constexpr("add.rm.sat.f32 $0, $1, $2;")


@gluon.constexpr_function
def _extreme(name, dtype):
    """$0 = the smaller (min) or larger (max) of $1 and $2 in each half of a word, NaN if one is."""
    return f"{name}.NaN.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'} $0, $1, $2;"


@gluon.constexpr_function
def _lifted(bits, down):
    """$0 = floor(2**bits * $1) - down in the low bits of 1.5 * 2**23."""
    from struct import pack, unpack  # Triton refuses it among a kernel's globals.

    power, magic = (unpack("<I", pack("<f", value))[0] for value in (2.0**bits, 12582912.0 - down))
    return f"fma.rm.f32 $0, $1, 0f{power:08X}, 0f{magic:08X};"


@gluon.jit
def _times(x, near, rest):
    """x * (near + rest), rounded once but for 2**-46 of it."""
    x, near = gl.broadcast(x, near)
    return gl.fma(x, near, x * rest)


@gluon.jit
def _smaller(a, b):
    return gl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _group_extreme(x, NAME: gl.constexpr):
    """min or max of each group of x, [groups, 2, 16] of 16-bit floats, as float32 [groups]."""
    extreme: gl.constexpr = _extreme(NAME, x.dtype)
    G: gl.constexpr = x.shape[0]
    a, b = x.permute((0, 2, 1)).split()
    x8 = gl.inline_asm_elementwise(extreme, "=r,r,r", [a, b], dtype=x.dtype, is_pure=True, pack=2)
    a, b = x8.reshape([G, 2, 2, 4]).permute((0, 1, 3, 2)).split()
    x4 = gl.inline_asm_elementwise(extreme, "=r,r,r", [a, b], dtype=x.dtype, is_pure=True, pack=2)
    a, b = x4.reshape([G, 2, 2, 2]).permute((0, 1, 3, 2)).split()
    x2 = gl.inline_asm_elementwise(extreme, "=r,r,r", [a, b], dtype=x.dtype, is_pure=True, pack=2).to(gl.float32)
    if NAME == "min":
        result = gl.reduce(gl.reduce(x2, 2, _smaller), 1, _smaller)
    else:
        result = gl.reduce(gl.reduce(x2, 2, _larger), 1, _larger)
    return result


@gluon.jit
def _span(x, SPAN: gl.constexpr, HALF: gl.constexpr, layout: gl.constexpr):
    """(low, high, scale before rounding) of each group; x: [groups, 2, 16]. NaN spreads over its group."""
    low = gl.convert_layout(_smaller(_group_extreme(x, "min"), 0.0), layout, assert_trivial=True)
    high = gl.convert_layout(_larger(_group_extreme(x, "max"), 0.0), layout, assert_trivial=True)
    if HALF:
        scale = high * (1.0 / SPAN) - low * (1.0 / SPAN)
    else:
        span = gl.full_like(high, SPAN)
        scale = gl.div_rn(high, span) - gl.div_rn(low, span)
    return low, high, scale


@gluon.jit
def _quantize(x, present, low, high, scale, BITS: gl.constexpr, HALF: gl.constexpr, INDEXED: gl.constexpr):
    """(codes like x, v and X of each group); the low bytes of the int32 codes count, 0 where padding.

    Codes of 8 bits, and v with them, are 128 less. Positions are in units of the whole range, [0, 1].
    """
    UNIT: gl.constexpr = 2.0**-BITS
    DOWN: gl.constexpr = 128.0 if BITS == 8 else 0.0
    divisor = gl.where(scale == 0, 1.0, scale)
    near = gl.inline_asm_elementwise(RECIPROCAL, "=r,r", [divisor], dtype=gl.float32, is_pure=True, pack=1)
    # near + rest is 1 / scale to 2**-46, and no quotient by a scale of 4 bits is that close to a tie.
    rest = gl.fma(-divisor, near, gl.full_like(near, 1.0)) * near
    position = _times(x, (near * UNIT)[:, None, None], (rest * UNIT)[:, None, None])
    if HALF:
        zero = 1.0 / (2.0 * UNIT) - _times(low * 0.5 + high * 0.5, near, rest)
        shift = zero - (0.5 + DOWN)
        add: gl.constexpr = ADD
    else:
        zero = gl.minimum(gl.floor(_times(-low, near, rest) + 0.5), 1.0 / UNIT - 1.0)
        shift = zero - DOWN
        position += 0.5 * UNIT
        # Rounded down, the sum with a whole number stays on its side of the next whole number.
        add: gl.constexpr = ADD_DOWN
    zero = (zero * UNIT)[:, None, None]
    position = gl.inline_asm_elementwise(add, "=r,r,r", [position, zero], dtype=gl.float32, is_pure=True, pack=1)
    lift: gl.constexpr = _lifted(BITS, DOWN)
    codes = gl.inline_asm_elementwise(
        lift, "=r,r", [gl.minimum(position, BELOW_ONE)], dtype=gl.int32, is_pure=True, pack=1
    )
    if INDEXED:
        codes = gl.where(present, codes, MAGIC_BITS)
        count = gl.sum(gl.sum(present.to(gl.int32), 2), 1).to(gl.float32)
    else:
        count = 32.0
    total = gl.sum(gl.sum(codes - MAGIC_BITS, 2), 1).to(gl.float32) - count * shift
    return codes, shift, total


@gluon.jit
def _operand_bytes(value, WARPS: gl.constexpr):
    """[16 * WARPS, 2, 16] columns to bytes in the order of the second operand, [4 quarters, WARPS, 128].

    A group's bytes alternate between its halves, as in the planes; a quad's lane reads half a group of two blocks.
    """
    runs = value.to(gl.int8).permute((0, 2, 1)).reshape([WARPS, 2, 2, 4, 2, 16])
    return runs.permute((3, 0, 2, 4, 1, 5)).reshape([4, WARPS, 128])


@gluon.jit
def _round_alone(scale, UP: gl.constexpr):
    """`_round_e4m3` at any exponent at which the result is neither subnormal nor cut off."""
    bits = scale.to(gl.int32, bitcast=True)
    if UP:
        bits += 0xFFFFF
    else:
        bits += 0x7FFFF + ((bits >> 20) & 1)
    rounded = (bits & -0x100000).to(gl.float32, bitcast=True)
    return gl.where((scale > 0) & (scale < float("inf")), rounded, scale * 0.0)


@gluon.jit
def _turn(
    source,
    place,
    exponent,
    TURN: gl.constexpr,
    NB: gl.constexpr,
    R: gl.constexpr,
    ACT_BITS: gl.constexpr,
    ACT_HALF: gl.constexpr,
    INDEXED: gl.constexpr,
    WARPS: gl.constexpr,
):
    """What `quantized_row` stores for a turn, and its scales before rounding, each alone if there is no exponent."""
    x_ptr, index_ptr, in_features = source
    g, half, i = place
    SPAN: gl.constexpr = 2.0**ACT_BITS if ACT_HALF else 2.0**ACT_BITS - 1.0
    g_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, g.type.layout))
    column = TURN * 512 * WARPS + g * 32 + half * 16 + i
    x = gather(x_ptr, index_ptr, 0, column, TURN * 16 * WARPS + g + column * 0 < 4 * NB, in_features, INDEXED)
    low, high, free = _span(x, SPAN, ACT_HALF, g_layout)
    if exponent is None:
        scale = _round_alone(free, ACT_BITS >= UP_BITS)
    else:
        scale = _round_e4m3(free, exponent, ACT_BITS >= UP_BITS)
    present = column < 128 * NB
    if INDEXED:
        present = gl.load(index_ptr + column, mask=present, other=in_features) < in_features
    codes, shift, total = _quantize(x.to(gl.float32), present, low, high, scale, ACT_BITS, ACT_HALF, INDEXED)
    # A code of the upper quarters is larger by what its place in the byte adds.
    quarter = gl.arange(0, 16 * WARPS, layout=g_layout) % 4
    placed = scale * ((127 - quarter // (R // 2) * R) << 23).to(gl.float32, bitcast=True)
    factors: gl.constexpr = [WARPS, 4, 4]
    parts = (
        _operand_bytes(codes, WARPS),
        placed.reshape(factors),
        (placed * shift).reshape(factors),
        (scale * total).reshape(factors),
        _operand_bytes(present, WARPS),
    )
    return parts, free


@gluon.jit
def quantized_row(
    x_ptr,
    index_ptr,
    in_features,
    NB: gl.constexpr,
    TURNS: gl.constexpr,
    R: gl.constexpr,
    ACT_BITS: gl.constexpr,
    ACT_HALF: gl.constexpr,
    INDEXED: gl.constexpr,
    WARPS: gl.constexpr,
):
    """For each 512 * WARPS columns, in shared memory: (codes, factor, factor, factor, ones).

    Codes and ones are bytes, [4 quarters, WARPS, 128], in the order of `_operand_bytes`; ones, 0 where padding, are
    there with INDEXED only. Factors are a / 2**place, a * v / 2**place and a * X, float32 [WARPS, 4 blocks, 4 groups].

    Where no scale of the row is subnormal in E4M3, its exponent, which all warps have to meet for, does not matter. So
    the row is quantized without it, and once more if that turns out to be wrong.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 2, 8], [16, 1, 2], [WARPS, 1, 1], [2, 1, 0])
    memory: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    everywhere: gl.constexpr = gl.BlockedLayout([WARPS], [32], [WARPS], [0])
    g_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    source = (x_ptr, index_ptr, in_features)
    place = (
        gl.arange(0, 16 * WARPS, layout=g_layout)[:, None, None],
        gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None],
        gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :],
    )
    largest = gl.zeros([16 * WARPS], gl.float32, layout=g_layout)
    smallest = gl.full([16 * WARPS], float("inf"), gl.float32, layout=g_layout)
    stored = ()
    for turn in gl.static_range(TURNS):
        parts, free = _turn(source, place, None, turn, NB, R, ACT_BITS, ACT_HALF, INDEXED, WARPS)
        largest = gl.maximum(largest, free)
        smallest = gl.minimum(smallest, gl.where(free > 0, free, float("inf")))
        buffers = ()
        for part in gl.static_range(4 + INDEXED):
            value = parts[part]
            buffers = buffers + (gl.allocate_shared_memory(value.dtype, value.shape, memory, value),)
        stored = stored + (buffers,)
    highs = gl.allocate_shared_memory(gl.float32, [WARPS], line, gl.max(largest.reshape([WARPS, 16]), 1))
    lows = gl.allocate_shared_memory(gl.float32, [WARPS], line, gl.min(smallest.reshape([WARPS, 16]), 1))
    high = gl.max(highs.load(everywhere), 0)
    # 448 * 2**exponent is less than twice the largest, and e4m3 subnormal below 2**-6: at a ratio of 14,336 at least.
    # The other bounds keep away from those of the exponent, -100 and 119.
    if (gl.min(lows.load(everywhere), 0) < high * 2.0**-13) | (high < 2.0**-80) | (high > 2.0**120):
        exponent = _scale_exponent(high.to(gl.int32, bitcast=True))
        for turn in gl.static_range(TURNS):
            parts, _ = _turn(source, place, exponent, turn, NB, R, ACT_BITS, ACT_HALF, INDEXED, WARPS)
            for part in gl.static_range(4):
                stored[turn][part].store(parts[part])
    return stored
