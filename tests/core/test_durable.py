"""What is written is on the disk before a name says that it is there."""

import os
from pathlib import Path

import pytest

from bbb_ao.checkpoint import new_directory
from bbb_ao.durable import write_durably


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is fsynced and renamed, in order."""
    seen: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(descriptor: int) -> None:
        seen.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        real["fsync"](descriptor)

    def move(source: Path, target: Path) -> None:
        seen.append(f"{os.path.basename(source)} to {os.path.basename(target)}")
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    monkeypatch.setattr(os, "rename", move)
    return seen


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(calls: list[str], tmp_path: Path) -> None:
    write_durably(tmp_path / "file", lambda path: path.write_text("x"))
    assert calls == ["fsync .file.partial", ".file.partial to file", f"fsync {tmp_path.name}"]


def test_all_of_a_directory_is_synced_before_it_has_its_name(calls: list[str], tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text("x")
    *synced, renamed, last = calls
    assert sorted(synced) == ["fsync .out.partial-" + str(os.getpid()), "fsync a", "fsync b", "fsync inner"]
    assert renamed == f".out.partial-{os.getpid()} to out"
    assert last == f"fsync {tmp_path.name}"
