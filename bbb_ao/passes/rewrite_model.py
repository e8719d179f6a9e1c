"""Apply a plan to the live modules of a decoder block, and take it back."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from bbb_ao.duplication import duplicate_output, undo_duplicate_output
from bbb_ao.errors import ModelError
from bbb_ao.passes.plan import RewritePlan
from bbb_ao.passes.rewrite_graph import select_sites
from bbb_ao.qat_linear import QATLinear, become
from bbb_ao.splitting import channel_metric, check_index, choose_index


class LinearBuilder(Protocol):
    """Makes the host that replaces a Linear; `index` and `out_index` as in `QATLinear.from_linear`."""

    def __call__(
        self, linear: nn.Linear, *, index: Tensor | None, expands_input: bool, out_index: Tensor | None
    ) -> nn.Module: ...


def split_linear(
    linear: nn.Linear, *, index: Tensor | None, expands_input: bool, out_index: Tensor | None
) -> nn.Module:
    """A split Linear in full precision, or `linear` itself where nothing is split."""
    if index is None and out_index is None:
        return linear
    return QATLinear.from_linear(linear, None, index=index, expands_input=expands_input, out_index=out_index)


def apply_plan(
    block: nn.Module, plan: RewritePlan, indices: Mapping[str, Tensor], build: LinearBuilder = split_linear
) -> None:
    """Split the channels of a live block in place: norms duplicate outputs, producers rows, the rest gathers.

    A norm of a "norm" site gets `duplicate_index`; a producer of a "rows" site gets `out_index`; consumers of an
    "index" site expand their own input. Every module keeps its identity and its hooks.

    Args:
        block: a block of the plan's kind.
        indices: site name -> int32 [stored_features] as from `splitting.choose_index`; other sites stay as they are.
        build: called for every Linear of the plan, split or not; by default the result stays in full precision.
    Raises:
        ValueError: an index that does not fit its site, or a site that the plan does not have.
        ModelError: a module of the plan is no nn.Linear, or the block was rewritten already. In either case nothing
            was changed.
    """
    sites = select_sites(plan, indices)
    out_indices: dict[str, Tensor] = {}
    for site in sites:
        for name in site.consumers:
            check_index(indices[site.name], _linear(block, name).in_features, 32, f"index of {site.name}")
        if site.rule == "rows":
            out_indices |= dict.fromkeys(site.producers, indices[site.name])
    norms = [(block.get_submodule(site.producers[0]), site) for site in sites if site.rule == "norm"]
    linears = [(_linear(block, name), name, site) for site in plan.sites for name in site.consumers]
    for norm, site in norms:
        duplicate_output(norm, indices[site.name].to(_device(norm, block)))
    for linear, name, site in linears:
        index, out_index = indices.get(site.name), out_indices.get(name)
        host = build(
            linear,
            index=None if index is None else index.to(linear.weight.device),
            expands_input=site.rule == "index",
            out_index=None if out_index is None else out_index.to(linear.weight.device),
        )
        if host is not linear:
            become(linear, host)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear) or isinstance(module, QATLinear):
        raise ModelError(f"{name}: expected an nn.Linear, got {type(module).__name__}; apply the plan to a fresh block")
    return module


def _device(module: nn.Module, block: nn.Module) -> torch.device:
    return next(iter([*module.parameters(), *block.parameters()])).device


def undo_plan(block: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Take `apply_plan` back: copies are summed, indices removed; every QATLinear becomes an nn.Linear again.

    Plain halves give the original weights bit for bit.

    Args:
        dtype: of the merged weights; by default that of the masters (float32, or float64).
    """
    for module in list(block.modules()):
        if isinstance(module, QATLinear):
            become(module, _merged(module, dtype))
        elif hasattr(module, "duplicate_index"):
            undo_duplicate_output(module)


def _merged(host: QATLinear, dtype: torch.dtype | None) -> nn.Linear:
    weight = host.merged_weight().to(dtype or host.weight.dtype)
    linear = nn.Linear(host.in_features, host.out_features, host.bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=host.weight.requires_grad)
    if host.bias is not None:
        linear.bias = nn.Parameter(host.bias.detach().to(weight.dtype), requires_grad=host.bias.requires_grad)
    return linear.train(host.training)


def choose_indices(
    block: nn.Module,
    plan: RewritePlan,
    ratio: float,
    activation_norms: Mapping[str, Tensor] | None = None,
    group_size: int = 32,
) -> dict[str, Tensor]:
    """An index for each site, by ||X_m||_2 * max over all consumers' rows of |W_jm| (design.md, section 1.7).

    Args:
        ratio: share of the channels to split, 0 to 1; at 0 only ragged inputs get an index, of padding.
        activation_norms: Linear name -> ||X_m||_2 over the calibration tokens, [in_features], for one consumer of
            each site at least; None ranks by the weights alone.
        group_size: divides the number of stored columns.
    Returns:
        site name -> int32 [stored_features], on the weights' device.
    Raises:
        ValueError: a site has no activation norm.
    """
    indices: dict[str, Tensor] = {}
    for site in plan.sites:
        weights = [_linear(block, name).weight for name in site.consumers]
        norm = None
        if activation_norms is not None:
            known = [activation_norms[name] for name in site.consumers if name in activation_norms]
            if not known:
                raise ValueError(f"activation_norms: none for {', '.join(site.consumers)}; pass one of them")
            norm = known[0]
        index = choose_index(channel_metric(weights, norm), ratio, group_size)
        if index is not None:
            indices[site.name] = index
    return indices
