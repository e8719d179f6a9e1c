"""Checkpoints: a Hugging Face directory with packed weights, its dense export, and a description of its layers."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bbb_ao.convert import to_dense
from bbb_ao.durable import fsync
from bbb_ao.errors import ModelError, ResourceError
from bbb_ao.huggingface import QUANT_METHOD, attach_quantizer
from bbb_ao.manifest import write_manifest
from bbb_ao.outputs import check_output_directory
from bbb_ao.packed_config import check_packed_config
from bbb_ao.packed_linear import check_widths, stored_widths
from bbb_ao.safetensors_header import read_header

RECIPE_FILE = "recipe.yaml"


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` that becomes `path` when the body succeeds; on failure nothing is left.

    Every file and folder is fsynced before the rename.

    Raises:
        RecipeError: the directory holds something, or is a file.
        ResourceError: it cannot be written.
    """
    path = check_output_directory(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for entry in (*partial.rglob("*"), partial):
            fsync(entry)
        if path.exists():
            path.rmdir()
        partial.rename(path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{path}: expected a writable directory, got: {error}; fix: free space or choose another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_packed(model: Any, tokenizer: Any, path: str | Path, bits: int | None, recipe: str | None = None) -> None:
    """Save a converted model: plain safetensors, config with `quant_method: bitbybit`, tokenizer, resolved recipe.

    Args:
        model: a Hugging Face model whose decoder Linears are PackedLinears.
        bits: the width at which the checkpoint opens; None: every layer at its present one.
        recipe: YAML text stored beside the weights.
    Raises:
        ValueError: a layer does not store that width (the layer is named).
        RecipeError, ResourceError: see `new_directory`.
    """
    check_output_directory(path)
    check_widths(model, bits)
    attach_quantizer(model, bits)

    def write_recipe(folder: Path) -> None:
        if recipe is not None:
            (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")

    _save(model, tokenizer, path, write_recipe)


def export_dense(
    model: Any, tokenizer: Any, path: str | Path, bits: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Turn a packed model into plain weights, in place, and save it as its original architecture.

    Split channels are merged, so that any loader accepts the directory; quantized activations are not expressed.

    Args:
        bits: width to export; None takes the current one.
        dtype: of all weights, float16 or bfloat16 (float32 for studies).
    Raises:
        RecipeError, ResourceError: see `new_directory`.
        ValueError: see `to_dense`.
    """
    check_output_directory(path)
    to_dense(model, dtype, bits)
    for name in ("quantization_config", "bits", "budget_gb"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model.to(dtype)
    model.config.dtype = dtype
    _save(model, tokenizer, path, lambda folder: None)


def _save(model: Any, tokenizer: Any, path: str | Path, extra: Callable[[Path], Any]) -> None:
    with new_directory(path) as folder:
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            # Its library lets nobody else read them.
            shutil.copymode(folder / "config.json", file)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        extra(folder)
        write_manifest(folder)


@dataclass(frozen=True)
class LayerDescription:
    """One packed layer as stored.

    bits: the width that it opens at; fixed_bits: it does not follow the model's width (a packed head); bits_per_weight:
    planes, scales, zero points and index at the widest width.
    """

    name: str
    in_features: int
    out_features: int
    widths: tuple[int, ...]
    fixed_bits: bool
    bits: int | None
    act_bits: int | None
    split_channels: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.in_features * self.out_features)


def describe(path: str | Path) -> list[LayerDescription]:
    """Read the layers of a packed checkpoint from its headers and indices, without loading weights.

    Rows are in the order of their names, numbers by value. An index that several layers share counts for the first.

    Raises:
        ModelError: not a bitbybit checkpoint, or a module without its tensors.
    """
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}/config.json: expected JSON, got: {error}; fix: check the path") from None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or method != QUANT_METHOD:
        raise ModelError(
            f"{path}: quant_method: expected {QUANT_METHOD}, got {method!r}; "
            "fix: give a directory that `bbb-ao train` wrote"
        )
    check_packed_config(quantization, f"{path}/config.json")
    sizes, indices = _stored_tensors(path)
    counted: set[str] = set()
    rows = []
    for name, shape in sorted(quantization["modules"].items(), key=lambda item: _natural(item[0])):
        own = {key for key in sizes if key.rpartition(".")[0] == name and not key.endswith((".bias", "_index"))}
        source = shape["index_source"]
        own |= {key for key in (source, f"{name}.out_index") if key in sizes and key not in counted}
        if not own:
            raise ModelError(f"{path}: {name}: expected packed tensors, got none; fix: copy all of its files again")
        counted |= own
        index = indices.get(source)
        split = 0 if index is None else int((index[shape["in_features"] :] < shape["in_features"]).sum())
        fixed = shape.get("fixed_bits", False)
        rows.append(
            LayerDescription(
                name,
                shape["in_features"],
                shape["out_features"],
                tuple(stored_widths(quantization["grid"]["kind"], shape["max_bits"], fixed)),
                fixed,
                shape["max_bits"] if fixed else shape.get("bits", config.get("bits")),
                shape["act_bits"],
                split,
                sum(sizes[key] for key in own),
            )
        )
    return rows


def openable_widths(path: str | Path) -> list[int]:
    """The widths at which a packed checkpoint can be opened: those that each layer stores, a packed head aside."""
    return sorted(set(range(2, 9)).intersection(*(row.widths for row in describe(path) if not row.fixed_bits)))


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _stored_tensors(path: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Bytes of every tensor in the directory, and the index tensors themselves."""
    sizes: dict[str, int] = {}
    indices: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        entries = read_header(file)
        sizes |= {key: entry.end - entry.begin for key, entry in entries.items()}
        with safe_open(file, framework="pt") as tensors:
            indices |= {key: tensors.get_tensor(key) for key in entries if key.endswith("_index")}
    if not sizes:
        raise ModelError(f"{path}: weights: expected .safetensors files, got none; fix: copy all of its files again")
    return sizes, indices
