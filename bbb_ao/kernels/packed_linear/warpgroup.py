"""Several rows through a packed weight on Hopper GPUs (compute capability 9.0), written in Gluon.

The weight is the first operand of wgmma, decoded in registers, and the activations the second, in shared memory; both
arrive through asynchronous copies some blocks ahead. While one product runs, the next block of 128 columns is decoded.

A pair of codes takes three instructions. Masked in place it is a pair of subnormal 16-bit floats (see `decode`); one
multiply-add makes them c - zeta * 2**(R-2), which is exact, a second one

    w = e4m3 * (c - zeta * 2**(R-2)) + e4m3 * H,

rounded once to the type of x: what `dequantize_packed` rounds to it. Where the columns are shared out over programs
(SPLITS > 1), the last one to finish adds the parts up in a fixed order, so results do not change from run to run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from bbb_ao.kernels.packed_linear.decode import _assemble, _place


@gluon.constexpr_function
def _splat(value, dtype):
    """A 16-bit float constant, a power of two or 0 with a sign, twice in a 32-bit word."""
    from math import frexp

    sign = 0x8000 if value < 0 else 0
    if value == 0:
        return 0
    exponent = frexp(abs(value))[1] - 1
    bits = sign | ((exponent + 127) << 7 if dtype == gl.bfloat16 else (exponent + 15) << 10)
    return bits * 0x00010001


@gluon.constexpr_function
def _type(dtype):
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"


@gluon.constexpr_function
def _scale_code(dtype, quarter, H):
    """PTX: ($0, $1) = (e4m3 * 2**6, e4m3 * H) in bfloat16, (e4m3 * 2**5, e4m3 * H / 16) in float16, each twice."""
    bf16 = dtype == gl.bfloat16
    # An E4M3 pattern moved to the top of the mantissa is e4m3 * 2**-120 in bfloat16 and e4m3 * 2**-8 in float16.
    move, up = (0x00100010, _splat(2.0**126, dtype)) if bf16 else (0x00800080, _splat(2.0**13, dtype))
    half = _splat(H * (2.0**-6 if bf16 else 2.0**-9), dtype)
    zero = 0x80008000
    code = "{ .reg .b32 t, c, z; mov.b32 z, %d; " % zero
    code += "bfe.u32 t, $2, %d, 8; mul.lo.u32 t, t, %d; " % (8 * quarter, move)
    code += "mov.b32 c, %d; fma.rn.%s $0, t, c, z; " % (up, _type(dtype))
    code += "mov.b32 c, %d; fma.rn.%s $1, $0, c, z; }" % (half, _type(dtype))
    return code


@gluon.constexpr_function
def _zero_code(dtype, quarter, R, ZB):
    """PTX: $0 = -zeta * 2**(R-2) * 2**-6 (bfloat16) or * 2**-9 (float16), twice."""
    top = 127 if dtype == gl.bfloat16 else 15
    if ZB == 0:
        return "{ .reg .b32 t; mov.b32 t, $1; mov.b32 $0, %d; }" % _splat(
            -(2.0 ** (R - 1)) * (2.0**-6 if dtype == gl.bfloat16 else 2.0**-9), dtype
        )
    shift = max(0, R - ZB)
    code = "{ .reg .b32 t, c, z; mov.b32 z, %d; " % 0x80008000
    code += "bfe.u32 t, $1, %d, %d; mul.lo.u32 t, t, %d; " % (ZB * quarter, ZB, 0x00010001 << shift)
    code += "mov.b32 c, %d; fma.rn.%s $0, t, c, z; }" % (_splat(-(2.0 ** (top + R - ZB - shift)), dtype), _type(dtype))
    return code


@gluon.constexpr_function
def _weight_code(dtype, hb, place, mask):
    """PTX: $0 = (code * 2**p + zero) * scale + half, p = -6 or -9; operands: $1 word, $2 $3 scale, $4 $5 half, $6 $7 zero."""
    top = 127 if dtype == gl.bfloat16 else 15
    pair = (mask << place) * 0x00010001
    code = "{ .reg .b32 t, c; "
    code += "shr.b32 t, $1, 8; and.b32 t, t, %d; " % pair if hb else "and.b32 t, $1, %d; " % pair
    code += "mov.b32 c, %d; fma.rn.%s t, t, c, $6; " % (_splat(2.0 ** (top - place), dtype), _type(dtype))
    return code + "fma.rn.%s $0, t, $2, $4; }" % _type(dtype)


@gluon.jit
def _weights(words, scale, half, zero, x_ptr, HB: gl.constexpr, PLACE: gl.constexpr, MASK: gl.constexpr):
    dtype = x_ptr.dtype.element_ty
    return gl.inline_asm_elementwise(
        _weight_code(dtype, HB, PLACE, MASK), "=r,r,r,r,r,r,r,r", [words, scale, half, zero], dtype=dtype, is_pure=True, pack=2
    )


@gluon.jit
def _decode_block(planes, scale, zero, x_ptr, R: gl.constexpr, MASK: gl.constexpr, H: gl.constexpr, ZB: gl.constexpr, layout: gl.constexpr):
    """The weights of one block, [BN, 128], from 16-bit words [BN, 16] and packed scales and zero offsets [BN, 1]."""
    dtype = x_ptr.dtype.element_ty
    words = _assemble(planes[0], planes[1], planes[2], planes[3], R)
    fields = ()
    for quarter in gl.static_range(4):
        s, h = gl.inline_asm_elementwise(
            _scale_code(dtype, quarter, H), "=r,=r,r", [scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        z = gl.inline_asm_elementwise(_zero_code(dtype, quarter, R, ZB), "=r,r", [zero], dtype=gl.int32, is_pure=True, pack=1)
        for hb in gl.static_range(2):
            fields = fields + (_weights(words[quarter % (R // 2)], s, h, z, x_ptr, hb, _place(quarter, R), MASK),)
    # [BN, 16] each, field by field: [BN, 16, 2, 2, 2] with the fields' bits last, then first.
    pairs = (gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]), gl.join(fields[4], fields[5]), gl.join(fields[6], fields[7]))
    fours = gl.join(gl.join(pairs[0], pairs[1]), gl.join(pairs[2], pairs[3]))
    block = fours.permute([0, 4, 3, 2, 1]).reshape([fours.shape[0], 128])
    return gl.convert_layout(block, layout, assert_trivial=True)


@gluon.jit
def _copy_block(x_ptr, high_ptr, mid_ptr, low_ptr, xs, ws, stage, block, last, m0, n0, M, N, K, NB: gl.constexpr, R: gl.constexpr,
                BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr):
    """Start the copies of one block's activations and planes; nothing from `last` on."""
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    w_layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, x_layout))[:, None]
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, x_layout))[None, :]
    async_copy.async_copy_global_to_shared(
        xs.index(stage), x_ptr + m.to(gl.int64) * K + (block * 128 + k), mask=(m < M) & (block + k * 0 < last)
    )
    n = gl.minimum(n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, w_layout)), N - 1)[:, None]
    e = gl.arange(0, 16, layout=gl.SliceLayout(0, w_layout))[None, :]
    mask = block + (n + e) * 0 < last
    place = (n * NB + block).to(gl.int64)
    words = gl.pointer_type(gl.int16)
    async_copy.async_copy_global_to_shared(ws.index(stage * (R // 2)), high_ptr.to(words) + place * 16 + e, mask=mask)
    if R > 2:
        async_copy.async_copy_global_to_shared(ws.index(stage * (R // 2) + 1), mid_ptr.to(words) + place * 16 + e, mask=mask)
    if R > 4:
        for i in gl.static_range(2):
            async_copy.async_copy_global_to_shared(
                ws.index(stage * (R // 2) + 2 + i), low_ptr.to(words) + place * 32 + 16 * i + e, mask=mask
            )
    async_copy.commit_group()


@gluon.jit
def _read_words(ws, stage, R: gl.constexpr, layout: gl.constexpr):
    high = ws.index(stage * (R // 2)).load(layout)
    mid = high
    even = high
    odd = high
    if R > 2:
        mid = ws.index(stage * (R // 2) + 1).load(layout)
    if R > 4:
        even = ws.index(stage * (R // 2) + 2).load(layout)
        odd = ws.index(stage * (R // 2) + 3).load(layout)
    return high, mid, even, odd


@gluon.jit
def _read_scales(scale_ptr, zero_ptr, row, block, last, NB: gl.constexpr, ZB: gl.constexpr):
    """Packed scales and zero offsets of a block's four groups, int32 of the shape of row."""
    mask = block + row * 0 < last
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
def matmul_kernel(x_ptr, high_ptr, mid_ptr, low_ptr, scale_ptr, exponent_ptr, zero_ptr, bias_ptr, y_ptr, parts_ptr, done_ptr,
                  M, N, NB: gl.constexpr, R: gl.constexpr, MASK: gl.constexpr, H: gl.constexpr, ZB: gl.constexpr,
                  EXPONENTS: gl.constexpr, BIASED: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr,
                  STAGES: gl.constexpr, SPLITS: gl.constexpr):
    """y[m, n] for BM rows of x and 16 * WARPS rows of the weight; x is [M, 128 * NB]."""
    BN: gl.constexpr = 16 * WARPS
    AHEAD: gl.constexpr = STAGES - 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    n0 = gl.program_id(0) * BN
    m0 = gl.program_id(1) * BM
    split = gl.program_id(2)
    first = split * NB // SPLITS
    last = (split + 1) * NB // SPLITS
    xs = gl.allocate_shared_memory(dtype, [STAGES, BM, 128], gl.NVMMASharedLayout.get_default_for([BM, 128], dtype))
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * (R // 2), BN, 16], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    for i in gl.static_range(AHEAD):
        _copy_block(x_ptr, high_ptr, mid_ptr, low_ptr, xs, ws, i, first + i, last, m0, n0, M, N, NB * 128, NB, R, BM, BN, WARPS)
    row = gl.minimum(n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, a_layout)), N - 1)[:, None]
    scale, zero = _read_scales(scale_ptr, zero_ptr, row, first, last, NB, ZB)
    acc = warpgroup_mma_init(gl.zeros([BN, BM], gl.float32, layout=acc_layout))
    a = gl.zeros([BN, 128], dtype, layout=a_layout)
    for block in range(first, last):
        stage = (block - first) % STAGES
        async_copy.wait_group(AHEAD - 1)
        gl.thread_barrier()
        ahead = block + AHEAD
        _copy_block(x_ptr, high_ptr, mid_ptr, low_ptr, xs, ws, (ahead - first) % STAGES, ahead, last, m0, n0, M, N, NB * 128, NB, R, BM, BN, WARPS)
        planes = _read_words(ws, stage, R, a_layout)
        next_scale, next_zero = _read_scales(scale_ptr, zero_ptr, row, block + 1, last, NB, ZB)
        weights = _decode_block(planes, scale, zero, x_ptr, R, MASK, H, ZB, a_layout)
        fence_async_shared()
        acc, a = warpgroup_mma_wait(0, [acc, a])
        acc = warpgroup_mma(weights, xs.index(stage).permute((1, 0)), acc, is_async=True)
        a = weights
        scale = next_scale
        zero = next_zero
    acc, a = warpgroup_mma_wait(0, [acc, a])
    async_copy.wait_group(0)
    _finish(acc, exponent_ptr, bias_ptr, y_ptr, parts_ptr, done_ptr, m0, n0, M, N, R, EXPONENTS, BIASED, BM, BN, WARPS, SPLITS)


@gluon.jit
def _finish(acc, exponent_ptr, bias_ptr, y_ptr, parts_ptr, done_ptr, m0, n0, M, N, R: gl.constexpr, EXPONENTS: gl.constexpr,
            BIASED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr, SPLITS: gl.constexpr):
    """Add up the splits, scale, add the bias and write."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    writes = True
    if SPLITS > 1:
        tile = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
        i = gl.arange(0, BN, layout=gl.SliceLayout(1, acc.type.layout))[:, None]
        j = gl.arange(0, BM, layout=gl.SliceLayout(0, acc.type.layout))[None, :]
        base = parts_ptr + tile.to(gl.int64) * (SPLITS * BN * BM) + (i * BM + j)
        gl.store(base + gl.program_id(2) * (BN * BM), acc)
        gl.thread_barrier()
        before = gl.atomic_add(done_ptr + tile, 1, sem="acq_rel")
        writes = before == SPLITS - 1
        if writes:
            acc = gl.zeros([BN, BM], gl.float32, layout=acc.type.layout)
            for split in gl.static_range(SPLITS):
                acc += gl.load(base + split * (BN * BM), cache_modifier=".cg")
            gl.store(done_ptr + tile, 0)
    if writes:
        layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
        n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))[:, None]
        m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, layout))[None, :]
        y = gl.convert_layout(acc, layout) * (1.0 if dtype == gl.bfloat16 else 16.0)
        if EXPONENTS:
            exponent = gl.load(exponent_ptr + n, mask=n < N, other=0)
        else:
            exponent = gl.load(exponent_ptr)
        y *= ((exponent + (127 + 2 - R)) << 23).to(gl.float32, bitcast=True)
        if BIASED:
            y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        gl.store(y_ptr + m.to(gl.int64) * N + n, y.to(dtype), mask=(n < N) & (m < M))
