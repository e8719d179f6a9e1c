"""Dynamic fake quantization of activations."""

import torch
from torch import Tensor

from bbb_ao.grid import check_bits
from bbb_ao.kernels import fake_quantize_tokens


def fake_quantize_activation(
    x: Tensor,
    bits: int,
    group_size: int = 32,
    kind: str = "half_step",
    padding: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Activations as their `bits`-wide codes will be dequantized: one scale for each token and group.

    Equations in `kernels.quantize_activation`; the scale is E4M3 times a power of two for each token.

    Args:
        x: [..., features], floating point; group_size divides features.
        kind: "half_step" or "integer".
        padding: trailing features that are padding; they stay zero (zero is no level of the half-step grid).
        dtype: of the result; None takes x's.
    Returns:
        activations of the same shape, computed in float32 (float64 for float64).
    Raises:
        ValueError: bits, or features that group_size does not divide.
    Gradient: straight through inside the range of a group; through its minimum and maximum.
    """
    check_bits(bits, "act_bits")
    features = x.shape[-1]
    if features % group_size:
        raise ValueError(f"group_size must divide the activation's features: {group_size} does not divide {features}")
    return fake_quantize_tokens(x, bits, kind == "half_step", group_size, padding, dtype)
