"""The header of a safetensors file, checked against the file's size.

The library's own errors do not name the file, and it accepts duplicate names (the last wins) and empty tensors of any
count (format: 8 bytes of header length, little endian; the JSON header; the tensors' bytes, without holes).
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from bbb_ao.errors import ModelError

ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MOST_HEADER_BYTES = 100_000_000
MOST_TENSORS = 200_000
MOST_OBJECT_BYTES = 200_000_000


class TensorEntry(NamedTuple):
    """A tensor of a file: safetensors dtype name, shape, and byte range within the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, without their values.

    Raises:
        ModelError: not a safetensors file, truncated, too long, or with a header that contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_other_formats(path, start + file.read(64))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            limit = min(max(size - 8, 0), MOST_HEADER_BYTES)
            raise _damaged(path, "header", f"at most {limit} bytes of header", f"{length}")
        file.seek(8)
        header = _parse(path, file.read(length))
    entries = {name: _entry(path, name, value) for name, value in header.items() if name != "__metadata__"}
    position, last = 0, "header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            kind = "an overlap" if entry.begin < position else "a hole"
            raise _damaged(path, f"{name!r:.100}", f"data at byte {position}", f"{kind}, byte {entry.begin}")
        position, last = entry.end, f"{name!r:.100}"
    if position != size - 8 - length:
        raise _damaged(path, last, f"data up to byte {position}", f"{size - 8 - length} bytes")
    return entries


def grows(content: bytes) -> bool:
    """Whether the objects of a JSON text may take more than 200 MB beside it: a byte may become sixty of Python's.

    An upper bound by the characters that make objects: a filled dictionary takes 232 bytes, a filled list 88, a string
    52 without its text, a number 36 with its place.
    """
    sizes = {b"{": 232, b"[": 88, b",": 36, b'"': 26}
    return sum(size * content.count(mark) for mark, size in sizes.items()) > MOST_OBJECT_BYTES + len(content)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    formats = {
        b"version https://git-lfs": ("a Git LFS pointer", "run git lfs pull"),
        b"<": ("an HTML or XML page", "download the file again"),
        b"PK\x03\x04": ("a pickled or zip archive", "convert it with safetensors"),
        b"\x80\x02": ("a pickle", "convert it with safetensors"),
        b"GGUF": ("a GGUF file", "give the original model"),
    }
    for magic, (name, fix) in formats.items():
        # Eight bytes of header length may start with any of these; only a huge length is no length.
        if start.startswith(magic) and int.from_bytes(start[:8], "little") > MOST_HEADER_BYTES:
            raise ModelError(f"{path}: content: expected safetensors, got {name}; fix: {fix}")


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise _damaged(path, "header", "each name once", f"{key!r:.100} twice")
            keys[key] = value
        return keys

    if grows(content):
        raise _damaged(path, "header", f"at most {MOST_TENSORS} tensors", "more")
    try:
        header = json.loads(content, object_pairs_hook=unique)
    except ModelError:
        raise
    except (ValueError, RecursionError):
        raise _damaged(path, "header", "JSON", "something else") from None
    if not isinstance(header, dict):
        raise _damaged(path, "header", "a JSON object", type(header).__name__)
    if len(header) > MOST_TENSORS:
        raise _damaged(path, "header", f"at most {MOST_TENSORS} tensors", f"{len(header)}")
    return header


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    where = f"{name!r:.100}"
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, where, "dtype, shape and data_offsets", "something else") from None
    if not name.isprintable():
        raise _damaged(path, where, "a printable name", "control characters")
    numbers = (*shape, begin, end)
    if (
        not isinstance(dtype, str)
        or dtype not in ITEM_BITS
        or any(type(number) is not int or not 0 <= number < 2**63 for number in numbers)
    ):
        raise _damaged(path, where, "a known dtype and whole numbers", f"{dtype!r:.30} {shape!r:.60}")
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if (end - begin) * 8 != bits:
        raise _damaged(path, where, f"{bits / 8:g} bytes for {dtype} {list(shape)}", f"{end - begin}")
    return TensorEntry(dtype, shape, begin, end)


def _damaged(path: Path, field: str, expected: str, got: str) -> ModelError:
    return ModelError(f"{path}: {field}: expected {expected}, got {got}; fix: download or save the file again")
