"""Plain lines without a terminal, bars with one, and a log of whole JSON lines."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from bbb_ao.errors import ResourceError
from bbb_ao.recipes import progress
from bbb_ao.recipes.optimization import Fit
from bbb_ao.recipes.progress import JsonLog, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(stream: io.StringIO, log: Path | None = None) -> str:
    with Progress(2, log, stream) as report:
        report.event("plan", blocks=2, plan="a\nb")
        for number, name in enumerate(("w4a16", "w2a16")):
            report.stage(number, name, 2)
            for block in range(2):
                for step in range(1, 4):
                    report.step(step, 3, lambda: 0.25)
                report.block(block, f"layers.{block}", Fit(0.5, 0.25, 3, "recorded"))
    return stream.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    lines = play(io.StringIO()).splitlines()
    assert len(lines) == 6
    assert lines[0] == "stage 1/2 w4a16: begins at block 1/2"
    assert lines[1].startswith("stage 1/2 w4a16: block 1/2 done, loss 2.500e-01, ")
    assert not any("\x1b" in line for line in lines)


def test_long_blocks_speak_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", -1.0)
    assert "stage 1/2 w4a16: block 1/2, step 2/3, loss 2.500e-01" in play(io.StringIO())


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = play(Terminal())
    assert "stage 2/2 w2a16" in shown
    assert "blocks" in shown
    assert "loss 2.500e-01" in shown


def test_loss_is_not_read_at_every_step() -> None:
    reads: list[int] = []
    with Progress(1, None, Terminal()) as report:
        report.stage(0, "w2a16", 1)
        for step in range(1, 1001):
            report.step(step, 1000, lambda: reads.append(0) or 0.0)
    assert len(reads) < 100


def test_log_has_a_line_for_each_event(tmp_path: Path) -> None:
    play(io.StringIO(), tmp_path / "runs" / "log.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "runs" / "log.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["plan", *["stage", "block", "block"] * 2]
    assert rows[2] == {
        "seconds": rows[2]["seconds"],
        "event": "block",
        "block": 0,
        "name": "layers.0",
        "first_loss": 0.5,
        "last_loss": 0.25,
        "steps": 3,
        "how": "recorded",
    }


def test_log_is_flushed_line_by_line_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    assert not path.exists()
    log.write("a", loss=float("nan"), limits=[float("inf"), 1.0], file=tmp_path)
    assert json.loads(path.read_text()) | {"seconds": 0} == {
        "seconds": 0,
        "event": "a",
        "loss": "nan",
        "limits": ["inf", 1.0],
        "file": str(tmp_path),
    }
    log.write("b")
    JsonLog(path).write("c")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_no_part_of_a_line_stays_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    log.write("a")
    whole = path.read_text()

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            return super().write(content[:9])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Full(path, mode.replace("b", "")))
        with pytest.raises(ResourceError, match=r"log\.jsonl: log: expected a writable file, got No space left"):
            log.write("b")
    assert path.read_text() == whole
    path.write_text(whole + whole[:9])
    JsonLog(path).write("c")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_log_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="log: expected a writable file"):
        JsonLog(tmp_path).write("a")
