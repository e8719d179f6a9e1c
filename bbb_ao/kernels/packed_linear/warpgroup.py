"""Several rows through a packed weight on Hopper GPUs (compute capability 9.0), written in Gluon.

The weight is the first operand of wgmma, decoded in registers, and the activations the second, in shared memory; both
arrive through asynchronous copies some blocks ahead. While one product runs, the next block of 128 columns is decoded.

A pair of codes takes three instructions. Masked in place it is a pair of subnormal 16-bit floats (see `decode`); one
multiply-add makes them c - zeta * 2**(R-2) + H, which is exact, a second one

    w = e4m3 * (c - zeta * 2**(R-2) + H),

rounded once to the type of x: what `dequantize_packed` rounds to it. (Eight-bit codes and H are too much for bfloat16,
where the second step adds e4m3 * H.)

The blocks of all tiles of y stand in one row, tile after tile, and every program takes SHARE of them, so that all are
busy to the end whatever the shape. Where the columns of a tile fall to several programs (SPLIT), each writes its part
of the sum as float32 and counts up; when all have come, those at the end of their columns add up a piece each, in an
order that does not change from run to run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bbb_ao.kernels.packed_linear import ptx
from bbb_ao.kernels.packed_linear.blocks import (
    assemble,
    let_next_launch,
    load_scales,
    row_biases,
    row_factors,
    start_launch,
    wait_for_launches,
)
from bbb_ao.kernels.packed_linear.shared_tile import finish, share

# Triton 3.9 renamed it.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _weights(words, scale, half, zero, x_desc, HB: gl.constexpr, PLACE: gl.constexpr, MASK: gl.constexpr):
    """One quarter's codes in the low or high bytes of words, as weights."""
    dtype = x_desc.dtype
    return gl.inline_asm_elementwise(
        ptx.weight_pair(dtype, HB, PLACE, MASK),
        "=r,r,r,r,r,r,r,r",
        [words, scale, half, zero],
        dtype=dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _decode(
    words,
    scale,
    zero,
    x_desc,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    layout: gl.constexpr,
):
    """The weights of a block, [64, 128], from its assembled words and packed scales and zero offsets."""
    dtype = x_desc.dtype
    fields = ()
    for quarter in gl.static_range(4):
        s = gl.inline_asm_elementwise(
            ptx.scale_pair(dtype, quarter), "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1
        )
        h = gl.inline_asm_elementwise(ptx.half_pair(dtype, R, H), "=r,r", [s], dtype=gl.int32, is_pure=True, pack=1)
        z = gl.inline_asm_elementwise(
            ptx.zero_pair(dtype, quarter, R, ZB, H), "=r,r", [zero], dtype=gl.int32, is_pure=True, pack=1
        )
        for hb in gl.static_range(2):
            word = words[quarter % (R // 2)]
            fields = fields + (_weights(word, s, h, z, x_desc, hb, ptx.place(quarter, R), MASK),)
    # [64, 16] each, field by field: [64, 16, 2, 2, 2] with the fields' bits last, then first.
    first = gl.join(gl.join(fields[0], fields[1]), gl.join(fields[2], fields[3]))
    second = gl.join(gl.join(fields[4], fields[5]), gl.join(fields[6], fields[7]))
    block = gl.join(first, second).permute([0, 4, 3, 2, 1])
    return gl.convert_layout(block.reshape([block.shape[0], 128]), layout, assert_trivial=True)


@gluon.jit
def _copy_weights(
    planes, buffers, extent, place, STAGES: gl.constexpr, bytes: gl.constexpr, R: gl.constexpr, GROUPS: gl.constexpr
):
    """Expect `bytes` in the stage of a place in the row of blocks, and copy its planes there."""
    high_desc, mid_desc, low_desc = planes
    _, ws, ready, _ = buffers
    start, _, NB, row_tiles = extent
    block = place % NB
    tile = place // NB
    stage = (place - start) % STAGES
    barrier = ready.index(stage)
    mbarrier.expect(barrier, bytes)
    for group in gl.static_range(GROUPS):
        n = tile % row_tiles * 64 * GROUPS + 64 * group
        slot = (stage * GROUPS + group) * (R // 2)
        _copy(high_desc, [n, block * 16], barrier, ws.index(slot))
        if R > 2:
            _copy(mid_desc, [n, block * 16], barrier, ws.index(slot + 1))
        if R > 4:
            for half in gl.static_range(2):
                words = [n, block * 32 + 16 * half]
                _copy(low_desc, words, barrier, ws.index(slot + 2 + half))


@gluon.jit
def _copy_activations(x_desc, buffers, extent, place, STAGES: gl.constexpr):
    """Copy the activations of a place in the row of blocks into its stage."""
    xs, _, ready, _ = buffers
    start, _, NB, row_tiles = extent
    m = place // NB // row_tiles * x_desc.block_type.shape[0]
    stage = (place - start) % STAGES
    _copy(x_desc, [m, place % NB * 128], ready.index(stage), xs.index(stage))


@gluon.jit
def _produce(work, planes, R: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, PDL: gl.constexpr):
    """One warp: copy block after block into stages that every group of warps has freed.

    All stages are free at first: they get their weights while the launches before still run.
    """
    operands, buffers, extent = work
    x_desc = operands[0]
    start, end, _, _ = extent
    bytes: gl.constexpr = x_desc.block_type.nbytes + GROUPS * (R // 2) * planes[0].block_type.nbytes
    filled = gl.minimum(start + STAGES, end)
    for place in range(start, filled):
        _copy_weights(planes, buffers, extent, place, STAGES, bytes, R, GROUPS)
    wait_for_launches(PDL)
    for place in range(start, filled):
        _copy_activations(x_desc, buffers, extent, place, STAGES)
    for place in range(filled, end):
        turn = place - start
        mbarrier.wait(buffers[3].index(turn % STAGES), turn // STAGES & 1 ^ 1)
        _copy_weights(planes, buffers, extent, place, STAGES, bytes, R, GROUPS)
        _copy_activations(x_desc, buffers, extent, place, STAGES)
    # Not before: programs of the next launch would crowd on the multiprocessors that have room for a second one.
    let_next_launch(PDL)


@gluon.jit
def _read_words(ws, place, R: gl.constexpr, layout: gl.constexpr):
    """16-bit words of every plane that R needs."""
    high = ws.index(place).load(layout)
    mid = high
    even = high
    odd = high
    if R > 2:
        mid = ws.index(place + 1).load(layout)
    if R > 4:
        even = ws.index(place + 2).load(layout)
        odd = ws.index(place + 3).load(layout)
    return high, mid, even, odd


@gluon.jit
def _consume(
    work,
    GROUP: gl.constexpr,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    EXPONENTS: gl.constexpr,
    BIASED: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    STEP: gl.constexpr,
    SPLIT: gl.constexpr,
    PDL: gl.constexpr,
):
    """Four warps: 64 rows of the weight, BM rows of x. Groups drift apart: one decodes while another multiplies."""
    operands, buffers, extent = work
    x_desc, scale_ptr, zero_ptr, exponent_ptr, bias_ptr, result = operands
    xs, ws, ready, free = buffers
    start, end, NB, row_tiles = extent
    N = result[3]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    UNIT: gl.constexpr = 1.0 if x_desc.dtype == gl.bfloat16 else 16.0
    for tile in range(start // NB, (end + NB - 1) // NB):
        first = gl.maximum(start - tile * NB, 0)
        last = gl.minimum(end - tile * NB, NB)
        n0 = (tile % row_tiles * GROUPS + GROUP) * 64
        row = gl.minimum(n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, a_layout)), N - 1)[:, None]
        scale, zero = load_scales(scale_ptr, zero_ptr, row, first, last, NB, ZB)
        next_scale, next_zero = load_scales(scale_ptr, zero_ptr, row, first + 1, last, NB, ZB)
        n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, acc_layout))[:, None]
        # Not behind the products, where all would wait for them.
        zeros = gl.zeros([64, 1], gl.float32, layout=acc_layout)
        factor = zeros + row_factors(exponent_ptr, n, N, R, EXPONENTS)
        acc = gl.zeros([64, BM], gl.float32, layout=acc_layout)
        for step in range((last - first) // STEP):
            running = ()
            for i in gl.static_range(STEP):
                block = first + step * STEP + i
                turn = tile * NB + block - start
                stage = turn % STAGES
                mbarrier.wait(ready.index(stage), turn // STAGES & 1)
                planes = _read_words(ws, (stage * GROUPS + GROUP) * (R // 2), R, a_layout)
                # A block ahead is not enough: the compiler moves loads down among the products.
                later_scale, later_zero = load_scales(scale_ptr, zero_ptr, row, block + 2, last, NB, ZB)
                words = assemble(planes[0], planes[1], planes[2], planes[3], R)
                weights = _decode(words, scale, zero, x_desc, R, MASK, H, ZB, a_layout)
                acc = warpgroup_mma(weights, xs.index(stage).permute((1, 0)), acc, is_async=True)
                if i > 0:
                    acc, _, weights = warpgroup_mma_wait(1, [acc, running[0], weights])
                    mbarrier.arrive(free.index((turn - 1) % STAGES), count=1)
                running = (weights,)
                scale = next_scale
                zero = next_zero
                next_scale = later_scale
                next_zero = later_zero
            acc, weights = warpgroup_mma_wait(0, [acc, weights])
            mbarrier.arrive(free.index(stage), count=1)
        # The activations came, so that the launches before are complete; this makes what they wrote visible here too.
        wait_for_launches(PDL)
        m0 = tile // row_tiles * BM
        terms = (factor, zeros + row_biases(bias_ptr, n, N, BIASED))
        if SPLIT:
            share(acc * UNIT, result, tile, m0, n0, terms, NB, GROUP, GROUPS)
        else:
            finish(acc * UNIT, result, m0, n0, terms)


@gluon.jit(do_not_specialize=["M", "NB", "SHARE", "polls", "fresh"])
def matmul_kernel(
    x_desc,
    high_desc,
    mid_desc,
    low_desc,
    scale_ptr,
    exponent_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    count_ptr,
    M,
    N,
    NB,
    SHARE,
    polls,
    fresh,
    R: gl.constexpr,
    MASK: gl.constexpr,
    H: gl.constexpr,
    ZB: gl.constexpr,
    EXPONENTS: gl.constexpr,
    BIASED: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    STEP: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[m, n] from SHARE blocks of 128 columns of tiles of BM rows of x, [M, 128 * NB], and 64 * GROUPS of the weight.

    NB and SHARE are multiples of STEP, so many blocks follow each other with a product under way all the time.
    `parts_ptr` is for two tiles of float32 sums of each program; `count_ptr` for GROUPS int32 of each tile, as the
    launch before left them, zeros at first.
    """
    # The other warps begin when these get to `warp_specialize`.
    start_launch(fresh, PDL)
    row_tiles = (N + 64 * GROUPS - 1) // (64 * GROUPS)
    start = gl.program_id(0) * SHARE
    end = gl.minimum(start + SHARE, (M + BM - 1) // BM * row_tiles * NB)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * GROUPS * (R // 2), 64, 16], high_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    result = (y_ptr, parts_ptr, M, N, count_ptr, SHARE, polls)
    operands = (x_desc, scale_ptr, zero_ptr, exponent_ptr, bias_ptr, result)
    buffers = (xs, ws, ready, free)
    extent = (start, end, NB, row_tiles)
    work = (operands, buffers, extent)
    # Constants stand in each list: in a tuple that has a name they would become tensors.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (work, 0, R, MASK, H, ZB, EXPONENTS, BIASED, BM, STAGES, GROUPS, STEP, SPLIT, PDL)),
                (_consume, (work, 1, R, MASK, H, ZB, EXPONENTS, BIASED, BM, STAGES, GROUPS, STEP, SPLIT, PDL)),
                (_produce, (work, (high_desc, mid_desc, low_desc), R, STAGES, GROUPS, PDL)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (work, 0, R, MASK, H, ZB, EXPONENTS, BIASED, BM, STAGES, GROUPS, STEP, SPLIT, PDL)),
                (_consume, (work, 1, R, MASK, H, ZB, EXPONENTS, BIASED, BM, STAGES, GROUPS, STEP, SPLIT, PDL)),
                (_consume, (work, 2, R, MASK, H, ZB, EXPONENTS, BIASED, BM, STAGES, GROUPS, STEP, SPLIT, PDL)),
                (_produce, (work, (high_desc, mid_desc, low_desc), R, STAGES, GROUPS, PDL)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
