"""The grid's arithmetic in plain torch: codes, slices, dequantization and fake quantization.

Everything is measured in steps of the 2-bit grid. A group of weights has one scale s_2 and one zero offset zeta
(0 <= zeta < 4); at r bits s_r = s_2 * 2**(2-r), and

    half-step:  c_p = clamp(floor(w / s_p + zeta * 2**(p-2)), 0, 2**p - 1)
                c_r = c_p >> (p-r)                                    w_r = s_r * (c_r + 1/2 - zeta * 2**(r-2))
    integer:    c_p = clamp(floor(w / s_p + 1/2) + zeta * 2**(p-2), 0, 2**p - 1)
                c_r = min((c_p + 2**(p-r-1)) >> (p-r), 2**r - 1)      w_r = s_r * (c_r - zeta * 2**(r-2))

with p the parent width (8). Rounding is half-up everywhere: the split identity floor(y) + floor(y + 1/2) = floor(2y)
(Hermite) fails on ties under half-to-even. A group whose scale is 0 dequantizes to exact zeros.

Groups are the last-but-one dimension here: weights and codes are [..., groups, group_size], scales and zero points
[..., groups]. Source: design.md, sections 2.1, 2.3, 2.7 and 2.9.
"""

import torch
from torch import Tensor

from bbb_ao.kernels.fake_quantize.scales import SCALE_SMALLEST, round_scale, scale_exponent

# Narrowest activations whose scales are rounded up.
SCALE_UP_BITS = 4


class _Floor(torch.autograd.Function):
    """floor whose gradient is the identity."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return torch.floor(value)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0]


def floor_straight_through(value: Tensor) -> Tensor:
    """floor(value) with gradient 1."""
    return _Floor.apply(value)  # type: ignore[return-value]


def round_half_up(value: Tensor) -> Tensor:
    """floor(value + 1/2) with gradient 1."""
    return floor_straight_through(value + 0.5)


def divide_by_scale(value: Tensor, scale: Tensor) -> Tensor:
    """value / scale, and 0 where the scale is 0; scale broadcasts over the last dimension of `value`."""
    # An infinite divisor gives the zeros without touching the whole of `value` once more.
    return value / torch.where(scale == 0, torch.inf, scale).unsqueeze(-1)


def group_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(min(weight, 0), max(weight, 0)) of each group: [..., groups, group_size] -> two of [..., groups].

    Gradient: to one element of the group each, the first of equal ones.
    """
    return weight.min(-1).values.clamp(max=0), weight.max(-1).values.clamp(min=0)


def derive_scale(weight: Tensor, half_step: bool, zero_point_bits: int, e4m3: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and zero offset of each group in closed form from its minimum and maximum.

    half-step: s_2 = (hi - lo) / 4 and zeta = 2 - (lo + hi) / (2 s_2), to the nearest multiple of
    4 / 2**zero_point_bits; zero_point_bits = 0 is the symmetric grid: s_2 = max(hi, -lo) / 2, zeta = 2.
    integer: s_2 = (hi - lo) / 3.5 and zeta = floor(-lo / s_2 + 1/2): the levels span 3 steps at 2 bits, and rounding
    reaches half a step further at either end (relative squared error of Gaussian weights 0.139; 0.166 with 3).
    lo <= 0 <= hi. The zero offset is derived from the rounded scale.

    Args:
        weight: [..., groups, group_size], floating point; all leading dimensions share one second level.
        half_step: the half-step grid, else the integer grid.
        zero_point_bits: bits of the stored zero offset, 0 to 8; 2 on the integer grid.
        e4m3: round the scale to E4M3 with a second level, else keep it.
    Returns:
        (scale, zero_point), both [..., groups] of weight's dtype.
    Gradient: through the minimum and the maximum; straight through every rounding.
    """
    low, high = group_range(weight)
    symmetric = half_step and zero_point_bits == 0
    if symmetric:
        scale = torch.maximum(high, -low) / 2
    else:
        # Divided before subtracting: hi - lo may overflow.
        steps = 4.0 if half_step else 3.5
        scale = high / steps - low / steps
    # Only an all-zero group may have the scale 0: a quarter of a subnormal number can be none.
    scale = torch.where((scale < SCALE_SMALLEST) & (high > low), SCALE_SMALLEST, scale)
    if e4m3:
        scale = round_scale(scale, scale_exponent(scale.amax()))
    return scale, derive_zero_point(low, high, scale, half_step, zero_point_bits)


def derive_zero_point(low: Tensor, high: Tensor, scale: Tensor, half_step: bool, zero_point_bits: int) -> Tensor:
    """The zero offset that centres [low, high] on the grid of `scale`, all [..., groups]; see `derive_scale`."""
    if half_step and zero_point_bits == 0:
        return torch.full_like(scale, 2.0)
    if half_step:
        exact = 2.0 - divide_by_scale((low / 2 + high / 2).unsqueeze(-1), scale).squeeze(-1)
    else:
        exact = divide_by_scale(-low.unsqueeze(-1), scale).squeeze(-1)
    return round_zero_point(exact, zero_point_bits)


def round_zero_point(zero_point: Tensor, zero_point_bits: int) -> Tensor:
    """Nearest multiple of 4 / 2**zero_point_bits in [0, 4), half-up, gradient straight through inside the range."""
    levels = 2**zero_point_bits
    return round_half_up(zero_point * (levels / 4)).clamp(0, levels - 1) * (4 / levels)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, half_step: bool, parent_bits: int = 8) -> Tensor:
    """Parent codes c_p of the module's equations.

    Args:
        weight: [..., groups, group_size], floating point.
        scale, zero_point: [..., groups], in units of the 2-bit grid.
    Returns:
        codes of weight's shape and dtype (whole numbers). Gradient: straight through inside the range, zero outside.
    """
    parent_scale = scale * 2.0 ** (2 - parent_bits)
    offset = zero_point.unsqueeze(-1) * 2.0 ** (parent_bits - 2)
    position = divide_by_scale(weight, parent_scale)
    codes = floor_straight_through(position + offset) if half_step else round_half_up(position) + offset
    return codes.clamp(0, 2**parent_bits - 1)


def slice_codes(codes: Tensor, bits: int, half_step: bool, parent_bits: int = 8) -> Tensor:
    """The r-bit codes that a parent code holds: its top bits (half-step) or its rounded, clamped top bits (integer).

    Args:
        codes: parent codes, whole numbers, any shape; uint8 or floating point.
        bits: 1 to parent_bits.
    Returns:
        codes of the same shape and dtype. Gradient (floating point): 2**-(parent_bits - bits), zero where clamped.
    """
    shift = parent_bits - bits
    if shift == 0:
        return codes
    half = 0 if half_step else 2 ** (shift - 1)
    if not codes.is_floating_point():
        return ((codes.to(torch.int32) + half) >> shift).clamp(max=2**bits - 1).to(codes.dtype)
    return floor_straight_through((codes + half) / 2**shift).clamp(max=2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, half_step: bool) -> Tensor:
    """w_r = s_r * (c_r + h - zeta * 2**(r-2)), h = 1/2 on the half-step grid and 0 on the integer grid.

    Args:
        codes: r-bit codes, [..., groups, group_size], any dtype.
        scale, zero_point: [..., groups], in units of the 2-bit grid; their dtype is the result's.
    Returns:
        weights of codes' shape and scale's dtype.
    """
    shift = zero_point * 2.0 ** (bits - 2) - (0.5 if half_step else 0.0)
    return (codes.to(scale.dtype) - shift.unsqueeze(-1)) * (scale * 2.0 ** (2 - bits)).unsqueeze(-1)


class _FakeQuantizeHalfStep(torch.autograd.Function):
    """dequantize(quantize(weight)) on the half-step grid at one width, with the backward pass written out.

    With t = zeta * 2**(r-2), q = c + 1/2 - t, x = w / s_r and m = 1 where the code was not clamped:
    dL/dw = g * m, dL/ds_r = sum(g * (q - m * x)), dL/dt = sum(g * s_r * (m - 1)).
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale, offset)
        ctx.bits = bits
        codes = divide_by_scale(weight, scale).add_(offset.unsqueeze(-1)).floor_().clamp_(0, 2**bits - 1)
        return codes.add_((0.5 - offset).unsqueeze(-1)).mul_(scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        weight, scale, offset = ctx.saved_tensors
        position = divide_by_scale(weight, scale)
        floor = (position + offset.unsqueeze(-1)).floor_()
        codes = floor.clamp(0, 2**ctx.bits - 1)
        inside = codes == floor
        passed = gradient * inside
        scale_gradient = offset_gradient = None
        if ctx.needs_input_grad[1]:
            level = codes.add_((0.5 - offset).unsqueeze(-1))
            scale_gradient = (gradient * level).sum(-1) - (passed * position).sum(-1)
        if ctx.needs_input_grad[2]:
            offset_gradient = (passed.sum(-1) - gradient.sum(-1)) * scale
        return passed, scale_gradient, offset_gradient, None


def fake_quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, half_step: bool, parent_bits: int = 8
) -> Tensor:
    """dequantize(slice_codes(quantize(weight))): what the packed weight will be, with a straight-through gradient.

    Args:
        weight: [..., groups, group_size]; scale, zero_point: [..., groups].
    Returns:
        weights of the same shape and dtype. Gradient: 1 inside the range and 0 outside for `weight`; for `scale` and
        `zero_point` that of the equations with every floor's derivative taken as 1.
    """
    if half_step:
        # floor(floor(x) / k) = floor(x / k): one floor at the target width gives the same codes.
        return _FakeQuantizeHalfStep.apply(  # type: ignore[return-value]
            weight, scale * 2.0 ** (2 - bits), zero_point * 2.0 ** (bits - 2), bits
        )
    codes = slice_codes(quantize(weight, scale, zero_point, half_step, parent_bits), bits, half_step, parent_bits)
    return dequantize(codes, scale, zero_point, bits, half_step)


def quantize_activation(x: Tensor, bits: int, half_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic quantization of activations: one scale and zero point for each token and group.

    half-step: s = (hi - lo) / 2**bits, codes = clamp(floor(x / s + zeta), 0, 2**bits - 1), zeta = -lo / s;
    integer: s = (hi - lo) / (2**bits - 1), codes = clamp(floor(x / s + 1/2) + zeta, ...), zeta = floor(-lo / s + 1/2),
    with lo <= 0 <= hi. s is E4M3 times a power of two for each token: plain E4M3 overflows (design.md, 2.8). From
    SCALE_UP_BITS bits on E4M3 rounds up, since a scale rounded down clips the largest values, which costs more than its
    finer steps give; below it rounds to nearest (benchmarks/LOG.md).

    Args:
        x: [..., groups, group_size], floating point.
    Returns:
        (codes, scale, zero_point): codes as whole numbers of x's shape; scale and zero_point [..., groups], in steps of
        this width; x is about scale * (codes + h - zero_point), h = 1/2 on the half-step grid, else 0.
    Gradient: straight through inside the range, zero outside; through the minimum and the maximum.
    """
    low, high = group_range(x)
    steps = 2**bits if half_step else 2**bits - 1
    scale = high / steps - low / steps
    scale = round_scale(scale, scale_exponent(scale.amax(-1, keepdim=True)), bits >= SCALE_UP_BITS)
    if half_step:
        middle = divide_by_scale((low / 2 + high / 2).unsqueeze(-1), scale).squeeze(-1)
        zero_point = steps / 2 - middle
        codes = floor_straight_through(divide_by_scale(x, scale) + zero_point.unsqueeze(-1))
    else:
        zero_point = round_half_up(divide_by_scale(-low.unsqueeze(-1), scale).squeeze(-1)).clamp(0, steps)
        codes = round_half_up(divide_by_scale(x, scale)) + zero_point.unsqueeze(-1)
    return codes.clamp(0, 2**bits - 1), scale, zero_point


def fake_quantize_activation(x: Tensor, bits: int, half_step: bool) -> Tensor:
    """x as `quantize_activation` stores it: scale * (codes + h - zero_point); x is [..., groups, group_size]."""
    codes, scale, zero_point = quantize_activation(x, bits, half_step)
    shift = zero_point - (0.5 if half_step else 0.0)
    return (codes - shift.unsqueeze(-1)) * scale.unsqueeze(-1)
