"""What a command is about to write: refused in the first second rather than after hours of training."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from bbb_ao.errors import RecipeError, ResourceError

# Bytes of a name, and of a whole path: the log and the temporary sibling have longer ones than the directory itself,
# and the weights lie below it.
MOST_NAME, MOST_PATH = 200, 3500
MOST_LINE = 2**20


def check_output_directory(
    output: str | Path, model: str | Path | None = None, *, may_hold_files: bool = False
) -> Path:
    """Refuse a directory that is the model's own, lies inside it, holds anything already, or cannot be replaced.

    A result is written beside its place and moved there in one step, so that the folder above must be writable too.

    Args:
        may_hold_files: accept a directory that holds something, as a run leaves one that was killed at its very end.
    Returns:
        the path, without symbolic links; nothing is created.
    Raises:
        RecipeError: as above, or it is no directory.
        ResourceError: the nearest folder above it cannot be written.
    """
    path = _plain_path(output, "output")
    if model is not None and os.path.exists(model):
        source = Path(model).resolve()
        if path == source or source in path.parents:
            raise RecipeError(
                f"{output}: output: expected a directory other than the model's, got the same; fix: choose another"
            )
    if path.exists():
        if not path.is_dir():
            raise RecipeError(f"{output}: output: expected a directory, got a file; fix: choose another path")
        if not may_hold_files and any(path.iterdir()):
            raise RecipeError(
                f"{output}: output: expected an empty or missing directory, got files; fix: choose another"
            )
        if path.is_mount():
            raise RecipeError(
                f"{output}: output: expected a directory that can be replaced, got a mount point; fix: add /result"
            )
    _check_folder(path.parent, output, "output")
    return path


def check_log(log: str | Path, output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse a log that would spoil the output directory, an input, or a file that is no log.

    Args:
        inputs: files and folders that are read.
    Raises:
        RecipeError, ResourceError: nothing is created.
    """
    path = _plain_path(log, "log")
    folders = {Path(output).resolve(): "the output directory"}
    folders |= {Path(name).resolve(): f"the input {name}" for name in inputs if os.path.exists(name)}
    for folder, what in folders.items():
        if path == folder or folder in path.parents:
            raise RecipeError(f"{log}: log: expected a file outside {what}, got one in it; fix: choose another path")
    if path.exists():
        if not path.is_file():
            raise RecipeError(f"{log}: log: expected a file, got a folder or device; fix: choose another path")
        if not _is_log(path):
            raise RecipeError(f"{log}: log: expected a log to go on with, got another file; fix: choose another path")
        if not os.access(path, os.W_OK):
            raise ResourceError(f"{log}: log: expected a writable file, got no permission; fix: choose another")
    _check_folder(path.parent, log, "log")


def check_space(output: str | Path, needed: int, held: int = 0) -> None:
    """Refuse a disk that has no room for what a run writes.

    Args:
        needed: bytes, as `recipes.disk` counts them; held: of these, what is there from an earlier start.
    Raises:
        ResourceError: names what is needed and what is free.
    """
    if (free := free_space(output)) + held < needed:
        got = size(free) + (f" beside {size(held)} that the run has written" if held else "")
        raise ResourceError(
            f"{output}: disk: expected {size(needed)} free for the result and the run's state, got {got}; "
            "fix: free space, or choose another output"
        )


def free_space(path: str | Path) -> int:
    """Bytes that are free on the disk of a path, or of the nearest folder above it that is there."""
    path = Path(path).resolve()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def size(count: float) -> str:
    """Bytes for people: "3.2 GB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _plain_path(given: str | Path, field: str) -> Path:
    """The path without symbolic links, if the system takes it and the names made from it."""
    if not str(given):
        raise RecipeError(f"{field}: expected a path, got an empty name; fix: give one")
    try:
        path = Path(given).resolve()
        longest = max(len(os.fsencode(part)) for part in path.parts)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{given}: {field}: expected a path, got: {error}; fix: choose another") from None
    if longest > MOST_NAME or len(os.fsencode(path)) > MOST_PATH:
        raise RecipeError(
            f"{given!s:.80}: {field}: expected names of at most {MOST_NAME} bytes and {MOST_PATH} in all, "
            f"got {longest} and {len(os.fsencode(path))}; fix: choose a shorter path"
        )
    if os.path.islink(given) and not path.exists():
        raise RecipeError(f"{given}: {field}: expected a path, got a link to nothing; fix: remove it")
    return path


def _check_folder(folder: Path, given: str | Path, field: str) -> None:
    """That files can be made in a folder, or in the nearest one above it that is there."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise RecipeError(
            f"{given}: {field}: expected a path below a directory, got the file {nearest}; fix: choose another"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ResourceError(f"{given}: {field}: expected {nearest} writable, got no permission; fix: choose another")


def _is_log(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(MOST_LINE)
    try:
        return not line or "event" in json.loads(line)
    except (TypeError, ValueError, RecursionError):
        return False
