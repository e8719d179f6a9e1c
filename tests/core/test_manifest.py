"""The manifest: what it records, what it refuses, and that a flipped bit is named by its tensor."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bbb_ao.checkpoint import export_dense
from bbb_ao.errors import ModelError
from bbb_ao.manifest import CHUNK, MANIFEST, check_manifest, read_manifest, record_file, write_manifest
from bbb_ao.safetensors_header import read_header

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint.path, tmp_path / "copy"))


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_every_file_and_tensor_is_recorded(checkpoint) -> None:
    manifest = check_manifest(checkpoint.path)
    assert manifest is not None
    assert manifest.files.keys() == {path.name for path in checkpoint.path.iterdir()} - {MANIFEST}
    for name, record in manifest.files.items():
        content = (checkpoint.path / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(checkpoint.path / WEIGHTS, framework="pt") as tensors:
        names = set(tensors.keys())
    recorded = manifest.files[WEIGHTS].tensors
    assert recorded.keys() == names
    entries, content = read_header(checkpoint.path / WEIGHTS), (checkpoint.path / WEIGHTS).read_bytes()
    start = data_start(checkpoint.path / WEIGHTS)
    for name, entry in entries.items():
        assert recorded[name] == hashlib.sha256(content[start + entry.begin : start + entry.end]).hexdigest(), name


def test_hashes_of_tensors_across_chunks(tmp_path: Path) -> None:
    values = {"a": torch.arange(CHUNK // 4 + 3, dtype=torch.int32), "b": torch.zeros(5), "c": torch.ones(2 * CHUNK)}
    save_file(values, tmp_path / "x.safetensors")
    record = record_file(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert record.tensors[name] == hashlib.sha256(value.numpy().tobytes()).hexdigest()
    assert record.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_the_dense_export_has_a_manifest(checkpoint, tmp_path: Path) -> None:
    export_dense(copy.deepcopy(checkpoint.model), None, tmp_path / "dense", 2)
    manifest = check_manifest(tmp_path / "dense")
    assert manifest is not None
    assert manifest.tensors == len(load_file(tmp_path / "dense" / WEIGHTS))


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_of_every_tensor_is_named(copied: Path, bit: int) -> None:
    start = data_start(copied / WEIGHTS)
    for name, entry in read_header(copied / WEIGHTS).items():
        for position in {entry.begin, entry.end - 1}:
            flip(copied / WEIGHTS, start + position, bit)
            with pytest.raises(ModelError) as error:
                check_manifest(copied)
            assert f"{WEIGHTS}: {name}: expected sha256" in str(error.value)
            flip(copied / WEIGHTS, start + position, bit)
    assert check_manifest(copied) is not None


def test_several_changed_tensors_are_counted(copied: Path) -> None:
    start, size = data_start(copied / WEIGHTS), (copied / WEIGHTS).stat().st_size
    flip(copied / WEIGHTS, start)
    flip(copied / WEIGHTS, size - 1)
    with pytest.raises(ModelError, match="and 1 more tensors: expected sha256"):
        check_manifest(copied)


def test_a_changed_header_is_named(copied: Path) -> None:
    content = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(content.replace(b'"pt"', b'"tf"'))
    with pytest.raises(ModelError, match=f"{WEIGHTS}: header: expected sha256"):
        check_manifest(copied)


@pytest.mark.parametrize("name", ["config.json", "recipe.yaml"])
def test_a_changed_file_is_named(copied: Path, name: str) -> None:
    flip(copied / name, 0)
    with pytest.raises(ModelError, match=f"{name}: content: expected sha256"):
        check_manifest(copied)
    (copied / name).write_bytes(b"")
    with pytest.raises(ModelError, match=f"{name}: size: expected"):
        check_manifest(copied)
    (copied / name).unlink()
    with pytest.raises(ModelError, match=f"{name}: file: expected it, got nothing there"):
        check_manifest(copied)


@pytest.mark.parametrize("name", ["extra.safetensors", "pytorch_model.bin", "modeling.py", "adapter_config.json"])
def test_surplus_files_that_loaders_read_are_refused(copied: Path, name: str) -> None:
    (copied / "README.md").write_text("mine")
    (copied / ".gitattributes").write_text("")
    assert check_manifest(copied) is not None
    (copied / name).write_bytes(b"")
    with pytest.raises(ModelError, match=f"{name}: file: expected only those of {MANIFEST}"):
        check_manifest(copied)


def test_no_manifest_is_none(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    assert check_manifest(copied) is None


DIGEST = "0" * 64
ODD = "expected bytes and sha256, got something else"
BAD = {
    "empty": ("", "content: expected JSON"),
    "a list": ("[]", "format_version: expected 1, got None"),
    "a newer version": ({"format_version": 2, "files": {}}, "format_version: expected 1, got 2"),
    "no files": ({"format_version": 1}, "files: expected names and hashes"),
    "files a list": ({"format_version": 1, "files": ["config.json"]}, "files: expected names and hashes"),
    "deeply nested": ('{"a":' * 10**5, "nesting"),
}
GOOD = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
BAD_FILES = {
    "no hash": ("config.json", {"bytes": 1}, ODD),
    "no size": ("config.json", {"sha256": GOOD["sha256"]}, ODD),
    "a size of text": ("config.json", GOOD | {"bytes": "1"}, ODD),
    "a short hash": ("config.json", GOOD | {"sha256": "00"}, ODD),
    "a hash that is a number": ("config.json", GOOD | {"sha256": 0}, ODD),
    "a hash in capitals": ("config.json", GOOD | {"sha256": "A" * 64}, ODD),
    "tensors a list": ("config.json", GOOD | {"tensors": [1]}, ODD),
    "a tensor without a hash": ("config.json", GOOD | {"tensors": {"a": None}}, ODD),
    "another field": ("config.json", GOOD | {"code": "x"}, ODD),
    "a record of text": ("config.json", "x", ODD),
    "a path outside": ("../../etc/passwd", GOOD, "link out of it"),
    "an absolute path": ("/etc/hostname", GOOD, "link out of it"),
    "a device": ("/dev/zero", GOOD, "link out of it"),
    "a folder": ("folder", GOOD, "regular file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests_are_refused(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    (tmp_path / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ModelError, match=rf"{MANIFEST}: {words}.*; fix: "):
        check_manifest(tmp_path)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_records_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("x")
    (tmp_path / "folder").mkdir()
    file, record, words = BAD_FILES[name]
    files = {"config.json": GOOD, file: record}
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 1, "files": files}))
    with pytest.raises(ModelError, match=rf"{words}.*; fix: "):
        check_manifest(tmp_path)


def test_a_manifest_linked_outside_is_refused(copied: Path) -> None:
    (copied / MANIFEST).rename(copied.parent / "elsewhere.json")
    (copied / MANIFEST).symlink_to(copied.parent / "elsewhere.json")
    with pytest.raises(ModelError, match="link out of it"):
        check_manifest(copied)


def test_files_in_folders_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    write_manifest(tmp_path)
    first = (tmp_path / MANIFEST).read_bytes()
    write_manifest(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == first
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert set(manifest.files) == {"additional_chat_templates/tool.jinja"}
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ y }}")
    with pytest.raises(ModelError, match=r"tool\.jinja"):
        check_manifest(tmp_path)
