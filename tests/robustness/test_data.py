"""Every bad data source of the robustness list: exit code 4, one line, nothing written."""

import json
import os
from pathlib import Path

import pytest

from bbb_ao.recipes import compress

GOOD = json.dumps({"text": "some words " * 20}) + "\n"
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty jsonl": ("d.jsonl", b"", "an empty file"),
    "blank jsonl": ("d.jsonl", b"\n \n", "an empty file"),
    "empty txt": ("d.txt", b"", "an empty file"),
    "no token": ("d.jsonl", b'{"text": ""}\n{"text": ""}\n', "at least one window of 64, got 2"),
    "shorter than a window": ("d.txt", b"a few words", "at least one window of 64, got 11"),
    "missing column": ("d.jsonl", (GOOD + '{"txt": "a"}\n').encode(), "line 2: column: expected 'text', got txt"),
    "text a number": ("d.jsonl", (GOOD + '{"text": 3}\n').encode(), "line 2: text: expected a string, got int"),
    "text null": ("d.jsonl", b'{"text": null}\n', "line 1: text: expected a string, got NoneType"),
    "malformed line": ("d.jsonl", (GOOD * 3 + '{"text": "a}\n').encode(), "line 4"),
    "cut line": ("d.jsonl", (GOOD * 3 + '{"text": "a').encode(), "line 4: expected a JSON object"),
    "a list": ("d.jsonl", (GOOD + "[1]\n").encode(), "line 2: expected a JSON object"),
    "line after a blank one": ("d.jsonl", (GOOD + "\n" + "x\n").encode(), "line 3"),
    "deeply nested": ("d.jsonl", b'{"text":' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 1"),
    "not UTF-8": ("d.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', "line 2: encoding"),
    "not UTF-8 text": ("d.txt", b"words \xff words" * 20, "encoding: expected UTF-8"),
    "half a surrogate pair": ("d.jsonl", GOOD.encode() + rb'{"text": "\ud800"}', "line 2: text: expected characters"),
    "not parquet": ("d.parquet", b"garbage", "a readable dataset"),
    "other suffix": ("d.csv", b"text\nx\n", "suffix"),
}


def evaluate(refused, model: Path, *data: object) -> str:
    return refused(4, "eval", model, "--data", *data)


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_refused(name: str, refused, model: Path, tmp_path: Path) -> None:
    file, content, expected = FILES[name]
    (tmp_path / file).write_bytes(content)
    message = evaluate(refused, model, tmp_path / file)
    assert expected in message
    assert "; fix: " in message


@pytest.mark.parametrize(
    "name",
    ["missing.jsonl", "missing.txt", "missing", "a/b/c", "", "/dev/null", "no\x1bsuch", f"{'x' * 300}.txt", "x\0.txt"],
)
def test_missing_file_is_refused(name: str, refused, model: Path) -> None:
    evaluate(refused, model, name)


def test_missing_text_is_refused_before_the_model_is_loaded(
    refused, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(compress, "load_model", loaded)
    arguments = ("train", model, "--data", data, "typo.jsonl", "--recipe", "smoke", "--output", tmp_path / "out")
    assert "typo.jsonl: file: expected a file" in refused(4, *arguments)
    monkeypatch.setattr("bbb_ao.cli.commands.check_plan", loaded)
    refused(4, *arguments)


def test_one_bad_source_among_good_ones_is_named(refused, model: Path, data: Path) -> None:
    assert "nothing.jsonl" in evaluate(refused, model, data, "nothing.jsonl")


def test_hub_name_while_offline_says_so(refused, model: Path) -> None:
    assert "offline" in evaluate(refused, model, "org/name:config:test")


def test_folder_without_text_is_refused(refused, model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.md").write_text("x")
    assert "folder" in evaluate(refused, model, tmp_path / "folder")


def test_pipe_is_refused(refused, model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "regular file" in evaluate(refused, model, tmp_path / "pipe.jsonl")


def test_parquet_without_text_is_refused(refused, model: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"words": ["a"]}), tmp_path / "d.parquet")
    assert "row 1: column: expected 'text', got words" in evaluate(refused, model, tmp_path / "d.parquet")


def test_ids_beyond_the_vocabulary_are_refused(refused, model: Path, data: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert "token id: expected below 64" in evaluate(refused, model, data)
