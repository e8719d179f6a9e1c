"""The training form of a Linear: float32 masters, fake-quantized in every forward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbb_ao.activations import fake_quantize_activation
from bbb_ao.fake_quant_tensor import FakeQuantTensor
from bbb_ao.grid import Grid, check_bits, group, round_learned, scale_and_zero_point
from bbb_ao.kernels import dequantize, quantize, slice_codes
from bbb_ao.splitting import check_index, expand_channels, merge_channels, split_channels


class QATLinear(nn.Linear):
    """A Linear whose weight (and activation) is fake-quantized on the grid that will be deployed.

    y = F.linear(Q_act(x[index]), Q_bits(weight)) + bias, then the rows that `out_index` names. Parameters are ordinary
    ones: `weight` [out_features, stored_features], `bias`, and `scale`, `zero_point` [out_features, groups] where they
    are learned; all float32. `stored_features` counts the input channels after splitting and padding.

    Attributes:
        in_features, out_features: of the Linear that this one came from.
        bits, act_bits: current widths, switchable at any time; None leaves that operand in full precision.
        grid: the weight grid.
        ocs_index: int32 [stored_features] or None; see `splitting`.
        expands_input: True, this module gathers its input by `ocs_index`; False, it arrives with stored_features.
        out_index: int32 or None; output rows duplicated for a consumer, an index as in `splitting` over out_features.
        padding: trailing stored columns that are padding.
        detach_scales: closed-form scales pass no gradient to the weight.
        frozen_scale: the scale at which the codes were frozen, [out_features, groups], or None; see `freeze_codes`.
        bounds: (lowest, highest) weight that keeps a code's top bits, weight's shape, or None; see `keep_top_bits`.
    """

    bits: int | None
    act_bits: int | None
    grid: Grid
    expands_input: bool
    padding: int
    detach_scales: bool
    ocs_index: Tensor | None
    out_index: Tensor | None
    scale: nn.Parameter | None
    zero_point: nn.Parameter | None
    frozen_scale: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int | None,
        act_bits: int | None = None,
        grid: Grid | None = None,
        index: Tensor | None = None,
        *,
        expands_input: bool = True,
        out_index: Tensor | None = None,
        learned_scales: bool = False,
        detach_scales: bool = False,
    ) -> "QATLinear":
        """Split, pad and wrap a Linear. The weight is copied to a float32 master; `linear` is left alone.

        A float64 weight keeps its type. With bits=None the host is the split Linear in full precision.

        Args:
            linear: any nn.Linear with a [out_features, in_features] floating-point weight.
            index: stored columns from `choose_index`; None keeps them (group_size must then divide in_features).
            out_index: rows to duplicate for a consumer, an index over out_features.
        Raises:
            ValueError: a width, a malformed index, or group_size against in_features without an index.
        """
        host = cls.__new__(cls)
        nn.Module.__init__(host)
        grid = grid or Grid()
        host.in_features, host.out_features = linear.in_features, linear.out_features
        host.grid, host.detach_scales = grid, detach_scales
        host.set_bits(bits, act_bits)
        host.expands_input = expands_input and index is not None
        if index is not None:
            check_index(index, linear.in_features, grid.group_size)
        if out_index is not None:
            check_index(out_index, linear.out_features, grid.group_size, "out_index")
        host.register_buffer("ocs_index", None if index is None else index.to(linear.weight.device, copy=True))
        # An index on the meta device has no values to count.
        host.padding = 0 if index is None or index.is_meta else int((index == linear.in_features).sum())
        host.register_buffer("out_index", None if out_index is None else out_index.to(linear.weight.device, copy=True))
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        master = linear.weight.detach().to(dtype)
        host.weight = nn.Parameter(master.clone() if index is None else host._split(master, bits))
        if host.weight.shape[1] % grid.group_size:
            raise ValueError(
                f"group_size must divide in_features: {grid.group_size} does not divide {linear.in_features}; "
                "pass an index from choose_index, which pads"
            )
        bias = linear.bias
        host.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(dtype).clone()))
        host.register_parameter("scale", None)
        host.register_parameter("zero_point", None)
        if learned_scales:
            host.learn_scales()
        return host.train(linear.training)

    def _split(self, master: Tensor, bits: int | None) -> Tensor:
        """The stored columns of `master`: plain halves, or offset by a quarter of the new step on the integer grid."""
        index = self.ocs_index
        assert index is not None, "only called with an index"
        halves = split_channels(master, index)
        if self.grid.half_step or bits is None:
            return halves
        # Halve, derive the new scale, then offset by it: an offset from the old scale is worse than no split.
        scale, _ = scale_and_zero_point(halves, self.grid)
        step = scale.repeat_interleave(self.grid.group_size, 1)[:, : self.in_features] * 2.0 ** (2 - bits)
        return split_channels(master, index, step / 4)

    def set_bits(self, bits: int | None, act_bits: int | None = None) -> None:
        """Switch the widths of the weight and the activation; None means full precision.

        Raises:
            ValueError: a width outside 2 to 8 (at most grid.parent_bits for the weight).
        """
        if bits is not None and check_bits(bits) > self.grid.parent_bits:
            raise ValueError(f"bits: expected at most parent_bits = {self.grid.parent_bits}, got {bits}")
        self.bits = bits
        self.act_bits = None if act_bits is None else check_bits(act_bits, "act_bits")

    def learn_scales(self) -> None:
        """Make scale and zero point parameters that start from the closed form; nothing where they are already."""
        if self.scale is None:
            scale, zero_point = scale_and_zero_point(self.weight.detach(), self.grid)
            self.scale, self.zero_point = nn.Parameter(scale), nn.Parameter(zero_point)

    def freeze_codes(self) -> None:
        """Keep every code as it is while the (from now on learned) scale moves: w = w_frozen * scale / frozen_scale.

        The weight moves into the middle of its widest code's step first, so that no rounding of the quotient can change
        the code. The gradient for the scale is then that of scale * (codes + h - zero_point) at fixed codes.
        """
        self.learn_scales()
        with torch.no_grad():
            self.weight.copy_(self._fake_quantized(self.grid.parent_bits).dequantize())
        self.frozen_scale = self.rounded_scales()[0].detach()

    def thaw_codes(self) -> None:
        """Undo `freeze_codes`: the weight takes its values at the present scale, which keeps its codes."""
        if self.frozen_scale is not None:
            with torch.no_grad():
                self.weight.copy_(self._master(self.rounded_scales()[0]))
            self.frozen_scale = None

    def keep_top_bits(self, bits: int, weight: Tensor | None) -> None:
        """Keep the scales and the top `bits` of every code as they are.

        `bounds` are set to the weights of the lowest and the highest parent code with the same top bits. Whoever trains
        the master has to clamp it to them after each step.

        Args:
            weight: of the Linear that this one came from, [out_features, in_features]: the master becomes what is
                nearest to it within the bounds. None leaves the master where it is.
        """
        self.learn_scales()
        scale, zero_point = (tensor.detach() for tensor in self.rounded_scales())
        half_step, parent = self.grid.half_step, self.grid.parent_bits
        groups = group(self.weight.detach(), self.grid.group_size)
        codes = slice_codes(quantize(groups, scale, zero_point, half_step, parent), bits, half_step, parent)
        # Codes of the integer grid are rounded to their top bits, those of the half-step grid are cut.
        width = 2 ** (parent - bits)
        lowest = codes * width - (0 if half_step else width // 2)
        ends = lowest.clamp(min=0), torch.where(codes == 2**bits - 1, 2**parent - 1, lowest + width - 1)
        low, high = (dequantize(end, scale, zero_point, parent, half_step).flatten(1) for end in ends)
        with torch.no_grad():
            start = self.weight if weight is None else weight.to(self.weight)
            if weight is not None and self.ocs_index is not None:
                start = self._split(start, bits)
            self.weight.copy_(start.clamp(low, high))
        self.bounds = low, high

    def _master(self, scale: Tensor) -> Tensor:
        """The weight, rescaled where its codes are frozen."""
        if self.frozen_scale is None:
            return self.weight
        ratio = scale / torch.where(self.frozen_scale == 0, torch.inf, self.frozen_scale)
        return (group(self.weight, self.grid.group_size) * ratio.unsqueeze(-1)).flatten(1)

    @property
    def stored_features(self) -> int:
        """Columns of the stored weight: input channels, duplicates and padding."""
        return self.weight.shape[1]

    def rounded_scales(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) as they will be stored: learned, or in closed form from the weight."""
        if self.scale is not None and self.zero_point is not None:
            return round_learned(self.scale, self.zero_point, self.grid)
        return scale_and_zero_point(self.weight.detach() if self.detach_scales else self.weight, self.grid)

    def _fake_quantized(self, bits: int) -> FakeQuantTensor:
        """The weight at `bits`; learned scales rounded, while those in closed form are left to the fused kernels."""
        settings = (bits, self.act_bits, self.grid, self.padding, self.detach_scales)
        if self.scale is None:
            return FakeQuantTensor(self.weight, *settings)
        scale, zero_point = self.rounded_scales()
        return FakeQuantTensor(self._master(scale), *settings, scale, zero_point)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.ocs_index is not None and self.expands_input:
            x = expand_channels(x, self.ocs_index)
        if self.bits is None:
            if self.act_bits is not None:
                grid = self.grid
                x = fake_quantize_activation(x, self.act_bits, grid.group_size, grid.activation_kind, self.padding)
            y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        else:
            y = F.linear(x, self._fake_quantized(self.bits), self.bias)
        return y if self.out_index is None else expand_channels(y, self.out_index)

    def merged_weight(self, bits: int | None = None) -> Tensor:
        """The dense [out_features, in_features] weight at width `bits` (None: the master), copies summed."""
        with torch.no_grad():
            weight: Tensor = self.weight
            if bits is not None:
                weight = self._fake_quantized(bits).dequantize()
            return weight if self.ocs_index is None else merge_channels(weight, self.ocs_index, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stored_features={self.stored_features}, bits={self.bits}, act_bits={self.act_bits}, grid={self.grid.kind}"
        )


def qat_linears(module: nn.Module) -> dict[str, QATLinear]:
    """The QATLinears below `module` by name, in the module's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, QATLinear)}


def set_training_bits(module: nn.Module, bits: int | None, act_bits: int | None = None) -> None:
    """Switch every QATLinear below `module` to these widths."""
    for linear in qat_linears(module).values():
        linear.set_bits(bits, act_bits)


def is_plain_linear(linear: nn.Linear) -> bool:
    """Whether a call gives x @ weight^T + bias and nothing else.

    A subclass may write that in another way (Falcon's) or compute something else (a router, which gives a tuple): it is
    called with one row, and on the meta device only the shape tells.
    """
    if isinstance(linear, QATLinear):
        return False
    if type(linear).forward is nn.Linear.forward:
        return True
    weight = linear.weight
    x = torch.linspace(-1, 1, linear.in_features, dtype=weight.dtype, device=weight.device).unsqueeze(0)
    with torch.no_grad():
        expected = F.linear(x, weight, linear.bias)
        try:
            y = linear(x)
        except Exception:  # noqa: BLE001  what it takes is its own affair
            return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or bool((y - expected).abs().max() <= 16 * torch.finfo(weight.dtype).eps * expected.abs().max())


def become(module: nn.Module, other: nn.Module) -> nn.Module:
    """Turn `module` into `other` in place, hooks kept, so that every reference to it (a root's too) sees the change.

    Returns:
        `module`, now of other's class and with other's state.
    """
    hooks: dict[str, Any] = {
        name: value
        for name, value in module.__dict__.items()
        if name.endswith("_hooks") or "_hooks_" in name or name == "_is_full_backward_hook"
    }
    module.__class__ = type(other)
    module.__dict__.clear()
    module.__dict__.update(other.__dict__ | hooks)
    return module
