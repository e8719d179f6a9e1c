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
        weight: [out_features, in_features], float32 master; scale, zero_point: [out_features, groups], rounded.
        bits: width of the weight; None leaves it as it is.
        act_bits: width of the activations; None leaves them as they are.
        grid: the weight grid; activations use its group size and `activation_kind`.
        padding: trailing columns that are padding: activations there stay exactly zero.
    """

    master: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    act_bits: int | None
    grid: Grid
    padding: int

    tensor_data_names = ["master", "scale", "zero_point"]
    tensor_attribute_names = ["bits", "act_bits", "grid", "padding"]

    def __new__(
        cls,
        master: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        act_bits: int | None,
        grid: Grid,
        padding: int,
    ) -> "FakeQuantTensor":
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, master.shape, dtype=master.dtype, device=master.device, requires_grad=False
        )
        tensor.master, tensor.scale, tensor.zero_point = master, scale, zero_point
        tensor.bits, tensor.act_bits, tensor.grid, tensor.padding = bits, act_bits, grid, padding
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The fake-quantized weight as a plain tensor, connected to the parameters' graph."""
        return fake_quantize_weight(self.master, self.scale, self.zero_point, self.bits, self.grid)


@FakeQuantTensor.implements_torch_function([F.linear])
def _linear(func, types, args, kwargs):
    x, weight, *rest = args
    bias = rest[0] if rest else kwargs.get("bias")
    if weight.act_bits is not None:
        grid = weight.grid
        x = fake_quantize_activation(x, weight.act_bits, grid.group_size, grid.activation_kind, weight.padding)
    dense = weight.dequantize()
    # Autocast casts inside F.linear; without it the product runs in the activation's dtype.
    if not torch.is_autocast_enabled(x.device.type):
        dense = dense.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, dense, bias)
