"""Launches of the fake quantization kernels: tensors in, tensors out, no autograd."""

# pyright: reportAttributeAccessIssue=false
# It does not see triton.knobs.

from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from bbb_ao.kernels.dependent_launch import dependent_launch
from bbb_ao.kernels.fake_quantize import row_kernel, triton_kernels
from bbb_ao.kernels.fake_quantize.reference import SCALE_UP_BITS

# Untyped: without Triton at hand, a type checker sees plain functions, which take no launch grid.
kernels: Any = triton_kernels
gathered_rows_kernel: Any = row_kernel.gathered_rows_kernel
# Elements of a program's tile, and its warps: 16 elements a thread, which the backward pass keeps in registers.
TILE = 2048
WARPS = 4
ROW_TILE = 16384  # elements of a token that one program of `gathered_rows_kernel` keeps in registers


class Settings(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        bits, parent_bits: width of the result and of the codes that it is a slice of.
        group_size: elements of the last dimension that share a scale.
        half_step: the half-step grid, else the integer grid.
        zero_point_bits: bits of a weight's rounded zero offset; 0 is the symmetric grid.
        e4m3: scales are rounded to E4M3 with a second level for each row.
        activation: every row (token) has a second level of its own and an unrounded zero offset; else a weight.
        detach: closed-form scales pass no gradient.
        padding: trailing columns of every row whose result and gradient are 0 (activations alone).
    """

    bits: int
    parent_bits: int
    group_size: int
    half_step: bool
    zero_point_bits: int
    e4m3: bool
    activation: bool = False
    detach: bool = False
    padding: int = 0


def row_count(x: Tensor, settings: Settings) -> int:
    """Parts of x with a second level of their own: the tokens of an activation, one for a weight."""
    return x.numel() // x.shape[-1] if settings.activation else 1


def _arguments(x: Tensor, settings: Settings) -> tuple[tuple[int], dict[str, int], dict[str, Any]]:
    """(launch grid, sizes, compile-time constants)."""
    columns = triton.next_power_of_2(settings.group_size)
    block = max(1, TILE // columns)
    rows = row_count(x, settings)
    groups = x.numel() // settings.group_size // rows
    tiles = triton.cdiv(groups, block)
    unit = settings.bits if settings.activation else 2
    span = 2.0**unit if settings.half_step else 2.0**unit - (1.0 if settings.activation else 0.5)
    constants = {
        "BITS": settings.bits,
        "PARENT": settings.parent_bits,
        "UNIT": unit,
        "SPAN": span,
        "HALF": settings.half_step,
        "SYMMETRIC": settings.half_step and settings.zero_point_bits == 0 and not settings.activation,
        "ZERO_LEVELS": 2**settings.zero_point_bits,
        "E4M3": settings.e4m3,
        "UP": settings.activation and settings.bits >= SCALE_UP_BITS,
        "ACTIVATION": settings.activation,
        "PADDED": settings.padding > 0,
        "GROUP": settings.group_size,
        "COLUMNS": columns,
        "BLOCK": block,
        # Fused multiply-adds round once where the reference rounds twice.
        "enable_fp_fusion": False,
        "num_warps": WARPS,
    }
    return (rows * tiles,), {"groups": groups, "tiles": tiles, "kept": x.shape[-1] - settings.padding}, constants


def _about_scale(scale: Tensor | None, settings: Settings) -> dict[str, bool]:
    """Whether the scale is given, and whether quotients by it take the short way (not where the fma is inexact)."""
    short = scale is None and settings.e4m3 and not triton.knobs.runtime.interpret
    return {"GIVEN": scale is not None, "SHORT": short}


def largest_scales(x: Tensor, settings: Settings) -> Tensor:
    """Bits of each row's largest closed-form scale before rounding: int32 [rows]; zeros without `e4m3`."""
    largest = torch.zeros(row_count(x, settings), dtype=torch.int32, device=x.device)
    if settings.e4m3 and x.numel():
        grid, sizes, constants = _arguments(x, settings)
        named = (
            "SPAN",
            "HALF",
            "SYMMETRIC",
            "ACTIVATION",
            "GROUP",
            "COLUMNS",
            "BLOCK",
            "enable_fp_fusion",
            "num_warps",
        )
        kernels.largest_scale_kernel[grid](
            x, largest, sizes["groups"], sizes["tiles"], **{name: constants[name] for name in named}
        )
    return largest


def forward(
    x: Tensor, largest: Tensor, scale: Tensor | None, zero_point: Tensor | None, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """x fake-quantized, in `dtype`; scale and zero_point are given (float32, one a group) or None: closed form.

    Args:
        x: contiguous, the last dimension divisible by the group size; a weight counts as one row.
        largest: from `largest_scales`; not read where the scale is given.
    """
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        grid, sizes, constants = _arguments(x, settings)
        constants |= _about_scale(scale, settings)
        # A pointer that is never read still needs an address.
        operands = (x, out, largest, x if scale is None else scale, x if zero_point is None else zero_point)
        kernels.forward_kernel[grid](*operands, **sizes, **constants)
    return out


def gathered_rows(
    x: Tensor, index: Tensor | None, bits: int, half_step: bool, group_size: int, programs: int = 1
) -> Tensor:
    """Activations gathered by `index` and fake-quantized, in one launch.

    Args:
        x: [M, in_features], contiguous, at most 32 bits an element.
        index: int32 [K], in_features for padding, which stays 0; None: x has K columns. group_size divides K.
        programs: a power of two; about so many share the tokens, one or more for each.
    Returns:
        [M, K], computed in float32 and rounded to x's dtype.
    """
    features = x.shape[1] if index is None else index.shape[0]
    out = x.new_empty(x.shape[0], features)
    if out.numel():
        groups, columns = features // group_size, triton.next_power_of_2(group_size)
        block = min(triton.next_power_of_2(groups), max(1, ROW_TILE // columns))
        part = max(1, min(block, triton.next_power_of_2(groups * x.shape[0]) // programs))
        # Fewer elements for each thread where most of them are only read.
        elements = 512 if part == block else 256
        gathered_rows_kernel[(x.shape[0], triton.cdiv(groups, part))](
            x,
            x if index is None else index,
            out,
            x.shape[1],
            groups,
            BITS=bits,
            SPAN=2.0**bits if half_step else 2.0**bits - 1.0,
            HALF=half_step,
            UP=bits >= SCALE_UP_BITS,
            SHORT=not triton.knobs.runtime.interpret,
            INDEXED=index is not None,
            GROUP=group_size,
            COLUMNS=columns,
            BLOCK=block,
            PART=part,
            WHOLE=part >= groups,
            enable_fp_fusion=False,
            num_warps=max(WARPS, min(16, block * columns // elements)),
            **dependent_launch(x.device),
        )
    return out


def backward(
    gradient: Tensor, x: Tensor, largest: Tensor, scale: Tensor | None, zero_point: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients for x (its dtype) and, where they are given, for scale and zero_point (float32)."""
    out = torch.empty_like(x)
    scale_out = None if scale is None else torch.empty_like(scale)
    zero_out = None if zero_point is None else torch.empty_like(zero_point)
    if x.numel():
        grid, sizes, constants = _arguments(x, settings)
        constants |= _about_scale(scale, settings) | {"DETACH": settings.detach}
        read = [x if tensor is None else tensor for tensor in (scale, zero_point)]
        written = [out if tensor is None else tensor for tensor in (scale_out, zero_out)]
        kernels.backward_kernel[grid](gradient, x, out, largest, *read, *written, **sizes, **constants)
    return out, scale_out, zero_out
