"""The demo's text: the same rule everywhere, and no module on both sides of the split."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bbb_ao.demo.stdlib_corpus import (
    MINIMUM_CHARACTERS,
    Document,
    family_of,
    find_documents,
    split_of,
    write_corpus,
)

LONG = "# a line of source text\n" * (MINIMUM_CHARACTERS // 20)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return find_documents()


def make_library(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_split_is_the_recorded_one() -> None:
    # The shipped model was trained on exactly this side: a changed rule would leak text into the evaluation.
    held_out = {"http", "logging", "tarfile", "doctest", "functools", "dis", "abc", "_py_abc"}
    assert {split_of(module) for module in held_out} == {"held_out"}
    assert {split_of(module) for module in ("asyncio", "email", "json", "re", "typing")} == {"train"}


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("datetime", "datetime"),
        ("_pydatetime", "datetime"),
        ("_py_abc", "abc"),
        ("_collections_abc", "collections"),
        ("sre_parse", "sre"),
        ("__future__", "future"),
        ("py_compile", "py"),
        ("pydoc", "pydoc"),
    ],
)
def test_helpers_share_the_family_of_their_module(module: str, family: str) -> None:
    assert family_of(module) == family


def test_reading_twice_gives_the_same_documents_in_path_order(documents: list[Document]) -> None:
    assert documents == find_documents()
    paths = [document.path for document in documents]
    assert paths == sorted(set(paths))


def test_about_a_twelfth_of_the_text_is_held_out(documents: list[Document]) -> None:
    held_out = sum(len(document.text) for document in documents if document.split == "held_out")
    share = held_out / sum(len(document.text) for document in documents)
    assert 0.06 <= share <= 0.12, share


def test_splits_share_no_module(documents: list[Document]) -> None:
    modules = {side: set[str]() for side in ("train", "held_out")}
    for document in documents:
        modules[document.split].add(family_of(document.path.split("/")[0].removesuffix(".py")))
    assert modules["train"]
    assert modules["held_out"]
    assert not modules["train"] & modules["held_out"]


def test_installed_packages_tests_generated_and_unreadable_files_are_left_out(tmp_path: Path) -> None:
    kept = {"json/__init__.py": LONG, "abc.py": LONG + "é"}
    dropped = [
        "site-packages/numpy/core.py",
        "dist-packages/apt.py",
        "config-3.12-x86_64-linux-gnu/python-config.py",
        "test/test_json.py",
        "unittest/test/case.py",
        "lib2to3/tests/data/crlf.py",
        "idlelib/idle_test/test_run.py",
        "encodings/cp037.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "LICENSE.txt",
    ]
    make_library(tmp_path, kept | dict.fromkeys(dropped, LONG) | {"small.py": "x = 1\n"})
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" + LONG.encode())
    assert find_documents(tmp_path) == sorted(Document(path, text) for path, text in kept.items())


def test_written_files_hold_every_document_once(tmp_path: Path) -> None:
    library = make_library(tmp_path / "library", {"json.py": LONG + "json", "http/client.py": LONG + "http — ü"})
    calibration, held_out = write_corpus(tmp_path / "data" / "text", library)
    assert [json.loads(line) for line in calibration.read_text("utf-8").splitlines()] == [{"text": LONG + "json"}]
    assert [json.loads(line) for line in held_out.read_text("utf-8").splitlines()] == [{"text": LONG + "http — ü"}]


def test_folder_without_source_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="found none"):
        find_documents(tmp_path)


def test_the_command_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").write_text("mine")
    command = [sys.executable, "-m", "bbb_ao.demo.stdlib_corpus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "held_out.jsonl: expected no such file" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["held_out.jsonl"]
    assert (tmp_path / "held_out.jsonl").read_text() == "mine"
