"""Bits where they matter: a width for each layer of a nested checkpoint, by measured sensitivity under a budget.

All layers start at the narrowest width. D(l, r) is the divergence on a text when layer l alone runs at r bits instead;
the steps with the largest fall of D for each byte that they add are taken while the budget lasts. Nothing is trained:
every width is a slice of the same stored codes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbb_ao.checkpoint import RECIPE_FILE, save_packed
from bbb_ao.errors import NumericsError, RecipeError
from bbb_ao.packed_linear import free_layers, set_bits, set_layer_bits
from bbb_ao.recipes.distill import divergence, next_token_loss
from bbb_ao.recipes.loading import load_model, load_tokenizer
from bbb_ao.storage import footprint, layer_footprint

Sensitivity = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Assignment:
    """Widths by layer, and what they take: bits per weight that are read at these widths, and that are stored."""

    widths: dict[str, int]
    bits_per_weight: float
    stored_bits: float


@torch.no_grad()
def measure_sensitivity(
    model: Any,
    windows: Tensor,
    widths: Sequence[int],
    metric: str = "kl",
    batch_size: int = 4,
    on_run: Callable[[], None] | None = None,
) -> Sensitivity:
    """D(layer, width) for every packed layer whose width is not fixed, with all other layers at the narrowest width.

    Args:
        model: a packed Hugging Face model, in evaluation mode; afterwards every layer runs at the narrowest width.
        windows: int64 [windows, tokens].
        widths: at least two that every layer stores.
        metric: "kl", the divergence from the model at its widest width of `widths`; "loss", the text's cross-entropy.
        on_run: called after each forward pass; there are 2 + layers * (widths - 1) for each batch.
    Returns:
        layer -> width -> mean over the windows.
    Raises:
        ValueError: a width that is not stored. NumericsError: a loss that is not finite; names the layer.
    """
    low, *others = sorted(set(widths))
    layers = free_layers(model)
    device = next(iter(layers.values())).plane_high.device
    sums = {name: dict.fromkeys((low, *others), 0.0) for name in layers}
    for batch in windows.split(batch_size):
        ids = batch.to(device)

        def measure(reference: Tensor | None, ids: Tensor = ids) -> float:
            logits = model(ids, use_cache=False).logits
            loss = next_token_loss(logits, ids) if reference is None else divergence(reference, logits)
            if on_run:
                on_run()
            return loss.item() * len(ids) / len(windows)

        set_bits(model, max(widths))
        target = model(ids, use_cache=False).logits if metric == "kl" else None
        set_bits(model, low)
        start = measure(target)
        for name, layer in layers.items():
            sums[name][low] += start
            for width in others:
                layer.set_bits(width)
                sums[name][width] += measure(target)
            layer.set_bits(low)
    for name, losses in sums.items():
        if not all(map(math.isfinite, losses.values())):
            raise NumericsError(f"{name}: expected finite losses, got {losses}; fix: check the checkpoint")
    return sums


def assign_widths(model: nn.Module, sensitivity: Mapping[str, Mapping[int, float]], budget: int) -> dict[str, int]:
    """Widths by name whose layers together read at most `budget` bytes; see the module's docstring.

    Args:
        sensitivity: as from `measure_sensitivity`.
        budget: bytes of planes, scales, zero points and indices, as `footprint` counts them.
    Raises:
        RecipeError: not even the narrowest widths fit.
    """
    layers = free_layers(model)
    chosen = {name: min(losses) for name, losses in sensitivity.items()}
    spent = footprint(model, chosen).bytes
    if spent > budget:
        raise RecipeError(f"budget: expected at least {spent} bytes, the narrowest widths, got {budget}; fix: raise it")
    sizes = {
        (name, width): layer_footprint(layers[name], width).bytes
        for name, losses in sensitivity.items()
        for width in losses
    }
    while steps := [
        (_gain_per_byte(losses[chosen[name]] - losses[width], cost), width, name)
        for name, losses in sensitivity.items()
        for width in losses
        if width > chosen[name]
        and losses[width] < losses[chosen[name]]
        and spent + (cost := sizes[name, width] - sizes[name, chosen[name]]) <= budget
    ]:
        _, width, name = max(steps)
        spent += sizes[name, width] - sizes[name, chosen[name]]
        chosen[name] = width
    return chosen


def _gain_per_byte(gain: float, cost: int) -> float:
    # 3 bits read the same planes as 4.
    return math.inf if cost == 0 else gain / cost


def assign_checkpoint(
    directory: str | Path,
    output: str | Path,
    windows: Tensor,
    widths: Sequence[int],
    metric: str,
    batch_size: int,
    drop_planes: bool,
    device: torch.device,
    *,
    bits_per_weight: float | None = None,
    size: int | None = None,
) -> Assignment:
    """Choose widths for the layers of a checkpoint and save it anew, to open at them.

    Args:
        directory: of a packed checkpoint that stores `widths`; it is not changed.
        output: empty or not there yet.
        windows, widths, metric, batch_size: see `measure_sensitivity`.
        drop_planes: store nothing beyond each layer's width.
        bits_per_weight, size: the budget, one of them; size in bytes.
    Raises:
        RecipeError: fewer than two widths, or a budget below the narrowest.
    """
    if len(set(widths)) < 2:
        raise RecipeError(f"bits: expected at least two stored widths, got {list(widths)}; fix: choose from more")
    model = load_model(directory, "float32").to(device)
    sensitivity = measure_sensitivity(model, windows, widths, metric, batch_size)
    # The measurement's float32 copy must not reach the checkpoint.
    model = load_model(directory)
    limit = size if bits_per_weight is None else int(bits_per_weight * footprint(model).weights / 8)
    chosen = assign_widths(model, sensitivity, limit or 0)
    set_layer_bits(model, chosen)
    if drop_planes:
        for name, layer in free_layers(model).items():
            layer.drop_planes(chosen[name])
    recipe = Path(directory) / RECIPE_FILE
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    save_packed(model, load_tokenizer(directory), output, None, text)
    read, stored = footprint(model, chosen), footprint(model)
    return Assignment(chosen, read.bits_per_weight, stored.bits_per_weight)
