"""From a loaded model to a student: capture, plan, rank the channels, split, and put fake quantization in."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbb_ao.clipping import clip_ranges
from bbb_ao.grid import Grid
from bbb_ao.passes import (
    RewritePlan,
    SplitSite,
    apply_plan,
    block_linears,
    capture_model,
    choose_indices,
    find_blocks,
    verified_plan,
)
from bbb_ao.qat_linear import QATLinear, qat_linears, set_training_bits
from bbb_ao.recipes.blockwise import BlockRun
from bbb_ao.recipes.stages import Recipe
from bbb_ao.recipes.statistics import SiteChannels, site_channels, site_metrics
from bbb_ao.recipes.streams import working_copy
from bbb_ao.splitting import split_ratio


@dataclass(frozen=True)
class Prepared:
    """What preparation decided.

    Attributes:
        plans: one for each kind of block.
        layers: full names of the quantized Linears; one that the plan names as unsupported is not among them.
        channels: of every site of every block, in order; none without a run.
    """

    plans: tuple[RewritePlan, ...]
    layers: tuple[str, ...]
    channels: tuple[SiteChannels, ...]


def recipe_grid(recipe: Recipe) -> Grid:
    """The recipe's grid settings as the core's Grid."""
    settings = recipe.grid
    return Grid(
        settings.kind,
        settings.group_size,
        settings.zero_point_bits,
        settings.scale_format,
        act_kind=settings.act_kind,
    )


def prepare_student(student: nn.Module, recipe: Recipe, run: BlockRun | None) -> Prepared:
    """Split and wrap the selected Linears of the student's decoder blocks, in place.

    Args:
        student: a float32 copy of the model, on the CPU.
        run: the full-precision model and the calibration sequences, for metrics of activations; None has weights alone.
    Raises:
        RecipeError: a target pattern that matches nothing.
        ModelError: no decoder blocks.
        NumericsError: a block that is not the same after a rewrite by the simplest rule.
    """
    blocks = find_blocks(student)
    plans = tuple(verified_plan(captured) for captured in capture_model(student))
    by_block = {name: plan for plan in plans for name in plan.blocks}
    names = [f"{name}.{linear}" for name, block in blocks for linear in block_linears(block)]
    selected = set(recipe.select(names))
    grid, split = recipe_grid(recipe), recipe.split
    norms: Mapping[str, Mapping[str, Tensor]] = {}
    if run is not None and reads_activations(recipe):
        norms = activation_norms(run, by_block)
    channels: list[SiteChannels] = []
    for number, (name, block) in enumerate(blocks):
        chosen = {linear for linear in block_linears(block) if f"{name}.{linear}" in selected}
        plan = restrict_plan(by_block[name], chosen, producer_rows=split is None or split.producer_rows)
        ratio = 0.0 if split is None else split_ratio(number, len(blocks), split.ratio_min, split.ratio_max)
        known = norms.get(name)
        ranks = known if split is not None and split.metric == "joint" else None
        indices = choose_indices(block, plan, ratio, ranks, grid.group_size)
        before = {} if run is None else site_metrics(block, plan, ranks)
        apply_plan(block, plan, indices, partial(_build, recipe=recipe, grid=grid))
        if run is not None:
            after = site_metrics(block, plan, ranks, indices)
            metric = "weight" if ranks is None else "joint"
            channels += site_channels(number, name, plan, metric, before, after, indices)
        for linear in chosen & {consumer for site in plan.sites for consumer in site.consumers}:
            _initialize(block.get_submodule(linear), recipe, None if known is None else known[linear], run)
    return Prepared(plans, tuple(qat_linears(student)), tuple(channels))


def reads_activations(recipe: Recipe) -> bool:
    """Whether preparation runs the full-precision blocks for `activation_norms`."""
    split = recipe.split
    joint = split is not None and split.metric == "joint" and max(split.ratio_min, split.ratio_max) > 0
    return joint or (recipe.clip is not None and recipe.clip.metric == "activation")


def round_to_nearest(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A float32 copy of `model` on the recipe's grid at its default width, without splitting or training."""
    student = copy.deepcopy(model).float()
    prepare_student(student, replace(recipe, split=None), None)
    set_training_bits(student, recipe.default_bits, recipe.stages[-1].act_bits)
    return student


def _build(
    linear: nn.Linear,
    *,
    index: Tensor | None,
    expands_input: bool,
    out_index: Tensor | None,
    recipe: Recipe,
    grid: Grid,
) -> nn.Module:
    return QATLinear.from_linear(
        linear,
        # The offset of the copies on the integer grid is a quarter of the last stage's step.
        recipe.stages[-1].narrowest,
        None,
        grid,
        # A copy: safetensors refuses tensors that several layers share.
        None if index is None else index.clone(),
        expands_input=expands_input,
        out_index=out_index,
        detach_scales=recipe.scale_gradient == "detached",
    )


def _initialize(host: nn.Module, recipe: Recipe, norm: Tensor | None, run: BlockRun | None) -> None:
    """Clip a QATLinear's ranges by the recipe, and make its scales parameters where they are learned.

    Args:
        norm: ||X_m||_2, [in_features], or None for errors of the weights alone.
    """
    assert isinstance(host, QATLinear), "_build makes nothing else"
    if recipe.clip is not None:
        clip, importance = recipe.clip, None
        if clip.metric == "activation" and norm is not None:
            columns = torch.arange(host.in_features) if host.ocs_index is None else host.ocs_index.long().cpu()
            importance = F.pad(norm.square(), (0, 1))[columns]
        weight = host.weight.detach()
        clipped = clip_ranges(
            weight if run is None else weight.to(run.device),
            host.grid,
            recipe.stages[-1].narrowest,
            importance,
            asymmetric=clip.asymmetric,
            lowest=clip.lowest,
            steps=clip.steps,
        )
        with torch.no_grad():
            host.weight.copy_(clipped)
    if recipe.learned_scales:
        host.learn_scales()


def restrict_plan(plan: RewritePlan, chosen: Collection[str], producer_rows: bool) -> RewritePlan:
    """The plan for the chosen Linears alone.

    A site keeps its rule only if every Linear that the rule touches is chosen (and, for "rows", if `producer_rows`);
    otherwise its chosen consumers gather their own input, and the others stay as they are.
    """
    sites: list[SplitSite] = []
    for site in plan.sites:
        consumers = tuple(name for name in site.consumers if name in chosen)
        if not consumers:
            continue
        touched = (*site.consumers, *(site.producers if site.rule == "rows" else ()))
        whole = all(name in chosen for name in touched)
        if whole and (site.rule != "rows" or producer_rows):
            sites.append(site)
        else:
            reason = "rows are not duplicated" if whole else "shares it with a layer left out"
            sites.append(SplitSite(consumers[0], consumers, "index", reason=reason))
    return replace(plan, sites=tuple(sites))


def squares_of(states: Tensor) -> Tensor:
    """Sum of squares of each feature over all tokens: [..., features] -> float64 [features]."""
    return states.detach().double().square().flatten(0, -2).sum(0)


def activation_norms(run: BlockRun, plans: Mapping[str, RewritePlan]) -> dict[str, dict[str, Tensor]]:
    """||X_m||_2 over the calibration tokens for every Linear: block name -> Linear -> [in_features].

    The full-precision blocks run one at a time on the device. A Linear that no token reaches gets ones, so that its
    channels are ranked by the weights alone.
    """
    stream = run.entry
    norms: dict[str, dict[str, Tensor]] = {}
    for number, (name, block) in enumerate(zip(run.names, run.teacher_blocks, strict=True)):
        working = working_copy(block, run.device)
        sums: dict[str, Tensor] = {}

        def observe(module: nn.Module, args: tuple, key: str, sums: dict[str, Tensor] = sums) -> None:
            squares = squares_of(args[0])
            sums[key] = sums[key] + squares if key in sums else squares

        consumers = [consumer for site in plans[name].sites for consumer in site.consumers]
        for consumer in consumers:
            working.get_submodule(consumer).register_forward_pre_hook(partial(observe, key=consumer))
        # A stream kept from before would pass the block by, and with it the hooks.
        run.kept.pop(number, None)
        stream = run.behind(number, stream, working)
        norms[name] = {key: value.sqrt().float().cpu() for key, value in sums.items()}
        for consumer in consumers:
            norms[name].setdefault(
                consumer, torch.ones(working.get_parameter(f"{consumer}.weight".removeprefix(".")).shape[1])
            )
    return norms
