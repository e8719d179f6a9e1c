"""Dynamic fake quantization of activations."""

import torch.nn.functional as F
from torch import Tensor

from bbb_ao.grid import check_bits
from bbb_ao.kernels import fake_quantize_activation as fake_quantize_groups


def fake_quantize_activation(
    x: Tensor, bits: int, group_size: int = 32, kind: str = "half_step", padding: int = 0
) -> Tensor:
    """Activations as their `bits`-wide codes will be dequantized: one scale for each token and group.

    Equations in `kernels.quantize_activation`; the scale is E4M3 times a power of two for each token.

    Args:
        x: [..., features], floating point; group_size divides features.
        kind: "half_step" or "integer".
        padding: trailing features that are padding; they stay zero (zero is no level of the half-step grid).
    Returns:
        activations of the same shape and dtype, computed in float32 (float64 for float64).
    Raises:
        ValueError: bits, or features that group_size does not divide.
    Gradient: straight through inside the range of a group; through its minimum and maximum.
    """
    check_bits(bits, "act_bits")
    features = x.shape[-1]
    if features % group_size:
        raise ValueError(f"group_size must divide the activation's features: {group_size} does not divide {features}")
    compute = x if x.element_size() >= 4 else x.float()
    rounded = fake_quantize_groups(compute.unflatten(-1, (-1, group_size)), bits, kind == "half_step").flatten(-2)
    if padding:
        rounded = F.pad(rounded[..., : features - padding], (0, padding))
    return rounded.to(x.dtype)
