"""Questions that the passes ask of the FX nodes of an exported block."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
NN_LINEAR = "torch.nn.modules.linear.Linear"

# These hand their first argument on with its last dimension in place.
TRANSPARENT = frozenset(
    {
        aten.to,
        aten._to_copy,
        aten.type_as,
        aten.alias,
        aten.detach,
        aten.detach_,
        aten.contiguous,
        aten.clone,
        aten.dropout,
        aten.lift_fresh_copy,
    }
)

# These act on each element by itself, so a duplicated channel stays a duplicate.
ELEMENTWISE = frozenset(
    {
        aten.abs,
        aten.add,
        aten.clamp,
        aten.clamp_min,
        aten.div,
        aten.elu,
        aten.erf,
        aten.exp,
        aten.gelu,
        aten.hardsigmoid,
        aten.hardswish,
        aten.hardtanh,
        aten.leaky_relu,
        aten.mish,
        aten.mul,
        aten.neg,
        aten.pow,
        aten.relu,
        aten.relu6,
        aten.rsub,
        aten.sigmoid,
        aten.silu,
        aten.softplus,
        aten.square,
        aten.sub,
        aten.tanh,
    }
)

VIEWS = frozenset(
    {
        aten.expand,
        aten.flatten,
        aten.permute,
        aten.reshape,
        aten.slice,
        aten.squeeze,
        aten.transpose,
        aten.unflatten,
        aten.unsqueeze,
        aten.view,
    }
)

# Products of activations with activations.
ATTENTION = frozenset({aten.scaled_dot_product_attention, aten.matmul, aten.bmm, aten.einsum})


class Caller(NamedTuple):
    """The module whose forward made a node: its call (a module called twice has two), name and class name."""

    call: str
    name: str
    kind: str


def packet(node: fx.Node) -> Any:
    """The overload packet that a node calls (aten.add for aten.add.Tensor), or its target."""
    return getattr(node.target, "overloadpacket", node.target)


def op_name(node: fx.Node) -> str:
    """aten.add for aten.add.Tensor, the placeholder's or attribute's name otherwise."""
    if node.op != "call_function":
        return str(node.target)
    return str(packet(node)) if hasattr(node.target, "overloadpacket") else getattr(node.target, "__name__", "?")


def caller(node: fx.Node) -> Caller:
    """The innermost module of a node's `nn_module_stack`; empty strings where nothing is recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return Caller("", "", "")
    call, (name, kind) = list(stack.items())[-1]
    return Caller(call, name, kind if isinstance(kind, str) else kind.__name__)


def is_norm(node: fx.Node) -> bool:
    """Whether a norm module (by its class name) made the node."""
    return node.op == "call_function" and "norm" in caller(node).kind.rpartition(".")[2].lower()


def is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and packet(node) is aten.linear


def is_packed_linear(node: fx.Node) -> bool:
    ops = torch.ops.bbb_ao
    return node.op == "call_function" and packet(node) in (ops.packed_linear, ops.packed_linear_dynamic)


def linear_name(node: fx.Node) -> str | None:
    """Name of the module whose `weight` an aten.linear node reads, or None where the weight is computed."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    path = str(weight.target)
    if path == "weight":
        return ""
    return path.removesuffix(".weight") if path.endswith(".weight") else None


def linear_names(gm: fx.GraphModule) -> list[str]:
    """Names of the Linears whose aten.linear node an nn.Linear made, in the order of calls."""
    calls = [node for node in gm.graph.nodes if is_linear(node) and caller(node).kind == NN_LINEAR]
    return list(dict.fromkeys(name for name in map(linear_name, calls) if name is not None))


def input_node(node: fx.Node) -> fx.Node:
    """The first argument, which every op of this module's sets has as a node."""
    return cast(fx.Node, node.args[0])


def source(node: fx.Node) -> fx.Node:
    """The value that a node hands on, through casts, clones and the dropout of evaluation."""
    while node.op == "call_function" and packet(node) in TRANSPARENT:
        node = input_node(node)
    return node


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that compute with a value, looking through casts, clones and dropout."""
    for user in node.users:
        if user.op == "call_function" and packet(user) in TRANSPARENT and input_node(user) is node:
            yield from readers(user)
        elif packet(user) is not aten.type_as:
            yield user


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's recorded value, or None where it has none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with nodes of its own that shares parameters and submodules with `gm`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    # The original output node's metadata is of no use here; its calling convention is.
    graph.set_codegen(gm.graph._codegen)
    return fx.GraphModule(gm, graph)


def replace_parameter(gm: fx.GraphModule, target: str, change: Callable[[Tensor], Tensor]) -> None:
    """Put a changed tensor in the place of a parameter, as a parameter."""
    path, _, attribute = target.rpartition(".")
    module = gm.get_submodule(path)
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(change(old.detach()), requires_grad=old.requires_grad))
