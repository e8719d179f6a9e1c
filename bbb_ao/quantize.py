"""The torchao front door: `quantize_(model, bitbybit_qat(bits=2))` and its conversion step."""

import gc
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.transform_module import register_quantize_module_handler

from bbb_ao.grid import Grid, check_bits
from bbb_ao.packed_linear import PackedLinear
from bbb_ao.qat_linear import QATLinear, become, is_plain_linear
from bbb_ao.splitting import channel_metric, choose_index

__all__ = ["BitByBitQATConfig", "bitbybit_qat", "quantize_"]


@dataclass
class BitByBitQATConfig(AOBaseConfig):
    """What `quantize_` does to each Linear; see `bitbybit_qat` for the arguments."""

    bits: int = 2
    act_bits: int | None = None
    group_size: int = 32
    split_ratio: float = 0.0
    learned_scales: bool = False
    detach_scales: bool = False
    kind: str = "half_step"
    zero_point_bits: int | None = None
    act_kind: str | None = None
    step: str = "prepare"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.act_bits is not None:
            check_bits(self.act_bits, "act_bits")
        if not 0 <= self.split_ratio <= 1:
            raise ValueError(f"split_ratio: expected 0 to 1, got {self.split_ratio}")
        if self.step not in ("prepare", "convert"):
            raise ValueError(f"step: expected 'prepare' or 'convert', got {self.step!r}")
        self.grid()

    def grid(self) -> Grid:
        """The weight grid of these settings; zero_point_bits None means 4 (half_step) or 2 (integer)."""
        default = 4 if self.kind == "half_step" else 2
        zero_point_bits = default if self.zero_point_bits is None else self.zero_point_bits
        return Grid(self.kind, self.group_size, zero_point_bits, act_kind=self.act_kind)


def bitbybit_qat(bits: int = 2, act_bits: int | None = None, **settings: Any) -> BitByBitQATConfig:
    """Configuration for `quantize_`: quantization-aware training on the nested grid, or its conversion.

    Args:
        bits: width of the weights in training, 2 to 8; with step="convert" the widest slice that is packed.
        act_bits: width of dynamically quantized activations, 2 to 8, or None.
        group_size: weights along in_features that share a scale; ragged in_features are padded.
        split_ratio: share of input channels to split, 0 to 1, ranked by max_j |W_jm| (no calibration data here).
        learned_scales: scale and zero point are parameters; else they follow each group's minimum and maximum.
        detach_scales: closed-form scales pass no gradient.
        kind: "half_step" or "integer" grid.
        zero_point_bits: bits of the stored zero offset.
        act_kind: grid of the activations, "half_step" or "integer"; None takes that of the weights.
        step: "prepare" swaps Linears for QATLinears, "convert" packs QATLinears.
    Raises:
        ValueError: a value out of range; TypeError: an unknown setting.
    """
    return BitByBitQATConfig(bits, act_bits, **settings)


@register_quantize_module_handler(BitByBitQATConfig)
def _transform(module: nn.Module, config: BitByBitQATConfig) -> nn.Module:
    """Prepare or convert one module in place; repeating a step changes nothing."""
    if config.step == "convert":
        if isinstance(module, QATLinear):
            return become(module, PackedLinear.from_qat(module, config.bits))
        return module
    if isinstance(module, QATLinear | PackedLinear):
        return module
    if not isinstance(module, nn.Linear):
        raise TypeError(
            f"filter_fn selected a {type(module).__name__}; bitbybit_qat quantizes nn.Linear only: "
            "let filter_fn test isinstance(module, torch.nn.Linear)"
        )
    # MultiheadAttention never calls its out_proj, it reads the weight.
    if isinstance(module, NonDynamicallyQuantizableLinear) or _is_tied(module) or not is_plain_linear(module):
        return module
    grid = config.grid()
    index = choose_index(channel_metric([module.weight]), config.split_ratio, grid.group_size)
    host = QATLinear.from_linear(
        module,
        config.bits,
        config.act_bits,
        grid,
        index,
        learned_scales=config.learned_scales,
        detach_scales=config.detach_scales,
    )
    return become(module, host)


def _is_tied(linear: nn.Linear) -> bool:
    """Whether another module holds the same weight Parameter (a head tied to the embedding).

    torchao hands over one module at a time, so the owners are found among the objects that refer to the Parameter:
    every owner's `_parameters` is a dictionary with it as a value.
    """
    weight = linear.weight
    # The dictionary, the local name and getrefcount's argument; an untied weight needs no search.
    if sys.getrefcount(weight) <= 3:
        return False
    owners = [
        referrer
        for referrer in gc.get_referrers(weight)
        if isinstance(referrer, dict) and any(value is weight for value in referrer.values())
    ]
    # A module may count twice as a holder (itself and its __dict__), its `_parameters` only once.
    held = [owner for owner in owners if any(_is_module_state(holder, owner) for holder in gc.get_referrers(owner))]
    return len(held) > 1


def _is_module_state(holder: Any, owner: dict) -> bool:
    return (isinstance(holder, dict) and holder.get("_parameters") is owner) or (
        isinstance(holder, nn.Module) and holder._parameters is owner
    )
