"""Triton kernels of fake quantization: the largest scale, the forward pass and the straight-through backward pass.

Weights and activations are the same arithmetic in different units. The zero offset and the scale are measured in steps
of UNIT bits (2 for weights, the width itself for activations), codes are taken at PARENT bits and sliced to BITS. A
whole weight is one row, and so is a token:

    scale = (high - low) / SPAN, rounded to E4M3 times a power of two of the row, with UP never down
    half-step:  zero = 2**(UNIT-1) - (low + high) / (2 scale), weights: to a multiple of 2**UNIT / ZERO_LEVELS
    integer:    zero = floor(-low / scale + 1/2)
    step = scale * 2**(UNIT-BITS), offset = zero * 2**(BITS-UNIT)
    out = step * level, level = codes + h - offset, h = 1/2 on the half-step grid and 0 on the integer grid

in the order of operations of `reference`, without fused multiply-adds, so that codes and values are the reference's bit
for bit. With g the incoming gradient, m = 1 where no code was clamped and x = w / step, every floor's derivative 1:

    dL/dw = g m,   dL/dscale = 2**(UNIT-BITS) sum(g level - g m x),   dL/dzero = scale * miss, miss = sum(g m - g)

and in closed form scale and zero pass theirs on to the first smallest and the first largest element of the group. Where
the scale is 0, no gradient passes straight through, but on the half-step grid of weights (as in `reference`).

Tiles are [BLOCK groups, COLUMNS], COLUMNS the power of two at or above GROUP. Sums run in float32 in a fixed order;
the only atomic is a maximum of whole numbers, so that every result is the same in every run.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _power_of_two(exponent):
    """2**exponent for whole exponents from -126 to 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale_exponent(bits):
    """`scales.scale_exponent` of the float32 number >= 0 with these bits: the smallest e with number <= 448 * 2**e."""
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.where(bits == 0, 0, tl.minimum(tl.maximum(exponent, -100), 119))


@triton.jit
def _round_e4m3(scale, exponent, UP: tl.constexpr):
    """`scales.round_scale`: to the nearest e4m3 * 2**exponent, or with UP to the next one that is not smaller.

    Positive numbers never become 0, and NaN and infinity become NaN.
    """
    ratio = tl.minimum(tl.maximum(scale * _power_of_two(-exponent), 2.0**-9), 448.0)
    bits = ratio.to(tl.int32, bitcast=True)
    # Three bits of mantissa are kept, to nearest even; below 2**-6 the step is 2**-9, that of float32 at 24576.
    subnormal = (ratio + 24576.0) - 24576.0
    if UP:
        bits = bits + 0xFFFFF
        subnormal = tl.where(subnormal < ratio, subnormal + 2.0**-9, subnormal)
    else:
        bits = bits + 0x7FFFF + ((bits >> 20) & 1)
    normal = (bits & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(ratio < 2.0**-6, subnormal, normal)
    finite = (scale > 0) & (scale < float("inf"))
    return tl.where(finite, rounded * _power_of_two(exponent), scale * 0.0)


@triton.jit
def _divide(value, scale):
    """value / scale, correctly rounded, and 0 where the scale is 0."""
    return tl.div_rn(value, tl.where(scale == 0, float("inf"), scale))


@triton.jit
def _divide_by_step(x, step, SHORT: tl.constexpr):
    """x / step for [groups, 1] steps, correctly rounded, and 0 where the step is 0.

    With SHORT the step has an E4M3 mantissa and x is at most 2**100 steps: one correction by the exact remainder gives
    the rounded quotient (checked for all 8 mantissas of the step and all 2**23 of x), a third of a division's cost.
    """
    if SHORT:
        bits = step.to(tl.int32, bitcast=True)
        # step = body * 2**k with body in [2, 4), so that neither power nor reciprocal leaves the normal numbers.
        body = ((bits & 0x7FFFFF) | 0x40000000).to(tl.float32, bitcast=True)
        reciprocal = tl.div_rn(1.0, body)
        scaled = x * tl.where(step == 0, 0.0, _power_of_two(128 - (bits >> 23)))
        near = scaled * reciprocal
        quotient = tl.fma(tl.fma(near, -body, scaled), reciprocal, near)
    else:
        quotient = _divide(x, step)
    return quotient


@triton.jit
def _span(value, SPAN: tl.constexpr, HALF: tl.constexpr):
    """value / SPAN, which is a power of two on the half-step grid."""
    return value * (1.0 / SPAN) if HALF else tl.div_rn(value, SPAN)


@triton.jit
def _span_scale(x, SPAN: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, ACTIVATION: tl.constexpr):
    """(low, high, scale before rounding, whether it was raised) of each group of the tile x; masked elements are 0."""
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    scale = tl.maximum(high, -low) * 0.5 if SYMMETRIC else _span(high, SPAN, HALF) - _span(low, SPAN, HALF)
    # Only an all-zero group of weights may have the scale 0: 2**-109 is the smallest one stored.
    smallest: tl.constexpr = 0.0 if ACTIVATION else 2.0**-109
    raised = (scale < smallest) & (high > low)
    return low, high, tl.where(raised, smallest, scale), raised


@triton.jit
def _closed_form_zero(
    low,
    high,
    scale,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ZERO_LEVELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """(zero offset, whether its rounding was not clamped) of each group, in steps of UNIT bits."""
    top: tl.constexpr = 2.0**UNIT
    if SYMMETRIC:
        zero = tl.full(scale.shape, top / 2, tl.float32)
        free = zero > top
    elif HALF:
        zero = top / 2 - _divide(low * 0.5 + high * 0.5, scale)
        free = zero == zero
        if not ACTIVATION:
            whole = tl.floor(zero * (ZERO_LEVELS / top) + 0.5)
            free = (whole >= 0.0) & (whole <= ZERO_LEVELS - 1.0)
            zero = tl.minimum(tl.maximum(whole, 0.0), ZERO_LEVELS - 1.0) * (top / ZERO_LEVELS)
    else:
        whole = tl.floor(_divide(-low, scale) + 0.5)
        free = (whole >= 0.0) & (whole <= top - 1.0)
        zero = tl.minimum(tl.maximum(whole, 0.0), top - 1.0)
    return zero, free


@triton.jit
def _quantize(
    x,
    scale,
    zero,
    BITS: tl.constexpr,
    PARENT: tl.constexpr,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    SHORT: tl.constexpr,
):
    """(level, not clamped, x / step, step) of each element; step is [groups, 1]."""
    largest: tl.constexpr = 2.0**BITS - 1.0
    step = (scale * 2.0 ** (UNIT - BITS))[:, None]
    offset = (zero * 2.0 ** (BITS - UNIT))[:, None]
    if HALF:
        position = _divide_by_step(x, step, SHORT)
        floor = tl.floor(position + offset)
        codes = tl.clamp(floor, 0.0, largest, propagate_nan=tl.PropagateNan.ALL)
        inside = codes == floor
        level = codes + (0.5 - offset)
    else:
        # floor does not commute with rounding: the parent's code first, then its rounded top bits.
        parent_step = (scale * 2.0 ** (UNIT - PARENT))[:, None]
        parent = _divide_by_step(x, parent_step, SHORT)
        floor = tl.floor(parent + 0.5) + (zero * 2.0 ** (PARENT - UNIT))[:, None]
        codes = tl.clamp(floor, 0.0, 2.0**PARENT - 1.0, propagate_nan=tl.PropagateNan.ALL)
        inside = (codes == floor) & (parent_step != 0)
        if PARENT > BITS:
            sliced = tl.floor((codes + 2.0 ** (PARENT - BITS - 1)) * 2.0 ** (BITS - PARENT))
            codes = tl.minimum(sliced, largest, propagate_nan=tl.PropagateNan.ALL)
            inside = inside & (codes == sliced)
        position = parent * 2.0 ** (BITS - PARENT)
        level = codes - offset
    return level, inside, position, step


@triton.jit
def _tile(groups, tiles, GROUP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: (row, first group, offset of its first element, offsets from there, mask, group mask)."""
    row = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK
    group, column = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    present = first + group < groups
    mask = present[:, None] & (column < GROUP)[None, :]
    # Only the tile's base needs 64 bits.
    base = (row.to(tl.int64) * groups + first) * GROUP
    return row, first, base, group[:, None] * GROUP + column[None, :], mask, present


@triton.jit
def largest_scale_kernel(
    x_ptr,
    largest_ptr,
    groups,
    tiles,
    SPAN: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest unrounded scale of each row, as the bits of a float32, which order as whole numbers do."""
    row, _, base, offsets, mask, _ = _tile(groups, tiles, GROUP, COLUMNS, BLOCK)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    _, _, scale, _ = _span_scale(x, SPAN, HALF, SYMMETRIC, ACTIVATION)
    tl.atomic_max(largest_ptr + row, tl.max(scale, 0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def forward_kernel(
    x_ptr,
    out_ptr,
    largest_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    tiles,
    kept,
    GIVEN: tl.constexpr,
    BITS: tl.constexpr,
    PARENT: tl.constexpr,
    UNIT: tl.constexpr,
    SPAN: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ZERO_LEVELS: tl.constexpr,
    E4M3: tl.constexpr,
    UP: tl.constexpr,
    SHORT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = step * level; with PADDED, 0 from column `kept` of the row on."""
    row, first, base, offsets, mask, present = _tile(groups, tiles, GROUP, COLUMNS, BLOCK)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if GIVEN:
        at = row.to(tl.int64) * groups + first + tl.arange(0, BLOCK)
        scale = tl.load(scale_ptr + at, mask=present, other=0.0)
        zero = tl.load(zero_ptr + at, mask=present, other=0.0)
    else:
        low, high, scale, _ = _span_scale(x, SPAN, HALF, SYMMETRIC, ACTIVATION)
        if E4M3:
            scale = _round_e4m3(scale, _scale_exponent(tl.load(largest_ptr + row)), UP)
        zero, _ = _closed_form_zero(low, high, scale, UNIT, HALF, SYMMETRIC, ZERO_LEVELS, ACTIVATION)
    level, _, _, step = _quantize(x, scale, zero, BITS, PARENT, UNIT, HALF, SHORT)
    out = level * step
    if PADDED:
        out = tl.where(first * GROUP + offsets < kept, out, 0.0)
    tl.store(out_ptr + base + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    gradient_ptr,
    x_ptr,
    out_ptr,
    largest_ptr,
    scale_ptr,
    zero_ptr,
    scale_out_ptr,
    zero_out_ptr,
    groups,
    tiles,
    kept,
    GIVEN: tl.constexpr,
    BITS: tl.constexpr,
    PARENT: tl.constexpr,
    UNIT: tl.constexpr,
    SPAN: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ZERO_LEVELS: tl.constexpr,
    E4M3: tl.constexpr,
    UP: tl.constexpr,
    SHORT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PADDED: tl.constexpr,
    DETACH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient for x, and with GIVEN those for scale and zero; codes are derived anew from x."""
    row, first, base, offsets, mask, present = _tile(groups, tiles, GROUP, COLUMNS, BLOCK)
    at = row.to(tl.int64) * groups + first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    kept_mask = mask & (first * GROUP + offsets < kept) if PADDED else mask
    gradient = tl.load(gradient_ptr + base + offsets, mask=kept_mask, other=0.0).to(tl.float32)
    low, high, scale, raised = _span_scale(x, SPAN, HALF, SYMMETRIC, ACTIVATION)
    if GIVEN:
        scale = tl.load(scale_ptr + at, mask=present, other=0.0)
        zero = tl.load(zero_ptr + at, mask=present, other=0.0)
        free = present
    else:
        if E4M3:
            scale = _round_e4m3(scale, _scale_exponent(tl.load(largest_ptr + row)), UP)
        zero, free = _closed_form_zero(low, high, scale, UNIT, HALF, SYMMETRIC, ZERO_LEVELS, ACTIVATION)
    level, inside, position, _ = _quantize(x, scale, zero, BITS, PARENT, UNIT, HALF, SHORT)
    if ACTIVATION:
        inside = inside & (scale != 0)[:, None]
    passed = tl.where(inside, gradient, 0.0)
    if not DETACH:
        to_scale = tl.sum(gradient * level - passed * position, 1) * 2.0 ** (UNIT - BITS)
        miss = tl.sum(passed - gradient, 1)
        if GIVEN:
            tl.store(scale_out_ptr + at, to_scale, mask=present)
            tl.store(zero_out_ptr + at, miss * scale, mask=present)
        else:
            to_low, to_high = _to_range(low, high, scale, raised, free, to_scale, miss, SPAN, HALF, SYMMETRIC)
            column = tl.arange(0, COLUMNS)[None, :]
            first_low = tl.min(tl.where(mask & (x == low[:, None]), column, COLUMNS), 1)
            first_high = tl.min(tl.where(mask & (x == high[:, None]), column, COLUMNS), 1)
            passed += tl.where(column == first_low[:, None], to_low[:, None], 0.0)
            passed += tl.where(column == first_high[:, None], to_high[:, None], 0.0)
    tl.store(out_ptr + base + offsets, passed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _to_range(
    low, high, scale, raised, free, to_scale, miss, SPAN: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr
):
    """Gradients for the group's low and high end from those of its scale and of its zero offset (miss * scale)."""
    if SYMMETRIC:
        to_scale = tl.where(raised, 0.0, to_scale)
        # maximum(high, -low) / 2: half of the gradient to each where they are equal.
        share = tl.where(high == -low, to_scale * 0.25, to_scale * 0.5)
        to_low, to_high = tl.where(-low >= high, -share, 0.0), tl.where(high >= -low, share, 0.0)
    else:
        miss = tl.where(free & (scale != 0), miss, 0.0)
        if HALF:
            to_scale += miss * _divide(low * 0.5 + high * 0.5, scale)
            to_low, to_high = -0.5 * miss, -0.5 * miss
        else:
            to_scale += miss * _divide(low, scale)
            to_low, to_high = -miss, miss * 0.0
        to_scale = tl.where(raised, 0.0, to_scale)
        to_low -= _span(to_scale, SPAN, HALF)
        to_high += _span(to_scale, SPAN, HALF)
    return to_low, to_high
