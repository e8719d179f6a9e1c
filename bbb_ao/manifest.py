"""The manifest of a saved directory: size and SHA-256 of every file, and SHA-256 of every tensor.

`manifest.json` is written last, inside the directory that appears by one rename. It shows damage and tells where it
lies; who can change the files can change it too, so that it proves no origin.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from bbb_ao.errors import ModelError
from bbb_ao.modeldir import LOADED, inside, read_json
from bbb_ao.safetensors_header import read_header

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
CHUNK = 2**20  # bytes read at once


@dataclass(frozen=True)
class FileRecord:
    """One file: bytes, sha256 of all of them, and of the values of each tensor in it."""

    bytes: int
    sha256: str
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The files of a directory by their names relative to it, with / between folders."""

    files: dict[str, FileRecord]

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    @property
    def tensors(self) -> int:
        return sum(len(record.tensors) for record in self.files.values())


def write_manifest(folder: Path) -> None:
    """Record every file below `folder`; to be called when all of them are there.

    Raises:
        ModelError: one of its safetensors files is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    records = {path.relative_to(folder).as_posix(): record_file(path) for path in files}
    (folder / MANIFEST).write_text(manifest_text(records), encoding="utf-8")


def manifest_text(records: Mapping[str, FileRecord]) -> str:
    """The content of a manifest."""
    files = {name: _content(record) for name, record in records.items()}
    return json.dumps({"format_version": MANIFEST_VERSION, "files": files}, indent=1) + "\n"


def _content(record: FileRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name != "tensors" or value}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Iterable[Path]) -> list[str]:
    """The same of several files at a time: a core hashes more slowly than a disk reads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(file_digest, paths))


def record_file(path: Path) -> FileRecord:
    """Hash a file, and each tensor of a safetensors file, in one pass.

    Raises:
        ModelError: a safetensors file that is damaged.
    """
    size, whole, tensors = path.stat().st_size, hashlib.sha256(), {}
    entries = sorted(read_header(path).items(), key=lambda item: item[1][2:]) if path.suffix == ".safetensors" else []
    with path.open("rb") as file:
        # The data follow the header without holes.
        _feed(file, size - (entries[-1][1].end if entries else 0), whole)
        for name, entry in entries:
            own = hashlib.sha256()
            _feed(file, entry.end - entry.begin, whole, own)
            tensors[name] = own.hexdigest()
    return FileRecord(size, whole.hexdigest(), tensors)


def _feed(file: BinaryIO, count: int, *digests: Any) -> None:
    while count > 0 and (piece := file.read(min(CHUNK, count))):
        count -= len(piece)
        for digest in digests:
            digest.update(piece)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory, or None where it has none.

    Raises:
        ModelError: it is there and cannot be used.
    """
    path = directory / MANIFEST
    if not (path.exists() or path.is_symlink()):
        return None
    data = read_json(directory, MANIFEST)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != MANIFEST_VERSION:
        raise ModelError(
            f"{path}: format_version: expected {MANIFEST_VERSION}, got {version!r:.40}; fix: update bbb_ao"
        )
    files = data.get("files")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{path}: files: expected names and hashes, got none; fix: copy all files again")
    for name, record in files.items():
        tensors = record.get("tensors", {}) if isinstance(record, dict) else None
        fits = isinstance(tensors, dict) and type(record.get("bytes")) is int and record.keys() <= {*FIELDS}
        if not fits or not all(map(_is_digest, (record.get("sha256"), *tensors.values()))):  # type: ignore[union-attr]
            raise ModelError(
                f"{path}: {name!r:.100}: expected bytes and sha256, got something else; fix: copy it again"
            )
    return Manifest({name: FileRecord(**record) for name, record in files.items()})


FIELDS = FileRecord.__dataclass_fields__


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def check_manifest(directory: Path) -> Manifest | None:
    """Compare every file with the manifest.

    Files that no loader reads (README.md, .gitattributes) may be there besides.

    Returns:
        the manifest, or None where there is none.
    Raises:
        ModelError: a file is missing, surplus or changed; a changed tensor is named.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    present = {path.name for path in directory.iterdir() if path.suffix in LOADED and not path.is_dir()}
    if surplus := sorted(present - manifest.files.keys() - {MANIFEST}):
        raise ModelError(
            f"{directory / surplus[0]}: file: expected only those of {MANIFEST}, got {len(surplus)} more; "
            "fix: remove what was added"
        )
    files = {inside(directory, name): expected for name, expected in manifest.files.items()}
    for path, expected in files.items():
        if (size := path.stat().st_size) != expected.bytes:
            raise ModelError(f"{path}: size: expected {expected.bytes} bytes, got {size}; fix: copy the file again")
    for (path, expected), digest in zip(files.items(), file_digests(files), strict=True):
        if digest != expected.sha256:
            raise _changed(path, expected, record_file(path))
    return manifest


def _changed(path: Path, expected: FileRecord, found: FileRecord) -> ModelError:
    names = [name for name, digest in expected.tensors.items() if found.tensors.get(name) != digest]
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    if names:
        what, wanted, got = (
            f"{names[0]}{more}",
            expected.tensors[names[0]],
            found.tensors.get(names[0], "no such tensor"),
        )
    else:
        what, wanted, got = ("header" if expected.tensors else "content"), expected.sha256, found.sha256
    return ModelError(f"{path}: {what}: expected sha256 {wanted[:16]}, got {got[:16]}; fix: copy the file again")
