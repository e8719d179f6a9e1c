"""The entry point: runs a command and turns every failure into one line on stderr and an exit code."""

import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any, TextIO

import typer

from bbb_ao.errors import BitByBitError

INTERNAL, USAGE, RESOURCES, INTERRUPTED, TERMINATED = 1, 2, 5, 130, 143
RESOURCE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM, errno.EMFILE)


class Signalled(BaseException):
    """SIGINT or SIGTERM arrived; not an Exception, so that no handler on the way takes it for a failure of its own."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: Sequence[str] | None = None, load: Callable[[], Any] | None = None, name: str = "bbb-ao") -> int:
    """Run a command line with these arguments (None: the process's).

    Args:
        load: imports and returns the typer application; None takes `bbb-ao`'s commands.
        name: of the program, for usage and errors.
    Returns:
        the exit code: 0; 1 a bug; 2 usage or recipe; 3 model; 4 data; 5 resources; 6 numerics; 7 resume; 130 or
        143 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for a in arguments[:end] if a != "--debug"] + arguments[end:]
    try:
        with _signals(), _lasting_output(), _quiet(not debug):
            app = (load or _commands)()
            code = app(arguments, prog_name=name, standalone_mode=False)
            sys.stdout.flush()
        if code == INTERRUPTED:
            # typer turns the exception into an exit code.
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt, Signalled) as error:  # noqa: BLE001  the outermost door
        code, message = explain(error)
        if debug:
            import traceback

            traceback.print_exc()
        typer.echo(f"{name}: error: {escape(message)}", err=True)
        return code


def _commands() -> Any:
    from bbb_ao.cli.commands import app

    return app


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of a failure."""
    # Older typer: Abort, for the same.
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return INTERRUPTED, "interrupted"
    if isinstance(error, Signalled):
        code, what = (TERMINATED, "terminated") if error.number == signal.SIGTERM else (INTERRUPTED, "interrupted")
        return code, "; ".join([what, *getattr(error, "__notes__", ())])
    if isinstance(error, BitByBitError):
        return error.exit_code, "; ".join([str(error), *getattr(error, "__notes__", ())])
    # typer's usage errors; their module differs between its versions.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "bbb-ao"
        return USAGE, f"{error.format_message().rstrip('.')}; fix: see `{command} --help`"  # type: ignore[attr-defined]
    name, text = type(error).__name__, str(error) or "no message"
    out_of_memory = isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text
    if out_of_memory:
        return RESOURCES, "memory: expected enough, got an allocation failure; fix: lower micro_batch or sequences"
    if isinstance(error, OSError) and error.errno in RESOURCE_ERRNOS:
        return (
            RESOURCES,
            f"{error.filename or 'file'}: expected to read or write it, got {error.strerror}; fix: free it",
        )
    return INTERNAL, f"unexpected {name}: {text[:300]}; fix: run again with --debug and report it"


def escape(text: str) -> str:
    """One line of printable characters: control and other unprintable ones as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class Lasting:
    """A text stream that goes on, to nowhere, when its reader has left: a run outlives its terminal.

    Args:
        stream: with a file descriptor, where writing may fail.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._reader_may_leave():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader_may_leave():
            self._stream.flush()

    @contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A pipe without a reader, a terminal that was closed.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Also for what is still in the buffer, which Python writes at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def _lasting_output() -> Iterator[None]:
    with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)):  # type: ignore[type-var]
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise, so that temporary files are cleaned up as on an error.

    typer would turn a KeyboardInterrupt into an exit code, and lose what it says about going on.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Signalled(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell starts background jobs with SIGINT ignored; that is kept.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Keep libraries' log lines and warnings off stderr, which holds progress and one line of error."""
    if not active:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
