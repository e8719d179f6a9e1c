"""What a run is of: hashed once, and again where something has changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bbb_ao.errors import ResumeError
from bbb_ao.recipes import identity
from bbb_ao.recipes.identity import check_hashes, hash_inputs


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    seen: list[str] = []
    digests = identity.file_digests

    def noting(paths):
        paths = list(paths)
        seen.extend(path.name for path in paths)
        return digests(paths)

    monkeypatch.setattr(identity, "file_digests", noting)
    return seen


@pytest.fixture
def again(tmp_path: Path) -> Callable[[], None]:
    """A function: hash a model and data as when a run goes on, and compare with how it began."""
    (tmp_path / "model").mkdir()
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for name in ("model/model.safetensors", "model/config.json", "model/README", "texts/a.txt", "texts/more/b.txt"):
        (tmp_path / name).write_text(name)
    record: dict = {}

    def call() -> None:
        found = hash_inputs(tmp_path / "model", [tmp_path / "texts", "user/dataset"], record)
        check_hashes(record, found.hashes)
        record.update(json.loads(json.dumps(found._asdict())))

    return call


def test_files_are_read_when_a_run_begins_and_where_they_may_have_changed(again, read, tmp_path: Path) -> None:
    again()
    assert sorted(read) == ["a.txt", "b.txt", "config.json", "model.safetensors"]
    read.clear()
    again()
    assert read == []
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    again()
    assert read == ["model.safetensors"], "a copy of the same content is the same"
    again()
    assert read == ["model.safetensors"], "and is known from then on"


@pytest.mark.parametrize("name", ["model/model.safetensors", "texts/more/b.txt"])
def test_a_file_of_the_same_size_that_was_changed_is_refused_by_name(name: str, again, tmp_path: Path) -> None:
    again()
    content = (tmp_path / name).read_text()
    (tmp_path / name).write_text(content[::-1])
    expected = {"model": "model: model.safetensors", "texts": "data 1: more/b.txt"}[name.partition("/")[0]]
    with pytest.raises(ResumeError, match=f"^{expected}: content: expected sha256"):
        again()
    (tmp_path / name).write_text(content)
    again()


def test_a_file_that_is_missing_or_added_is_refused_by_name(again, tmp_path: Path) -> None:
    again()
    (tmp_path / "texts" / "c.txt").write_text("c")
    with pytest.raises(ResumeError, match=r"^data 1: c\.txt: content: expected sha256 none"):
        again()
    (tmp_path / "texts" / "c.txt").unlink()
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ResumeError, match=r"^model: config\.json: content: .* got none"):
        again()
