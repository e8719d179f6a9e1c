"""The weight grid: its settings, and quantization of whole weight matrices on it."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbb_ao.errors import NumericsError
from bbb_ao.kernels import (
    decode_scale,
    dequantize,
    derive_scale,
    encode_scale,
    fake_quantize_closed_form,
    fake_quantize_given,
    quantize,
    round_scale,
    round_zero_point,
    scale_exponent,
    slice_codes,
)

KINDS = ("half_step", "integer")
SCALE_FORMATS = ("e4m3", "float32")


@dataclass(frozen=True)
class Grid:
    """Settings of the nested weight grid (design.md, section 2.9; equations in kernels/fake_quantize/reference.py).

    Attributes:
        kind: "half_step" (levels in the middle of the steps; slices are plain shifts) or "integer" (levels on the
            steps; slices are rounded and clamped).
        group_size: weights along in_features that share a scale and a zero point; a multiple of 32.
        zero_point_bits: bits of the stored zero offset, 0 (symmetric, half_step only) to 8; 2 on the integer grid.
        scale_format: "e4m3" (8 bits and one power of two a tensor) or "float32" (for studies; cannot be packed).
        parent_bits: width of the stored code that narrower ones are slices of, 2 to 8.
        act_kind: kind of the activations' grid; None takes that of the weights.
    """

    kind: str = "half_step"
    group_size: int = 32
    zero_point_bits: int = 4
    scale_format: str = "e4m3"
    parent_bits: int = 8
    act_kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"grid kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.act_kind not in (None, *KINDS):
            raise ValueError(f"act_kind: expected one of {', '.join(KINDS)} or None, got {self.act_kind!r}")
        if self.scale_format not in SCALE_FORMATS:
            raise ValueError(f"scale_format: expected one of {', '.join(SCALE_FORMATS)}, got {self.scale_format!r}")
        if self.group_size < 32 or self.group_size % 32:
            raise ValueError(
                f"group_size: expected a positive multiple of 32, got {self.group_size}; use 32, 64 or 128"
            )
        if not 2 <= self.parent_bits <= 8:
            raise ValueError(f"parent_bits: expected 2 to 8, got {self.parent_bits}")
        if self.half_step and not 0 <= self.zero_point_bits <= 8:
            raise ValueError(f"zero_point_bits: expected 0 to 8, got {self.zero_point_bits}")
        if not self.half_step and self.zero_point_bits != 2:
            raise ValueError(f"zero_point_bits: the integer grid has 2, got {self.zero_point_bits}; use 2")

    @property
    def half_step(self) -> bool:
        return self.kind == "half_step"

    @property
    def activation_kind(self) -> str:
        """Kind of the activations' grid."""
        return self.act_kind or self.kind

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class QuantizedWeight(NamedTuple):
    """A weight in parent codes.

    codes: [out_features, in_features], uint8; scale: [out_features, in_features // group_size], uint8 E4M3 patterns;
    scale_exponent: int32 scalar; zero_point: like scale, uint8 whole multiples of 4 / 2**zero_point_bits, or None
    where the grid is symmetric.
    """

    codes: Tensor
    scale: Tensor
    scale_exponent: Tensor
    zero_point: Tensor | None


def check_bits(bits: int, what: str = "bits", lowest: int = 2) -> int:
    """`bits` if it is a whole number from `lowest` to 8, else a ValueError that names `what`."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not lowest <= bits <= 8:
        raise ValueError(f"{what}: expected a whole number from {lowest} to 8, got {bits!r}")
    return bits


def check_groups(weight: Tensor, group_size: int) -> None:
    """Refuse, with a ValueError, what is no matrix of whole groups."""
    if weight.dim() != 2 or weight.shape[1] % group_size:
        raise ValueError(
            f"group_size must divide in_features of a matrix: {group_size} against shape {tuple(weight.shape)}; "
            "pad in_features with zeros first"
        )


def group(weight: Tensor, group_size: int) -> Tensor:
    """[out_features, in_features] -> [out_features, in_features // group_size, group_size], a view where possible."""
    check_groups(weight, group_size)
    return weight.unflatten(1, (-1, group_size))


def scale_and_zero_point(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero offset of each group in closed form; see `kernels.derive_scale`.

    Args:
        weight: [out_features, in_features], floating point.
    Returns:
        (scale, zero_point), both [out_features, in_features // group_size], in units of the 2-bit grid; float32
        (float64 for float64), since 16-bit types cannot hold the offsets of wide codes.
    """
    groups = group(weight if weight.element_size() >= 4 else weight.float(), grid.group_size)
    return derive_scale(groups, grid.half_step, grid.zero_point_bits, grid.scale_format == "e4m3")


def round_learned(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Learned scale and zero offset as they will be stored, with straight-through gradients.

    Negative scales count as their magnitude. Both are [out_features, groups], floating point.
    """
    scale = scale.abs()
    if grid.scale_format == "e4m3":
        scale = round_scale(scale, scale_exponent(scale.amax()))
    if grid.half_step and grid.zero_point_bits == 0:
        return scale, torch.full_like(scale, 2.0)
    return scale, round_zero_point(zero_point, grid.zero_point_bits)


def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bits: int,
    grid: Grid,
    *,
    detach_scales: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight as its `bits`-wide slice will be dequantized, with a straight-through gradient.

    Args:
        weight: [out_features, in_features].
        scale, zero_point: [out_features, groups], already rounded; None for both takes `scale_and_zero_point(weight)`.
        detach_scales: scales in closed form pass no gradient.
        dtype: of the result; None takes weight's.
    Returns:
        weights of the same shape.
    """
    check_groups(weight, grid.group_size)
    kind, size, parent = grid.half_step, grid.group_size, grid.parent_bits
    if scale is None or zero_point is None:
        e4m3 = grid.scale_format == "e4m3"
        return fake_quantize_closed_form(
            weight, bits, kind, grid.zero_point_bits, e4m3, size, parent, detach_scales, dtype
        )
    return fake_quantize_given(weight, scale, zero_point, bits, kind, size, parent, dtype)


def quantize_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> QuantizedWeight:
    """Parent codes and stored scales of a weight; `scale` and `zero_point` as from `scale_and_zero_point`.

    Raises:
        ValueError: the grid keeps float32 scales, which have no stored form.
        NumericsError: NaN or infinity, for which there is no code.
    """
    if grid.scale_format != "e4m3":
        raise ValueError("scale_format: packing needs e4m3 scales, got float32; quantize with scale_format='e4m3'")
    for what, tensor in (("weight", weight), ("scale", scale), ("zero_point", zero_point)):
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise NumericsError(f"{what}: expected finite values, got {bad} NaN or infinite; lower the learning rate")
    groups = group(weight, grid.group_size)
    codes = quantize(groups, scale, zero_point, grid.half_step, grid.parent_bits).flatten(1)
    # Codes of a narrower parent are the top bits of the stored 8-bit code.
    codes = codes.to(torch.uint8) << (8 - grid.parent_bits)
    exponent = scale_exponent(scale.amax())
    stored_zero = None
    if grid.zero_point_bits:
        stored_zero = (zero_point * (2**grid.zero_point_bits / 4)).round().to(torch.uint8)
    return QuantizedWeight(codes, encode_scale(scale, exponent), exponent, stored_zero)


def dequantize_weight(quantized: QuantizedWeight, bits: int, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """w_r of the stored codes at width `bits`: [out_features, in_features], `dtype` (float32 or float64)."""
    scale = decode_scale(quantized.scale, quantized.scale_exponent, dtype)
    if quantized.zero_point is None:
        zero_point = torch.full_like(scale, 2.0)
    else:
        zero_point = quantized.zero_point.to(dtype) * (4 / 2**grid.zero_point_bits)
    codes = slice_codes(group(quantized.codes, grid.group_size), bits, grid.half_step)
    return dequantize(codes, scale, zero_point, bits, grid.half_step).flatten(1)
