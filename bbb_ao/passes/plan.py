"""Decide, from a block's graph, where each Linear's split input channels are duplicated.

All Linears that read one value form a site. Rules, in the order in which they are tried:

* norm: a norm module's output that only these Linears read is gathered once, behind the norm.
* rows: a value computed element by element from Linears' outputs, read nowhere else, arrives duplicated when these
  Linears duplicate their output rows; no gather at all. Zero outputs must give zero, for the padding.
* index: anything else. Each Linear of the site gathers its own input, by one index.

On Llama: q/k/v and gate/up are norm sites, down is a rows site with gate and up as producers, o keeps its index.
"""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch.fx.node import map_arg

from bbb_ao.passes.blocks import block_linears, unsupported_weights
from bbb_ao.passes.capture import CapturedBlock
from bbb_ao.passes.fx_nodes import (
    ATTENTION,
    ELEMENTWISE,
    TRANSPARENT,
    VIEWS,
    caller,
    input_node,
    is_linear,
    is_norm,
    linear_name,
    linear_names,
    op_name,
    packet,
    readers,
    shape,
    source,
)

Rule = Literal["norm", "rows", "index"]


@dataclass(frozen=True)
class SplitSite:
    """Linears that share one input, and how its split channels reach them. Names are relative to the block.

    Attributes:
        name: key of the site's index: the first consumer.
        consumers: the Linears, in the order of their calls.
        rule: "norm", "rows" or "index"; see the module's docstring.
        producers: the norm, or the Linears whose output rows are duplicated; empty for "index".
        reason: why the rule is "index"; else what was found.
    """

    name: str
    consumers: tuple[str, ...]
    rule: Rule
    producers: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class RewritePlan:
    """Where to duplicate channels in one kind of decoder block. `str(plan)` is a table.

    Attributes:
        sites: every quantizable Linear is a consumer of exactly one.
        unsupported: weights that stay as they are, as (name relative to the block, reason).
        blocks: fqns of the blocks that the plan applies to.
        kind: class name of these blocks.
        reason: why the block was not captured (then each Linear has a site of its own), or empty.
    """

    sites: tuple[SplitSite, ...]
    unsupported: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ()
    kind: str = ""
    reason: str = ""

    def site_of(self, linear: str) -> SplitSite:
        """The site that a Linear reads from; KeyError where it has none."""
        for site in self.sites:
            if linear in site.consumers:
                return site
        raise KeyError(f"{linear}: no site in the plan of {self.kind or 'the block'}")

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("rule", "Linears", "duplicated at", "why")]
        for site in self.sites:
            rows.append((site.rule, ", ".join(site.consumers), ", ".join(site.producers) or "own input", site.reason))
        rows += [("none", name, "-", reason) for name, reason in self.unsupported]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        title = f"{self.kind or 'block'}: {_range(self.blocks)}" if self.blocks else self.kind or "block"
        lines = [title] + ([f"not captured, one index for each Linear: {self.reason}"] if self.reason else [])
        lines += ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        return "\n".join(lines)


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} blocks, {names[0]} to {names[-1]}"


def plan_block(captured: CapturedBlock) -> RewritePlan:
    """The plan of a captured block; one index for each Linear where the capture failed."""
    linears = block_linears(captured.block)
    if captured.graph is None:
        sites = tuple(SplitSite(name, (name,), "index", reason="block not captured") for name in linears)
        unsupported: tuple[tuple[str, str], ...] = ()
    else:
        plan = plan_graph(captured.graph, linears)
        sites, unsupported = plan.sites, plan.unsupported
    unsupported = tuple(unsupported_weights(captured.block)) + unsupported
    return RewritePlan(sites, unsupported, captured.names, type(captured.block).__name__, captured.reason)


def plan_graph(gm: fx.GraphModule, linears: Collection[str] | None = None) -> RewritePlan:
    """The plan of a graph from `torch.export` (aten ops, parameters as get_attr nodes).

    Args:
        linears: names of the Linears to plan for; by default those whose aten.linear node an nn.Linear made.
    """
    calls = _linear_calls(gm, linears)
    sites: list[SplitSite] = []
    unsupported: list[tuple[str, str]] = []
    groups: dict[fx.Node, list[str]] = {}
    single: dict[fx.Node, str] = {}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr" and node.users}
    for name, nodes in calls.items():
        if not nodes and f"{name}.weight".removeprefix(".") in read:
            unsupported.append((name, "its weight is read, and it is never called"))
        elif not nodes:
            sites.append(SplitSite(name, (name,), "index", reason="not reached when the block ran"))
        elif any(_weight_leaks(node, name) for node in nodes):
            unsupported.append((name, "its weight is also read outside of its own forward"))
        elif len(nodes) > 1:
            sites.append(SplitSite(name, (name,), "index", reason=f"called {len(nodes)} times in a block"))
        else:
            single[nodes[0]] = name
            groups.setdefault(source(input_node(nodes[0])), []).append(name)
    called_twice = {caller(node).name for node in gm.graph.nodes if "@" in caller(node).call}
    for value, names in groups.items():
        sites.append(_site(value, tuple(names), single, called_twice))
    order = {name: i for i, name in enumerate(calls)}
    return RewritePlan(tuple(sorted(sites, key=lambda site: order[site.name])), tuple(unsupported))


def _linear_calls(gm: fx.GraphModule, linears: Collection[str] | None) -> dict[str, list[fx.Node]]:
    """The aten.linear nodes of each Linear, in the order of first calls; Linears without a node come last."""
    nodes = [(node, linear_name(node)) for node in gm.graph.nodes if is_linear(node)]
    linears = linear_names(gm) if linears is None else linears
    calls: dict[str, list[fx.Node]] = {}
    for node, name in nodes:
        if name is not None and name in linears:
            calls.setdefault(name, []).append(node)
    return calls | {name: [] for name in linears if name not in calls}


def _weight_leaks(node: fx.Node, name: str) -> bool:
    weight = node.args[1]
    assert isinstance(weight, fx.Node), "linear_name found a get_attr node"
    made_by = caller(node)
    outside = made_by.call and made_by.name != name
    return bool(outside) or any(not (is_linear(user) and user.args[1] is weight) for user in weight.users)


def _site(value: fx.Node, consumers: tuple[str, ...], single: dict[fx.Node, str], called_twice: set[str]) -> SplitSite:
    if is_norm(value):
        reason = _norm_defect(value, consumers, single, called_twice)
        if not reason:
            found = "only these Linears read the norm"
            return SplitSite(consumers[0], consumers, "norm", (caller(value).name,), found)
        return SplitSite(consumers[0], consumers, "index", reason=reason)
    producers, reason = _rows(value, consumers, single)
    return SplitSite(consumers[0], consumers, "rows" if producers else "index", producers, reason)


def _norm_defect(value: fx.Node, consumers: tuple[str, ...], single: dict[fx.Node, str], called_twice: set[str]) -> str:
    """Why the norm behind `value` cannot duplicate its output for the consumers, or ""."""
    norm = caller(value).name
    if norm in called_twice:
        return f"{norm} is called more than once"
    for reader in readers(value):
        if single.get(reader) not in consumers:
            return f"{norm} is also read by {op_name(reader)} in {caller(reader).name or 'the block'}"
    return ""


def _rows(value: fx.Node, consumers: tuple[str, ...], single: dict[fx.Node, str]) -> tuple[tuple[str, ...], str]:
    """The Linears whose rows to duplicate for `value`, and what was found; no Linears where that is impossible."""
    chain: dict[fx.Node, None] = {}
    leaves: dict[fx.Node, str] = {}
    pending = [value]
    while pending:
        node = pending.pop()
        if node in single:
            leaves[node] = single[node]
        elif node.op != "call_function" or is_norm(node) or packet(node) not in ELEMENTWISE | TRANSPARENT:
            return (), _origin(node)
        elif node not in chain:
            chain[node] = None
            operands = [input_node(node)] if packet(node) in TRANSPARENT else node.all_input_nodes
            if any(shape(operand) != shape(value) for operand in operands):
                return (), f"{op_name(node)} in {caller(node).name or 'the block'} broadcasts its operands"
            pending += operands
    for node in (*chain, *leaves):
        for reader in readers(node):
            if reader not in chain and single.get(reader) not in consumers:
                what = leaves.get(node) or op_name(node)
                return (), f"{what} is also read by {op_name(reader)} in {caller(reader).name or 'the block'}"
    if not _keeps_zero(value, chain, leaves):
        return (), "zero rows do not give a zero input, which padding needs"
    names = dict.fromkeys(leaves[node] for node in value.graph.nodes if node in leaves)
    return tuple(names), "element by element from these rows"


def _origin(node: fx.Node) -> str:
    """Where a value comes from that Linears' rows do not make, through views."""
    start = node
    while node.op == "call_function" and packet(node) in VIEWS | TRANSPARENT:
        node = input_node(node)
    through = "" if node is start else f" through {op_name(start)}"
    if node.op == "placeholder":
        return f"reads the block's input {node.target}{through}"
    where = caller(node).name or "the block"
    if is_norm(node) and packet(start) in VIEWS:
        return f"reads {where}{through}, which fixes its width"
    if is_norm(node):
        return f"computed from the output of {where} and other values"
    if packet(node) in ATTENTION:
        return f"attention output ({op_name(node)}{through} in {where})"
    if node.target is operator.getitem:
        return f"a part of a fused output ({op_name(input_node(node))} in {where})"
    return f"reads {op_name(node)}{through} in {where}, which is not element by element"


def _keeps_zero(value: fx.Node, chain: Collection[fx.Node], leaves: Collection[fx.Node]) -> bool:
    """Whether the chain maps zero outputs of the Linears to zero."""
    known: dict[fx.Node, torch.Tensor] = {leaf: torch.zeros(()) for leaf in leaves}
    for node in value.graph.nodes:
        if node in chain:
            # A cast by example (type_as) names a node outside of the chain; zero has no other type to it.
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: known.get(n, torch.zeros(())))
            known[node] = node.target(*args, **kwargs)
    return bool(known[value] == 0)
