"""Which implementation runs for a packed layer on a device, and what keeps a faster one from running.

The rules are those of `kernels.packed_linear.cuda` and `kernels.packed_row`; here they are only asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bbb_ao.grid import Grid
from bbb_ao.kernels.packed_row.linear import fits_row_path

ROW_COUNTS = (1, 8, 16, 256)


@dataclass(frozen=True)
class LayerKind:
    """What the choice depends on: stored sizes, widths, grid, and the type of the activations."""

    out_features: int
    stored_features: int
    bits: int
    max_bits: int
    act_bits: int | None
    grid: Grid
    dtype: torch.dtype

    def planes(self, bits: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Planes of codes of `bits` bits without memory."""
        high = torch.empty(self.out_features, self.stored_features // 4, dtype=torch.uint8, device="meta")
        low = torch.empty(self.out_features, self.stored_features // 2, dtype=torch.uint8, device="meta")
        return high, torch.empty_like(high) if bits > 2 else None, low if bits > 4 else None


def gpu_route(kind: LayerKind, rows: int, capability: tuple[int, int]) -> tuple[str, str]:
    """(kernel, what keeps a faster one from running or "") on an NVIDIA GPU; needs Triton.

    Raises:
        ImportError: Triton is missing or too old.
    """
    from bbb_ao.kernels.packed_linear.cuda import fits_kernels, kernel_for

    grid = kind.grid
    fits = _fits_gpu(fits_kernels, kind, capability)
    if fits:
        return kernel_for(rows, kind.bits, True, capability), ""
    fitting = LayerKind(128, 128, kind.max_bits, kind.max_bits, None, Grid(), torch.bfloat16)
    # Each property of the layer alone, in a layer that fits otherwise.
    probes: tuple[tuple[str, dict[str, Any]], ...] = (
        (f"x is {str(kind.dtype).removeprefix('torch.')}", {"dtype": kind.dtype}),
        (
            f"groups of {grid.group_size}",
            {"grid": Grid(group_size=grid.group_size), "stored_features": 128 * grid.group_size},
        ),
        (f"{kind.stored_features} columns are no multiple of 128", {"stored_features": kind.stored_features}),
        (f"{grid.zero_point_bits}-bit zero points", {"grid": Grid(zero_point_bits=grid.zero_point_bits)}),
        (f"{kind.bits} of {kind.max_bits} bits are rounded", {"grid": Grid(grid.kind, 32, 2), "bits": kind.bits}),
    )
    reasons = [words for words, change in probes if not _fits_gpu(fits_kernels, replace(fitting, **change), (9, 0))]
    if capability < (8, 9):
        reasons.append(f"compute capability {capability[0]}.{capability[1]}")
    return "dequantize", ", ".join(reasons)


def _fits_gpu(rule: Callable[..., bool], kind: LayerKind, capability: tuple[int, int]) -> bool:
    settings = (kind.bits, kind.grid.zero_point_bits, kind.grid.half_step, kind.grid.group_size)
    groups = kind.stored_features // kind.grid.group_size
    scale = torch.empty(kind.out_features, groups, dtype=torch.uint8, device="meta")
    scales = (scale, scale, scale if kind.grid.zero_point_bits else None)
    return rule(kind.dtype, kind.planes(kind.max_bits), scales, settings, capability)


def cpu_route(kind: LayerKind, rows: int) -> tuple[str, str]:
    """(implementation under torch.compile, what keeps the fused row from running or "") on a CPU."""
    grid = kind.grid
    x = torch.empty(rows, kind.stored_features, dtype=kind.dtype)
    settings = (kind.bits, grid.zero_point_bits, grid.half_step, grid.group_size)
    if fits_row_path(x, *kind.planes(kind.max_bits), *settings):
        return "fused row", ""
    if rows > 1:
        return "dequantize", ""
    reasons = [
        words
        for words, holds in (
            (f"{kind.bits} bits (not 2, 4 or 8)", kind.bits in (2, 4, 8)),
            (f"groups of {grid.group_size}", grid.group_size == 32),
            (f"{grid.zero_point_bits}-bit zero points", grid.zero_point_bits in (0, 2, 4, 8)),
            (f"{kind.bits} of {kind.max_bits} bits are rounded", grid.half_step or kind.bits == kind.max_bits),
        )
        if not holds
    ]
    return "dequantize", ", ".join(reasons)
