"""The deployed form of a Linear: packed nested codes in plain buffers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bbb_ao.fused_rows import FusedRows
from bbb_ao.grid import Grid, check_bits, quantize_weight
from bbb_ao.kernels import pack_codes, pack_planes, slice_codes, unpack_planes
from bbb_ao.packed_tensor import PackedTensor, packed_product
from bbb_ao.qat_linear import QATLinear
from bbb_ao.splitting import expand_channels


class PackedLinear(nn.Module):
    """y = F.linear(Q_act(x[index]), w_bits) + bias from planes of an 8-bit parent code.

    A plain module, not an nn.Linear, which Hugging Face would re-initialize. All quantized state is in integer buffers,
    so that casting the model to another floating-point type leaves it alone: `plane_high` (bits 7..6), `plane_mid`
    (5..4), `plane_low` (3..0), `scale` (E4M3 patterns), `scale_exponent` (int32), `zero_point` (packed), `ocs_index`,
    `out_index`; `bias` is floating point. A plane above `max_bits` is absent.

    Attributes:
        in_features, out_features: of the original Linear; stored_features: columns after splitting and padding.
        bits, act_bits: widths to run at; `set_bits` switches and copies nothing.
        max_bits: the widest slice that is stored.
        padding: trailing stored columns that are padding.
        index_source: name, in the whole model, of the buffer with the index of this layer's columns; None without one.
        fixed_bits: it runs at `max_bits` whatever the model's width is (a packed head).
        fused, position: the product that it shares with other layers, and its place there; None where it is alone.
    """

    bits: int
    act_bits: int | None
    max_bits: int
    grid: Grid
    expands_input: bool
    padding: int
    fixed_bits: bool
    fused: FusedRows | None
    position: int
    plane_high: Tensor
    plane_mid: Tensor | None
    plane_low: Tensor | None
    scale: Tensor
    scale_exponent: Tensor
    zero_point: Tensor | None
    ocs_index: Tensor | None
    out_index: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stored_features: int,
        grid: Grid,
        max_bits: int,
        *,
        act_bits: int | None = None,
        expands_input: bool = False,
        padding: int = 0,
        stored_rows: int | None = None,
        bias_dtype: torch.dtype | None = None,
        fixed_bits: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate empty buffers of the right shapes, to be filled by `from_qat` or from a checkpoint.

        Args:
            stored_rows: length of `out_index`, None where rows are not duplicated.
            bias_dtype: None for no bias.
        """
        super().__init__()
        self.in_features, self.out_features, self.stored_features = in_features, out_features, stored_features
        self.grid, self.max_bits, self.expands_input = grid, check_bits(max_bits, "max_bits"), expands_input
        self.act_bits, self.bits, self.padding = act_bits, max_bits, padding
        self.index_source: str | None = None
        self.fixed_bits, self.fused, self.position = fixed_bits, None, 0

        def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        groups = stored_features // grid.group_size
        zero_bytes = -(-groups * grid.zero_point_bits // 8)
        buffers = {
            "plane_high": empty(out_features, stored_features // 4),
            "plane_mid": empty(out_features, stored_features // 4) if max_bits > 2 else None,
            "plane_low": empty(out_features, stored_features // 2) if max_bits > 4 else None,
            "scale": empty(out_features, groups),
            "scale_exponent": empty(dtype=torch.int32),
            "zero_point": empty(out_features, zero_bytes) if zero_bytes else None,
            "ocs_index": empty(stored_features, dtype=torch.int32) if expands_input else None,
            "out_index": None if stored_rows is None else empty(stored_rows, dtype=torch.int32),
            "bias": None if bias_dtype is None else empty(out_features, dtype=bias_dtype),
        }
        # torch.export counts the buffers of its root in order and stumbles over an absent one before a present one.
        for name, buffer in sorted(buffers.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, buffer)

    @classmethod
    def allocate(cls, qat: QATLinear, max_bits: int, bias_dtype: torch.dtype) -> "PackedLinear":
        """Empty buffers for a QATLinear, on its device: what `from_qat` fills."""
        return cls(
            qat.in_features,
            qat.out_features,
            qat.stored_features,
            qat.grid,
            max_bits,
            act_bits=qat.act_bits,
            expands_input=qat.expands_input,
            padding=qat.padding,
            stored_rows=None if qat.out_index is None else qat.out_index.numel(),
            bias_dtype=None if qat.bias is None else bias_dtype,
            device=qat.weight.device,
        )

    @classmethod
    def from_qat(cls, qat: QATLinear, max_bits: int, bias_dtype: torch.dtype = torch.float32) -> "PackedLinear":
        """Pack a QATLinear; codes are derived from its rounded scales.

        Args:
            max_bits: widest slice to keep; narrower ones come with it (integer grid: only from max_bits = 8).
        Raises:
            ValueError: max_bits above grid.parent_bits, or float32 scales.
        """
        grid, weight = qat.grid, qat.weight.detach()
        if check_bits(max_bits, "max_bits") > grid.parent_bits:
            raise ValueError(f"max_bits: expected at most parent_bits = {grid.parent_bits}, got {max_bits}")
        packed = cls.allocate(qat, max_bits, bias_dtype)
        with torch.no_grad():
            scale, zero_point = qat.rounded_scales()
            quantized = quantize_weight(weight, scale, zero_point, grid)
            codes = quantized.codes
            if not grid.half_step and max_bits < 8:
                codes = _rounded_slice(codes, max_bits)
            packed.plane_high, mid, low = pack_planes(codes)
            packed.plane_mid = mid if max_bits > 2 else None
            packed.plane_low = low if max_bits > 4 else None
            packed.scale, packed.scale_exponent = quantized.scale, quantized.scale_exponent
            if quantized.zero_point is not None:
                packed.zero_point = pack_codes(quantized.zero_point, grid.zero_point_bits)
        packed.ocs_index = qat.ocs_index if qat.expands_input else None
        # A copy: safetensors refuses tensors that several layers share.
        packed.out_index = None if qat.out_index is None else qat.out_index.clone()
        packed.bias = None if qat.bias is None else qat.bias.detach().to(bias_dtype)
        packed.set_bits(max_bits if qat.bits is None else min(qat.bits, max_bits))
        return packed.train(qat.training)

    def set_bits(self, bits: int) -> None:
        """Run at another stored width from now on; nothing is copied.

        Raises:
            ValueError: a width that is not stored.
        """
        self.check_width(bits)
        self.bits = bits

    def check_width(self, bits: int, where: str = "") -> None:
        """Raise a ValueError that starts with `where` unless this layer stores width `bits`."""
        widths = stored_widths(self.grid.kind, self.max_bits, self.fixed_bits)
        if check_bits(bits, f"{where}bits") not in widths:
            raise ValueError(f"{where}bits: this layer stores widths {widths[0]} to {widths[-1]}, got {bits}")

    def drop_planes(self, max_bits: int) -> None:
        """Forget everything below the slice of width `max_bits`, which becomes the widest that is stored.

        Raises:
            ValueError: a width that is not stored.
        """
        self.check_width(max_bits)
        if self.fused is not None:
            self.fused.dissolve()
        if not self.grid.half_step and max_bits < self.max_bits:
            # The integer grid rounds its slices by the bits below them.
            codes = unpack_planes(self.plane_high, self.plane_mid, self.plane_low, self.stored_features, 8)
            self.plane_high, self.plane_mid, self.plane_low = pack_planes(_rounded_slice(codes, max_bits))
        self.max_bits, self.bits = max_bits, min(self.bits, max_bits)
        self.plane_mid = self.plane_mid if max_bits > 2 else None
        self.plane_low = self.plane_low if max_bits > 4 else None

    @property
    def weight(self) -> PackedTensor:
        """The packed weight at the current width, a view of the buffers."""
        return PackedTensor(
            self.plane_high,
            self.scale,
            self.scale_exponent,
            self.bits,
            self.act_bits,
            self.grid,
            self.in_features if self.expands_input else self.stored_features,
            self.plane_mid,
            self.plane_low,
            self.zero_point,
            self.gather_index(),
        )

    def gather_index(self) -> Tensor | None:
        """The index that the op gathers by: the layer's own, or one that marks padding which a producer delivers.

        Quantized activations must stay zero there, and zero is no level of the half-step grid.
        """
        if self.ocs_index is not None or self.act_bits is None or not self.padding:
            return self.ocs_index
        columns = torch.arange(self.stored_features, dtype=torch.int32, device=self.plane_high.device)
        return columns.masked_fill(columns >= self.stored_features - self.padding, self.stored_features)

    def product(self, x: Tensor) -> Tensor:
        """F.linear(x, self.weight, self.bias), without a tensor subclass for the compiler to look through."""
        planes = (self.plane_high, self.plane_mid, self.plane_low)
        scales = (self.scale, self.scale_exponent, self.zero_point)
        return packed_product(x, planes, scales, self.gather_index(), self.bias, self.bits, self.act_bits, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is None:
            y, index = self.product(x), self.out_index
        else:
            y, index = self.fused.product(self, x), self.fused.out_index
            index = self.out_index if index is None else index
        return y if index is None else expand_channels(y, index)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        super()._apply(*args, **kwargs)
        if self.fused is not None and not self.fused.holds(self):
            self.fused.dissolve()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Fused layers have a copy of the second level of their scales.
        if self.fused is not None:
            self.fused.dissolve()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stored_features={self.stored_features}, bits={self.bits}, max_bits={self.max_bits}, "
            f"act_bits={self.act_bits}"
        )


def _rounded_slice(codes: Tensor, bits: int) -> Tensor:
    """Integer grid: the parent code rounded to `bits` bits and shifted back, so that planes below can be dropped."""
    return slice_codes(codes, bits, False) << (8 - bits)


def stored_widths(kind: str, max_bits: int, fixed_bits: bool = False) -> range:
    """The widths that can be read from planes up to `max_bits`: on the integer grid narrower slices need all 8 bits."""
    nested = not fixed_bits and (kind == "half_step" or max_bits == 8)
    return range(2 if nested else max_bits, max_bits + 1)


def packed_linears(module: nn.Module) -> dict[str, PackedLinear]:
    """The PackedLinears below `module` by name, in the module's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, PackedLinear)}


def free_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers whose width can be chosen, by name: all but those with `fixed_bits`."""
    return {name: layer for name, layer in packed_linears(model).items() if not layer.fixed_bits}


def common_widths(model: nn.Module) -> list[int]:
    """The widths that every packed layer stores, but for those with `fixed_bits`, ascending; empty without any."""
    layers = free_layers(model).values()
    stored = [set(stored_widths(layer.grid.kind, layer.max_bits)) for layer in layers]
    return sorted(set.intersection(*stored)) if stored else []


def check_widths(model: nn.Module, bits: int | None) -> dict[str, PackedLinear]:
    """`free_layers(model)`, each of which stores width `bits` (None: the one that it runs at).

    Raises:
        ValueError: a layer does not store it (the layer is named).
    """
    layers = free_layers(model)
    for name, layer in layers.items():
        layer.check_width(layer.bits if bits is None else bits, f"{name}: ")
    return layers


def set_bits(model: nn.Module, bits: int) -> nn.Module:
    """Run every packed layer of `model` that is not fixed at width `bits`; copies nothing.

    Returns:
        `model`.
    Raises:
        ValueError: `model` has no packed layer, or a layer does not store that width (the layer is named).
    """
    layers = check_widths(model, check_bits(bits))
    if not layers:
        raise ValueError("set_bits: the model has no packed layers; convert it or load a bitbybit checkpoint first")
    for layer in layers.values():
        layer.bits = bits
    return model


def set_layer_bits(model: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """Run every packed layer of `model` that is not fixed at a width of its own, by name; copies nothing.

    Returns:
        `model`.
    Raises:
        ValueError: the names are not those of these layers, or a layer does not store its width; nothing changed.
    """
    layers = free_layers(model)
    if different := sorted(layers.keys() ^ widths.keys()):
        raise ValueError(f"set_layer_bits: expected a width for each packed layer, got a difference in {different[0]}")
    for name, layer in layers.items():
        layer.check_width(widths[name], f"{name}: ")
    for name, layer in layers.items():
        layer.bits = widths[name]
    return model
