"""The packed weight as a tensor: three planes, E4M3 scales, and F.linear dispatched to bbb_ao's ops."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from bbb_ao.grid import Grid
from bbb_ao.kernels import dequantize_packed, packed_linear, packed_linear_dynamic
from bbb_ao.splitting import merge_channels


class PackedTensor(TorchAOBaseTensor):
    """A [out_features, in_features] weight stored as nested codes; a view of a PackedLinear's buffers.

    Args:
        high, mid, low: planes of the 8-bit parent code (bits 7..6, 5..4, 3..0), uint8; layout in kernels/packing.
        scale: E4M3 patterns, uint8 [out_features, groups]; scale_exponent: int32 scalar.
        zero_point: packed zero offsets, uint8, or None on a symmetric grid.
        index: int32 [stored_features], gathered from the activation inside the op, or None.
        bits, act_bits: widths to run at; grid: the weight grid; columns: of the logical weight.
    """

    high: Tensor
    mid: Tensor | None
    low: Tensor | None
    scale: Tensor
    scale_exponent: Tensor
    zero_point: Tensor | None
    index: Tensor | None  # pyright: ignore[reportIncompatibleMethodOverride]
    bits: int
    act_bits: int | None
    grid: Grid
    columns: int

    # Some models of transformers (Mamba) initialize this layer's weight by its name when they are loaded.
    _is_hf_initialized = True

    tensor_data_names = ["high", "scale", "scale_exponent"]
    tensor_attribute_names = ["bits", "act_bits", "grid", "columns"]
    optional_tensor_data_names = ["mid", "low", "zero_point", "index"]

    def __new__(
        cls,
        high: Tensor,
        scale: Tensor,
        scale_exponent: Tensor,
        bits: int,
        act_bits: int | None,
        grid: Grid,
        columns: int,
        mid: Tensor | None = None,
        low: Tensor | None = None,
        zero_point: Tensor | None = None,
        index: Tensor | None = None,
    ) -> "PackedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (high.shape[0], columns), dtype=torch.float32, device=high.device, requires_grad=False
        )
        tensor.high, tensor.mid, tensor.low = high, mid, low
        tensor.scale, tensor.scale_exponent, tensor.zero_point, tensor.index = scale, scale_exponent, zero_point, index
        tensor.bits, tensor.act_bits, tensor.grid, tensor.columns = bits, act_bits, grid, columns
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def stored_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense [out_features, stored_features] weight at the current width, splits not merged."""
        grid, scales = self.grid, (self.scale, self.scale_exponent, self.zero_point)
        settings = (self.bits, grid.zero_point_bits, grid.half_step, grid.group_size)
        return dequantize_packed(self.high, self.mid, self.low, *scales, *settings, dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # type: ignore[override]
        """The dense [out_features, in_features] weight at the current width, copies of split channels summed."""
        weight = self.stored_weight(dtype)
        return weight if self.index is None else merge_channels(weight, self.index, self.columns)


@PackedTensor.implements_torch_function([F.linear])
def _linear(func, types, args, kwargs):
    x, weight, *rest = args
    planes = (weight.high, weight.mid, weight.low)
    scales = (weight.scale, weight.scale_exponent, weight.zero_point)
    bias = rest[0] if rest else kwargs.get("bias")
    return packed_product(x, planes, scales, weight.index, bias, weight.bits, weight.act_bits, weight.grid)


def packed_product(
    x: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor | None],
    scales: tuple[Tensor, Tensor, Tensor | None],
    index: Tensor | None,
    bias: Tensor | None,
    bits: int,
    act_bits: int | None,
    grid: Grid,
) -> Tensor:
    """F.linear with a packed weight, through the op for its activations; under autocast in autocast's type.

    Args:
        x: [..., columns], floating point.
        planes: (high, mid, low); scales: (scale, scale_exponent, zero_point); the others as in `PackedTensor`.
        bias: [out_features] or None.
    Returns:
        [..., out_features].
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        # As autocast does for nn.Linear; an op without a rule of its own would return another type than it declares.
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    settings = (bits, grid.zero_point_bits, grid.half_step, grid.group_size)
    act_half_step = grid.activation_kind == "half_step"
    if act_bits is None:
        return packed_linear(x, *planes, *scales, index, bias, *settings)
    return packed_linear_dynamic(x, *planes, *scales, index, bias, *settings, act_bits, act_half_step)
