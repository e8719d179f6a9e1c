"""The header of a safetensors file: its limits, each with what is said about it."""

import json
import os
import struct
from pathlib import Path

import pytest

from bbb_ao import safetensors_header
from bbb_ao.errors import ModelError
from bbb_ao.safetensors_header import MOST_HEADER_BYTES, MOST_TENSORS, TensorEntry, read_header

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def written(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_entries_are_what_the_header_says(tmp_path: Path) -> None:
    entries = {
        "b": {"dtype": "F4", "shape": [3, 2], "data_offsets": [8, 11]},
        "a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    found = read_header(written(tmp_path / "x", header, data=bytes(11)))
    assert found == {"a": TensorEntry("BF16", (4,), 0, 8), "b": TensorEntry("F4", (3, 2), 8, 11)}


@pytest.mark.parametrize("length", [3, 1000, MOST_HEADER_BYTES])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelError, match=rf"x: header: expected at most 2 bytes of header, got {length}; fix"):
        read_header(written(tmp_path / "x", b"{}", length))


def test_a_header_of_more_than_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = written(tmp_path / "x", b"{}", MOST_HEADER_BYTES + 1)
    os.truncate(path, MOST_HEADER_BYTES + 100)
    with pytest.raises(ModelError, match=f"expected at most {MOST_HEADER_BYTES} bytes of header, got 100000001"):
        read_header(path)


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MOST_TENSORS", 3)
    for count in (3, 4):
        path = written(tmp_path / "x", json.dumps(dict.fromkeys(map(str, range(count)), EMPTY)).encode())
        if count == 3:
            assert len(read_header(path)) == 3
            continue
        with pytest.raises(ModelError, match="header: expected at most 3 tensors, got 4"):
            read_header(path)


@pytest.mark.parametrize("unit", [b"{},", b"[],", b'"a",'])
def test_headers_that_would_grow_in_memory_are_refused(tmp_path: Path, unit: bytes) -> None:
    path = written(tmp_path / "x", b'{"x":[' + unit * (21 * MOST_TENSORS) + b"0]}")
    with pytest.raises(ModelError, match=f"header: expected at most {MOST_TENSORS} tensors, got more"):
        read_header(path)
