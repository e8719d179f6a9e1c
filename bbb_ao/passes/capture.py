"""Capture decoder blocks as FX graphs, one of each kind, by running the model once.

The model runs without a KV cache on a few ids while pre-hooks record what each block is called with; `torch.export`
then traces the block with those arguments. The graph's parameters keep their names relative to the block, so one graph
serves all blocks of its kind (`bind`).
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bbb_ao.errors import ModelError
from bbb_ao.passes.blocks import find_blocks
from bbb_ao.passes.fx_nodes import aten, copy_graph_module, packet
from bbb_ao.qat_linear import is_plain_linear

# Scalar attributes that number or name a block; all others tell kinds of blocks apart.
POSITION_ATTRIBUTES = frozenset(
    {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx", "index_source"}
)


@dataclass(frozen=True)
class CapturedBlock:
    """A kind of decoder block and its graph.

    Attributes:
        names: fqns of all blocks of this kind; the first one was traced.
        block: the block that was traced (live, unchanged).
        args, kwargs: what it was called with, detached copies.
        graph: its FX graph, which shares the block's parameters, or None where it could not be captured.
        reason: why there is no graph.
    """

    names: tuple[str, ...]
    block: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    graph: fx.GraphModule | None = None
    reason: str = ""


def capture_model(model: nn.Module, input_ids: Tensor | None = None) -> list[CapturedBlock]:
    """Capture one decoder block of each kind: the same class, structure, scalar settings and kind of arguments.

    Args:
        model: a Hugging Face decoder; its training flag is restored.
        input_ids: [batch, tokens], int64; 2 x 16 seeded random ids by default.
    Raises:
        ModelError: the model has no decoder blocks.
    """
    names = {block: name for name, block in find_blocks(model)}
    kinds: dict[Any, tuple[list[str], nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
    reached: set[nn.Module] = set()

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block in reached:
            return
        reached.add(block)
        key = _kind(block, args, kwargs)
        if key not in kinds:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
            kinds[key] = ([], block, args, kwargs)
        kinds[key][0].append(names[block])

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in names]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(_example_ids(model) if input_ids is None else input_ids, use_cache=False)
        captured = [capture_block(block, args, kwargs, tuple(fqns)) for fqns, block, args, kwargs in kinds.values()]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    skipped = [block for block in names if block not in reached]
    return captured + [CapturedBlock((names[block],), block, reason="not reached by the model") for block in skipped]


def _example_ids(model: nn.Module) -> Tensor:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{type(model).__name__}: no input embedding found; fix: pass input_ids")
    ids = torch.randint(embedding.num_embeddings, (2, 16), generator=torch.Generator().manual_seed(0))
    return ids.to(embedding.weight.device)


def _kind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings = [
        (name, type(module), key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key not in POSITION_ATTRIBUTES | {"training"}
    ]
    parameters = [(name, tuple(p.shape), p.dtype) for name, p in block.named_parameters()]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = [
        (tuple(leaf.shape), leaf.dtype)
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, bool | int | float | str | None)
        else type(leaf)
        for leaf in leaves
    ]
    return repr((settings, parameters, described, spec))


def capture_block(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, names: tuple[str, ...] = ("",)
) -> CapturedBlock:
    """Trace one module with `torch.export` and check that the graph reproduces it on the same arguments.

    Returns:
        a capture whose `graph` is None, with the reason, where tracing fails or the graph gives other numbers.
    """
    kwargs = dict(kwargs or {})
    training = block.training
    block.eval()
    try:
        with torch.no_grad():
            graph = _export(block, args, kwargs)
            reason = _difference(block, graph, args, kwargs)
    except Exception as error:  # noqa: BLE001  tracing fails in many ways; each one is kept, printed and planned for
        reason = f"torch.export: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        graph = None
    finally:
        block.train(training)
    return CapturedBlock(names, block, args, kwargs, None if reason else graph, reason)


@contextmanager
def _plain_linears(block: nn.Module) -> Iterator[None]:
    """Meanwhile Linears that write their product in another way, as Falcon's do, are called as plain ones."""
    linears = [m for m in block.modules() if isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward]
    own = [linear for linear in linears if is_plain_linear(linear)]
    for linear in own:
        linear.forward = MethodType(nn.Linear.forward, linear)
    try:
        yield
    finally:
        for linear in own:
            del linear.forward


def _export(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    with _plain_linears(block):
        program = torch.export.export(block, args, kwargs, strict=False)
    # Guards and metadata assertions pin the dtype, which verification in float64 changes.
    options = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    graph = copy_graph_module(program.module(**options))  # pyright: ignore[reportArgumentType]
    for node in reversed(graph.graph.nodes):
        if node.op == "call_function" and packet(node) is aten._assert_tensor_metadata:
            graph.graph.erase_node(node)
    # A result that nothing reads must not count as a reader of its operands.
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def _difference(block: nn.Module, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    copies = [pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)) for _ in range(2)]
    expected = pytree.tree_leaves(block(*copies[0][0], **copies[0][1]))
    got = pytree.tree_leaves(graph(*copies[1][0], **copies[1][1]))
    for wanted, value in zip(expected, got, strict=True):
        # On the meta device there are no numbers to compare.
        if isinstance(wanted, Tensor) and wanted.is_floating_point() and not wanted.is_meta:
            error, peak = (wanted - value).abs().max().item(), wanted.abs().max().item()
            # Also true for NaN.
            if not error <= 16 * torch.finfo(wanted.dtype).eps * peak:
                return f"the captured graph differs from the block by up to {error:.3g}"
    return ""


def bind(graph: fx.GraphModule, block: nn.Module) -> fx.GraphModule:
    """A copy of a captured graph that computes with the parameters and buffers of another block of its kind.

    Constants that tracing put into the graph are kept, floating-point ones in the type of the block's parameters.
    """
    bound = copy_graph_module(graph)
    own = {**dict(block.named_parameters(remove_duplicate=False)), **dict(block.named_buffers(remove_duplicate=False))}
    dtype = next((tensor.dtype for tensor in own.values() if tensor.is_floating_point()), torch.float32)
    for target in {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}:
        path, _, attribute = target.rpartition(".")
        holder = bound.get_submodule(path)
        tensor = own.get(target, getattr(holder, attribute))
        if isinstance(tensor, Tensor):
            constant = target not in own and tensor.is_floating_point()
            setattr(holder, attribute, tensor.to(dtype) if constant else tensor)
    return bound
