"""The forward pass of activations for deployment: gather and fake quantization of each token in one launch.

The arithmetic is that of `triton_kernels`, values are the reference's bit for bit.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from bbb_ao.kernels.fake_quantize.triton_kernels import (
    _closed_form_zero,
    _quantize,
    _round_e4m3,
    _scale_exponent,
    _span_scale,
)


@triton.jit
def _gather(row_ptr, index_ptr, column, mask, in_features, INDEXED: tl.constexpr):
    """(row[index[column]] as float32, 0 where masked or padding; what is neither)."""
    if INDEXED:
        column = tl.load(index_ptr + column, mask=mask, other=in_features)
        mask = column < in_features
    return tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _write_activations(
    out_ptr,
    offsets,
    mask,
    x,
    present,
    exponent,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    HALF: tl.constexpr,
    UP: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Quantize a tile of groups of one token at its second level; 0 where not present."""
    low, high, scale, _ = _span_scale(x, SPAN, HALF, False, True)
    scale = _round_e4m3(scale, exponent, UP)
    zero, _ = _closed_form_zero(low, high, scale, BITS, HALF, False, 1, True)
    level, _, _, step = _quantize(x, scale, zero, BITS, BITS, BITS, HALF, SHORT)
    out = tl.where(present, level * step, 0.0)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["fresh"])
def gathered_rows_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    in_features,
    groups,
    fresh,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    HALF: tl.constexpr,
    UP: tl.constexpr,
    SHORT: tl.constexpr,
    INDEXED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A part of one token's activations, gathered by the index: out = step * level, 0 where the index says padding.

    Every program reads the whole row, BLOCK groups at a time, for its second level, and writes PART groups of it; with
    WHOLE these are all groups of the row. The index is read behind the wait: a layer whose input is padded computes it.
    """
    if PDL:
        if fresh != 0:
            gdc_wait()
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_ptr = x_ptr + row * in_features, out_ptr + row * groups * GROUP
    group, element = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    mask = (group < groups) & (element < GROUP)
    x, present = _gather(row_ptr, index_ptr, group * GROUP + element, mask, in_features, INDEXED)
    if WHOLE:
        own, own_mask, own_x, own_present = group, mask, x, present
    else:
        own = tl.program_id(1) * PART + tl.arange(0, PART)[:, None]
        own_mask = (own < groups) & (element < GROUP)
        own_x, own_present = _gather(row_ptr, index_ptr, own * GROUP + element, own_mask, in_features, INDEXED)
    _, _, largest, _ = _span_scale(x, SPAN, HALF, False, True)
    if not WHOLE:
        for first in range(BLOCK, groups, BLOCK):
            mask = (first + group < groups) & (element < GROUP)
            x, _ = _gather(row_ptr, index_ptr, (first + group) * GROUP + element, mask, in_features, INDEXED)
            _, _, scale, _ = _span_scale(x, SPAN, HALF, False, True)
            largest = tl.maximum(largest, scale)
    exponent = _scale_exponent(tl.max(largest, 0).to(tl.int32, bitcast=True))
    column = own * GROUP + element
    _write_activations(out_ptr, column, own_mask, own_x, own_present, exponent, BITS, SPAN, HALF, UP, SHORT)
