"""Packed layers in vLLM: parameters named as in the checkpoint, rows of merged layers side by side, one packed product.

vLLM merges q/k/v and gate/up into one layer each, and hands over their tensors one by one with the place of each. Every
layer must gather its own split channels: `bbb_ao.convert.gather_inputs` makes such a checkpoint out of any other.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
)

from bbb_ao.errors import ModelError
from bbb_ao.grid import Grid
from bbb_ao.huggingface import QUANT_METHOD, BitByBitConfig
from bbb_ao.packed_linear import PackedLinear
from bbb_ao.packed_tensor import packed_product
from bbb_ao.splitting import check_index

PLACES = {None: 0, "q": 0, "k": 1, "v": 2}
# What the parts of a merged layer must agree in.
SHARED = ("in_features", "stored_features", "max_bits", "act_bits", "expands_input", "fixed_bits", "bits")


class PackedConfig(QuantizationConfig):
    """`quantization_config` of a packed checkpoint, for vLLM.

    Attributes:
        bits: the width of all layers, from the model's configuration (`--hf-overrides '{"bits": 4}'`); None: the one
            that each layer opens at, or the widest.
    """

    def __init__(self, config: BitByBitConfig) -> None:
        super().__init__()
        self.grid, self.modules = Grid(**config.grid), config.modules
        self.bits: int | None = None

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """Raises: NotImplementedError: channels that another module duplicates."""
        parsed = BitByBitConfig(**config)
        apart = {
            name
            for name, shape in parsed.modules.items()
            if shape["stored_rows"] is not None or shape["index_source"] not in (None, f"{name}.ocs_index")
        }
        if apart or parsed.duplicated_outputs:
            raise NotImplementedError(
                f"{min(apart | parsed.duplicated_outputs.keys())}: split channels: expected layers that gather their "
                "own, got some that another module duplicates; fix: save gather_inputs(model) of bbb_ao.convert"
            )
        return cls(parsed)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the width that the checkpoint, or an override, opens at."""
        self.bits = getattr(hf_config, "bits", None)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of one of vLLM's layers, by the names of the checkpoint's layers that it is made of.

        Raises:
            NotImplementedError: a packed head, or a layer of which only a part is packed.
        """
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(last, [last])]
        packed = [name for name in names if name in self.modules]
        if packed and not isinstance(layer, LinearBase):
            raise NotImplementedError(f"{prefix}: expected a linear layer, got a packed {type(layer).__name__}")
        if packed and packed != names:
            raise NotImplementedError(f"{prefix}: expected all of {', '.join(names)} packed, got {', '.join(packed)}")
        if not packed:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return PackedMethod(prefix, self.grid, [self.modules[name] for name in names], self.bits)


class PackedMethod(LinearMethodBase):
    """One layer of vLLM, made of one or more packed layers that read one input.

    Args:
        prefix: the layer's name, for errors.
        shapes: of its parts, entries of `BitByBitConfig.modules`.
        bits: None for the width of the layer itself.
    """

    def __init__(self, prefix: str, grid: Grid, shapes: list[dict[str, Any]], bits: int | None) -> None:
        self.prefix, self.grid, self.shapes = prefix, grid, shapes
        shape = shapes[0]
        for key in SHARED:
            if len({other.get(key) for other in shapes}) > 1:
                raise NotImplementedError(f"{prefix}: {key}: expected one for all merged layers, got several")
        self.act_bits: int | None = shape["act_bits"]
        self.bits = shape["max_bits"] if shape["fixed_bits"] else bits or shape.get("bits") or shape["max_bits"]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters with loaders of their own, which know where the rows of each part belong.

        Raises:
            NotImplementedError: the layer is cut by tensor parallelism; ModelError: another size or width.
        """
        shape, rows = self.shapes[0], [each["out_features"] for each in self.shapes]
        if output_size != sum(output_partition_sizes) or input_size != input_size_per_partition:
            raise NotImplementedError(f"{self.prefix}: tensor parallelism: expected one GPU, got several")
        if (output_partition_sizes, input_size) != (rows, shape["in_features"]):
            expected = f"{rows} rows of {shape['in_features']}"
            raise ModelError(f"{self.prefix}: expected {expected}, got {output_partition_sizes} of {input_size}")
        packed = PackedLinear(
            shape["in_features"],
            sum(rows),
            shape["stored_features"],
            self.grid,
            shape["max_bits"],
            expands_input=shape["expands_input"],
            fixed_bits=shape["fixed_bits"],
        )
        try:
            packed.check_width(self.bits, f"{self.prefix}: ")
        except ValueError as error:
            raise ModelError(str(error)) from None
        # Each part has a second level of its scales of its own.
        packed.scale_exponent = packed.scale_exponent.new_empty(sum(rows))
        for name, buffer in packed._buffers.items():
            parameter = None if buffer is None else nn.Parameter(buffer, requires_grad=False)
            if parameter is not None:
                parameter.weight_loader = self._loader(name, rows)  # type: ignore[attr-defined]
            if name != "bias":
                layer.register_parameter(name, parameter)

    def _loader(self, name: str, rows: list[int]) -> Callable[..., None]:
        ends = list(accumulate(rows))
        first: list[Tensor] = []

        def load(parameter: nn.Parameter, loaded: Tensor, place: int | str | None = None) -> None:
            number = place if isinstance(place, int) else PLACES[place]
            target = parameter.data[ends[number] - rows[number] : ends[number]]
            if name == "ocs_index":
                target = parameter.data
                if first and not torch.equal(first[0], loaded):
                    raise NotImplementedError(f"{self.prefix}.{name}: expected equal split channels, got others")
                first[:] = [loaded]
            elif name == "scale_exponent":
                loaded = loaded.expand_as(target)
            if (target.shape, target.dtype) != (loaded.shape, loaded.dtype):
                found = f"{loaded.dtype} {list(loaded.shape)}"
                raise ModelError(f"{self.prefix}.{name}: expected {target.dtype} {list(target.shape)}, got {found}")
            target.copy_(loaded)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse damaged scales and indices, and free the planes that the width does not read.

        Raises:
            ModelError: names the tensor.
        """
        if bool((layer.scale > 0x7E).any()):
            raise ModelError(f"{self.prefix}.scale: expected finite values >= 0, got NaN or negative ones")
        if layer.ocs_index is not None:
            try:
                where = f"{self.prefix}.ocs_index"
                check_index(layer.ocs_index, self.shapes[0]["in_features"], self.grid.group_size, where)
            except ValueError as error:
                raise ModelError(str(error)) from None
        if self.grid.half_step:
            for name, above in (("plane_mid", 2), ("plane_low", 4)):
                if self.bits <= above:
                    layer.register_parameter(name, None)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., rows of all parts]."""
        planes = (layer.plane_high, layer.plane_mid, layer.plane_low)
        scales = (layer.scale, layer.scale_exponent, layer.zero_point)
        return packed_product(x, planes, scales, layer.ocs_index, bias, self.bits, self.act_bits, self.grid)
