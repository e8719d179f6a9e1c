"""One row through a packed weight as plain aten, which Inductor fuses into one loop over the packed words.

With c the codes and e4m3 the stored scales, both sums over the columns k of group g,

    y[n] = 2**(scale_exponent[n] + 2 - r) * sum_g e4m3[n, g] * (sum_k x[k] * c[n, k] + offset[n, g] * sum_k x[k]),
    offset = h - zeta * 2**(r-2).

What makes it fast on a CPU (design.md, section 3; benchmarks/cpu_linear.py):
- a code is masked in place, and the power of two that its place adds is divided out of the activation;
- scale and zero offset multiply sums over a group, in vector lanes, so that no group needs a horizontal sum;
- E4M3 is decoded by a table of 256: its arithmetic in the loop costs as much as the product;
- planes are loaded as float32 words (see `plane_words`);
- products are added by fused multiply-adds;
- the activation's preparation is opaque (`prepare_row`).
"""

from math import prod

import torch
from torch import Tensor
from torch._inductor.inductor_prims import fma
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bbb_ao.kernels.fake_quantize import decode_scale
from bbb_ao.kernels.packed_row.op import prepare_row
from bbb_ao.kernels.packing.dense import unpack_codes
from bbb_ao.kernels.packing.planes import GRANULE, stored_bits
from bbb_ao.kernels.packing.words import LANES, WordLayout, assemble_words, plane_words


def _offsets(bits: int, zero_point_bits: int, half_step: bool) -> Tensor:
    """h - zeta * 2**(r-2) of each zero offset in a byte, float32 [256, 8 / zero_point_bits]."""
    codes = unpack_codes(_BYTES[:, None], zero_point_bits, 8 // zero_point_bits).to(torch.float32)
    return (0.5 if half_step else 0.0) - codes * 2.0 ** (bits - zero_point_bits)


# Tensors of the module, not of the graph: Inductor would put the computation of a table back into the loop.
# The device is named because this module may be imported under another default, such as "meta".
_BYTES = torch.arange(256, dtype=torch.uint8, device="cpu")
E4M3_VALUES = decode_scale(_BYTES, torch.zeros((), dtype=torch.int32, device="cpu"))
OFFSETS = {
    (bits, width, half_step): _offsets(bits, width, half_step)
    for bits in (2, 4, 8)
    for width in (2, 4, 8)
    for half_step in (False, True)
}


def takes_row_path(
    x: Tensor,
    high: Tensor,
    mid: Tensor | None,
    low: Tensor | None,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    group_size: int,
) -> bool:
    """The rule that chooses `packed_linear_row`: under torch.compile or torch.export, one row of 16- or 32-bit floating
    point on a CPU that needs no gradient, 2, 4 or 8 bits without rounded slices, groups of 32, contiguous planes, zero
    offsets of 0, 2, 4 or 8 bits. Anything else goes to the op.
    """
    return (
        torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and fits_row_path(x, high, mid, low, bits, zero_point_bits, half_step, group_size)
    )


def fits_row_path(
    x: Tensor,
    high: Tensor,
    mid: Tensor | None,
    low: Tensor | None,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    group_size: int,
) -> bool:
    """What `takes_row_path` asks of the operands, whether anything is being compiled or not."""
    planes = [plane for plane in (high, mid, low) if plane is not None]
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and statically_known_true(prod(x.shape[:-1]) == 1)
        and bits in (2, 4, 8)
        and (half_step or bits >= stored_bits(mid, low))
        and group_size == GRANULE
        and zero_point_bits in (0, 2, 4, 8)
        and all(plane.is_contiguous() for plane in planes)
        and high.shape[-1] > 0
    )


def packed_linear_row(
    x: Tensor,
    high: Tensor,
    mid: Tensor | None,
    low: Tensor | None,
    scale: Tensor,
    scale_exponent: Tensor,
    zero_point: Tensor | None,
    index: Tensor | None,
    bias: Tensor | None,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    act_bits: int | None = None,
    act_half_step: bool = True,
) -> Tensor:
    """`packed_linear` (or, with act_bits, `packed_linear_dynamic`) for one row, groups of 32, 2, 4 or 8 bits.

    Accumulates in float32. For who may call it see `takes_row_path`.
    """
    # The loops below are unrolled by the layout: int() makes a dynamic size a constant of the graph.
    features = int(scale.shape[-1]) * GRANULE
    activation, sums = prepare_row(x, index, features, bits, act_bits, act_half_step)
    sums = sums.view(-1)
    layout = WordLayout(bits, features)
    planes = [plane for plane, first in ((high, 2), (mid, 4), (low, 8)) if plane is not None and bits >= first]
    blocks, tail = plane_words(planes, layout)
    groups = layout.blocks * 4
    scales = _GroupScales(scale, zero_point, zero_point_bits, bits, half_step)
    parts = []
    if blocks:
        shares = activation[: groups * GRANULE].view(layout.block_shape)
        parts += _block_sums(assemble_words(blocks), shares, sums[: groups * LANES].view(-1, 4, LANES), scales, layout)
    if tail:
        shares = activation[groups * GRANULE :].view(layout.tail_shape)
        parts = [_tail_sum(assemble_words(tail), shares, sums[groups * LANES :], scales, layout, parts)]
    # 2**n as the bits of a float32: exact, and no call of pow. One exponent, or one for each row.
    y = _add(parts) * ((scale_exponent + (127 + 2 - bits)) << 23).view(torch.float32)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], high.shape[0])


class _GroupScales:
    """E4M3 scales and offsets in steps of the codes, h - zeta * 2**(r-2), of chosen groups; arguments as elsewhere."""

    def __init__(
        self, scale: Tensor, zero_point: Tensor | None, zero_point_bits: int, bits: int, half_step: bool
    ) -> None:
        self.scale, self.zero_point = scale, zero_point
        if zero_point is None:
            self.fixed_offset = (0.5 if half_step else 0.0) - 2.0 ** (bits - 1)
        else:
            self.table, self.per_byte = OFFSETS[bits, zero_point_bits, half_step], 8 // zero_point_bits

    def of_blocks(self, quarter: int, blocks: int) -> tuple[Tensor, Tensor | float]:
        """(scale, offset) of one quarter of all full blocks, [out_features, blocks, 1]."""
        scale = E4M3_VALUES[_per_block(self.scale, blocks, 4)[:, :, quarter, None].to(torch.int32)]
        if self.zero_point is None:
            return scale, self.fixed_offset
        packed = _per_block(self.zero_point, blocks, 4 // self.per_byte)[:, :, quarter // self.per_byte, None]
        return scale, self.table[packed.to(torch.int32), quarter % self.per_byte]

    def of_group(self, group: int) -> tuple[Tensor, Tensor | float]:
        """(scale, offset) of one group, [out_features, 1]."""
        scale = E4M3_VALUES[self.scale[:, group, None].to(torch.int32)]
        if self.zero_point is None:
            return scale, self.fixed_offset
        packed = self.zero_point[:, group // self.per_byte, None]
        return scale, self.table[packed.to(torch.int32), group % self.per_byte]


def _per_block(packed: Tensor, blocks: int, size: int) -> Tensor:
    """[out_features, >= blocks * size] -> [out_features, blocks, size]."""
    return packed[:, : blocks * size].reshape(packed.shape[0], blocks, size)


def _block_sums(
    words: list[Tensor], shares: Tensor, sums: Tensor, scales: _GroupScales, layout: WordLayout
) -> list[Tensor]:
    """Terms of the full blocks, [out_features] each.

    Inductor writes the terms of a sum to memory when they take more than 12 loads or 50 operations on a CPU (8 and 30
    before torch 2.13), which makes the product three times as slow. Hence one sum for each quarter, or for each half of
    its bytes where the whole would take too much; before 2.13 4 and 8 bits are past the limit however they are cut.
    """
    bytes_at_once = 4 if layout.bits == 4 else 2
    parts = []
    for k in range(4):
        scale, offset = scales.of_blocks(k, layout.blocks)
        for first in range(0, 4, bytes_at_once):
            codes = range(first, first + bytes_at_once)
            terms = [(layout.masked_field(words, k, q), shares[:, k, q]) for q in codes]
            start = sums[:, k] * offset if first == 0 else None
            parts.append((_add_products(terms, start) * scale).sum((1, 2)))
    return parts


def _tail_sum(
    words: list[Tensor], shares: Tensor, sums: Tensor, scales: _GroupScales, layout: WordLayout, parts: list[Tensor]
) -> Tensor:
    """The columns after the full blocks, added to `parts`, the terms of those: [out_features].

    The terms join in shares of one lane (exact: there are eight if there are blocks), which makes Inductor run this
    after them, when the end of each row is in the cache.
    """
    groups = [_add(parts).unsqueeze(1) / LANES] if parts else []
    for g in range(layout.tail_groups):
        scale, offset = scales.of_group(layout.blocks * 4 + g)
        places = [(k, q) for k in layout.tail_quarters(g) for q in range(4)]
        terms = [(layout.masked_field(words, k, q), shares[g, k, q]) for k, q in places]
        groups.append(_add_products(terms, sums[g] / layout.tail_lanes * offset) * scale)
    return _add(groups).sum(1)


def _add_products(terms: list[tuple[Tensor, Tensor]], start: Tensor | None) -> Tensor:
    """start + the sum of a * b, by fused multiply-adds: Inductor does not make them of a product and a sum."""
    total = start
    for a, b in terms:
        total = a * b if total is None else fma(a, b, total)
    assert total is not None, "called with at least one term"
    return total


def _add(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
