"""Packed Linears that read one input, as row slices of one weight, and the product that they share.

Hugging Face calls q_proj(x), k_proj(x), v_proj(x) one by one. The first of them computes all rows and leaves the result
with the input that it belongs to; those that are called with that very tensor take their rows from it, and the last one
lets go of it. Called with anything else a layer computes its own rows: sharing is never a matter of correctness.
torch.compile resolves the hand-over while it traces: the graph holds one product and views of it.

Nothing is stored twice: the layers' planes, scales, zero points and biases become views of the stacked tensors. Their
names and values in the state dict stay the same, and so does a checkpoint.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bbb_ao.packed_tensor import packed_product

if TYPE_CHECKING:
    from bbb_ao.packed_linear import PackedLinear

# Buffers whose rows are stacked; the second level of the scales is one number a layer, and repeated for its rows.
STACKED = ("plane_high", "plane_mid", "plane_low", "scale", "zero_point", "bias")
EQUAL = ("stored_features", "grid", "max_bits", "bits", "act_bits", "padding", "expands_input", "fixed_bits")


class FusedRows:
    """y = x @ [w_1; w_2; ...].T + [b_1; b_2; ...], computed once for the layers 1, 2, ... in the order of their calls.

    Attributes:
        layers: the PackedLinears; each has `fused`, this object, and `position`, its place here.
        ends: last row of each layer, exclusive.
        plane_high, ..., bias: rows of all layers, in the types of a PackedLinear; scale_exponent: int32 [rows].
        out_index: that of every layer, in one tensor, so that a graph shows that they deliver the same channels twice;
            None where they differ.
    """

    plane_high: Tensor
    plane_mid: Tensor | None
    plane_low: Tensor | None
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, layers: "Sequence[PackedLinear]") -> None:
        """Stack the rows of `layers` and let their buffers be views of the result.

        Raises:
            ValueError: fewer than two layers, or layers that `difference` tells apart.
        """
        if len(layers) < 2:
            raise ValueError(f"layers: expected at least two to fuse, got {len(layers)}")
        for layer in layers[1:]:
            if reason := difference(layers[0], layer):
                raise ValueError(f"layers: expected equal settings, got {reason}")
        self.layers = tuple(layers)
        self.ends = tuple(accumulate(layer.out_features for layer in layers))
        self.held: tuple[Tensor, tuple[int, int | None], Tensor] | None = None
        for name in STACKED:
            setattr(self, name, self._stack(name))
        exponents = [layer.scale_exponent.expand(layer.out_features) for layer in layers]
        self.scale_exponent = torch.cat(exponents)
        for position, layer in enumerate(layers):
            layer.fused, layer.position = self, position
        index = layers[0].out_index
        same = index is not None and all(
            layer.out_index is not None and layer.out_index.equal(index) for layer in layers[1:]
        )
        self.out_index = index if same else None

    def _stack(self, name: str) -> Tensor | None:
        if getattr(self.layers[0], name) is None:
            return None
        rows = torch.cat([getattr(layer, name) for layer in self.layers])
        for position, layer in enumerate(self.layers):
            setattr(layer, name, rows[self._rows(position)])
        return rows

    def _rows(self, position: int) -> slice:
        return slice(self.ends[position - 1] if position else 0, self.ends[position])

    def product(self, layer: "PackedLinear", x: Tensor) -> Tensor:
        """The rows of `layer` for x, [..., out_features]; `x` must not be written to before the last layer's call."""
        settings = (layer.bits, layer.act_bits)
        if layer.position == 0:
            planes = (self.plane_high, self.plane_mid, self.plane_low)
            scales = (self.scale, self.scale_exponent, self.zero_point)
            y = packed_product(x, planes, scales, layer.gather_index(), self.bias, *settings, layer.grid)
            self.held = (x, settings, y)
        held = self.held
        if layer.position == len(self.ends) - 1:
            self.held = None
        if held is None or held[0] is not x or held[1] != settings:
            return layer.product(x)
        return held[2][..., self._rows(layer.position)]

    def holds(self, layer: "PackedLinear") -> bool:
        """Whether the layer's buffers still are views of the tensors here (casting or moving a model makes others)."""
        pairs = [(getattr(self, name), getattr(layer, name)) for name in STACKED]
        return all(
            whole.device == rows.device
            and whole.dtype == rows.dtype
            and whole.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
            for whole, rows in pairs
            if whole is not None
        )

    def dissolve(self) -> None:
        """Let every layer compute its own rows again; copies nothing, the buffers stay where they are."""
        for layer in self.layers:
            layer.fused, layer.position = None, 0


def difference(first: "PackedLinear", second: "PackedLinear") -> str:
    """Why the two cannot be rows of one weight, or ""."""
    for name in EQUAL:
        if getattr(first, name) != getattr(second, name):
            return f"{name}: {getattr(first, name)} and {getattr(second, name)}"
    if first.plane_high.device != second.plane_high.device:
        return f"device: {first.plane_high.device} and {second.plane_high.device}"
    biases = [None if layer.bias is None else layer.bias.dtype for layer in (first, second)]
    if biases[0] != biases[1]:
        return f"bias: {biases[0]} and {biases[1]}"
    if first.ocs_index is not None and second.ocs_index is not None and not first.ocs_index.equal(second.ocs_index):
        return "ocs_index: different channels"
    return ""
