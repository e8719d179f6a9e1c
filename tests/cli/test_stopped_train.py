"""`train` that was stopped: signals and what they say, the same command again, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bbb_ao.recipes import compress as engine
from bbb_ao.recipes import optimization

SMALL = ("--set", "sequences=4", "sequence_length=32", "micro_batch=2", "stages.*.epochs=1")


@pytest.fixture
def command(model: Path, data: Path, tmp_path: Path) -> list[object]:
    return ["train", model, "--data", data, "--recipe", "smoke", "--output", tmp_path / "out", *SMALL]


def stop_after(patch: pytest.MonkeyPatch, count: int, stop) -> None:
    """Call `stop` in place of an optimizer step, after `count` of them."""
    update, calls = optimization.update, iter(range(1000))
    patch.setattr(optimization, "update", lambda *given: stop() if next(calls) == count else update(*given))


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_says_how_to_go_on(number, code, word, run, command, tmp_path, monkeypatch) -> None:
    # A shell starts background jobs with SIGINT ignored, which Python inherits.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            stop_after(patch, 1, lambda: os.kill(os.getpid(), number))
            stopped = run(*command)
    finally:
        signal.signal(number, before)
    assert stopped.code == code
    last = stopped.err.splitlines()[-1]
    assert last == f"bbb-ao: error: {word}; the same command goes on from stage 2/3 w4a16"
    done = run(*command)
    assert (done.code, sorted(path.name for path in tmp_path.iterdir())) == (
        0,
        ["data.jsonl", "model", "out", "out.log.jsonl"],
    )
    assert f"{tmp_path / 'out.run'}: going on from stage 2/3 w4a16" in done.err.splitlines()
    log = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    assert [row["name"] for row in log if row["event"] == "stage"] == ["w8a16", "w4a16", "w4a16", "w2a16"]
    (resumed,) = [row for row in log if row["event"] == "resume"]
    assert (resumed["stage"], resumed["block"], resumed["step"]) == (1, 0, 0)
    assert "empty or missing" in run(*command).err, "a finished run is not done again"


def test_what_changed_is_refused_by_name(run, command, model, data, tmp_path, monkeypatch) -> None:
    def fail() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        stop_after(patch, 1, fail)
        patch.setattr(engine.Memory, "retry", lambda memory, attempt, size, where: attempt(size))
        assert run(*command).code == 5

    def listing() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}

    before = listing()
    changed = run(*command, "stages.1.lr=0.1")
    assert changed.code == 7
    assert "stages.1.lr: recipe: expected 0.0002, as the run began, got 0.1; fix: restore it, go on" in changed.err
    text = data.read_text()
    data.write_text(text + "\n")
    changed = run(*command)
    assert (changed.code, "data 1: data.jsonl: content: expected sha256" in changed.err) == (7, True), changed
    data.write_text(text)
    state = load_file(model / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in state.items()}, model / "model.safetensors", {"format": "pt"})
    changed = run(*command)
    assert (changed.code, "model: model.safetensors: content: expected sha256" in changed.err) == (7, True), changed
    save_file(state, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "expected an empty or missing directory" in run(*command).err
    (tmp_path / "out" / "thesis.tex").unlink()
    assert listing() == before
    assert run(*command).code == 0


def test_a_second_process_is_refused(run, command, tmp_path) -> None:
    program = (
        "import sys; sys.argv[0] = 'bbb-ao'\n"
        "from bbb_ao.recipes.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]): print('held', flush=True); sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        started = time.monotonic()
        result = run(*command)
        assert time.monotonic() - started < 10
        other.communicate("")
    assert result.code == 5
    assert f"lock: expected no other process at work here, got process {other.pid}; fix: " in result.err
    assert not (tmp_path / "out.log.jsonl").exists()
