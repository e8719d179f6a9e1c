"""Rewrite a captured block's FX graph. Each pass stands alone and returns a new graph module, linted and recompiled.

A returned graph shares the parameters that did not change with the one it came from, which stays as it was.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bbb_ao.activations import fake_quantize_activation
from bbb_ao.grid import Grid, fake_quantize_weight, scale_and_zero_point
from bbb_ao.passes.fx_nodes import (
    aten,
    copy_graph_module,
    input_node,
    is_linear,
    linear_name,
    linear_names,
    replace_parameter,
    source,
)
from bbb_ao.passes.plan import RewritePlan, SplitSite
from bbb_ao.quantize import BitByBitQATConfig
from bbb_ao.splitting import check_index, split_channels

# node.meta key of an aten.linear: how many trailing columns of its input are padding.
PADDING = "bbb_ao_padding"


def duplicate_channels(
    gm: fx.GraphModule,
    plan: RewritePlan,
    indices: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
) -> fx.GraphModule:
    """Split the channels of a plan's sites: gathers and duplicated rows go in, split weights replace the old ones.

    Recorded values (`meta["val"]`) are dropped where their shape no longer holds.

    Args:
        gm: a block from `capture_block`, or any graph from `torch.export` whose parameters are get_attr nodes.
        indices: site name -> int32 [stored_features] as from `splitting.choose_index`; other sites stay as they are.
        weights: Linear name -> split weight [out_features, stored_features]; plain halves where it has none.
    Raises:
        ValueError: an index or a weight that does not fit its site, or a name that the plan does not have.
    """
    sites = select_sites(plan, indices)
    gm = copy_graph_module(gm)
    for site in sites:
        index = indices[site.name]
        calls = _calls(gm, site.consumers)
        padding = _split_weights(gm, calls, index, weights or {})
        producers = _calls(gm, site.producers) if site.rule == "rows" else []
        if site.rule == "rows":
            _duplicate_rows(gm, producers, index)
        else:
            buffer = f"{site.name.replace('.', '_')}_channel_index"
            gm.register_buffer(buffer, index)
            _insert_gathers(gm, site, calls, buffer, padding > 0)
        for call in calls:
            call.meta[PADDING] = padding
            _drop_shapes(call, producers)
    gm.graph.lint()
    gm.recompile()
    return gm


def select_sites(plan: RewritePlan, indices: Mapping[str, Tensor]) -> list[SplitSite]:
    """The plan's sites that have an index.

    Raises:
        ValueError: an index for a site that the plan does not have.
    """
    names = {site.name for site in plan.sites}
    if unknown := sorted(set(indices) - names):
        raise ValueError(f"indices: no site {', '.join(unknown)} in the plan; it has {', '.join(sorted(names))}")
    return [site for site in plan.sites if site.name in indices]


def _calls(gm: fx.GraphModule, names: Collection[str]) -> list[fx.Node]:
    nodes = [node for node in gm.graph.nodes if is_linear(node) and linear_name(node) in names]
    if missing := set(names) - {linear_name(node) for node in nodes}:
        raise ValueError(f"the graph has no aten.linear for {', '.join(sorted(missing))}; plan it from this graph")
    return nodes


def _split_weights(gm: fx.GraphModule, calls: Collection[fx.Node], index: Tensor, weights: Mapping[str, Tensor]) -> int:
    """Replace the weights of the calls by split ones; returns the number of padding columns."""
    padding = 0
    for name, target in {linear_name(call) or "": str(call.all_input_nodes[1].target) for call in calls}.items():
        out_features, in_features = gm.get_parameter(target).shape
        check_index(index, in_features, 32, f"index of {name}")
        padding = int((index == in_features).sum())
        split = weights.get(name)
        if split is not None and split.shape != (out_features, index.numel()):
            expected = (out_features, index.numel())
            raise ValueError(f"split weight of {name}: expected shape {expected}, got {tuple(split.shape)}")
        replace_parameter(
            gm, target, lambda old, new=split: split_channels(old, index) if new is None else new.detach()
        )
    return padding


def _duplicate_rows(gm: fx.GraphModule, calls: Collection[fx.Node], index: Tensor) -> None:
    """Repeat output rows (and biases) as the index says; padding rows are zero."""

    def rows(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros_like(tensor[:1])]).index_select(0, index.long())

    for call in calls:
        for parameter in call.all_input_nodes[1:]:
            replace_parameter(gm, str(parameter.target), rows)


def _insert_gathers(gm: fx.GraphModule, site: SplitSite, calls: list[fx.Node], buffer: str, padded: bool) -> None:
    """Insert value[..., index]: once behind the norm for all its users, or before the calls that read a value."""
    if site.rule == "norm":
        value = source(input_node(calls[0]))
        _gather(gm, value, value.next, list(value.users), buffer, padded)
        return
    for value in dict.fromkeys(input_node(call) for call in calls):
        users = [call for call in calls if input_node(call) is value]
        _gather(gm, value, users[0], users, buffer, padded)


def _gather(
    gm: fx.GraphModule, value: fx.Node, before: fx.Node, users: list[fx.Node], buffer: str, padded: bool
) -> None:
    with gm.graph.inserting_before(before):
        index = gm.graph.get_attr(buffer)
        operand = gm.graph.call_function(aten.constant_pad_nd.default, (value, [0, 1])) if padded else value
        gathered = gm.graph.call_function(aten.index_select.default, (operand, -1, index))
    for node in (operand, gathered):
        node.meta.setdefault("nn_module_stack", value.meta.get("nn_module_stack") or {})
    for user in users:
        user.replace_input_with(value, gathered)


def _drop_shapes(call: fx.Node, producers: Collection[fx.Node]) -> None:
    """Forget the recorded values between a call and the gather or the producers that feed it."""
    pending = [input_node(call)]
    while pending:
        node = pending.pop()
        known = node.meta.pop("val", None) is not None
        if known and node not in producers and node.target is not aten.index_select.default:
            pending += [operand for operand in node.all_input_nodes if operand.op == "call_function"]


class FakeQuantizeWeight(nn.Module):
    """Fake quantization of a weight [out_features, in_features] in closed form, ragged in_features padded."""

    def __init__(self, bits: int, grid: Grid) -> None:
        super().__init__()
        self.bits, self.grid = bits, grid

    def forward(self, weight: Tensor) -> Tensor:
        columns = weight.shape[1]
        padded = F.pad(weight, (0, -columns % self.grid.group_size))
        scale, zero_point = scale_and_zero_point(padded, self.grid)
        return fake_quantize_weight(padded, scale, zero_point, self.bits, self.grid)[:, :columns]


class FakeQuantizeActivation(nn.Module):
    """Dynamic fake quantization of activations [..., features]; `padding` trailing features stay zero."""

    def __init__(self, bits: int, grid: Grid, padding: int) -> None:
        super().__init__()
        self.bits, self.grid, self.padding = bits, grid, padding

    def forward(self, x: Tensor) -> Tensor:
        features = x.shape[-1]
        ragged = -features % self.grid.group_size
        padded = F.pad(x, (0, ragged))
        kind = self.grid.activation_kind
        y = fake_quantize_activation(padded, self.bits, self.grid.group_size, kind, self.padding + ragged)
        return y[..., :features]


def insert_fake_quantize(
    gm: fx.GraphModule, config: BitByBitQATConfig, linears: Collection[str] | None = None
) -> fx.GraphModule:
    """Fake-quantize the weight, and with `config.act_bits` the input, of aten.linear nodes.

    The numbers are those of a `QATLinear` with closed-form scales. An input that several Linears read is quantized
    once. Scales follow the weight in every forward; with `config.detach_scales` they still pass a gradient here.

    Args:
        linears: names of the Linears; by default those whose node an nn.Linear made.
    """
    gm = copy_graph_module(gm)
    names = linear_names(gm) if linears is None else linears
    quantized_inputs: dict[fx.Node, fx.Node] = {}
    quantized_weights: dict[str, fx.Node] = {}
    for call in _calls(gm, names):
        name, weight = linear_name(call) or "", call.all_input_nodes[1]
        # get_attr nodes have no inputs, so the shared one may follow the weight directly.
        if name not in quantized_weights:
            module = f"{name}.fake_quantize_weight".removeprefix(".")
            gm.add_submodule(module, FakeQuantizeWeight(config.bits, config.grid()))
            with gm.graph.inserting_after(weight):
                quantized_weights[name] = gm.graph.call_module(module, (weight,))
        call.update_arg(1, quantized_weights[name])
        if config.act_bits is None:
            continue
        x = input_node(call)
        if x not in quantized_inputs:
            module = f"{name}.fake_quantize_input".removeprefix(".")
            gm.add_submodule(module, FakeQuantizeActivation(config.act_bits, config.grid(), call.meta.get(PADDING, 0)))
            with gm.graph.inserting_before(call):
                quantized_inputs[x] = gm.graph.call_module(module, (x,))
        call.update_arg(0, quantized_inputs[x])
    gm.graph.lint()
    gm.recompile()
    return gm
