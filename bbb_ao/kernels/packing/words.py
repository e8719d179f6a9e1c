"""Planes seen as 32-bit words, for vector code: codes of 2, 4 or 8 bits without a shift for each of them.

A word is four consecutive bytes of a plane's row. The layout of `planes` makes words of the three planes line up: with
the even and the odd 2-bit fields of high and mid taken apart, a pair of words becomes two words of 4-bit codes whose
columns are those of two words of low, and with low four words of 8-bit codes. So at r bits there are S = r / 2 words
for every word of high, and for a block of L columns, with field j at bit r * j of byte q of word w of set s,

    column = (L / 4) * (S * j + s) + u // 2 + (L / 8) * (u % 2),   u = 4 * w + q.

S * j + s is the quarter of the block. In a full block (L = 128, eight words of high) a quarter is one group of 32. In a
shorter last block it is not; that one is read once for each of its groups, through the last words of a row, with an
activation that is 0 outside of the group.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bbb_ao.kernels.packing.planes import BLOCK, GRANULE

LANES = 8
EVEN, ODD = 0x33333333, 0xCCCCCCCC - 2**32
LOWER, UPPER = 0x0F0F0F0F, 0xF0F0F0F0 - 2**32


@dataclass(frozen=True)
class WordLayout:
    """Words of `bits`-wide codes of a weight with `features` columns.

    Attributes:
        bits: 2, 4 or 8.
        features: columns, a positive multiple of 32.
    """

    bits: int
    features: int

    @property
    def sets(self) -> int:
        """S, words of codes for every word of the plane high."""
        return self.bits // 2

    @property
    def blocks(self) -> int:
        """Full blocks of 128 columns."""
        return self.features // BLOCK

    @property
    def tail_groups(self) -> int:
        """Groups of 32 columns after the full blocks, 0 to 3."""
        return self.features % BLOCK // GRANULE

    @property
    def tail_lanes(self) -> int:
        """Words of high that are read for the tail, the last ones of a row: eight, or all of a shorter row."""
        return min(LANES, self.features // 16)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the activation of the full blocks: [blocks, quarter, byte, lane]."""
        return (self.blocks, 4, 4, LANES)

    @property
    def tail_shape(self) -> tuple[int, ...]:
        """Shape of the activation of the tail: [tail_groups, quarter, byte, lane]."""
        return (self.tail_groups, 4, 4, self.tail_lanes)

    @property
    def activation_size(self) -> int:
        """Elements of the activation: the full blocks' part, then the tail's."""
        return prod(self.block_shape) + prod(self.tail_shape)

    def tail_quarters(self, group: int) -> range:
        """The quarters of the tail that meet its group `group`."""
        span = self.tail_groups * GRANULE // 4
        return range(group * GRANULE // span, (group * GRANULE + GRANULE - 1) // span + 1)

    def field_scale(self, quarter: int, byte: int) -> float:
        """1 / (what `masked_field` multiplies a code by)."""
        shift, _ = self._place(quarter, byte)
        return 2.0**-shift

    def masked_field(self, words: list[Tensor], quarter: int, byte: int) -> Tensor:
        """The codes of a quarter's columns in one byte of each word, masked where they are, times a power of two.

        Args:
            words: the S sets of `assemble_words`, int32.
        Returns:
            float32 of a set's shape: code / field_scale(quarter, byte), exactly.
        """
        shift, moved = self._place(quarter, byte)
        chosen = words[quarter % self.sets]
        return ((chosen >> 24 if moved else chosen) & ((2**self.bits - 1) << shift)).to(torch.float32)

    def _place(self, quarter: int, byte: int) -> tuple[int, bool]:
        # The top field of a word holds the sign bit, so that its byte is moved to the bottom first.
        field = self.bits * (quarter // self.sets)
        moved = byte == 3 and field + self.bits == 8
        return (field if moved else 8 * byte + field), moved


def assemble_words(planes: list[Tensor]) -> list[Tensor]:
    """Words of 2-, 4- or 8-bit codes from words of the planes.

    Args:
        planes: int32, one shape: [high]; [high, mid]; or [high, mid, even low, odd low], where the last two are the
            first and the second half of the words of low in a block.
    Returns:
        the S sets of words, int32, of the same shape.
    """
    if len(planes) == 1:
        return planes
    high, mid = planes[0], planes[1]
    pairs = [((high & EVEN) << 2) | (mid & EVEN), (high & ODD) | ((mid >> 2) & EVEN)]
    if len(planes) == 2:
        return pairs
    halves = list(zip(pairs, planes[2:], strict=True))
    lower = [((pair & LOWER) << 4) | (low & LOWER) for pair, low in halves]
    return lower + [(pair & UPPER) | ((low >> 4) & LOWER) for pair, low in halves]


def plane_words(planes: list[Tensor], layout: WordLayout) -> tuple[list[Tensor], list[Tensor]]:
    """Words of the planes that `layout.bits` needs, as `assemble_words` takes them.

    They are loaded as float32 and reinterpreted: Inductor's AVX2 load of integers goes through memory and stalls.

    Args:
        planes: [high], [high, mid] or [high, mid, low]; uint8, contiguous.
    Returns:
        words of the full blocks, each [out_features, blocks, 8]; words of the tail, each [out_features, lanes], the
        last of them the tail's. Either list is empty where there is no such block.
    """
    full, tail = [], []
    for plane, halves in zip(planes, (1, 1, 2), strict=False):
        words = plane.view(torch.float32).view(torch.int32)
        rows, end = words.shape
        blocks = words[:, : layout.blocks * LANES * halves].reshape(rows, layout.blocks, halves, LANES)
        ends = [end] if halves == 1 else [end - 2 * layout.tail_groups, end]
        full += [blocks[:, :, half] for half in range(halves)]
        tail += [words[:, last - layout.tail_lanes : last] for last in ends]
    return full if layout.blocks else [], tail if layout.tail_groups else []


def word_activation(layout: WordLayout) -> tuple[Tensor, Tensor]:
    """How to lay out an activation for `masked_field`: x[columns] * factors, then split and reshaped.

    Returns:
        columns, int64 [activation_size]: the full blocks' part, then the tail's; places outside of a tail group have
        column `features`, which must read as 0.
        factors, float32 [activation_size]: `field_scale` of each place. Both on the CPU.
    """
    scales = torch.tensor([[layout.field_scale(k, q) for q in range(4)] for k in range(4)], device="cpu").unsqueeze(-1)
    whole, span = layout.blocks * BLOCK, layout.tail_groups * GRANULE // 4
    # [..., quarter, parity, half a quarter] -> [..., quarter, lane, byte] -> [..., quarter, byte, lane]
    full = torch.arange(whole, device="cpu").view(layout.blocks, 4, 2, GRANULE // 2).transpose(-1, -2)
    full = full.reshape(layout.blocks, 4, LANES, 4).transpose(-1, -2)
    word = torch.arange(layout.tail_lanes, device="cpu") - (layout.tail_lanes - span // 4)
    quarter, byte = torch.arange(4, device="cpu")[:, None, None], torch.arange(4, device="cpu")[:, None]
    place = 4 * word + byte
    column = span * quarter + place.div(2, rounding_mode="floor") + span // 2 * (place % 2)
    group = torch.where(word >= 0, column.div(GRANULE, rounding_mode="floor"), -1)
    tail = [torch.where(group == g, whole + column, layout.features) for g in range(layout.tail_groups)]
    columns = torch.cat([full.flatten(), *(part.flatten() for part in tail)])
    factors = [scales.expand(layout.block_shape).flatten(), scales.expand(layout.tail_shape).flatten()]
    return columns, torch.cat(factors)
