"""Ops: pure-torch references (also the CPU path), Triton kernels, and their registration."""

from bbb_ao.kernels.fake_quantize import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    decode_scale,
    dequantize,
    derive_scale,
    derive_zero_point,
    divide_by_scale,
    encode_scale,
    fake_quantize,
    fake_quantize_activation,
    floor_straight_through,
    group_range,
    power_of_two,
    quantize,
    quantize_activation,
    round_half_up,
    round_scale,
    round_zero_point,
    scale_exponent,
    slice_codes,
)
from bbb_ao.kernels.packed_linear import dequantize_packed, packed_linear
from bbb_ao.kernels.packed_linear_dynamic import packed_linear_dynamic
from bbb_ao.kernels.packing import pack_codes, pack_planes, unpack_codes, unpack_planes
from bbb_ao.kernels.packing.planes import BLOCK as PLANE_BLOCK

__all__ = [
    "EXPONENT_MAX",
    "EXPONENT_MIN",
    "PLANE_BLOCK",
    "decode_scale",
    "dequantize",
    "dequantize_packed",
    "derive_scale",
    "derive_zero_point",
    "divide_by_scale",
    "encode_scale",
    "fake_quantize",
    "fake_quantize_activation",
    "floor_straight_through",
    "group_range",
    "pack_codes",
    "pack_planes",
    "packed_linear",
    "packed_linear_dynamic",
    "power_of_two",
    "quantize",
    "quantize_activation",
    "round_half_up",
    "round_scale",
    "round_zero_point",
    "scale_exponent",
    "slice_codes",
    "unpack_codes",
    "unpack_planes",
]
