"""Run packed Linears that read one input as one product: q/k/v, gate/up.

What shares an input is read from the captured graph of each kind of block. See `bbb_ao.fused_rows` for how the live
modules share the product.

Why here and not in a pass of the compiler: modules that hand over one tensor give one product in eager mode, under any
backend of torch.compile, in `generate`, which compiles by itself, and in torch.export; Inductor has a single slot for
passes of users, and does not merge equal calls in inference. Why views of one weight: nothing is
stored twice, taking it back is free, and the checkpoint does not know of it.
"""

from dataclasses import dataclass

from torch import Tensor, fx, nn

from bbb_ao.fused_rows import FusedRows, difference
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.passes.capture import capture_model
from bbb_ao.passes.fx_nodes import caller, input_node, is_packed_linear


@dataclass(frozen=True)
class FusionReport:
    """What was fused. `str(report)` is a table.

    Attributes:
        fused: full names of the layers of each product, in the order of their calls.
        refused: (block or layer, why its product is not shared), where one could have been.
    """

    fused: tuple[tuple[str, ...], ...]
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = [f"fused: {', '.join(names)}" for names in self.fused]
        return "\n".join(rows + [f"apart: {name}: {reason}" for name, reason in self.refused])


def fuse_projections(model: nn.Module, input_ids: Tensor | None = None) -> FusionReport:
    """Let packed Linears of a decoder block that read one input share one product, in place.

    Layers must agree in grid, widths, stored columns, index and padding; biases and duplicated rows stay. Do it last:
    moving the model, casting its biases or loading a state dict into it ends the sharing (`PackedLinear.fused`), not
    the model. Two threads may run the model at once, but then may compute a product more than once.

    Args:
        model: a converted Hugging Face decoder, on its final device.
        input_ids: [batch, tokens], at least two tokens in all, for the one forward pass that captures the blocks; 2 x
            16 seeded random ids by default.
    Raises:
        ValueError: no packed layer.
        ModelError: no decoder blocks.
    """
    if not packed_linears(model):
        raise ValueError("fuse_projections: the model has no packed layers; convert it or load a bitbybit checkpoint")
    unfuse_projections(model)
    fused: list[tuple[str, ...]] = []
    refused: list[tuple[str, str]] = []
    for captured in capture_model(model, input_ids):
        if captured.graph is None:
            refused += [(name, captured.reason) for name in captured.names]
            continue
        groups = shared_inputs(captured.graph)
        for block_name in captured.names:
            block = model.get_submodule(block_name)
            for group in groups:
                for names, reason in _partition(block, group):
                    full = tuple(f"{block_name}.{name}" for name in names)
                    if len(names) > 1:
                        FusedRows([_packed(block, name) for name in names])
                        fused.append(full)
                    if reason:
                        refused.append((full[0], reason))
    return FusionReport(tuple(fused), tuple(refused))


def unfuse_projections(model: nn.Module) -> None:
    """Take `fuse_projections` back; copies nothing."""
    for layer in packed_linears(model).values():
        if layer.fused is not None:
            layer.fused.dissolve()


def shared_inputs(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    """Names of the packed Linears that read one value, in the order of their calls; those called once, two and more.

    Args:
        gm: graph of a block from `capture_block`.
    """
    calls = [(node, caller(node).name) for node in gm.graph.nodes if is_packed_linear(node)]
    names = [name for _, name in calls]
    groups: dict[fx.Node, list[str]] = {}
    for node, name in calls:
        if names.count(name) == 1:
            groups.setdefault(input_node(node), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _partition(block: nn.Module, group: tuple[str, ...]) -> list[tuple[list[str], str]]:
    """Split a group into layers that can share a product, each with what tells it from the first part."""
    parts: list[tuple[list[str], str]] = []
    for name in group:
        layer, reason = _packed(block, name), ""
        for names, _ in parts:
            found = difference(_packed(block, names[0]), layer)
            if not found:
                names.append(name)
                break
            reason = reason or f"{names[0]} differs in {found}"
        else:
            parts.append(([name], reason))
    return parts


def _packed(block: nn.Module, name: str) -> PackedLinear:
    layer = block.get_submodule(name)
    assert isinstance(layer, PackedLinear), "made the call of its op"
    return layer
