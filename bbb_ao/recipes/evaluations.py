"""Perplexities of a checkpoint and of what it is compared with, kept beside it with what they depend on."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbb_ao.durable import append_line
from bbb_ao.errors import ModelError, ResourceError
from bbb_ao.packed_linear import packed_linears, set_bits
from bbb_ao.recipes.compress import pack
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.loading import load_model
from bbb_ao.recipes.machine import describe_device, versions
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import Recipe
from bbb_ao.storage import footprint

EVALUATIONS = "evaluations.jsonl"
BACKEND = "bbb_ao"


@dataclass(frozen=True)
class Text:
    """What perplexities are measured on, and how.

    Attributes:
        windows: int64 [windows, window].
        data: names the text.
        batch: windows in a forward pass.
        device: where the model is.
    """

    windows: Tensor
    data: str
    batch: int
    device: torch.device


def perplexity_row(model: Any, of: str, bits: int | str | None, text: Text) -> dict[str, Any]:
    """The perplexity of a model at its present widths, as a flat row.

    Args:
        of: "checkpoint", "full_precision" or "round_to_nearest".
        bits: that width, "mixed", or None for full precision.
    Returns:
        of, bits, bits_per_weight (everything that is read counted; None for full precision), ppl (4 decimals), tokens
        (predicted), windows, window (tokens in each), data, backend, batch, device and versions.
    Raises:
        NumericsError: see `perplexity`.
    """
    layers = packed_linears(model)
    read = footprint(model, {name: layer.bits for name, layer in layers.items()}).bits_per_weight if layers else None
    return {
        "of": of,
        "bits": bits,
        "bits_per_weight": None if read is None else round(read, 4),
        "ppl": round(perplexity(model, text.windows, text.batch, text.device), 4),
        "tokens": text.windows[:, 1:].numel(),
        "windows": len(text.windows),
        "window": text.windows.shape[1],
        "data": text.data,
        "backend": BACKEND,
        "batch": text.batch,
        "device": describe_device(text.device),
        "versions": versions(),
    }


def baseline_rows(
    source: str | Path, recipe: Recipe, widths: Sequence[int | str | None], text: Text
) -> Iterator[dict[str, Any]]:
    """Rows of the full-precision model in the directory `source`, and of its round to nearest on the recipe's grid.

    Args:
        widths: of round to nearest; one that is no number takes the recipe's `default_bits`.
    """
    model = load_model(source)
    # Before it is moved or widened: packing reads the types of its tensors.
    rounded = pack(round_to_nearest(model, recipe), model, recipe).float().to(text.device)
    yield perplexity_row(model.float().to(text.device), "full_precision", None, text)
    numbers = [width if isinstance(width, int) else recipe.default_bits for width in widths]
    for width in dict.fromkeys(numbers):
        yield perplexity_row(set_bits(rounded, width), "round_to_nearest", width, text)


def check_store(directory: str | Path) -> bool:
    """Whether rows can be appended in the directory.

    Raises:
        ModelError: its `evaluations.jsonl` is a link or no regular file: it would lead out of the directory.
    """
    path = Path(directory) / EVALUATIONS
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ModelError(f"{path}: file: expected a regular one, got a link or another kind; fix: remove it")
    return os.access(path if path.exists() else directory, os.W_OK)


def store_row(directory: str | Path, row: dict[str, Any]) -> None:
    """Append a row to the checkpoint's `evaluations.jsonl`.

    Raises:
        ResourceError: it cannot be written.
    """
    path = Path(directory) / EVALUATIONS
    try:
        append_line(path, json.dumps(row))
    except OSError as error:
        raise ResourceError(
            f"{path}: file: expected it writable, got {error.strerror}; fix: free space or permissions"
        ) from None
