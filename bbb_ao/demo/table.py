"""The comparison that the demo and the documentation print: what each part of the method is worth on one model."""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbb_ao.checkpoint import save_packed
from bbb_ao.recipes.compress import Reporter, pack, train
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.loader import dump_recipe
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import Recipe
from bbb_ao.storage import footprint


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: what was done.
        perplexity: on the held-out windows, of the packed model in float32.
        bits_per_weight: of the decoder blocks' Linears, everything stored counted.
        bytes: of the saved weights.
        seconds: of preparation and training.
    """

    method: str
    perplexity: float
    bits_per_weight: float
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.method:24} {self.perplexity:10.3f} {self.bits_per_weight:11.3f} "
            f"{self.bytes / 1e6:9.2f} MB {self.seconds:8.1f}"
        )


HEADER = f"{'method':24} {'perplexity':>10} {'bits/weight':>11} {'on disk':>12} {'seconds':>8}"


def ablations(recipe: Recipe, equal_budget: bool) -> list[tuple[str, Recipe | None]]:
    """The recipe taken apart: round to nearest (None), its last stage alone, all its stages, and with splitting.

    Args:
        equal_budget: also the last stage alone with the epochs of all stages, the budget of the progressive run.
    """
    last = recipe.stages[-1]
    longer = replace(last, epochs=sum(stage.epochs for stage in recipe.stages))
    extra = [("straight, all epochs", replace(recipe, split=None, stages=(longer,)))]
    return [
        ("round to nearest", None),
        ("straight", replace(recipe, split=None, stages=(last,))),
        *(extra if equal_budget else []),
        ("progressive", replace(recipe, split=None)),
        ("progressive + splitting", recipe),
    ]


def compare(
    model: Any,
    tokenizer: Any,
    sequences: Tensor,
    windows: Tensor,
    recipe: Recipe,
    output: Path,
    show: Callable[[str], None],
    equal_budget: bool = False,
    report: Callable[[Recipe], Reporter | None] = lambda recipe: None,
) -> list[Row]:
    """Measure full precision and each of `ablations`; save the last one to `output`.

    Args:
        model: the full-precision model, on the CPU.
        sequences: calibration ids; windows: held-out ids, both int64 [sequences, tokens].
        show: receives each line as soon as it is known.
        report: makes the reporter of a training run.
    """
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    bits = 8 * next(model.parameters()).element_size()
    show(HEADER)
    rows = [Row("full precision", perplexity(copy.deepcopy(model).float(), windows), bits, weights, 0.0)]
    show(str(rows[0]))
    for method, variant in ablations(recipe, equal_budget):
        start = time.perf_counter()
        if variant is None:
            student = round_to_nearest(model, recipe)
        else:
            student = train(model, sequences, variant, torch.device("cpu"), report(variant)).model
        seconds = time.perf_counter() - start
        packed = pack(student, model, recipe)
        # Before it is saved: transformers refuses to cast a model that is marked as quantized.
        value = perplexity(copy.deepcopy(packed).float(), windows)
        with tempfile.TemporaryDirectory() as scratch:
            target = output if variant is recipe else Path(scratch) / "packed"
            save_packed(packed, tokenizer, target, recipe.default_bits, dump_recipe(variant or recipe))
            size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        rows.append(Row(method, value, footprint(packed).bits_per_weight, size, seconds))
        show(str(rows[-1]))
    return rows
