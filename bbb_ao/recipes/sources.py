"""Where text comes from: files, folders and hub datasets, resolved without reading them or importing anything heavy."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from bbb_ao.errors import DataError

SUFFIXES = (".jsonl", ".txt", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.\[\]%-]+))?")

Sources = str | Path | Sequence[str | Path]


def resolve_sources(sources: Sources) -> list[Path | str]:
    """The files of all sources, and the names of hub datasets; nothing is read.

    Raises:
        DataError: missing, or of no known kind.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise DataError("data: sources: expected a file, a folder or a hub dataset, got none; fix: give one")
    return [item for name in names for item in _resolve(name)]


def _resolve(name: str | Path) -> list[Path | str]:
    """The files of a source, or the hub name itself."""
    if not str(name):
        raise DataError("data: sources: expected a file, a folder or a hub dataset, got an empty name; fix: give one")
    path = Path(name)
    # Unlike Path's, os.path's functions answer for names that no file can have, too.
    if os.path.isdir(path):
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise DataError(f"{name}: folder: expected {', '.join(SUFFIXES)} files, got none; fix: check the path")
        return list(found)
    if os.path.isfile(path):
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{name}: suffix: expected {', '.join(SUFFIXES)}, got {path.suffix!r}; fix: rename the file"
            )
        return [path]
    if os.path.exists(path):
        raise DataError(f"{name}: file: expected a regular file, got a device or pipe; fix: save the text to a file")
    if path.suffix in SUFFIXES or not HUB_NAME.fullmatch(str(name)):
        raise DataError(
            f"{name}: file: expected a file, a folder or a hub dataset, got nothing there; fix: check the path"
        )
    if _offline():
        raise DataError(f"{name}: file: expected a local file while offline, got a hub name; fix: unset HF_HUB_OFFLINE")
    return [str(name)]


def _offline() -> bool:
    flags = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)
