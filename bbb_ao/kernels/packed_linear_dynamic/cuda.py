"""The packed linear layer with quantized activations on an NVIDIA GPU.

The rule, for activations of at most 32 bits:

- one row of a layer that fits the kernels of `packed_linear.cuda` takes `decode`, which quantizes it and multiplies
  integers;
- else one kernel gathers the rows and fake-quantizes them, and `packed_linear.cuda` multiplies.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Triton types a launch as a call of the Python function.

import torch
import triton
from torch import Tensor

from bbb_ao.kernels.dependent_launch import dependent_launch
from bbb_ao.kernels.fake_quantize.launch import gathered_rows
from bbb_ao.kernels.packed_linear.cuda import FEW_ROWS, aligned_rows, fits_kernels, multiply
from bbb_ao.kernels.packed_linear.launch import row_arguments
from bbb_ao.kernels.packed_linear.reference import check_input, check_weight
from bbb_ao.kernels.packed_linear.tuning import Settings, settings_for
from bbb_ao.kernels.packed_linear_dynamic.decode import dynamic_decode_kernel
from bbb_ao.kernels.packed_linear_dynamic.reference import packed_linear_dynamic_reference
from bbb_ao.kernels.packing.planes import BLOCK

# As for `decode_linear`.
DECODE_SETTINGS: list[Settings] = [
    (1, 8, 0, 1),
    (1, 8, 96, 1),
    (1, 8, 128, 1),
    (2, 8, 0, 2),
    (2, 8, 168, 2),
    (3, 4, 168, 3),
    (4, 8, 168, 4),
    (1, 4, 0, 1),
    (2, 4, 0, 1),
    (1, 16, 0, 1),
]
# Programs that quantize rows; before `few_rows`, whose programs need a whole multiprocessor, one for each row.
SPREAD = 128
UNROLLED = 8  # tiles times turns over the columns in one program, at most: more take long to compile


def packed_linear_dynamic_cuda(
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
    act_bits: int,
    act_half_step: bool,
) -> Tensor:
    """See `packed_linear_dynamic`."""
    check_weight(high, mid, low, scale, zero_point, bits, zero_point_bits, group_size)
    check_input(x, index, scale.shape[-1] * group_size)
    planes, scales = (high, mid, low), (scale, scale_exponent, zero_point)
    settings = (bits, zero_point_bits, half_step, group_size)
    act_settings = (act_bits, act_half_step)
    if x.dtype == torch.float64:
        return packed_linear_dynamic_reference(x, *planes, *scales, index, bias, *settings, *act_settings)
    rows = aligned_rows(x)
    shape = (*x.shape[:-1], high.shape[0])
    if rows.shape[0] == 1 and high.shape[0]:
        capability = torch.cuda.get_device_capability(x.device)
        if fits_kernels(x.dtype, planes, scales, settings, capability):
            return dynamic_decode(rows, planes, scales, index, bias, settings, act_settings).view(shape)
    with torch.cuda.device_of(x):
        programs = 1 if rows.shape[0] <= FEW_ROWS else SPREAD
        quantized = gathered_rows(rows, index, act_bits, act_half_step, group_size, programs)
    return multiply(quantized, planes, scales, None, bias, settings).view(shape)


def dynamic_decode(
    row: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
    act_settings: tuple[int, bool],
) -> Tensor:
    """One row, [1, in_features] contiguous, through `dynamic_decode_kernel`: [1, out_features]."""
    features, count = planes[0].shape[1] * 4, planes[0].shape[0]
    y = row.new_empty(1, count)
    arguments, constants = row_arguments(row, planes, scales, index, bias, settings, y)

    def run(choice: Settings) -> None:
        tiles, warps, registers, ahead = choice
        dynamic_decode_kernel[(triton.cdiv(count, 16 * tiles),)](
            *arguments,
            **constants,
            ACT_BITS=act_settings[0],
            ACT_HALF=act_settings[1],
            TILES=tiles,
            WARPS=warps,
            AHEAD=ahead,
            num_warps=warps,
            **dependent_launch(row.device),
            **({"maxnreg": registers} if registers else {}),
        )

    turns = {warps: triton.cdiv(features, 4 * BLOCK * warps) for _, warps, _, _ in DECODE_SETTINGS}
    candidates = [each for each in DECODE_SETTINGS if each[0] * turns[each[1]] <= UNROLLED] or [(1, 16, 0, 1)]
    key = f"dynamic decode {count}x{features} {constants['R']} bits"
    with torch.cuda.device(row.device):
        run(settings_for(key, candidates, run, row.get_device()))
    return y
