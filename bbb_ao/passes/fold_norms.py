"""A pass of Inductor: RMSNorm, residual sums and SwiGLU become parts of the packed products around them, for decoding.

    torch.compile(model, options={"post_grad_custom_pre_pass": FoldNorms()})

It looks for packed_linear(norm(residual + packed_linear(x))) with one or two rows of 16-bit floating point, and writes
it as two operators (`kernels.packed_norm` has the equations and bounds), without a launch for the norm. It asks that

- the sum alone reads the first product; anything may read the sum, which goes on as the residual stream;
- the second product alone reads the norm: `fuse_projections` first, so that q/k/v and gate/up are one product;
- the norm divides by the root mean square in float32 and multiplies by a weight that is an input of the graph.

Then silu(gate) * up of a second product's halves becomes a part of it, too, if nothing else reads them.

Where a norm, or both gate and up, deliver split channels twice (`duplicate_output`), the product that reads them
gathers by their index.

Why here and not in the modules: the compiled graph shows who reads the residual stream and a norm whatever the
architecture, the model stays as it is, and eager mode keeps the model's own order of rounding.
"""

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import CallFunction, KeywordArg, Match, PatternExpr

from bbb_ao.kernels.packed_linear.op import packed_linear_op
from bbb_ao.kernels.packed_norm import packed_linear_normed_op, packed_linear_residual_op

aten, prims = torch.ops.aten, torch.ops.prims
packed_linear = packed_linear_op._opoverload
packed_linear_residual = packed_linear_residual_op._opoverload
packed_linear_normed = packed_linear_normed_op._opoverload
MAX_ROWS = 2
INDEX = 7  # place of the index among packed_linear's operands
INDEX_OF: dict[Any, int] = {packed_linear: INDEX, packed_linear_residual: INDEX + 2}
GATED = 3  # place of `gated` among packed_linear_normed's


def _norm_patterns() -> list[PatternExpr]:
    """RMSNorm as models write it: rounded before or after the product with the weight, on either side of it."""
    wide = CallFunction(prims.convert_element_type.default, KeywordArg("hidden"), torch.float32, _users=2)
    mean = CallFunction(
        aten.mean.dim, CallFunction(aten.pow.Tensor_Scalar, wide, 2), KeywordArg("dims"), KeywordArg("keepdim")
    )
    stable = CallFunction([aten.add.Tensor, aten.add.Scalar], mean, KeywordArg("eps"))
    divided = CallFunction(aten.mul.Tensor, wide, CallFunction(aten.rsqrt.default, stable))
    rounded = CallFunction(prims.convert_element_type.default, divided, KeywordArg("dtype"))
    weight, dtype = KeywordArg("weight"), KeywordArg("dtype")
    return [
        CallFunction(aten.mul.Tensor, weight, rounded),
        CallFunction(aten.mul.Tensor, rounded, weight),
        CallFunction(prims.convert_element_type.default, CallFunction(aten.mul.Tensor, divided, weight), dtype),
        CallFunction(prims.convert_element_type.default, CallFunction(aten.mul.Tensor, weight, divided), dtype),
    ]


def _gather_pattern() -> PatternExpr:
    """`expand_channels`: the channels, and behind them those that the rest of an index names."""
    padded = CallFunction(aten.constant_pad_nd.default, KeywordArg("normed"), [0, 1], 0.0)
    gathered = CallFunction(aten.index.Tensor, padded, KeywordArg("places"))
    return CallFunction(aten.cat.default, [KeywordArg("normed"), gathered], -1)


def _gate_patterns() -> list[PatternExpr]:
    """silu(gate) * up, as Inductor takes silu apart."""
    wide = CallFunction(prims.convert_element_type.default, KeywordArg("gate"), torch.float32, _users=2)
    above = CallFunction(aten.add.Tensor, CallFunction(aten.exp.default, CallFunction(aten.neg.default, wide)), 1)
    divided = CallFunction(aten.div.Tensor, wide, above)
    silu, up = CallFunction(prims.convert_element_type.default, divided, KeywordArg("dtype")), KeywordArg("up")
    return [CallFunction(aten.mul.Tensor, silu, up), CallFunction(aten.mul.Tensor, up, silu)]


NORMS, GATHER, GATES = _norm_patterns(), _gather_pattern(), _gate_patterns()


@dataclass(frozen=True)
class Fold:
    """Nodes of packed_linear(norm(residual + packed_linear(x))): `first` and `second` are the products.

    `matched` has those between the sum, `hidden`, and the second product, and the norm's weight and eps.
    """

    first: fx.Node
    residual: fx.Node
    hidden: fx.Node
    weight: fx.Node
    eps: float
    index: fx.Node | None
    second: fx.Node
    matched: tuple[Match, ...]


@dataclass(frozen=True)
class Gate:
    """Nodes of silu(gate) * up: the normed `product` of both, their `slices` of it, what is matched up to `output`.

    index: by which the packed product behind it should gather, if both deliver split channels twice.
    """

    product: fx.Node
    slices: list[fx.Node]
    output: fx.Node
    index: fx.Node | None
    matched: tuple[Match, ...]


class FoldNorms(CustomGraphPass):
    """The pass; see the module."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite `graph`, whose nodes have their fake values in meta["val"], in place."""
        for second in graph.find_nodes(op="call_function", target=packed_linear):
            fold = find_fold(second)
            if fold is not None:
                _rewrite(graph, fold)
        for output in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            gate = find_gate(output)
            if gate is not None:
                _rewrite_gate(graph, gate)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def find_fold(second: fx.Node) -> Fold | None:
    """What can be folded before a packed product, or None."""
    normed: Any = second.args[0]
    index: Any = second.args[INDEX]
    matched: tuple[Match, ...] = ()
    gather = GATHER.match(normed)
    if isinstance(gather, Match) and index is None and len(normed.users) == 1:
        normed, index = gather.kwargs["normed"], _whole_index(gather)
        matched = (gather,)
    norm = _first_match(NORMS, normed)
    if norm is None:
        return None
    # By the second product, or by the pad and the join of its gather.
    if len(normed.users) != 1 + len(matched) or (matched and index is None):
        return None
    hidden, weight, eps = norm.kwargs["hidden"], norm.kwargs["weight"], norm.kwargs["eps"]
    found = _product_and_residual(hidden)
    if found is None or not _fits(hidden, normed, weight, eps, norm.kwargs["dims"], norm.kwargs["keepdim"]):
        return None
    return Fold(*found, hidden, weight, float(eps), index, second, (*matched, norm))


def _first_match(patterns: list[PatternExpr], node: fx.Node) -> Match | None:
    """How the first of the patterns that fits matches `node`, or None."""
    found = (pattern.match(node) for pattern in patterns)
    return next((match for match in found if isinstance(match, Match)), None)


def _whole_index(gather: Match) -> fx.Node | None:
    """The index whose rest a gather takes behind the channels; see `expand_channels`."""
    *before, tail = gather.kwargs["places"]
    channels = _value(gather.kwargs["normed"]).shape[-1]
    if any(place is not None for place in before) or tail.target != aten.slice.Tensor:
        return None
    index, *where = tail.args
    stored = _value(gather.output_node()).shape[-1]
    whole = where[:2] == [0, channels] and _value(index).shape == (stored,)
    return index if whole and index.op in ("placeholder", "get_attr") else None


def _product_and_residual(hidden: Any) -> tuple[fx.Node, fx.Node] | None:
    """(a packed product that only this sum reads, what it is added to) where `hidden` is such a sum."""
    if hidden.target != aten.add.Tensor or hidden.kwargs:
        return None
    for product, residual in (hidden.args, hidden.args[::-1]):
        if isinstance(product, fx.Node) and isinstance(residual, fx.Node) and product.target == packed_linear:
            pair, whole = (_value(product), _value(residual)), _value(hidden)
            same = all(value.shape == whole.shape and value.dtype == whole.dtype for value in pair)
            if len(product.users) == 1 and same:
                return product, residual
    return None


def _fits(hidden: fx.Node, normed: fx.Node, weight: Any, eps: Any, dims: Any, keepdim: Any) -> bool:
    """Whether the norm is over the channels of one or two rows that `decode` takes, with a weight for each channel."""
    value = _value(hidden)
    return (
        value.dtype in (torch.bfloat16, torch.float16)
        and _value(normed).dtype == value.dtype
        and all(isinstance(size, int) for size in value.shape)
        and 0 < value.shape[:-1].numel() <= MAX_ROWS
        and tuple(dims) in ((-1,), (value.dim() - 1,))
        and keepdim is True
        and isinstance(eps, float)
        and isinstance(weight, fx.Node)
        # So it is there before the sum, and no launch of a graph writes it.
        and weight.op in ("placeholder", "get_attr")
        and _value(weight).shape == value.shape[-1:]
    )


def find_gate(output: fx.Node) -> Gate | None:
    """What can be folded into the normed product behind which `output` is SwiGLU, or None."""
    swiglu = _first_match(GATES, output)
    if swiglu is None:
        return None
    halves: list[fx.Node] = [swiglu.kwargs["gate"], swiglu.kwargs["up"]]
    if not all(isinstance(half, fx.Node) for half in halves):
        return None
    gathers = [found for found in map(GATHER.match, halves) if isinstance(found, Match)]
    matched, index = (swiglu, *gathers), None
    if len(gathers) == len(halves):
        halves = [gather.kwargs["normed"] for gather in gathers]
        index, other = map(_whole_index, gathers)
        if index is None or index is not other or not _can_gather(output):
            return None
    # By silu or the product with it, or by the pad and the join of a gather.
    if any(half.target != aten.slice.Tensor or len(half.users) != len(matched) // 2 + 1 for half in halves):
        return None
    product: Any = halves[0].args[0]
    if product.target != packed_linear_normed or product.args[GATED] or len(product.users) != 2:
        return None
    whole = all(_is_half(half, product, place) for place, half in enumerate(halves))
    return Gate(product, halves, output, index, matched) if whole else None


def _is_half(half: fx.Node, product: fx.Node, place: int) -> bool:
    """Whether a slice is the first half (`place` 0) or the second of a product's channels."""
    value, size = _value(product), _value(half).shape[-1]
    start = (product, value.dim() - 1, place * size)
    # Four arguments: without a step.
    return half.args[:3] == start and len(half.args) == 4 and value.shape[-1] == 2 * size


def _can_gather(output: fx.Node) -> bool:
    """Whether one packed product, which gathers nothing yet, is all that reads `output`."""
    if len(output.users) != 1:
        return False
    (reader,) = output.users
    place = INDEX_OF.get(reader.target)
    return place is not None and reader.args[0] is output and reader.args[place] is None


def _rewrite_gate(graph: fx.Graph, gate: Gate) -> None:
    operands = list(gate.product.args)
    operands[GATED] = True
    with graph.inserting_before(gate.output):
        y = _call(graph, packed_linear_normed, *operands)
    if gate.index is not None:
        (reader,) = gate.output.users
        reader.update_arg(INDEX_OF[reader.target], gate.index)
    gate.output.replace_all_uses_with(y)
    for match in gate.matched:
        match.erase_nodes()
    for node in (*gate.slices, gate.product):
        graph.erase_node(node)


def _rewrite(graph: fx.Graph, fold: Fold) -> None:
    x, *operands = fold.first.args
    with graph.inserting_before(fold.hidden):
        made = _call(graph, packed_linear_residual, x, fold.residual, fold.weight, *operands)
        hidden, weighted, squares = (_call(graph, getitem, made, place) for place in range(3))
    fold.hidden.replace_all_uses_with(hidden)
    operands = list(fold.second.args[1:])
    operands[INDEX - 1] = fold.index
    with graph.inserting_before(fold.second):
        y = _call(graph, packed_linear_normed, weighted, squares, fold.eps, False, *operands)
    fold.second.replace_all_uses_with(y)
    graph.erase_node(fold.second)
    for match in fold.matched:
        match.erase_nodes()
    graph.erase_node(fold.hidden)
    graph.erase_node(fold.first)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call with its fake value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, _value))
    return node


def _value(node: fx.Node) -> Tensor:
    return node.meta["val"]
