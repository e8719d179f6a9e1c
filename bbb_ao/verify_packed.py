"""A packed model against its fake-quant reference: the weight as the grid defines it, in float64.

Every packed layer runs on what reaches it in a forward pass, with many rows and with one, and

    |y - y64| <= 3 eps |x| |w| + (K + 2) 2**-23 |x| (s c + |w - s c|) + tiny (sum |x| + 1),   y64 = x w.T + bias

with eps of x's type: each weight is rounded twice (times its scale, to x's type), the result once, and sums over K
columns run in float32, over codes and offsets apart. The bias counts as one more product. Quantized activations are
rounded to x's type once more, and are compared as `fake_quantize_input` gives them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bbb_ao.errors import NumericsError
from bbb_ao.grid import QuantizedWeight, dequantize_weight
from bbb_ao.kernels import decode_scale, slice_codes, unpack_codes, unpack_planes
from bbb_ao.kernels.packed_row.inputs import expand_input, fake_quantize_input
from bbb_ao.packed_linear import PackedLinear, packed_linears, stored_widths

TOKENS = 16
SLAB = 2**23  # weights in float64 at once
FLOAT32_EPS = 2.0**-23


@dataclass(frozen=True)
class WidthCheck:
    """What was compared at one width: the number of layers, and the largest error as a share of its bound.

    layer: where that is.
    """

    bits: int
    layers: int
    share: float
    layer: str


def verify_packed(model: Any, report: Callable[[WidthCheck], object] = lambda check: None) -> list[WidthCheck]:
    """Compare every packed layer of a causal language model with its reference, at every width that it stores.

    Args:
        model: in evaluation mode; its widths are the same afterwards. Runs on random tokens; layers that these do not
            reach (experts) run on normal random numbers.
        report: called after each width.
    Raises:
        NumericsError: a layer's output is outside the bound, or NaN or infinite; names the layer.
    """
    layers = packed_linears(model)
    before = {name: layer.bits for name, layer in layers.items()}
    checks = []
    try:
        for bits in range(2, 9):
            chosen = {name: layer for name, layer in layers.items() if bits in _widths(layer)}
            for layer in chosen.values():
                layer.bits = bits
            if chosen:
                checks.append(_check_width(model, chosen, bits))
                report(checks[-1])
    finally:
        for name, layer in layers.items():
            layer.bits = before[name]
    return checks


def _widths(layer: PackedLinear) -> range:
    return stored_widths(layer.grid.kind, layer.max_bits, layer.fixed_bits)


def _check_width(model: Any, layers: dict[str, PackedLinear], bits: int) -> WidthCheck:
    shares: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def compare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            shares[name] = max(shares.get(name, 0.0), _check_layer(name, layers[name], args[0]))

        return compare

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        device = next(iter(layers.values())).plane_high.device
        generator = torch.Generator().manual_seed(bits)
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, TOKENS), generator=generator)
        with torch.no_grad():
            model(input_ids=ids.to(device), use_cache=False)
            for name in layers.keys() - shares.keys():
                layer = layers[name]
                columns = layer.in_features if layer.expands_input else layer.stored_features
                x = torch.randn(TOKENS, columns, generator=generator).to(device, model.dtype)
                shares[name] = _check_layer(name, layer, x)
    finally:
        for handle in handles:
            handle.remove()
    worst = max(shares, key=shares.__getitem__)
    return WidthCheck(bits, len(shares), shares[worst], worst)


def _check_layer(name: str, layer: PackedLinear, x: Tensor) -> float:
    """Largest error as a share of its bound, over all rows together and the last one alone."""
    rows = x.reshape(-1, x.shape[-1])
    exact, bound = reference_product(layer, rows)
    share = 0.0
    for part in (slice(None), slice(-1, None)):
        y = layer.product(rows[part]).double()
        error = (y - exact[part]).abs()
        # Not "above": NaN is neither.
        wrong = ~(error <= bound[part])
        if bool(wrong.any()):
            first = wrong.nonzero()[0].tolist()
            raise NumericsError(
                f"{name}: output at {layer.bits} bits: expected {exact[part][tuple(first)].item():.6g} within "
                f"{bound[part][tuple(first)].item():.3g} as the fake-quant reference, got "
                f"{y[tuple(first)].item():.6g} at {first} and {int(wrong.sum())} such values; "
                "fix: run `bbb-ao doctor`, and report it"
            )
        share = max(share, (error / bound[part]).max().item())
    return share


def reference_product(layer: PackedLinear, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's product in float64, and the bound of the module's first lines, both [M, out_features].

    Args:
        rows: [M, columns], as they reach the layer.
    """
    index, eps = layer.gather_index(), torch.finfo(rows.dtype).eps
    columns = expand_input(rows, index)
    products = 3
    if layer.act_bits is not None:
        settings = (layer.act_bits, layer.grid.activation_kind == "half_step", layer.grid.group_size)
        # In plain torch, whatever the device.
        marks = None if index is None else index.cpu()
        quantized = fake_quantize_input(columns.cpu(), marks, rows.shape[-1], *settings)
        columns, products = quantized.to(rows.device), 4
    columns = columns.double()
    features = layer.stored_features
    lost = torch.finfo(rows.dtype).smallest_normal * torch.finfo(rows.dtype).eps * (columns.abs().sum(-1) + 1)
    ys, bounds = [], []
    for first in range(0, layer.out_features, step := max(1, SLAB // features)):
        weight, scaled_codes = reference_weight(layer, slice(first, first + step))
        bias = 0.0 if layer.bias is None else layer.bias[first : first + step].double()
        dense = columns.abs() @ weight.abs().T + abs(bias)
        factored = columns.abs() @ (scaled_codes + (weight - scaled_codes).abs()).T + abs(bias)
        ys.append(columns @ weight.T + bias)
        bounds.append(products * eps * dense + (features + 2) * FLOAT32_EPS * factored + lost[:, None])
    return torch.cat(ys, -1), torch.cat(bounds, -1)


def reference_weight(layer: PackedLinear, rows: slice) -> tuple[Tensor, Tensor]:
    """(w, s c) of some rows at the layer's width, float64 [rows, stored_features], from the 8-bit parent codes."""
    grid, high = layer.grid, layer.plane_high[rows]
    mid = torch.zeros_like(high) if layer.plane_mid is None else layer.plane_mid[rows]
    low = high.new_zeros(high.shape[0], 2 * high.shape[1]) if layer.plane_low is None else layer.plane_low[rows]
    codes = unpack_planes(high, mid, low, layer.stored_features, 8)
    scale, zero_point = layer.scale[rows], None
    if layer.zero_point is not None:
        zero_point = unpack_codes(layer.zero_point[rows], grid.zero_point_bits, scale.shape[1])
    weight = dequantize_weight(
        QuantizedWeight(codes, scale, layer.scale_exponent, zero_point), layer.bits, grid, torch.float64
    )
    step = decode_scale(scale, layer.scale_exponent, torch.float64) * 2.0 ** (2 - layer.bits)
    slices = slice_codes(codes, layer.bits, grid.half_step).double()
    return weight, slices * step.repeat_interleave(grid.group_size, 1)
