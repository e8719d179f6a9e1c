"""Where `train` may write, its log included: refused before any work."""

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bbb_ao.checkpoint import new_directory
from bbb_ao.errors import ResourceError
from bbb_ao.recipes.compress import compress
from bbb_ao.recipes.loader import load_recipe

LEAST = ("--set", "sequences=2", "sequence_length=16", "stages.*.epochs=0")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def train(refused, model: Path, data: Path):
    """A run that is refused with a code: its line."""

    def call(code: int, output: object, *more: object) -> str:
        return refused(code, "train", model, "--data", data, "--recipe", "smoke", "--output", output, *LEAST, *more)

    return call


def test_output_equal_to_the_model_is_refused(train, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    for output in (model, f"{model}/../model", tmp_path / "link", model / "out"):
        assert "other than the model's" in train(2, output)


@pytest.mark.usefixtures("unplanned")
def test_output_that_holds_something_is_refused(train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "empty or missing" in train(2, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert "empty or missing" in train(2, tmp_path / "link")


def test_output_that_is_a_file_is_refused(train, data: Path) -> None:
    assert "got a file" in train(2, data)
    assert "below a directory" in train(2, data / "out")


def test_output_of_no_possible_name_is_refused(train, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "dangling").symlink_to("nothing")
    for output in ("", "x" * 250, f"{'x' * 250}/out", "/".join(["x" * 100] * 60), "x\0y"):
        assert "output: expected" in train(2, output)
    for link in ("circle", "dangling"):
        assert "output: expected a path" in train(2, tmp_path / link)


def test_output_that_cannot_be_replaced_is_refused(train) -> None:
    """An empty mount point, as containers have, can hold files but cannot be renamed over."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    empty = [path for path in mounts if os.access(path, os.R_OK) and Path(path).is_dir() and not os.listdir(path)]
    if not empty:
        pytest.skip("no empty mount point here")
    assert "mount point" in train(2, empty[0])


@pytest.mark.parametrize("there", [True, False])
def test_read_only_folders_are_refused(
    train, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    if there:
        # Empty and writable itself, but the folder in which it would be replaced is not.
        (tmp_path / "locked").chmod(0o755)
        (tmp_path / "locked" / "out").mkdir()
        (tmp_path / "locked").chmod(0o555)
    allowed = os.access
    (tmp_path / "old.jsonl").touch(mode=0o444)
    if os.geteuid() == 0:
        # Root may write anywhere.
        closed = ("locked", "old.jsonl")
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in closed and allowed(path, mode))
    assert "writable" in train(5, tmp_path / "locked" / "out")
    assert "writable" in train(5, tmp_path / "out", "--log", tmp_path / "locked" / "log.jsonl")
    assert "log: expected a writable file" in train(5, tmp_path / "out", "--log", tmp_path / "old.jsonl")


def test_a_full_disk_is_refused_at_the_start(
    train, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("bbb_ao.recipes.compress.load_model", loaded)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 1000))
    line = train(5, tmp_path / "a" / "out")
    needed = re.search(
        r"disk: expected ([\d.]+) kB free for the result and the run's state, got 1.0 kB; fix: free", line
    )
    assert needed is not None, line
    with pytest.raises(ResourceError, match="disk: expected") as alone:
        compress(model, load_recipe("smoke", LEAST[1:]), data, tmp_path / "out", device=torch.device("cpu"))
    assert needed[1] not in str(alone.value), "a run that keeps no state needs less"


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    def save() -> None:
        with new_directory(tmp_path / "out") as folder:
            (folder / "part").write_bytes(b"x")
            Path("/dev/full").write_bytes(b"x")

    with pytest.raises(ResourceError, match="free space"):
        save()
    assert not list(tmp_path.iterdir())


def test_logs_that_would_spoil_something_are_refused(train, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "notes.txt").write_text("mine\n")
    for log in (out / "log.jsonl", out, model / "log.jsonl", model / "config.json", data):
        assert "log: expected a file outside" in train(2, out, "--log", log)
    assert "expected a log to go on with" in train(2, out, "--log", tmp_path / "notes.txt")
    assert "got a folder or device" in train(2, out, "--log", tmp_path)
    assert "below a directory" in train(2, out, "--log", tmp_path / "notes.txt" / "log.jsonl")
    for content in ('{"text": "my data"}\n', "[" * 10**5, "[]", "3"):
        (tmp_path / "out.log.jsonl").write_text(content)
        assert "expected a log to go on with" in train(2, out)


@pytest.mark.parametrize("output", [".", "link", "out/"])
def test_the_current_directory_and_links_to_empty_ones_are_replaced(
    run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if output == "link":
        (tmp_path / "here" / "real").mkdir()
        (tmp_path / "here" / "link").symlink_to("real")
    place = (tmp_path / "here" / output).resolve()
    place.with_name(f"{place.name}.log.jsonl").write_text(json.dumps({"event": "stage"}) + "\n")
    result = run("train", model, "--data", data, "--recipe", "smoke", "--output", output, *LEAST)
    assert result.code == 0, result
    assert (place / "manifest.json").is_file()
    assert len(place.with_name(f"{place.name}.log.jsonl").read_text().splitlines()) > 1
    assert not list(place.parent.glob(".*partial*"))
