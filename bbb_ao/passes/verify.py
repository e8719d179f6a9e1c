"""Compare a rewritten block, as a graph and as live modules, with the captured original in float64."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bbb_ao.errors import NumericsError
from bbb_ao.passes.capture import CapturedBlock, bind
from bbb_ao.passes.plan import RewritePlan, SplitSite, plan_block
from bbb_ao.passes.rewrite_graph import duplicate_channels
from bbb_ao.passes.rewrite_model import apply_plan, choose_indices

NARROW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verification:
    """Largest errors of a block in float64, each max |y - reference| / max |reference| over the outputs.

    Attributes:
        block: fqn.
        capture: the live block before rewriting, against the captured graph.
        graph: the rewritten graph; None where the block was not captured (the live block is then the reference).
        live: the rewritten live block.
    """

    block: str
    capture: float
    graph: float | None
    live: float


class _Float64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            return _grouped_mm(*args[:3])
        # A reinterpretation of bits is no cast.
        if func is not torch.ops.aten.view.dtype:
            args, kwargs = pytree.tree_map_only(torch.dtype, _widen, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widen(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in NARROW else dtype


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[i-1]:offsets[i] of x [tokens, in] times weight[i] [in, out]; torch's own refuses float64."""
    starts = [0, *offsets.tolist()]
    return torch.cat([x[start:end] @ weight[i] for i, (start, end) in enumerate(pairwise(starts))])


@contextmanager
def float64_casts() -> Iterator[None]:
    """Let every cast to a narrower floating type be a cast to float64, so that a float64 model stays in float64.

    Norms and softmax of Hugging Face models compute in float32, whose rounding hides an identity to 1e-12. What a model
    makes without a type, as XGLM the least number for its mask, is float64 too.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(usual)


def verify_block(
    captured: CapturedBlock,
    plan: RewritePlan,
    indices: Mapping[str, Tensor],
    *,
    name: str | None = None,
    block: nn.Module | None = None,
    tolerance: float = 1e-12,
    seed: int = 0,
) -> Verification:
    """Rewrite copies of a block, as a graph and live, and compare them with the original on random inputs.

    Floating-point inputs with as many dimensions as the hidden states are drawn from N(0, 1); the rest (masks,
    position embeddings) is as captured. The block itself is not changed.

    Args:
        indices: site name -> int32 [stored_features], as for `apply_plan`.
        name: fqn of the block, for the message; by default the first of the kind.
        block: another block of the captured kind; by default the one that was traced.
        tolerance: largest relative error that passes.
    Raises:
        NumericsError: the block's name, which form differs and by how much, or which one does not run and why.
    """
    name = name or captured.names[0]
    original = copy.deepcopy(captured.block if block is None else block).double().eval()
    args, kwargs = _random_inputs(captured, seed)
    live_reference = _run(original, args, kwargs)
    reference, capture_error, graph_error = live_reference, 0.0, None
    if captured.graph is not None:
        with _released(bind(captured.graph, original)) as graph:
            reference = _run(graph, args, kwargs)
            capture_error = _relative_error(live_reference, reference)
            with _released(duplicate_channels(graph, plan, indices)) as rewritten:
                outputs = _run_rewritten(f"{name}: rewritten graph", rewritten, args, kwargs)
        graph_error = _relative_error(outputs, reference)
    apply_plan(original, plan, indices)
    live_error = _relative_error(_run_rewritten(f"{name}: rewritten block", original, args, kwargs), reference)
    result = Verification(name, capture_error, graph_error, live_error)
    _check(result, tolerance)
    return result


@contextmanager
def _released(graph: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Takes a graph's tensors from it at the end: it refers to itself, and would keep them until some collection."""
    try:
        yield graph
    finally:
        for module in graph.modules():
            for name in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]:
                delattr(module, name)


def block_error(captured: CapturedBlock, original: nn.Module, changed: nn.Module, seed: int = 0) -> float:
    """Largest relative error of a changed block against the original, in float64 on `verify_block`'s random inputs.

    Both are blocks of the captured kind and stay as they are.

    Raises:
        NumericsError: the changed block does not run.
    """
    args, kwargs = _random_inputs(captured, seed)
    first, second = (copy.deepcopy(block).double().eval() for block in (original, changed))
    return _relative_error(_run_rewritten("changed block", second, args, kwargs), _run(first, args, kwargs))


def verified_plan(captured: CapturedBlock, tolerance: float = 1e-12) -> RewritePlan:
    """The plan of a captured block, with "index" in the place of every rule that fails its verification.

    The analysis sees the graph only; a live module may also depend on a width in Python. Such a site is tried alone,
    fails, and gets the failure as its reason. On the meta device there is nothing to compare: the analysis stands.

    Raises:
        NumericsError: the block fails with the index rule too.
    """
    plan = plan_block(captured)
    if any(parameter.is_meta for parameter in captured.block.parameters()):
        return plan
    indices = choose_indices(captured.block, plan, 0.5)
    try:
        verify_block(captured, plan, indices, tolerance=tolerance)
    except NumericsError:
        sites = tuple(_verified_site(captured, plan, site, indices, tolerance) for site in plan.sites)
        plan = replace(plan, sites=sites)
        verify_block(captured, plan, indices, tolerance=tolerance)
    return plan


def _verified_site(
    captured: CapturedBlock, plan: RewritePlan, site: SplitSite, indices: Mapping[str, Tensor], tolerance: float
) -> SplitSite:
    if site.rule == "index" or site.name not in indices:
        return site
    try:
        verify_block(captured, plan, {site.name: indices[site.name]}, tolerance=tolerance)
    except NumericsError as error:
        return SplitSite(site.name, site.consumers, "index", reason=f"{site.rule} rule refused: {error}")
    return site


def _check(result: Verification, tolerance: float) -> None:
    errors = {
        "captured graph": result.capture,
        "rewritten graph": result.graph or 0.0,
        "rewritten block": result.live,
    }
    for form, error in errors.items():
        # Also true for NaN.
        if not error <= tolerance:
            raise NumericsError(
                f"{result.block}: {form}: expected a relative error of at most {tolerance:g} against the original, "
                f"got {error:.3g}; fix: leave its sites without an index"
            )


def _random_inputs(captured: CapturedBlock, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    floats = [x for x in pytree.tree_leaves((captured.args, captured.kwargs)) if _is_float(x)]
    hidden = floats[0].shape if floats else None

    def draw(x: Tensor) -> Tensor:
        if _is_float(x) and x.shape == hidden:
            return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return x.double() if x.is_floating_point() else x.clone()

    args, kwargs = pytree.tree_map_only(Tensor, draw, (captured.args, dict(captured.kwargs)))
    return args, kwargs


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    # A block may write to its arguments, so each run has its own.
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    with torch.no_grad(), float64_casts():
        return [y for y in pytree.tree_leaves(module(*args, **kwargs)) if _is_float(y)]


def _run_rewritten(form: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    try:
        return _run(module, args, kwargs)
    except Exception as error:
        # Any exception of the block's own code, for one an assertion on a width that the rewrite changed.
        message = f"{form} does not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise NumericsError(message) from error


def _relative_error(outputs: list[Tensor], references: list[Tensor]) -> float:
    errors = []
    for y, reference in zip(outputs, references, strict=True):
        peak = reference.abs().max()
        errors.append((y - reference).abs().max() / torch.where(peak > 0, peak, 1.0))
    # Unlike Python's max, this one keeps a NaN.
    return torch.stack(errors).max().item()
