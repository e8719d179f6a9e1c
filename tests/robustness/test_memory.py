"""Large bad files are refused within twice their size and 200 MB of memory."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from robustness.damage import INDEX, WEIGHTS, remove

PEAK_RESET = Path("/proc/self/clear_refs")
MILLION = 10**6


def status(field: str) -> int:
    """A figure of this process in bytes: VmRSS, what it holds, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak(call: Callable[[], object]) -> int:
    """The most bytes that this process held during a call, beyond those before."""
    PEAK_RESET.write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def repeated(unit: bytes, size: int) -> bytes:
    """A JSON object with a list of so many bytes."""
    return b'{"x":[' + unit * (size // len(unit)) + b"0]}"


def empty_tensors(count: int) -> bytes:
    """The header of a file with so many tensors of no values."""
    entry = '"x{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return header(("{" + ",".join(map(entry.format, range(count))) + "}").encode())


def merges(count: int) -> bytes:
    return json.dumps({"model": {"merges": [["a", "b"]] * count}}).encode()


LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a million empty tensors": (WEIGHTS, lambda: empty_tensors(MILLION)),
    "a header of objects": (WEIGHTS, lambda: header(repeated(b"{},", 40 * MILLION))),
    "a header of numbers": (WEIGHTS, lambda: header(repeated(b"999,", 40 * MILLION))),
    "a header of one name": (WEIGHTS, lambda: header(b'{"' + b"x" * 40 * MILLION + b'":3}')),
    "a configuration of lists": ("config.json", lambda: repeated(b"[],", 40 * MILLION)),
    "a configuration of numbers": ("config.json", lambda: repeated(b"1.5,", 40 * MILLION)),
    "a configuration of text": ("config.json", lambda: b'{"x":"' + b"y" * 40 * MILLION + b'"}'),
    "a configuration of 100 MB": ("config.json", lambda: b" " * 100 * MILLION + b"{}"),
    "an index of objects": (INDEX, lambda: repeated(b'{"a":1},', 40 * MILLION)),
    "a tokenizer of merges": ("tokenizer.json", lambda: merges(4 * MILLION)),
}


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="needs Linux's peak of this process")
@pytest.mark.parametrize("name", LARGE)
def test_large_files_are_refused_within_their_memory(
    name: str, refused, model: Path, data: Path, tmp_path: Path
) -> None:
    file, content = LARGE[name]
    if file == INDEX:
        remove(WEIGHTS)(model)
    (model / file).write_bytes(content())
    # Of what the first refusal imports nothing counts.
    refused(3, "eval", tmp_path / "missing", "--data", data)
    most = 2 * (model / file).stat().st_size + 200 * MILLION
    assert peak(lambda: refused(3, "eval", model, "--data", data)) <= most


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="needs Linux's peak of this process")
def test_a_line_of_270_mb_is_refused_within_its_memory(refused, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"text": "' + b"x" * 270 * MILLION + b'"}\n')
    refused(4, "eval", model, "--data", tmp_path / "missing.jsonl")
    assert peak(lambda: refused(4, "eval", model, "--data", data)) <= 2 * data.stat().st_size + 200 * MILLION
