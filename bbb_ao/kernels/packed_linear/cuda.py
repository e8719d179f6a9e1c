"""The packed linear layer on an NVIDIA GPU: which kernel runs.

The rule, with M rows of x:

- `decode` for M of 1 or 2;
- `few_rows` for M up to FEW_ROWS;
- `warpgroup` on compute capability 9.0, for M up to DENSE_ROWS where codes have more than four bits;
- else the weight is dequantized once, by `dequantize`, and multiplied by the library.

The first three take bfloat16 or float16 x, groups of 32, a multiple of 128 stored columns, zero offsets of 0, 2, 4 or 8
bits, contiguous planes, scales and zero offsets, planes at an address that 16 divides, and slices that need no rounding
(the half-step grid, or every stored bit); other layers always take the last way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels.packed_linear.dequantize import ZERO_POINT_WIDTHS, dequantize_dense
from bbb_ao.kernels.packed_linear.launch import decode_linear, few_rows_linear, warpgroup_linear
from bbb_ao.kernels.packed_linear.reference import check_input, check_weight, dequantize_packed
from bbb_ao.kernels.packed_row import expand_input
from bbb_ao.kernels.packing.planes import BLOCK, GRANULE, stored_bits

ALIGNMENT = 16  # bytes, of what is copied in whole tiles
DECODE_ROWS = 2
FEW_ROWS = 8
DENSE_ROWS = 1024


def packed_linear_cuda(
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
    group_size: int,
) -> Tensor:
    """See `packed_linear`."""
    check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
    check_input(x, index, scale.shape[-1] * group_size)
    planes, scales = (high, mid, low), (scale, scale_exponent, zero_point)
    return multiply(x, planes, scales, index, bias, (bits, zero_point_bits, half_step, group_size))


def multiply(
    x: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
) -> Tensor:
    """`packed_linear_cuda` on operands that were checked."""
    high = planes[0]
    rows = aligned_rows(x)
    shape = (*x.shape[:-1], high.shape[0])
    capability = torch.cuda.get_device_capability(x.device)
    fits = fits_kernels(x.dtype, planes, scales, settings, capability)
    kernel = kernel_for(rows.shape[0] if high.shape[0] else 0, settings[0], fits, capability)
    if kernel == "decode":
        return decode_linear(rows, planes, scales, index, bias, settings).view(shape)
    if kernel == "few_rows":
        return few_rows_linear(rows, planes, scales, index, bias, settings).view(shape)
    if kernel == "warpgroup":
        return warpgroup_linear(expand_input(rows, index), planes, scales, bias, settings).view(shape)
    return dequantized_linear(x, planes, scales, index, bias, settings)


def aligned_rows(x: Tensor) -> Tensor:
    """x as [rows, in_features], contiguous, at an address that kernels can read whole tiles from."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows if rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


def runs_decode_once(
    x: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    settings: tuple[int, int, bool, int],
) -> bool:
    """Whether x, [..., in_features], has one or two rows and `decode` takes this layer."""
    capability = torch.cuda.get_device_capability(x.device)
    rows = x.numel() // max(1, x.shape[-1])
    return (
        0 < rows <= DECODE_ROWS
        and planes[0].shape[0] > 0
        and fits_kernels(x.dtype, planes, scales, settings, capability)
    )


def kernel_for(rows: int, bits: int, fits: bool, capability: tuple[int, int]) -> str:
    """Which of decode, few_rows, warpgroup and dequantize runs for so many rows of x and bits; the rule stands above.

    Args:
        fits: as from `fits_kernels`.
    """
    if not fits or not rows:
        return "dequantize"
    if rows <= FEW_ROWS:
        return "decode" if rows <= DECODE_ROWS else "few_rows"
    return "warpgroup" if capability == (9, 0) and (bits <= 4 or rows <= DENSE_ROWS) else "dequantize"


def fits_kernels(
    dtype: torch.dtype,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    settings: tuple[int, int, bool, int],
    capability: tuple[int, int],
) -> bool:
    """Whether `decode`, `few_rows` and `warpgroup` take this layer; the rule stands above."""
    bits, zero_point_bits, half_step, group_size = settings
    scale, _, zero_point = scales
    features = scale.shape[1] * group_size
    return (
        dtype in (torch.bfloat16, torch.float16)
        and group_size == GRANULE
        and features > 0
        and features % BLOCK == 0
        and zero_point_bits in (0, 2, 4, 8)
        and (half_step or bits >= stored_bits(*planes[1:]))
        and all(plane is None or (plane.is_contiguous() and plane.data_ptr() % ALIGNMENT == 0) for plane in planes)
        # Those of a block are read as one word.
        and scale.is_contiguous()
        and scale.data_ptr() % 4 == 0
        and (zero_point is None or zero_point.is_contiguous())
        and (zero_point is None or zero_point.data_ptr() % max(1, zero_point_bits // 2) == 0)
        and capability >= (8, 9)
    )


def dequantized_linear(
    x: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
) -> Tensor:
    """The weight dequantized once, then the library's product."""
    if x.dtype == torch.float64 or settings[1] not in ZERO_POINT_WIDTHS:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight = dequantize_packed(*planes, *scales, *settings, dtype).to(x.dtype)
    else:
        contiguous = [plane if plane is None else plane.contiguous() for plane in (*planes, *scales)]
        weight = dequantize_dense(*contiguous, *settings, x.dtype)  # type: ignore[arg-type]
    return F.linear(expand_input(x, index), weight, bias)
