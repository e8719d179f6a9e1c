"""Where `train` may write: refused before any work."""

import os
from pathlib import Path

import pytest


def train(refused, code: int, model: Path, data: Path, output: object) -> str:
    return refused(code, "train", model, "--data", data, "--recipe", "smoke", "--output", output)


def test_output_equal_to_the_model_is_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    for output in (model, f"{model}/../model", tmp_path / "link", model / "out"):
        assert "other than the model's" in train(refused, 2, model, data, output)


def test_output_that_holds_something_is_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "empty or missing" in train(refused, 2, model, data, tmp_path / "out")


def test_output_that_is_a_file_is_refused(refused, model: Path, data: Path) -> None:
    assert "got a file" in train(refused, 2, model, data, data)
    assert "below a directory" in train(refused, 2, model, data, data / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent_is_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "writable" in train(refused, 5, model, data, tmp_path / "locked" / "out")
