"""A report replaces an older report and nothing else, and is there whole or not at all."""

import os
from pathlib import Path

import pytest
from written_runs import evaluation_lines, log_lines

from bbb_ao.errors import ModelError, RecipeError, ResourceError
from bbb_ao.report import write_report, writer


def test_beside_the_run_by_default_and_again(write_run, tmp_path: Path) -> None:
    directory = write_run(log_lines(), None)
    path = write_report(f"{directory}/")
    assert path == tmp_path / "out.report.html"
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    (directory / "evaluations.jsonl").write_text("")
    assert write_report(directory) == path
    assert path.read_text() == first
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "out.log.jsonl", "out.report.html"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_another_file_is_not_overwritten(write_run, tmp_path: Path) -> None:
    directory = write_run(log_lines(), evaluation_lines())
    (tmp_path / "thesis.html").write_text("<p>mine</p>")
    (tmp_path / "empty.html").touch()
    (tmp_path / "link.html").symlink_to(tmp_path / "thesis.html")
    (tmp_path / "report.html").symlink_to(write_report(directory))
    for name in ("thesis.html", "empty.html", "link.html", "report.html", "out"):
        with pytest.raises(RecipeError, match=rf"{name}: output: expected .*; fix: choose another"):
            write_report(directory, tmp_path / name)
    assert (tmp_path / "thesis.html").read_text() == "<p>mine</p>"
    with pytest.raises(RecipeError, match="a folder that exists"):
        write_report(directory, tmp_path / "absent" / "report.html")


def test_a_failed_report_leaves_the_older_one(write_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_run(log_lines(), None)
    path = write_report(directory)
    older = path.read_text()
    with (tmp_path / "out.log.jsonl").open("a") as log:
        log.write('{"cut')
    with pytest.raises(ModelError, match=r"remove that line"):
        write_report(directory)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    write = write_run(log_lines(), None, "second")
    with pytest.raises(ResourceError, match="No space left"):
        write_report(write, path)
    assert path.read_text() == older
    assert not list(tmp_path.glob(".*"))
