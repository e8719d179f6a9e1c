"""What a run is of: its recipe and the hashes of its model and data, so that no run goes on with others by mistake."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bbb_ao.errors import ResumeError
from bbb_ao.manifest import file_digest
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


def hash_inputs(model: Any, data: Any) -> dict[str, str]:
    """SHA-256 of what a run reads, by name.

    Args:
        model: a directory, of which every file that loaders read is taken, or a module, each of its tensors.
        data: files and folders, or names of hub datasets, which stand for themselves; or token ids.
    """
    hashes: dict[str, str] = {}
    if isinstance(model, str | Path):
        files = sorted(path for path in Path(model).iterdir() if path.suffix in LOADED and path.is_file())
        hashes |= {f"model: {path.name}": file_digest(path) for path in files}
    else:
        hashes |= {f"model: {name}": _tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    if hasattr(data, "numpy"):
        return hashes | {"data": _tensor_digest(data)}
    sources: Sequence[str | Path] = [data] if isinstance(data, str | Path) else data
    for number, source in enumerate(map(Path, sources)):
        inside = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        for path in inside:
            name = f"data {number + 1}: {path.relative_to(source) if source.is_dir() else path.name}"
            hashes[name] = file_digest(path) if path.is_file() else hashlib.sha256(str(source).encode()).hexdigest()
    return hashes


def _tensor_digest(tensor: Any) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()
