"""torch.ops.bbb_ao.prepare_row: what a one-row product does to its activation, kept opaque to Inductor.

Inductor would otherwise repeat the gather for every output. Between two products the caches are full of weights, so
that every call into torch counts: there are few here, and the op is registered without the wrapper of `custom_op`.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels.packed_row.inputs import expand_input, fake_quantize_input
from bbb_ao.kernels.packing.planes import BLOCK, GRANULE
from bbb_ao.kernels.packing.words import LANES, WordLayout, word_activation

torch.library.define(
    "bbb_ao::prepare_row",
    "(Tensor x, Tensor? index, int features, int bits, int? act_bits, bool act_half_step) -> (Tensor, Tensor)",
)


@torch.library.impl("bbb_ao::prepare_row", "cpu")
def _prepare_row(
    x: Tensor, index: Tensor | None, features: int, bits: int, act_bits: int | None, act_half_step: bool
) -> tuple[Tensor, Tensor]:
    """Gather, quantize (with act_bits), lay out for `WordLayout.masked_field`, and sum over groups.

    Args:
        x: [..., in_features] with one row, floating point.
        index: int32 [features] or None, as in `packed_linear`.
        features: columns of the weight, K.
        bits: width of the weight, 2, 4 or 8.
        act_bits: width of the activation, None to leave it as it is.
    Returns:
        activation: float32 [activation_size], as `word_activation` lays it out.
        sums: float32, sums over each group of the full blocks in eight parts, [K // 128, 4, 8], then over each group of
            the tail, [tail_groups]; one row of both where there is a tail.
    """
    columns, factors, whole = _gather_plan(features, bits)
    row = expand_input(x.reshape(-1), index)
    if act_bits is not None:
        row = fake_quantize_input(row, index, x.shape[-1], act_bits, act_half_step, GRANULE)
    if whole == features:
        sums = row.view(-1, GRANULE // LANES, LANES).sum(1, dtype=torch.float32)
    else:
        full = row[:whole].view(-1, GRANULE // LANES, LANES).sum(1, dtype=torch.float32)
        sums = torch.cat([full.flatten(), row[whole:].view(-1, GRANULE).sum(1, dtype=torch.float32)])
        row = F.pad(row, (0, 1))
    return row.index_select(0, columns) * factors, sums


@lru_cache(maxsize=64)
def _gather_plan(features: int, bits: int) -> tuple[Tensor, Tensor, int]:
    """(columns, factors) of `word_activation`, and the columns in full blocks."""
    layout = WordLayout(bits, features)
    return *word_activation(layout), layout.blocks * BLOCK


@torch.library.register_fake("bbb_ao::prepare_row")
def _(
    x: Tensor, index: Tensor | None, features: int, bits: int, act_bits: int | None, act_half_step: bool
) -> tuple[Tensor, Tensor]:
    layout = WordLayout(bits, features)
    groups = layout.blocks * 4
    sums = (groups * LANES + layout.tail_groups,) if layout.tail_groups else (groups, LANES)
    return x.new_empty(layout.activation_size, dtype=torch.float32), x.new_empty(sums, dtype=torch.float32)


prepare_row = torch.ops.bbb_ao.prepare_row.default
