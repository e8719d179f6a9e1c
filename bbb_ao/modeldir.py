"""What a model directory must hold before anything of it is loaded, decided from its files alone.

Loaders follow paths in an index, run code named in a config and unpickle weights, so a directory is checked first:
configuration, tokenizer, and every safetensors file's header against its size.
"""

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbb_ao.errors import ModelError
from bbb_ao.packed_config import check_packed_config, check_stored
from bbb_ao.safetensors_header import TensorEntry, grows, read_header

if TYPE_CHECKING:
    from torch import nn

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16")
ADAPTER, TOKENIZER_SETTINGS = "adapter_config.json", "tokenizer_config.json"
QUANT_METHOD = "bitbybit"
# Endings of the files that loaders read from a directory, whether they are meant to be there or not.
LOADED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py", *PICKLES)
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "recipe.yaml")
MOST_JSON_BYTES = 64 * 2**20
MOST_LEVELS = 32
JSON_FILES = ("generation_config.json", TOKENIZER_SETTINGS, "special_tokens_map.json", "tokenizer.json")


def check_model_directory(
    model: str | Path, allow_bitbybit: bool = False, needs_tokenizer: bool = True
) -> dict[str, Any]:
    """Refuse a model that is missing, unsafe, damaged or of the wrong kind.

    Args:
        model: a directory, as from `fetch_model`.
        allow_bitbybit: also accept a checkpoint that this package wrote (for evaluation and inspection).
        needs_tokenizer: refuse a directory without one.
    Returns:
        its config.json.
    Raises:
        ModelError: one line, `<file>: <field>: expected X, got Y; fix: ...`.
    """
    directory = Path(model)
    if not os.path.isdir(directory):
        got = "a file" if os.path.exists(directory) else "nothing there"
        raise ModelError(f"{model}: model: expected a directory, got {got}; fix: check the path")
    try:
        config = _check_config(directory, allow_bitbybit)
        for name in JSON_FILES:
            if (directory / name).exists():
                _refuse_code(read_json(directory, name), directory / name)
        if needs_tokenizer and not any((directory / name).is_file() for name in TOKENIZERS):
            raise ModelError(
                f"{directory}: tokenizer: expected one of {', '.join(TOKENIZERS[:3])}, got none; "
                "fix: save the model's tokenizer beside it"
            )
        _check_other_files(directory)
        _check_weight_files(directory, config)
    except OSError as error:
        name = error.filename or directory
        raise ModelError(f"{name}: file: expected it readable, got {error.strerror}; fix: check permissions") from None
    return config


def check_checkpoint(directory: str | Path, needs_tokenizer: bool = True) -> dict[str, Any]:
    """`check_model_directory` for a checkpoint that this package wrote.

    Raises:
        ModelError: it is a plain model, or as there.
    """
    config = check_model_directory(directory, allow_bitbybit=True, needs_tokenizer=needs_tokenizer)
    if "quantization_config" not in config:
        raise ModelError(
            f"{directory}: quantization_config: expected a bbb_ao checkpoint, got a plain model; fix: train first"
        )
    return config


def check_config(model: str | Path) -> dict[str, Any]:
    """The config.json of a full-precision model, which need not have its weights yet.

    Raises:
        ModelError: as `check_model_directory`, for this file alone.
    """
    try:
        return _check_config(Path(model), allow_bitbybit=False)
    except OSError as error:
        raise ModelError(
            f"{model}/{CONFIG}: file: expected it readable, got {error.strerror}; fix: check permissions"
        ) from None


def check_weights(model: "nn.Module") -> None:
    """Refuse NaN and infinities, which load without a word.

    Args:
        model: its parameters and buffers of a floating type are read; those on the meta device are passed over.
    Raises:
        ModelError: names the tensor, the first bad index and the count.
    """
    import torch

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        # The sum is finite exactly where all values are: one pass without a mask for the common case.
        if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float64))):
            continue
        bad = ~torch.isfinite(tensor.detach())
        if count := int(bad.sum()):
            first = bad.nonzero()[0].tolist()
            value = float(tensor.detach()[tuple(first)])
            raise ModelError(
                f"{name}: values: expected finite ones, got {value} at {first} and {count} in all; "
                "fix: use an undamaged checkpoint"
            )


def read_json(directory: Path, name: str) -> Any:
    """A JSON file of the directory, bounded in size and nesting.

    Raises:
        ModelError: not there, no regular file inside the directory, not JSON, or nested too deeply.
    """
    path = inside(directory, name)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ModelError(
            f"{path}: size: expected at most 64 MiB, got {path.stat().st_size} bytes; fix: restore the file"
        )
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: content: expected JSON, got a Git LFS pointer; fix: run git lfs pull")
    if grows(content):
        raise ModelError(f"{path}: content: expected fewer values, got millions; fix: restore the file")
    try:
        data = json.loads(content)
        levels = _levels(data)
    except RecursionError:
        levels = 10**4
        data = None
    except ValueError as error:
        reason = str(error).split(": line")[0]
        raise ModelError(f"{path}: content: expected JSON, got {reason}; fix: download the file again") from None
    if levels > MOST_LEVELS:
        raise ModelError(f"{path}: nesting: expected at most {MOST_LEVELS} levels, got more; fix: restore the file")
    return data


def _levels(data: Any) -> int:
    levels, row = 0, [data]
    while row and levels <= MOST_LEVELS:
        levels += 1
        row = [
            child
            for item in row
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
    return levels


def fetch_model(model: str | Path, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """The directory of a model: as given, or downloaded from the hub (without pickles and code) into its cache.

    Args:
        patterns: names of the files to download.
    Raises:
        ModelError: nothing there, or a hub id that cannot be downloaded.
    """
    # An empty name would be the current directory; of one that no file can have, os.path says that it is not there.
    if str(model) and os.path.isdir(model):
        return Path(model)
    if str(model) and os.path.exists(model):
        raise ModelError(
            f"{model}: model: expected a directory, got a file; fix: give the folder that holds config.json"
        )
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        raise ModelError(f"{model}: model: expected a directory or a hub id, got nothing there; fix: check the path")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelError(
            f"{model}: model: expected a local directory while offline, got none; fix: unset HF_HUB_OFFLINE"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client, its network library and the disk each raise their own
        reason = " ".join(str(error).split()).removeprefix("Got: ")[:160] or type(error).__name__
        raise ModelError(
            f"{model}: model: expected a directory or a hub id, got: {reason}; fix: check the name and the connection"
        ) from error


def inside(directory: Path, name: str) -> Path:
    """The path of a file that must lie in the directory, symbolic links resolved.

    Folders of the hub's cache, models--*/snapshots/<revision>, link to models--*/blobs; that is inside, too.

    Raises:
        ModelError: it lies elsewhere, is not there, or is no regular file.
    """
    root = directory.resolve()
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            root = folder.parent.parent
            break
    path = directory / name
    try:
        is_inside, is_there = path.resolve().is_relative_to(root), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # A name of 256 bytes, links in a circle, a null character.
        raise ModelError(f"{path}: path: expected a file's, got: {error}; fix: download the model again") from None
    if not is_inside:
        raise ModelError(f"{path}: path: expected a file inside {directory}, got a link out of it; fix: copy the file")
    if not is_there:
        raise ModelError(f"{path}: file: expected it, got nothing there; fix: download the model again")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ModelError(f"{path}: file: expected a regular file, got another kind; fix: download the model again")
    return path


def _check_config(directory: Path, allow_bitbybit: bool) -> dict[str, Any]:
    path = directory / CONFIG
    config = read_json(directory, CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: model_type: expected a Hugging Face architecture, got none; fix: restore the file")
    _refuse_code(config, path)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        if not (allow_bitbybit and method == QUANT_METHOD):
            raise ModelError(
                f"{path}: quantization_config: expected a full-precision model, got quant_method {method!r}; "
                "fix: give the original model"
            )
        check_packed_config(quantization, str(path))
    return config


def _refuse_code(data: Any, path: Path) -> None:
    """Refuse `auto_map` at any level: it names Python code to run."""
    row = [data]
    while row:
        item = row.pop()
        if isinstance(item, dict):
            if item.get("auto_map"):
                raise ModelError(
                    f"{path}: auto_map: expected no remote code, got some; "
                    "fix: remove auto_map if transformers knows the architecture itself"
                )
            row.extend(item.values())
        elif isinstance(item, list):
            row.extend(item)


def _check_other_files(directory: Path) -> None:
    """No link out of the directory among the files that loaders read, and none that names files elsewhere."""
    for path in directory.iterdir():
        if path.suffix in LOADED and path.is_symlink() and path.suffix not in PICKLES:
            inside(directory, path.name)
    if (directory / ADAPTER).exists():
        raise ModelError(
            f"{directory / ADAPTER}: file: expected a whole model, got an adapter, which names its base elsewhere; "
            "fix: merge it into its base"
        )
    settings = read_json(directory, TOKENIZER_SETTINGS) if (directory / TOKENIZER_SETTINGS).exists() else {}
    for key, value in settings.items() if isinstance(settings, dict) else ():
        # The tokenizer reads such a file instead of its own; the special tokens' one is a leftover that nothing reads.
        outside = isinstance(value, str) and os.sep in value
        if key.endswith("_file") and key != "special_tokens_map_file" and outside:
            raise ModelError(
                f"{directory / TOKENIZER_SETTINGS}: {key}: expected a plain file name, got {value!r:.80}; "
                "fix: remove it"
            )


def _check_weight_files(directory: Path, config: dict[str, Any]) -> None:
    """All weights in whole safetensors files inside the directory, of types and sizes that the configuration names."""
    entries, names = weight_entries(directory)
    packed = config.get("quantization_config")
    for name, entry in entries.items():
        if 0 in entry.shape:
            raise ModelError(
                f"{directory}: {name}: expected a tensor with values, got shape {list(entry.shape)}; "
                "fix: restore the file"
            )
        if not packed and name.endswith("weight") and entry.dtype not in FLOATS:
            raise ModelError(
                f"{directory}: {name}: expected {', '.join(FLOATS[1:])}, got {entry.dtype}; "
                "fix: give the model before quantization"
            )
    _check_blocks(directory, config, len(entries))
    if packed:
        if surplus := sorted({path.name for path in directory.glob("*.safetensors")} - names):
            raise ModelError(
                f"{directory / surplus[0]}: file: expected only the weights' files, got {len(surplus)} more; "
                "fix: remove what was added"
            )
        check_stored(packed, entries)


def weight_entries(directory: Path) -> tuple[dict[str, TensorEntry], set[str]]:
    """The tensors of a directory's weights by the headers of their files, and the names of these files.

    Raises:
        ModelError: no weights, or damaged, outside the directory, or not as the index says.
    """
    names = {WEIGHTS}
    if (directory / WEIGHTS).is_symlink() or (directory / WEIGHTS).exists():
        entries = read_header(inside(directory, WEIGHTS))
    elif (directory / INDEX).is_symlink() or (directory / INDEX).exists():
        entries, names = _read_shards(directory)
    else:
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
        got = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        fix = "convert them with safetensors" if pickles else "download the model again"
        raise ModelError(f"{directory}: weights: expected {WEIGHTS}, got {got}; fix: {fix}")
    if not entries:
        raise ModelError(f"{directory}: weights: expected tensors, got none; fix: download the model again")
    return entries, names


def _check_blocks(directory: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse more blocks than tensors: building them would take hours before the first one is found missing."""
    for settings in (config, config.get("text_config")):
        blocks = settings.get("num_hidden_layers") if isinstance(settings, dict) else None
        if blocks is not None and (type(blocks) is not int or not 0 <= blocks <= tensors):
            raise ModelError(
                f"{directory / CONFIG}: num_hidden_layers: expected at most {tensors}, the number of tensors, "
                f"got {blocks!r:.40}; fix: restore the file"
            )


def read_stored(root: str | Path, files: Iterable[str | Path]) -> dict[str, TensorEntry]:
    """The tensors of the files that a loader is about to read.

    Args:
        root: the directory that it was given; where there is none (a hub id), each file's own folder in the cache.
    Raises:
        ModelError: a file outside the directory or no whole safetensors file, or a tensor in two of them.
    """
    stored: dict[str, TensorEntry] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise ModelError(f"{file}: weights: expected safetensors, got {file.name!r}; fix: convert them")
        folder = Path(root) if root and Path(root).is_dir() else file.parent
        _add_shard(stored, inside(folder, os.path.relpath(file, folder)))
    return stored


def _add_shard(entries: dict[str, TensorEntry], path: Path) -> dict[str, TensorEntry]:
    """Add a file's tensors to those of the files before it, and return them."""
    added = read_header(path)
    if twice := entries.keys() & added.keys():
        raise ModelError(
            f"{path}: {min(twice)!r:.100}: expected in one file only, got it in two; fix: download the model again"
        )
    entries |= added
    return added


def _read_shards(directory: Path) -> tuple[dict[str, TensorEntry], set[str]]:
    """The tensors of all shards, and the shards' names."""
    path = directory / INDEX
    index = read_json(directory, INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map: expected tensor names and files, got none; fix: restore the file")
    entries: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        # transformers joins these to the directory as they are and reads whatever is there.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise ModelError(f"{path}: weight_map: expected plain file names, got {shard!r:.80}; fix: restore the file")
        added = _add_shard(entries, inside(directory, shard))
        if strayed := [name for name in added if weight_map.get(name, shard) != shard]:
            raise ModelError(
                f"{path}: weight_map: expected {strayed[0]!r:.100} in {weight_map[strayed[0]]}, got it in {shard}; "
                "fix: download the model again"
            )
    for kind, names in (
        ("missing", weight_map.keys() - entries.keys()),
        ("surplus", entries.keys() - weight_map.keys()),
    ):
        if names:
            raise ModelError(
                f"{path}: weight_map: expected the shards' tensors, got {len(names)} {kind}, "
                f"first {min(names)!r:.100}; fix: download the model again"
            )
    return entries, set(weight_map.values())
