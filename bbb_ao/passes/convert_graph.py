"""Lower the Linears of a block's FX graph to packed weights: aten.linear becomes bbb_ao.packed_linear."""

from collections.abc import Collection
from typing import cast

import torch
from torch import fx, nn

from bbb_ao.packed_linear import PackedLinear
from bbb_ao.passes.fx_nodes import NN_LINEAR, caller, copy_graph_module, input_node, is_linear
from bbb_ao.passes.rewrite_graph import PADDING, FakeQuantizeActivation, FakeQuantizeWeight
from bbb_ao.qat_linear import QATLinear
from bbb_ao.quantize import BitByBitQATConfig


def convert_graph(
    gm: fx.GraphModule, config: BitByBitQATConfig, linears: Collection[str] | None = None
) -> fx.GraphModule:
    """Pack the weights of aten.linear nodes and call torch.ops.bbb_ao.packed_linear(_dynamic) in their place.

    A fake-quantized Linear keeps its grid and runs at its widths, with its parent code stored up to `config.bits`; a
    plain one runs at those of `config`. Planes, scales and zero points become buffers beside the Linear's bias
    (`mlp.down_proj.plane_high`), as in a live `PackedLinear`; rows that `duplicate_channels` repeated are stored twice
    here. Ragged in_features are padded. Inference only.

    Args:
        gm: a block from `capture_block`, before or after `duplicate_channels` and `insert_fake_quantize`.
        config: `bits` is the widest slice to store; `act_bits` and the grid are for Linears without fake quantization.
        linears: names of the Linears; by default the fake-quantized ones, or, where there is none, those whose node an
            nn.Linear made.
    Returns:
        a new graph module, without the parameters that it no longer needs.
    Raises:
        ValueError: a name that the graph has no aten.linear for, or float32 scales.
        NumericsError: a weight that is NaN or infinite.
    """
    gm = copy_graph_module(gm)
    calls = {call: name for call in gm.graph.nodes if is_linear(call) and (name := _stored_name(gm, call)) is not None}
    if linears is None:
        fake = {name for call, name in calls.items() if _weight_module(gm, call) is not None}
        linears = fake or {name for call, name in calls.items() if caller(call).kind == NN_LINEAR}
    if missing := set(linears) - set(calls.values()):
        raise ValueError(f"the graph has no aten.linear for {', '.join(sorted(missing))}; plan it from this graph")
    packed: dict[str, PackedLinear] = {}
    for call, name in calls.items():
        if name in linears:
            if name not in packed:
                packed[name] = _pack(gm, call, config)
            _replace(gm, call, name, packed[name])
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    # A copy takes along only what its nodes refer to.
    return copy_graph_module(gm)


def _called_module(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def _weight_module(gm: fx.GraphModule, call: fx.Node) -> FakeQuantizeWeight | None:
    module = _called_module(gm, cast(fx.Node, call.args[1]))
    return module if isinstance(module, FakeQuantizeWeight) else None


def _weight_node(gm: fx.GraphModule, call: fx.Node) -> fx.Node:
    node = cast(fx.Node, call.args[1])
    return node if _weight_module(gm, call) is None else input_node(node)


def _stored_name(gm: fx.GraphModule, call: fx.Node) -> str | None:
    """Name of the module whose `weight` an aten.linear reads, also through fake quantization; None where computed."""
    node = _weight_node(gm, call)
    path, _, attribute = str(node.target).rpartition(".")
    return path if node.op == "get_attr" and attribute == "weight" else None


def _pack(gm: fx.GraphModule, call: fx.Node, config: BitByBitQATConfig) -> PackedLinear:
    weight = gm.get_parameter(str(_weight_node(gm, call).target))
    fake_weight, fake_input = _weight_module(gm, call), _called_module(gm, input_node(call))
    grid = config.grid() if fake_weight is None else fake_weight.grid
    bits, act_bits = (config.bits, config.act_bits) if fake_weight is None else (fake_weight.bits, None)
    padding = call.meta.get(PADDING, 0)
    if isinstance(fake_input, FakeQuantizeActivation):
        act_bits, padding = fake_input.bits, fake_input.padding
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    ragged = -weight.shape[1] % grid.group_size
    index = None
    if ragged:
        columns = torch.arange(weight.shape[1] + ragged, dtype=torch.int32, device=weight.device)
        index = columns.clamp(max=weight.shape[1])
    host = QATLinear.from_linear(linear, bits, act_bits, grid, index)
    host.padding = padding + ragged
    return PackedLinear.from_qat(host, max(config.bits, bits))


def _replace(gm: fx.GraphModule, call: fx.Node, name: str, packed: PackedLinear) -> None:
    """Call the op with the packed weight's tensors as buffers of the module `name`."""
    weight, holder = packed.weight, gm.get_submodule(name)
    tensors = {
        "plane_high": weight.high,
        "plane_mid": weight.mid,
        "plane_low": weight.low,
        "scale": weight.scale,
        "scale_exponent": weight.scale_exponent,
        "zero_point": weight.zero_point,
        "ocs_index": weight.index,
    }
    x = input_node(call)
    if isinstance(_called_module(gm, x), FakeQuantizeActivation):
        x = input_node(x)
    with gm.graph.inserting_before(call):
        operands: list[fx.Node | None] = [x]
        for attribute, tensor in tensors.items():
            if tensor is not None:
                holder.register_buffer(attribute, tensor)
            operands.append(None if tensor is None else gm.graph.get_attr(f"{name}.{attribute}".removeprefix(".")))
        bias = cast("fx.Node | None", call.args[2] if len(call.args) > 2 else call.kwargs.get("bias"))
        settings = (weight.bits, weight.grid.zero_point_bits, weight.grid.half_step, weight.grid.group_size)
        if weight.act_bits is None:
            op, extra = torch.ops.bbb_ao.packed_linear.default, ()
        else:
            half_step = weight.grid.activation_kind == "half_step"
            op, extra = torch.ops.bbb_ao.packed_linear_dynamic.default, (weight.act_bits, half_step)
        result = gm.graph.call_function(op, (*operands, bias, *settings, *extra))
    result.meta = dict(call.meta)
    call.replace_all_uses_with(result)
    gm.graph.erase_node(call)
