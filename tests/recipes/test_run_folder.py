"""The folder of a run's state: its lock, what it leaves, and what it takes for its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bbb_ao.durable import Lock, write_durably
from bbb_ao.errors import RecipeError, ResourceError, ResumeError
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


def test_a_checkpoint_that_is_half_removed_has_no_name_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path / "out") as run:
        run.commit({}, set(), format_version=1, stage=1, names=["w8a16", "w4a16"], block=0, loop=None)
        run.path("1-w8a16").mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "out", restart=True):
            pass
    assert not run.path("1-w8a16").exists()
    with RunFolder(tmp_path / "out") as run:
        assert run.record["stage"] == 1, "the state is forgotten last"
        assert not [path for path in run.folder.iterdir() if path.is_dir()]


def test_a_run_is_done_only_with_its_own_result_in_place(tmp_path: Path) -> None:
    """What is not its result would be kept in its place, and the run removed."""
    with RunFolder(tmp_path / "out") as run:
        run.commit({}, set(), format_version=1, stage=2, names=["w8a16", "w4a16"], block=0, loop=None)
        assert not run.is_done("recipe")
        run.output.mkdir()
        assert not run.is_done("recipe")
        (run.output / "recipe.yaml").write_text("recipe")
        assert run.is_done("recipe")
        assert not run.is_done("another")
        run.commit({}, set(), stage=1)
        assert not run.is_done("recipe")
    assert not RunFolder(tmp_path / "out", restart=True).is_done("recipe")


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out") as run:
        run.commit({}, set(), format_version=2)
    for _ in range(2):
        with (
            pytest.raises(
                ResumeError, match=r"format_version: expected 1, got 2; fix: go on with the bbb_ao that wrote"
            ),
            RunFolder(tmp_path / "out"),
        ):
            pass


def test_other_files_are_not_taken_for_a_state(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.tex").write_text("x")
    (tmp_path / "file.run").write_text("x")
    for name, restart in (("out", False), ("out", True), ("file", True)):
        with pytest.raises(RecipeError, match=r"\.run: state: expected a"), RunFolder(tmp_path / name, restart=restart):
            pass
    assert (tmp_path / "out.run" / "thesis.tex").exists()


@pytest.mark.parametrize("made_again", [False, True])
def test_a_lock_removed_while_we_wait_for_it_is_not_held(
    made_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path, real = tmp_path / "lock", fcntl.flock

    def removed_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        if made_again:
            path.write_text("the process before us, and another that came between\n")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    first = Lock(path)
    first.take()
    assert path.read_text() == f"{os.getpid()}\n"
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
