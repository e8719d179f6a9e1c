"""Lowering a trained model: QATLinears to PackedLinears, and packed ones back to plain Linears."""

import torch
from torch import Tensor, nn

from bbb_ao.duplication import undo_duplicate_output
from bbb_ao.errors import NumericsError
from bbb_ao.packed_linear import PackedLinear, packed_linears, set_bits
from bbb_ao.qat_linear import become, qat_linears
from bbb_ao.splitting import merge_channels


def convert_model(model: nn.Module, max_bits: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Pack every QATLinear of `model` in place.

    Args:
        max_bits: the widest slice to store.
        dtype: of the biases.
    Returns:
        `model`.
    Raises:
        NumericsError: a weight or a learned scale is NaN or infinite; names the layer.
        ValueError: max_bits, or an index that nothing in the model delivers.
    """
    for name, qat in qat_linears(model).items():
        index = qat.ocs_index
        try:
            packed = PackedLinear.from_qat(qat, max_bits, dtype)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from None
        if index is not None:
            packed.index_source = f"{name}.ocs_index" if qat.expands_input else _source(model, name, index)
        become(qat, packed)
    return model


def _source(model: nn.Module, name: str, index: Tensor) -> str:
    """The buffer outside this layer that delivers its columns; the closest by name among equal ones."""
    candidates = [
        buffer_name
        for buffer_name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer_name.endswith(("duplicate_index", "out_index")) and torch.equal(buffer, index)
    ]
    if not candidates:
        raise ValueError(f"{name}: its input is expanded elsewhere, but no norm or Linear holds that index")
    return max(candidates, key=lambda candidate: _common_prefix(candidate, name))


def _common_prefix(first: str, second: str) -> int:
    shared = 0
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        shared += 1
    return shared


def gather_inputs(model: nn.Module) -> nn.Module:
    """Let every packed layer gather its own split channels, in place, instead of the module before it.

    The same function, with an index for each layer: for loaders that know linear layers alone, such as vLLM's.

    Returns:
        `model`.
    Raises:
        ValueError: a layer whose index is not known. Nothing was changed.
    """
    layers = packed_linears(model)
    indices = {name: _columns_index(model, name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        if layer.fused is not None:
            layer.fused.dissolve()
        layer.out_index = None
        index = indices[name]
        if index is not None and not layer.expands_input:
            layer.ocs_index, layer.expands_input, layer.index_source = index.clone(), True, f"{name}.ocs_index"
    _undo_duplicates(model)
    return model


def _undo_duplicates(model: nn.Module) -> None:
    for module in model.modules():
        if "duplicate_index" in module._buffers:
            undo_duplicate_output(module)


def to_dense(model: nn.Module, dtype: torch.dtype, bits: int | None = None) -> nn.Module:
    """Replace every PackedLinear in place by a plain nn.Linear with the dequantized weight, split channels merged.

    y is the same up to rounding to `dtype`; activations are no longer quantized.

    Args:
        dtype: of the weights, float32, float16 or bfloat16.
        bits: width to dequantize; None takes each layer's current one.
    Returns:
        `model`, with its original architecture.
    Raises:
        ValueError: a width that is not stored, or a layer whose index is not known. Nothing was changed.
    """
    layers = packed_linears(model)
    indices = {name: _columns_index(model, name, layer) for name, layer in layers.items()}
    if bits is not None:
        set_bits(model, bits)
    for name, layer in layers.items():
        weight = layer.weight.stored_weight()
        index = indices[name]
        if index is not None:
            weight = merge_channels(weight, index, layer.in_features)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        become(layer, linear)
    _undo_duplicates(model)
    return model


def _columns_index(model: nn.Module, name: str, layer: PackedLinear) -> Tensor | None:
    if layer.expands_input:
        return layer.ocs_index
    if layer.index_source is not None:
        return model.get_buffer(layer.index_source)
    if layer.stored_features != layer.in_features:
        raise ValueError(
            f"{name}: its input is expanded elsewhere, by an index that was not recorded; convert with convert_model"
        )
    return None
