"""From a layer's input to the columns of its packed weight: gather by index, then dynamic quantization."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels.fake_quantize import fake_quantize_activation


def expand_input(x: Tensor, index: Tensor | None) -> Tensor:
    """x[..., index], with 0 where index == in_features; x itself without an index.

    Args:
        x: [..., in_features], floating point.
        index: int32 [K], each 0 to in_features, or None.
    Returns:
        [..., K], dtype of x.
    """
    if index is None:
        return x
    return F.pad(x, (0, 1)).index_select(-1, index)


def fake_quantize_input(
    x: Tensor, index: Tensor | None, in_features: int, bits: int, half_step: bool, group_size: int
) -> Tensor:
    """Quantize an expanded input per token and group of columns, and return the values that the codes stand for.

    Padding stays exactly 0, which is no level of the half-step grid: the weight's padding columns are not 0 there.

    Args:
        x: [..., K], floating point, expanded by `index`.
        index: int32 [K]; column k is padding where index[k] == in_features. None: no padding.
        bits: width of the codes, 2 to 8.
    Returns:
        [..., K], float32 (float64 if x is).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = x.to(dtype).unflatten(-1, (x.shape[-1] // group_size, group_size))
    quantized = fake_quantize_activation(groups, bits, half_step).flatten(-2)
    return quantized if index is None else quantized.masked_fill(index == in_features, 0.0)
