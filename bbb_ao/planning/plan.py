"""Everything that `bbb-ao plan` says, decided from config.json and a recipe before a weight is loaded."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bbb_ao.packed_head import find_head
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.passes import block_linears, find_blocks
from bbb_ao.planning.job import Job
from bbb_ao.planning.memory import Phase, phases
from bbb_ao.recipes.disk import disk_use
from bbb_ao.recipes.run_folder import SAVE_STEPS
from bbb_ao.recipes.skeleton import build_skeleton, pack_skeleton
from bbb_ao.recipes.stages import Recipe
from bbb_ao.splitting import split_ratio
from bbb_ao.storage import footprint, layer_footprint


@dataclass(frozen=True)
class LayerPlan:
    """A Linear that will be packed.

    Attributes:
        name: full name; in_features, out_features: of the original.
        stored_features: columns with duplicates and padding; split_channels, padding: how many of them are which.
        bits: the widest width that is stored; act_bits: of its activations in the end, None for 16 bits.
        bytes: of planes, scales, zero points and index.
    """

    name: str
    in_features: int
    out_features: int
    stored_features: int
    split_channels: int
    padding: int
    bits: int
    act_bits: int | None
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.in_features * self.out_features)


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        layers: in the model's order; skipped: (weight or layer, reason) of everything else that holds a matrix.
        bits_per_weight: of the packed layers, everything stored; default_bits_per_weight: what is read at the width at
            which the checkpoint opens.
        packed_bytes: of the packed layers; checkpoint_bytes: of all tensors of the result; run_bytes: the most that
            is on its disk at any moment, with the state of the run.
        phases: memory, phase by phase; seconds: of each stage, None where unknown, or None without a probe.
    """

    model: str
    architecture: str
    recipe: str
    device: str
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    bits_per_weight: float
    default_bits_per_weight: float
    packed_bytes: int
    checkpoint_bytes: int
    run_bytes: int
    phases: tuple[Phase, ...]
    stages: tuple[str, ...]
    seconds: tuple[float | None, ...] | None = None

    @property
    def device_bytes(self) -> int:
        """The most that a GPU must hold; 0 on a CPU."""
        return max(phase.device_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """The most that the CPU's memory must hold."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def temporary_bytes(self) -> int:
        """The most that the folder for temporary files must hold."""
        return max(phase.disk for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, totals included."""
        totals = {name: getattr(self, name) for name in ("device_bytes", "host_bytes", "temporary_bytes")}
        return {**asdict(self), **totals}


def make_plan(directory: str | Path, recipe: Recipe, device: torch.device, probe: bool = True) -> Plan:
    """Plan a run.

    Args:
        directory: of the model; config.json suffices.
        probe: also time a few steps on the device.
    Raises:
        RecipeError, ModelError: as training would.
    """
    model = build_skeleton(directory)
    job = Job.prepare(model, recipe, device)
    found = phases(job)
    seconds = None
    if probe:
        from bbb_ao.planning.probe import stage_seconds

        seconds = tuple(stage_seconds(job))
    disk = disk_use(model, job.student, recipe, SAVE_STEPS)
    packed = pack_skeleton(copy.deepcopy(job.student), model, recipe)
    default = footprint(packed, recipe.default_bits)
    total = footprint(packed)
    return Plan(
        model=str(directory),
        architecture=type(model).__name__,
        recipe=recipe.name,
        device=str(device),
        layers=tuple(_layers(packed, recipe)),
        skipped=tuple(_skipped(job)),
        bits_per_weight=total.bits_per_weight,
        default_bits_per_weight=default.bits_per_weight,
        packed_bytes=total.bytes,
        checkpoint_bytes=disk.result,
        run_bytes=disk.run,
        phases=tuple(found),
        stages=tuple(stage.name for stage in recipe.stages),
        seconds=seconds,
    )


def _layers(packed: Any, recipe: Recipe) -> list[LayerPlan]:
    ratios = _ratios(packed, recipe)
    return [_layer(name, layer, recipe, ratios) for name, layer in packed_linears(packed).items()]


def _layer(name: str, layer: PackedLinear, recipe: Recipe, ratios: Mapping[str, float]) -> LayerPlan:
    ratio = next((ratio for block, ratio in ratios.items() if name.startswith(f"{block}.")), 0.0)
    # As in `choose_index`: duplicates fill what rounding adds, where there is any splitting.
    added = layer.stored_features - layer.in_features
    split = min(added, layer.in_features) if ratio > 0 else 0
    act_bits = None if layer.fixed_bits else recipe.stages[-1].act_bits
    size = layer_footprint(layer).bytes
    shape = (layer.in_features, layer.out_features, layer.stored_features)
    return LayerPlan(name, *shape, split, added - split, layer.max_bits, act_bits, size)


def _ratios(packed: Any, recipe: Recipe) -> dict[str, float]:
    names = [name for name, _ in find_blocks(packed)]
    split = recipe.split
    if split is None:
        return dict.fromkeys(names, 0.0)
    return {n: split_ratio(i, len(names), split.ratio_min, split.ratio_max) for i, n in enumerate(names)}


def _skipped(job: Job) -> list[tuple[str, str]]:
    """Linears that the recipe leaves out, matrices that no pass supports, and what lies outside the blocks."""
    recipe, chosen = job.recipe, set(job.prepared.layers)
    unsupported = {
        f"{block}.{name}": reason
        for plan in job.prepared.plans
        for block in plan.blocks
        for name, reason in plan.unsupported
    }
    blocks = find_blocks(job.model)
    names = [f"{block}.{linear}" for block, module in blocks for linear in block_linears(module)]
    left = set(names) - set(recipe.select(names))
    found = [(name, "left out by the recipe's targets or skip") for name in names if name in left]
    found += [(name, reason) for name, reason in unsupported.items() if name not in chosen]
    for name, module in job.model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block, _ in blocks)
        weight = getattr(module, "weight", None)
        head = recipe.head_bits is not None and name == find_head(job.model)[0]
        if not inside and not head and isinstance(weight, torch.Tensor) and weight.dim() >= 2:
            found.append((name, f"{type(module).__name__} outside the decoder blocks"))
    return found
