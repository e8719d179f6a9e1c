"""What a run is of: its recipe and the hashes of its model and data, so that no run goes on with others by mistake."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from bbb_ao.errors import ResumeError
from bbb_ao.manifest import file_digests
from bbb_ao.modeldir import LOADED
from bbb_ao.recipes.run_folder import AFRESH
from bbb_ao.recipes.stages import Recipe

# Settings that a run may be continued with changed: of the whole recipe, and of stages that are not finished.
AMENDABLE = {"gradient_clip", "warmup", "micro_batch", "cache"}
AMENDABLE_IN_STAGES = {"epochs", "lr", "lr_scale", "loss_weights", "batch_size", "kl_temperature", "objective"}


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def check_recipe(record: Mapping[str, Any], recipe: Recipe, amend: bool) -> set[str]:
    """Compare a recipe with that of a run.

    Args:
        record: as in `RunFolder.record`; one that is empty fits any recipe.
    Returns:
        names of the settings that have changed, which `amend` allows.
    Raises:
        ResumeError: another change; the key is named.
    """
    changed: set[str] = set()
    for path, before, now in _differences(record["recipe"], recipe_record(recipe), []) if record else ():
        own = path[0] == "stages" and len(path) > 2 and int(path[1]) >= record["stage"]
        allowed = path[2] in AMENDABLE_IN_STAGES if own else path[0] in AMENDABLE
        if allowed and amend:
            changed.add(path[-1])
            continue
        fix = "restore it, " + ("go on with the change by --amend, " if allowed else "") + AFRESH
        raise ResumeError(
            f"{'.'.join(path)}: recipe: expected {before!r:.60}, as the run began, got {now!r:.60}; fix: {fix}"
        )
    return changed


def _differences(before: Any, now: Any, path: list[str]) -> Iterator[tuple[list[str], Any, Any]]:
    """(path, value before, value now) of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), [*path, key])
    elif path == ["stages"]:
        for number, pair in enumerate(zip_longest(before, now)):
            yield from _differences(*pair, [*path, str(number)])
    elif before != now:
        yield path, before, now


def check_hashes(record: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Compare hashes, by the names of what they are of, with those of a run; an empty record fits any.

    Raises:
        ResumeError: names the first that is missing, added or changed.
    """
    if not record:
        return
    before = record["hashes"]
    for name in {**before, **hashes}:
        old, now = (held[name][:16] if name in held else "none" for held in (before, hashes))
        if before.get(name) != hashes.get(name):
            raise ResumeError(
                f"{name}: content: expected sha256 {old}, as the run began, got {now}; fix: restore it, {AFRESH}"
            )


class Inputs(NamedTuple):
    """What a run reads, by name.

    Attributes:
        hashes: SHA-256 of each.
        stamps: bytes of a file, and when it was changed last, in ns; of files alone.
    """

    hashes: dict[str, str]
    stamps: dict[str, list[int]]


def hash_inputs(model: Any, data: Any, record: Mapping[str, Any]) -> Inputs:
    """Hash what a run reads; files whose stamps are as in `record` keep the hash that it has, as reading takes minutes.

    Args:
        model: a directory, of which every file that loaders read is taken, or a module, each of its tensors.
        data: files and folders, or names of hub datasets, which stand for themselves; or token ids.
        record: as in `RunFolder.record`.
    """
    hashes: dict[str, str] = {}
    files: dict[str, Path] = {}
    if isinstance(model, str | Path):
        inside = sorted(path for path in Path(model).iterdir() if path.suffix in LOADED and path.is_file())
        files |= {f"model: {path.name}": path for path in inside}
    else:
        hashes |= {f"model: {name}": _tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    sources: Sequence[str | Path] = [data] if isinstance(data, str | Path) else data
    if hasattr(data, "numpy"):
        hashes["data"], sources = _tensor_digest(data), ()
    for number, source in enumerate(map(Path, sources), start=1):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file())
            files |= {f"data {number}: {path.relative_to(source)}": path for path in inside}
        elif source.is_file():
            files[f"data {number}: {source.name}"] = source
        else:
            hashes[f"data {number}: {source.name}"] = hashlib.sha256(str(source).encode()).hexdigest()
    stamps = {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}
    known = {
        name: record["hashes"][name] for name, stamp in record.get("stamps", {}).items() if stamp == stamps.get(name)
    }
    read = [name for name in files if name not in known]
    hashes |= known | dict(zip(read, file_digests(files[name] for name in read), strict=True))
    return Inputs(hashes, stamps)


def _tensor_digest(tensor: Any) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()
