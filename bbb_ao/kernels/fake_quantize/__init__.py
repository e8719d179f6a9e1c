"""Fake quantization of weights and activations: the arithmetic of the grid."""

from bbb_ao.kernels.fake_quantize.dispatch import (
    fake_quantize_closed_form,
    fake_quantize_given,
    fake_quantize_tokens,
)
from bbb_ao.kernels.fake_quantize.reference import (
    dequantize,
    derive_scale,
    derive_zero_point,
    divide_by_scale,
    fake_quantize,
    fake_quantize_activation,
    floor_straight_through,
    group_range,
    quantize,
    quantize_activation,
    round_half_up,
    round_zero_point,
    slice_codes,
)
from bbb_ao.kernels.fake_quantize.scales import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    decode_scale,
    encode_scale,
    power_of_two,
    round_scale,
    scale_exponent,
)

__all__ = [
    "EXPONENT_MAX",
    "EXPONENT_MIN",
    "decode_scale",
    "dequantize",
    "derive_scale",
    "derive_zero_point",
    "divide_by_scale",
    "encode_scale",
    "fake_quantize",
    "fake_quantize_activation",
    "fake_quantize_closed_form",
    "fake_quantize_given",
    "fake_quantize_tokens",
    "floor_straight_through",
    "group_range",
    "power_of_two",
    "quantize",
    "quantize_activation",
    "round_half_up",
    "round_scale",
    "round_zero_point",
    "scale_exponent",
    "slice_codes",
]
