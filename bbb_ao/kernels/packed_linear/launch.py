"""Launches of the Gluon kernels that multiply by a packed weight, with the settings to choose from.

Each function takes checked operands that fit its kernel (`cuda.fits_kernels`): planes (high, mid, low), scales (scale,
exponent, zero offsets) and settings (bits, zero_point_bits, half_step, group_size), as `packed_linear` has them.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Triton types a launch as a call of the Python function.

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bbb_ao.kernels.dependent_launch import dependent_launch
from bbb_ao.kernels.packed_linear.counts import lasting_counts
from bbb_ao.kernels.packed_linear.decode import decode_kernel
from bbb_ao.kernels.packed_linear.few_rows import few_rows_kernel
from bbb_ao.kernels.packed_linear.shared_tile import columns_turned
from bbb_ao.kernels.packed_linear.tuning import Settings, settings_for
from bbb_ao.kernels.packed_linear.warpgroup import matmul_kernel
from bbb_ao.kernels.packing.planes import BLOCK

GROUP_ROWS = 64  # of the weight in one of the two or three groups of warps of `matmul_kernel`
_GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROW_TILES = (16, 32, 64, 128, 256)
# Each has settings of its own; larger numbers of rows take those of the last.
ROW_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 4096)
# For each (row tile, groups of warps): programs that share a multiprocessor, and for that the registers of each thread
# at the start and of the warps that multiply.
PROGRAMS = {
    (16, 2): (3, 56, 72),
    (32, 2): (2, 80, 104),
    (64, 2): (2, 80, 104),
    (64, 3): (1, 128, 160),
    (128, 2): (1, 168, 240),
    (128, 3): (1, 128, 160),
    (256, 2): (1, 168, 240),
}
SHARED_BYTES = 227 * 1024
# At most, for so many groups of warps: barriers, what the groups are handed, and room to turn round pieces of a tile.
OTHER_BYTES = {2: 1024, 3: 10240}
# (tiles of 16 rows of the weight for each program, warps, registers for each thread or 0 to leave them to the compiler,
# parts of a tile, as many columns as the warps take at once, that are loaded ahead)
DECODE_SETTINGS: list[Settings] = [
    (1, 4, 0, 1),
    (1, 4, 96, 1),
    (1, 4, 128, 1),
    (1, 8, 0, 1),
    (1, 8, 96, 1),
    (1, 8, 128, 1),
    (1, 16, 0, 1),
    (2, 4, 0, 1),
    (2, 8, 0, 1),
    (2, 8, 168, 2),
]
# (tiles at a time, blocks side by side for each warp, warps, programs that share a multiprocessor)
FEW_ROWS_SETTINGS: list[Settings] = [
    (2, 2, 16, 1),
    (1, 2, 16, 1),
    (1, 4, 8, 1),
    (2, 4, 8, 1),
    (2, 1, 16, 1),
    (1, 4, 8, 2),
    (1, 2, 8, 2),
    (1, 1, 8, 2),
    (1, 4, 4, 3),
    (4, 2, 8, 1),
    (3, 2, 16, 1),
    (2, 1, 8, 2),
]
POLLS = 64  # for the other programs of a tile, a fraction of a microsecond each
REGISTERS = 65536  # of a multiprocessor


def kernel_codes(
    planes: tuple[Tensor, Tensor | None, Tensor | None], settings: tuple[int, int, bool, int]
) -> dict[str, float]:
    """Container of the codes, the bits of it that count, and half a step in its units."""
    bits, _, half_step, _ = settings
    container = next(width for width in (2, 4, 8) if width >= bits)
    mask = (2**bits - 1) << (container - bits)
    return {"R": container, "MASK": mask, "H": 2.0 ** (container - bits) / 2 if half_step else 0.0, "ZB": settings[1]}


def kernel_pointers(planes: tuple[Tensor, Tensor | None, Tensor | None], scales: tuple[Tensor, Tensor, Tensor | None]):
    """Kernel arguments, with some pointer in the place of what is absent and not read."""
    high, mid, low = planes
    scale, exponent, zero_point = scales
    return (
        high,
        high if mid is None else mid,
        high if low is None else low,
        scale,
        exponent,
        scale if zero_point is None else zero_point,
    )


def row_arguments(
    rows: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
    y: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(first arguments, constants) of a kernel that takes rows of x, [M, in_features], as they are."""
    pointers = kernel_pointers(planes, scales)
    others = (rows if index is None else index, rows if bias is None else bias)
    constants = {
        "NB": planes[0].shape[1] * 4 // BLOCK,
        **kernel_codes(planes, settings),
        "EXPONENTS": scales[1].dim() == 1,
        "INDEXED": index is not None,
        "BIASED": bias is not None,
    }
    return (rows, *pointers, *others, y, rows.shape[1], planes[0].shape[0]), constants


def decode_linear(
    rows: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
    name: str = "decode",
    kernel: Any = decode_kernel,
    y: Tensor | None = None,
    **more: object,
) -> Tensor:
    """One or two rows, [M, in_features] contiguous, through `decode_kernel`: [M, out_features].

    Args:
        name: of what is launched, among tuned settings.
        kernel: one that takes the arguments of `decode_kernel` and these `more`.
        y: where it writes, if not [M, out_features].
    """
    features, count = planes[0].shape[1] * 4, planes[0].shape[0]
    y = rows.new_empty(rows.shape[0], count) if y is None else y
    arguments, constants = row_arguments(rows, planes, scales, index, bias, settings, y)

    def run(choice: Settings) -> None:
        tiles, warps, registers, ahead = choice
        kernel[(triton.cdiv(count, 16 * tiles),)](
            *arguments,
            **constants,
            M=rows.shape[0],
            TILES=tiles,
            WARPS=warps,
            AHEAD=ahead,
            num_warps=warps,
            **dependent_launch(rows.device),
            **({"maxnreg": registers} if registers else {}),
            **more,
        )

    key = f"{name} {count}x{features} {constants['R']} bits, {rows.shape[0]} rows"
    with torch.cuda.device(rows.device):
        run(settings_for(key, DECODE_SETTINGS, run, rows.get_device()))
    return y


def few_rows_linear(
    rows: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
) -> Tensor:
    """Up to eight rows, [M, in_features] contiguous, through `few_rows_kernel`: [M, out_features]."""
    features, count = planes[0].shape[1] * 4, planes[0].shape[0]
    y = rows.new_empty(rows.shape[0], count)
    arguments, constants = row_arguments(rows, planes, scales, index, bias, settings, y)
    device = rows.get_device()

    def run(choice: Settings) -> None:
        tiles, span, warps, programs = choice
        few_rows_kernel[(min(triton.cdiv(count, 16 * tiles), programs * _multiprocessors(device)),)](
            *arguments,
            rows.shape[0],
            **constants,
            TILES=tiles,
            SPAN=span,
            WARPS=warps,
            num_warps=warps,
            maxnreg=min(255, REGISTERS // (programs * warps * 32) // 8 * 8),
            **dependent_launch(rows.device),
        )

    key = f"few rows {count}x{features} {constants['R']} bits"
    with torch.cuda.device(rows.device):
        run(settings_for(key, FEW_ROWS_SETTINGS, run, device))
    return y


def tile_count(rows: int, count: int, size: int, groups: int) -> int:
    """Tiles of `size` rows of x and as many rows of the weight, of `count`, as the groups of warps take."""
    return triton.cdiv(count, groups * GROUP_ROWS) * triton.cdiv(rows, size)


def tile_share(tiles: int, blocks: int, programs: int, step: int) -> int:
    """Blocks of 128 columns for each of so many programs (0: one for each tile), a multiple of `step`."""
    return triton.cdiv(tiles * blocks, (programs or tiles) * step) * step


def warpgroup_settings(rows: int, count: int, features: int, multiprocessors: int) -> list[Settings]:
    """Candidates (rows of x in a tile, programs or 0 for one of each tile, blocks at a time, groups of warps).

    The first is taken where none is measured.
    """
    fitting = [size for size in ROW_TILES if size < 2 * rows] or [ROW_TILES[0]]
    # The largest tiles decode a weight least often; smaller ones may fill the GPU better.
    sizes = fitting[-2:] if 32 < rows <= 1024 else fitting[-1:]
    blocks, choices = features // BLOCK, {}
    for size, groups in sorted(PROGRAMS, key=lambda each: (-each[0], each[1])):
        if size not in sizes:
            continue
        tiles = tile_count(rows, count, size, groups)
        shared = [n * multiprocessors for n in range(PROGRAMS[size, groups][0], 0, -1)]
        # As many for each tile, or as many tiles for each.
        whole = [n // tiles * tiles or triton.cdiv(tiles, triton.cdiv(tiles, n)) for n in shared]
        # Two blocks for each program at least.
        programs = [min(n, max(1, tiles * blocks // 2)) for n in (*shared, *whole)] + [0]
        steps = (2, 1) if size >= 64 and blocks % 2 == 0 else (1,)
        for n in programs:
            for step in steps:
                key = (size, tile_share(tiles, blocks, n, step), step, groups)
                choices.setdefault(key, (size, n, step, groups))
    return list(choices.values())


def pipeline_stages(size: int, groups: int, container: int, programs: int) -> int:
    """Blocks of activations and planes in a program's share of the shared memory, `programs` to a multiprocessor.

    So many fit there and no more: of a launch that starts early, programs would crowd where the first ones get free.
    """
    turned = groups * GROUP_ROWS * columns_turned(size) * 2  # where y is turned round before it is written
    block = size * 2 * BLOCK + groups * GROUP_ROWS * 32 * (container // 2)
    return max(2, (SHARED_BYTES // min(programs, PROGRAMS[size, groups][0]) - turned - OTHER_BYTES[groups]) // block)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def warpgroup_linear(
    columns: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    settings: tuple[int, int, bool, int],
) -> Tensor:
    """Any number of rows, [M, K] contiguous, through `matmul_kernel`: [M, out_features]."""
    rows, features = columns.shape
    count = planes[0].shape[0]
    device = columns.get_device()
    y = columns.new_empty(rows, count)
    codes = kernel_codes(planes, settings)
    pointers = kernel_pointers(planes, scales)

    words = [plane.view(torch.int16) for plane in pointers[:3]]
    word_layout = gl.NVMMASharedLayout.get_default_for([64, 16], gl.int16)
    words = [TensorDescriptor.from_tensor(plane, [64, 16], word_layout) for plane in words]

    def run(choice: Settings) -> None:
        size, programs, step, groups = choice
        _, most, registers = PROGRAMS[size, groups]
        layout = gl.NVMMASharedLayout.get_default_for([size, BLOCK], _GLUON_TYPES[columns.dtype])
        tiles, blocks = tile_count(rows, count, size, groups), features // BLOCK
        share = tile_share(tiles, blocks, programs, step)
        programs = triton.cdiv(tiles * blocks, share)
        split = share % blocks > 0
        matmul_kernel[(programs,)](
            TensorDescriptor.from_tensor(columns, [size, BLOCK], layout),
            *words,
            *pointers[3:],
            columns if bias is None else bias,
            y,
            columns.new_empty(programs * 2 * groups * GROUP_ROWS * size, dtype=torch.float32) if split else y,
            lasting_counts("warpgroup", groups * tiles, device) if split else y,
            rows,
            count,
            blocks,
            share,
            POLLS,
            **codes,
            EXPONENTS=scales[1].dim() == 1,
            BIASED=bias is not None,
            BM=size,
            STAGES=pipeline_stages(size, groups, int(codes["R"]), triton.cdiv(programs, _multiprocessors(device))),
            STEP=step,
            SPLIT=split,
            GROUPS=groups,
            REGISTERS=registers,
            num_warps=4,
            maxnreg=most,
            **dependent_launch(columns.device),
        )

    candidates = warpgroup_settings(rows, count, features, _multiprocessors(device))
    bucket = next((size for size in ROW_BUCKETS if size >= rows), ROW_BUCKETS[-1])
    key = f"matmul {count}x{features} {codes['R']} bits, {bucket} rows"
    with torch.cuda.device(columns.device):
        run(settings_for(key, candidates, run, device))
    return y
