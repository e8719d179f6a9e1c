"""What a quantized model stores: bytes and bits per weight, everything counted."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bbb_ao.packed_linear import PackedLinear, packed_linears


@dataclass(frozen=True)
class Footprint:
    """Stored size of one packed Linear.

    Attributes:
        weights: elements of the original weight, out_features * in_features.
        bytes: of planes, scales, zero points and index, for the widths up to `max_bits`.
    """

    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.weights + other.weights, self.bytes + other.bytes)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def layer_footprint(layer: PackedLinear, bits: int | None = None) -> Footprint:
    """Bytes that `layer` reads when the model runs at width `bits`, scales, zero points and index included.

    None counts all that it stores; a layer with fixed_bits always reads that.

    On the integer grid a slice narrower than `max_bits` also reads the bit below it, which rounds it.

    Split channels and padding count as stored columns against the original number of weights; the bias does not count.
    """
    width = layer.max_bits if bits is None or layer.fixed_bits else bits
    if not layer.grid.half_step and width < layer.max_bits:
        width += 1
    planes = [layer.plane_high, layer.plane_mid if width > 2 else None, layer.plane_low if width > 4 else None]
    shared = (layer.scale, layer.scale_exponent, layer.zero_point, layer.ocs_index, layer.out_index)
    return Footprint(layer.in_features * layer.out_features, _bytes(*planes, *shared))


def footprint(model: nn.Module, bits: int | Mapping[str, int] | None = None) -> Footprint:
    """Sum of `layer_footprint` over the packed layers of `model`, and of the indices kept beside its norms.

    Args:
        bits: one width for all layers, or one by name for each that is not fixed, or None for all that is stored.
    Raises:
        ValueError: no packed layer.
    """
    layers = packed_linears(model)
    if not layers:
        raise ValueError("footprint: the model has no packed layers; convert it first")
    total = Footprint(0, _bytes(*(b for name, b in model.named_buffers() if name.endswith("duplicate_index"))))
    widths = bits if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    for name, layer in layers.items():
        total += layer_footprint(layer, None if layer.fixed_bits else widths[name])
    return total
