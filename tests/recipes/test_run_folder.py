"""The folder of a run's state: its lock, what it leaves, and what it takes for its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bbb_ao.durable import Lock, write_durably
from bbb_ao.errors import RecipeError, ResourceError
from bbb_ao.recipes.run_folder import RunFolder

# Under the name of the program the package imports nothing heavy.
HOLD = """
import sys
sys.argv[0] = "bbb-ao"
from bbb_ao.recipes.run_folder import RunFolder
with RunFolder(sys.argv[1]) as run:
    run.commit({"a": lambda path: path.write_bytes(b"x")}, set(), format_version=1, stage=0, names=["w"])
    (run.folder / ".a.partial").write_bytes(b"half")
    run.commit({"b": lambda path: path.write_bytes(b"x")}, set())
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for restart in (False, True):
            with (
                pytest.raises(ResourceError, match=rf"lock: expected no other process .* got process {other.pid}; "),
                RunFolder(tmp_path / "out", restart=restart),
            ):
                pass
        assert (tmp_path / "out.run" / ".a.partial").exists(), "nothing of a living run is touched"
        other.send_signal(signal.SIGKILL)
        other.wait()
    with RunFolder(tmp_path / "out") as run:
        assert run.record["names"] == ["w"]
        left = sorted(path.name for path in run.folder.iterdir())
        assert left == ["b", "lock", "manifest.json", "run-2.json"], "a file that is not needed any more is gone, too"
        assert (run.folder / "lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    ("block", "step", "expected"),
    [
        (0, None, "stage 2/2 b"),
        (0, 7, "stage 2/2 b, step 7"),
        (3, None, "stage 2/2 b, block 3 done"),
        (3, 7, "stage 2/2 b, block 4, step 7"),
    ],
)
def test_a_position_names_no_block_that_may_not_exist(
    block: int, step: int | None, expected: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "out")
    run.record = {"names": ["a", "b"], "stage": 1, "block": block, "loop": step and {"step": step}}
    assert run.position == expected
    run.record["stage"] = 2
    assert run.position == "the end of its last stage"


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new" / "folder" / "out") as run:
        assert run.folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_taken_for_a_state(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.tex").write_text("x")
    (tmp_path / "file.run").write_text("x")
    for name, restart in (("out", False), ("out", True), ("file", True)):
        with pytest.raises(RecipeError, match=r"\.run: state: expected a"), RunFolder(tmp_path / name, restart=restart):
            pass
    assert (tmp_path / "out.run" / "thesis.tex").exists()


def test_a_lock_removed_while_we_wait_for_it_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path, real = tmp_path / "lock", fcntl.flock

    def removed_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    first = Lock(path)
    first.take()
    assert path.exists()
    with pytest.raises(ResourceError, match=f"got process {os.getpid()}"):
        Lock(path).take()
    first.release()
    Lock(path).take()


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, lambda partial: partial.write_text("one"))

    def fail(partial: Path) -> None:
        partial.write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"file: file: expected to write it, got: .*No space left"):
        write_durably(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "one")]
