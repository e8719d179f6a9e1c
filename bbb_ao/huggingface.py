"""The Hugging Face quantizer: `AutoModelForCausalLM.from_pretrained(directory, bits=4)` after `import bbb_ao`.

`budget_gb=2.5` instead of `bits` opens the widest width whose weights fit (`bbb_ao.budget`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bbb_ao.budget import fit_budget
from bbb_ao.duplication import duplicate_output
from bbb_ao.errors import ModelError
from bbb_ao.grid import Grid
from bbb_ao.kernels import EXPONENT_MAX, EXPONENT_MIN
from bbb_ao.modeldir import check_weights, read_stored
from bbb_ao.packed_config import FORMAT_VERSION, check_packed_config, check_stored
from bbb_ao.packed_linear import PackedLinear, packed_linears, set_bits
from bbb_ao.safetensors_header import TensorEntry
from bbb_ao.splitting import check_index

QUANT_METHOD = "bitbybit"
DESCRIPTION = ("format_version", "grid", "modules", "duplicated_outputs")


class BitByBitConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: the shape of every quantized module.

    Args:
        grid: fields of `Grid`.
        modules: for each packed Linear's name in_features, out_features, stored_features, max_bits, act_bits,
            expands_input, padding, stored_rows, bias, fixed_bits (False where it is missing), index_source (the buffer
            that holds the index of its columns, or None), and, where layers have widths of their own, bits, the width
            that it opens at.
        duplicated_outputs: for each norm whose output is gathered its number of stored columns.
        format_version: of this description; a newer one is refused.
    """

    def __init__(
        self,
        grid: dict[str, Any] | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        duplicated_outputs: dict[str, int] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ModelError(
                f"config.json: quantization_config.format_version: expected {FORMAT_VERSION}, got {format_version!r}; "
                "fix: update bbb_ao"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.grid = grid if grid is not None else Grid().to_dict()
        self.modules = modules or {}
        self.duplicated_outputs = duplicated_outputs or {}


class BitByBitHfQuantizer(HfQuantizer):
    """Builds the packed modules on the meta device, lets transformers fill their buffers, and selects the width."""

    requires_calibration = True
    quantization_config: BitByBitConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        stored = read_stored(model.name_or_path, kwargs.get("checkpoint_files") or ())
        described = {name: getattr(self.quantization_config, name) for name in DESCRIPTION}
        check_packed_config(described)
        if stored:
            check_stored(described, stored)
        build_packed_modules(model, self.quantization_config)
        check_shapes(model, stored)
        files = kwargs.get("checkpoint_files") or ()
        if getattr(model.config, "budget_gb", None) is not None:
            self._fit_budget(model, files)
        return model

    def _fit_budget(self, model: Any, files: Sequence[str | Path]) -> None:
        """Open the model at the width of its `budget_gb`; what is saved from it has that width as its widest."""
        config = model.config
        # By the attribute alone, bits= cannot be told from the width that the checkpoint opens at.
        stored = json.loads((Path(files[0]).parent / "config.json").read_bytes()) if files else vars(config)
        if getattr(config, "bits", None) != stored.get("bits"):
            raise ModelError("bits: expected it or budget_gb, got both; fix: give one of them")
        config.bits, config.budget_gb = fit_budget(model, config.budget_gb), None
        for name, layer in packed_linears(model).items():
            self.quantization_config.modules[name]["max_bits"] = layer.max_bits
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.plane_(mid|low)$"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_indices(model)
        check_scales(model)
        check_weights(model)
        bits = getattr(model.config, "bits", None)
        if bits is not None:
            try:
                set_bits(model, bits)
            except ValueError as error:
                raise ModelError(f"bits: {error}; fix: pass bits= with a stored width") from None
        return model

    def is_serializable(self, **kwargs: Any) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_compileable(self) -> bool:
        return True


# As calls: the decorators have no types, and hide those of the classes.
register_quantization_config(QUANT_METHOD)(BitByBitConfig)
register_quantizer(QUANT_METHOD)(BitByBitHfQuantizer)


def build_packed_modules(model: nn.Module, config: BitByBitConfig) -> None:
    """Replace the Linears that `config` names by empty PackedLinears, and let the named norms gather their output.

    Raises:
        ModelError: a name that the architecture does not have, or settings that describe no layer.
    """
    where = "grid"
    try:
        grid = Grid(**config.grid)
        for name, shape in config.modules.items():
            where = f"modules: {name}"
            _place_packed(model, name, dict(shape), grid)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"config.json: quantization_config.{where}: expected the settings of a packed layer, got: {error}; "
            "fix: restore the config.json that was saved with the weights"
        ) from None
    for name, columns in config.duplicated_outputs.items():
        norm = _submodule(model, name)
        duplicate_output(norm, torch.empty(columns, dtype=torch.int32, device="meta"))


def _place_packed(model: nn.Module, name: str, shape: dict[str, Any], grid: Grid) -> None:
    linear: Any = _submodule(model, name)
    sizes = [shape["in_features"], shape["out_features"]]
    if not isinstance(linear, nn.Linear) or [linear.in_features, linear.out_features] != sizes:
        raise ValueError(f"sizes {sizes} for {linear!r:.80}")
    index_source = shape.pop("index_source")
    bias_dtype = linear.weight.dtype if shape.pop("bias") else None
    bits = shape.pop("bits", None)
    packed = PackedLinear(**shape, grid=grid, bias_dtype=bias_dtype, device="meta")
    packed.index_source = index_source
    if bits is not None:
        packed.set_bits(bits)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, packed)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"config.json: quantization_config.modules: {name!r} is no module of {type(model).__name__}; "
            "fix: restore the config.json that was saved with the weights"
        ) from None


def check_shapes(model: nn.Module, stored: Mapping[str, TensorEntry]) -> None:
    """Refuse stored tensors of another shape than the architecture has by its configuration.

    Raises:
        ModelError: names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        entry = stored.get(name)
        if entry is not None and entry.shape != tuple(tensor.shape):
            raise ModelError(
                f"{name}: expected {list(tensor.shape)} by config.json, got {list(entry.shape)}; "
                "fix: restore the config.json that was saved with the weights"
            )


def check_indices(model: nn.Module) -> None:
    """Refuse loaded indices that point outside their channels.

    Raises:
        ModelError: names the buffer.
    """
    read: dict[str, torch.Tensor] = {}
    for name, layer in packed_linears(model).items():
        size = layer.grid.group_size
        try:
            if layer.ocs_index is not None:
                check_index(layer.ocs_index, layer.in_features, size, f"{name}.ocs_index")
            if layer.out_index is not None:
                check_index(layer.out_index, layer.out_features, size, f"{name}.out_index")
            if layer.index_source is not None and not layer.expands_input:
                read[layer.index_source] = index = model.get_buffer(layer.index_source)
                check_index(index, layer.in_features, size, layer.index_source)
                if layer.padding != (padding := int((index == layer.in_features).sum())):
                    raise ValueError(
                        f"{name}: padding: expected {padding}, as in {layer.index_source}, got {layer.padding}; "
                        "fix: restore config.json"
                    )
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{error}") from None
    for name, index in model.named_buffers():
        # Of equal indices, layers name one.
        if name.endswith("duplicate_index") and name not in read and not any(map(index.equal, read.values())):
            raise ModelError(f"{name}: expected an index that a layer reads, got another; fix: copy all files again")


def check_scales(model: nn.Module) -> None:
    """Refuse loaded scales that are NaN or negative, or whose second level is out of range.

    Raises:
        ModelError: names the buffer.
    """
    for name, layer in packed_linears(model).items():
        # The sign bit and the two NaN patterns of E4M3 are all above 0x7E.
        if bad := int((layer.scale > 0x7E).sum()):
            raise ModelError(
                f"{name}.scale: expected finite values >= 0, got {bad} NaN or negative; "
                "fix: use an undamaged checkpoint"
            )
        exponent = int(layer.scale_exponent)
        if not EXPONENT_MIN <= exponent <= EXPONENT_MAX:
            raise ModelError(
                f"{name}.scale_exponent: expected {EXPONENT_MIN} to {EXPONENT_MAX}, got {exponent}; "
                "fix: use an undamaged checkpoint"
            )


def quantization_config(model: nn.Module, own_bits: bool = False) -> BitByBitConfig:
    """Describe a converted model, so that it can be saved and loaded again.

    Args:
        own_bits: every layer opens at its present width.
    Raises:
        ValueError: no packed layer; NotImplementedError: layers on different grids.
    """
    layers = packed_linears(model)
    if not layers:
        raise ValueError("quantization_config: the model has no packed layers; convert it first")
    grids = {layer.grid for layer in layers.values()}
    if len(grids) > 1:
        raise NotImplementedError(f"quantization_config: one grid for all layers is supported, got {len(grids)}")
    modules = {
        name: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "stored_features": layer.stored_features,
            "max_bits": layer.max_bits,
            "act_bits": layer.act_bits,
            "expands_input": layer.expands_input,
            "padding": layer.padding,
            "stored_rows": None if layer.out_index is None else layer.out_index.numel(),
            "bias": layer.bias is not None,
            "fixed_bits": layer.fixed_bits,
            "index_source": f"{name}.ocs_index" if layer.expands_input else layer.index_source,
            **({"bits": layer.bits} if own_bits else {}),
        }
        for name, layer in layers.items()
    }
    suffix = ".duplicate_index"
    duplicated = {
        name.removesuffix(suffix): buffer.numel() for name, buffer in model.named_buffers() if name.endswith(suffix)
    }
    return BitByBitConfig(grids.pop().to_dict(), modules, duplicated)


def attach_quantizer(model: Any, bits: int | None) -> None:
    """Make a converted Hugging Face model savable by its own `save_pretrained`.

    Args:
        bits: the width that it opens at; None: every layer at its present one.
    """
    config = quantization_config(model, own_bits=bits is None)
    model.config.quantization_config = config
    model.config.bits = bits
    # An attribute of the configuration, so that `from_pretrained(directory, budget_gb=...)` takes it.
    model.config.budget_gb = None
    model.hf_quantizer = BitByBitHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
