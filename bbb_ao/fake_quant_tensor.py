"""The ephemeral tensor subclass that stands for a fake-quantized weight during one forward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from bbb_ao.activations import fake_quantize_activation
from bbb_ao.grid import Grid, fake_quantize_weight


class FakeQuantTensor(TorchAOBaseTensor):
    """A weight with its scales; `F.linear` with it quantizes both operands as the deployed layer will.

    Built anew in every forward from ordinary parameters and dropped afterwards: learnable tensors that live inside a
    wrapper subclass get no gradient under torch.compile.

    Args:
        master: [out_features, in_features], float32.
        scale, zero_point: [out_features, groups], rounded; None for both derives them from `master`.
        bits: width of the weight; None leaves it as it is.
        act_bits: width of the activations; None leaves them as they are.
        grid: the weight grid; activations use its group size and `activation_kind`.
        padding: trailing columns that are padding: activations there stay exactly zero.
        detach_scales: scales derived from `master` pass no gradient.
    """

    master: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    bits: int
    act_bits: int | None
    grid: Grid
    padding: int
    detach_scales: bool

    tensor_data_names = ["master"]
    optional_tensor_data_names = ["scale", "zero_point"]
    tensor_attribute_names = ["bits", "act_bits", "grid", "padding", "detach_scales"]

    def __new__(
        cls,
        master: Tensor,
        bits: int,
        act_bits: int | None,
        grid: Grid,
        padding: int,
        detach_scales: bool = False,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> "FakeQuantTensor":
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, master.shape, dtype=master.dtype, device=master.device, requires_grad=False
        )
        tensor.master, tensor.scale, tensor.zero_point = master, scale, zero_point
        tensor.bits, tensor.act_bits, tensor.grid, tensor.padding = bits, act_bits, grid, padding
        tensor.detach_scales = detach_scales
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The fake-quantized weight as a plain tensor, connected to the parameters' graph; None keeps the dtype."""
        return fake_quantize_weight(
            self.master,
            self.scale,
            self.zero_point,
            self.bits,
            self.grid,
            detach_scales=self.detach_scales,
            dtype=dtype,
        )


@FakeQuantTensor.implements_torch_function([F.linear])
def _linear(func, types, args, kwargs):
    x, weight, *rest = args
    bias = rest[0] if rest else kwargs.get("bias")
    dtype = _product_dtype(x)
    if weight.act_bits is not None:
        grid = weight.grid
        # What is computed in float32 may be written in the product's type; 16 bits are rounded to their own type.
        written = dtype if x.dtype == torch.float32 else x.dtype
        x = fake_quantize_activation(x, weight.act_bits, grid.group_size, grid.activation_kind, weight.padding, written)
    return F.linear(x, weight.dequantize(dtype), None if bias is None else bias.to(dtype))


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type of a matrix product with x: autocast's, where it is on (it leaves float64 alone), else x's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
