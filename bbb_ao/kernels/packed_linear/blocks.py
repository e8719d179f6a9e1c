"""What the Gluon kernels share: loads of planes, scales and activations, words of codes, and how a tile is written."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bbb_ao.kernels.packed_linear import ptx


@gluon.jit
def start_launch(fresh, PDL: gl.constexpr):
    """The first step of `dependent_launch`: what follows reads constants alone."""
    if PDL and fresh != 0:
        gdc_wait()


@gluon.jit
def let_next_launch(PDL: gl.constexpr):
    """The next launch may start when all programs got here (`dependent_launch`)."""
    if PDL:
        gdc_launch_dependents()


@gluon.jit
def wait_for_launches(PDL: gl.constexpr):
    """What follows may read and write anything (`dependent_launch`)."""
    if PDL:
        gdc_wait()


@gluon.constexpr_function
def quad_layout(warps):
    """[warps, 16, 4]: rows r and r + 8 of column q in lane 4 * r + q, as the accumulator has columns 2q and 2q + 1."""
    warp_bases = [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 8, 0]], lanes, warp_bases, [], [warps, 16, 4])


@gluon.constexpr_function
def turns_of_warps(blocks, warps):
    """How often a program's warps, with four blocks each, go on along a row."""
    return -(-blocks // (4 * warps))


@gluon.jit
def load_planes(high_ptr, mid_ptr, low_ptr, row, block, offset, NB: gl.constexpr, R: gl.constexpr, word: gl.constexpr):
    """Words (of the type `word`) of each plane that R needs, for a tile of 16 rows; block and offset (words in it)."""
    mask = block + row * 0 < NB
    place = (row * NB + block).to(gl.int64)
    words = gl.pointer_type(word)
    size: gl.constexpr = 256 // word.primitive_bitwidth
    high = gl.load(high_ptr.to(words) + place * size + offset, mask=mask, other=0)
    mid = high
    even = high
    odd = high
    if R > 2:
        mid = gl.load(mid_ptr.to(words) + place * size + offset, mask=mask, other=0)
    if R > 4:
        even = gl.load(low_ptr.to(words) + place * (2 * size) + offset, mask=mask, other=0)
        odd = gl.load(low_ptr.to(words) + place * (2 * size) + size + offset, mask=mask, other=0)
    return high, mid, even, odd


@gluon.jit
def _merge(a, b, MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    merge: gl.constexpr = ptx.merge(MASK, LEFT, RIGHT)
    pack: gl.constexpr = 32 // a.dtype.primitive_bitwidth
    return gl.inline_asm_elementwise(merge, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=pack)


@gluon.jit
def assemble(high, mid, low_even, low_odd, R: gl.constexpr):
    """Words of R-bit codes from words of the planes that hold them, as `packing.words` does it: R / 2 sets."""
    if R == 2:
        words = (high,)
    else:
        even = _merge(high, mid, 0x33333333, 2, 0)
        odd = _merge(high, mid, 0xCCCCCCCC, 0, 2)
        if R == 4:
            words = (even, odd)
        else:
            words = (
                _merge(even, low_even, 0x0F0F0F0F, 4, 0),
                _merge(odd, low_odd, 0x0F0F0F0F, 4, 0),
                _merge(even, low_even, 0xF0F0F0F0, 0, 4),
                _merge(odd, low_odd, 0xF0F0F0F0, 0, 4),
            )
    return words


@gluon.jit
def load_scales(scale_ptr, zero_ptr, row, block, last, NB, ZB: gl.constexpr):
    """Packed scales and zero offsets of a block's four groups, int32 of row's and block's shape; 0 from `last` on."""
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


@gluon.constexpr_function
def _field(mask):
    """$0 = 2**23 + ($1 & mask) as a float32."""
    return f"{{ .reg .b32 t; mov.b32 t, 0x4B000000; lop3.b32 $0, $1, {mask}, t, 0xEA; }}"  # ($1 & mask) | t


@gluon.jit
def group_scale(packed, QUARTER: gl.constexpr):
    """e4m3 of a quarter's groups, from the packed scales of `load_scales`."""
    decode: gl.constexpr = ptx.decode_pair(QUARTER // 2)
    pair = gl.inline_asm_elementwise(decode, "=f,=f,r", [packed], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)
    return pair[QUARTER % 2]


@gluon.jit
def group_offset(packed, QUARTER: gl.constexpr, R: gl.constexpr, ZB: gl.constexpr, FIXED: gl.constexpr):
    """zeta * 2**(R-2) + FIXED of a quarter's groups; a zero offset is masked in place, as 2**23 + zero * 2**bit."""
    if ZB == 0:
        offset = gl.full_like(packed, 2.0 ** (R - 1) + FIXED, dtype=gl.float32)
    else:
        shift: gl.constexpr = 16 if ZB * (QUARTER + 1) > 23 else 0
        bit: gl.constexpr = ZB * QUARTER - shift
        unit: gl.constexpr = 2.0 ** (R - ZB - bit)
        take: gl.constexpr = _field((2**ZB - 1) << bit)
        field = gl.inline_asm_elementwise(take, "=r,r", [packed >> shift], dtype=gl.float32, is_pure=True, pack=1)
        # In one step where half a code counts beside 2**23 units.
        if unit < 1.0:
            offset = field * unit + (FIXED - 2.0**23 * unit)
        else:
            offset = (field - 2.0**23) * unit + FIXED
    return offset


@gluon.jit
def tile_places(RUN: gl.constexpr, WARPS: gl.constexpr, a_layout: gl.constexpr):
    """Places in a tile: (row, first block of the warp, block, word) in its planes, (row, first, block) in its scales.

    Lane q of a quad has two runs of RUN words, 64 bytes apart, so that a quad reads whole sectors.
    """
    q_layout: gl.constexpr = quad_layout(WARPS)
    aw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, a_layout)))[:, None, None]
    an = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, a_layout)))[None, :, None]
    ak = gl.arange(0, 8 * RUN, layout=gl.SliceLayout(0, gl.SliceLayout(1, a_layout)))[None, None, :]
    block, word = quad_places(ak, RUN)
    qw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, q_layout)))[:, None, None]
    qn = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, q_layout)))[None, :, None]
    qc = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, q_layout)))[None, None, :]
    return (an, aw * 4, block, word), (qn, qw * 4, qc)


@gluon.jit
def quad_places(k, RUN: gl.constexpr):
    """(block of the quad's four, word of it) of an operand's element k."""
    run = k // RUN
    return run % 2 * 2 + run // 4, run // 2 % 2 * RUN + k % RUN


@gluon.jit
def load_tile(weight, places, first, base, N, NB: gl.constexpr, R: gl.constexpr, ZB: gl.constexpr, word: gl.constexpr):
    """Planes and packed scales of the 16 rows from `first` on, in the blocks from `base` on.

    Args:
        weight: pointers to its planes, scales and zero offsets.
        places: as from `tile_places`.
    """
    high_ptr, mid_ptr, low_ptr, scale_ptr, zero_ptr = weight
    an, a_first, a_block, a_word = places[0]
    qn, q_first, q_block = places[1]
    row = gl.minimum(first + an, N - 1)
    planes = load_planes(high_ptr, mid_ptr, low_ptr, row, base + a_first + a_block, a_word, NB, R, word)
    packed = load_scales(scale_ptr, zero_ptr, gl.minimum(first + qn, N - 1), base + q_first + q_block, NB, NB, ZB)
    return planes, packed


@gluon.jit
def step_start(first, STEP: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr):
    """(first row, first block) of a step: a turn of the warps over the columns has one for each tile, ROWS apart."""
    return first + STEP % TILES * ROWS, STEP // TILES * (4 * WARPS)


@gluon.jit
def gather(x_ptr, index_ptr, row, column, mask, in_features, INDEXED: gl.constexpr):
    """x[row, index[column]], 0 where masked or padding."""
    if INDEXED:
        column = gl.load(index_ptr + column, mask=mask, other=in_features)
        mask = column < in_features
    return gl.load(x_ptr + row * in_features + column, mask=mask, other=0.0)


@gluon.jit
def row_factors(exponent_ptr, rows, N, R: gl.constexpr, EXPONENTS: gl.constexpr):
    """2**(exponent + 2 - R) of these rows of the weight, float32; one number if they share an exponent."""
    if EXPONENTS:
        exponent = gl.load(exponent_ptr + rows, mask=rows < N, other=0)
    else:
        exponent = gl.load(exponent_ptr)
    # 2**n as the bits of a float32.
    return ((exponent + (127 + 2 - R)) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def row_biases(bias_ptr, rows, N, BIASED: gl.constexpr):
    """bias of these rows of the weight, float32; 0 without one."""
    if BIASED:
        bias = gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)
    else:
        bias = 0.0
    return bias


@gluon.jit
def row_sums(total, M: gl.constexpr, UNIT: gl.constexpr):
    """One tile summed over columns and warps in a fixed order: for each of M rows of x, [16] float32."""
    WARPS: gl.constexpr = total.shape[0]
    # Every thread adds up all warps of a row, so that they meet once.
    if M == 1:
        layout: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [0, 1])
        y = (gl.sum(gl.convert_layout(gl.sum(total, 2), layout), 0) * UNIT,)
    else:
        layout: gl.constexpr = gl.BlockedLayout([WARPS, 1, 2], [1, 32, 1], [1, WARPS, 1], [2, 0, 1])
        pairs = gl.convert_layout(gl.sum(total.reshape([WARPS, 16, 4, 2]), 2), layout)
        y = (gl.sum(pairs, 0) * UNIT).split()
    return y


@gluon.jit
def places_of_sums(M: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """0 to 15 as `row_sums` gives the rows of a tile of `layout`, [WARPS, 16, 8]."""
    sums = row_sums(gl.zeros([WARPS, 16, 8], gl.float32, layout=layout), M, 1.0)
    return gl.arange(0, 16, layout=sums[0].type.layout)


@gluon.jit
def tile_factors(exponent_ptr, place, first, step, N, R: gl.constexpr, EXPONENTS: gl.constexpr, TILES: gl.constexpr):
    """`row_factors` of each tile's rows: those at `place`, from `first` on and `step` further for each tile."""
    factors = ()
    for tile in gl.static_range(TILES):
        factors = factors + (row_factors(exponent_ptr, first + step * tile + place, N, R, EXPONENTS),)
    return factors


@gluon.jit
def tile_biases(bias_ptr, place, first, step, N, BIASED: gl.constexpr, TILES: gl.constexpr):
    """`row_biases` of each tile's rows, as in `tile_factors`."""
    biases = ()
    for tile in gl.static_range(TILES):
        biases = biases + (row_biases(bias_ptr, first + step * tile + place, N, BIASED),)
    return biases


@gluon.jit
def store_tile(total, y_ptr, factor, bias, rows, N, M: gl.constexpr, UNIT: gl.constexpr):
    """Sum one tile, scale by the factor of its rows, add the bias and write."""
    y = row_sums(total, M, UNIT)
    for m in gl.static_range(M):
        value = y[m] * factor + bias
        gl.store(y_ptr + m * N + rows, value.to(y_ptr.dtype.element_ty), mask=rows < N)
