"""From a run's directory to a file, which replaces nothing but an older report."""

import os
import tempfile
from pathlib import Path

from bbb_ao.errors import RecipeError, ResourceError
from bbb_ao.report.page import MARK, page
from bbb_ao.report.records import read_run

SUFFIX = ".report.html"
# The mark stands in the first lines.
HEAD_BYTES = 512


def write_report(directory: str | Path, output: str | Path | None = None, log: str | Path | None = None) -> Path:
    """Read a run and write its report, whole or not at all.

    Args:
        directory: the run's output directory; of an unfinished run its log is enough.
        output: the file; None writes `<directory>.report.html`.
        log: see `read_run`.
    Returns:
        where the report is.
    Raises:
        ModelError: no run, or a damaged one.
        RecipeError: `output` is there and is no report.
        ResourceError: it cannot be written.
    """
    path = Path(output) if output else Path(f"{str(directory).rstrip('/')}{SUFFIX}")
    _check_target(path)
    text = page(read_run(directory, log))
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            # As `open` would have made it; mkstemp lets nobody else read.
            umask = os.umask(0)
            os.umask(umask)
            Path(partial).chmod(0o666 & ~umask)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path}: output: expected a writable file, got {error.strerror}; fix: free space or choose another"
        ) from None
    return path


def _check_target(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        if not path.parent.is_dir():
            raise RecipeError(
                f"{path}: output: expected a file in a folder that exists, got none; fix: make {path.parent}"
            )
        return
    if path.is_symlink() or not path.is_file():
        raise RecipeError(f"{path}: output: expected a file, got a link or another kind; fix: choose another")
    with path.open("rb") as file:
        if MARK.encode() not in file.read(HEAD_BYTES):
            raise RecipeError(
                f"{path}: output: expected a report or nothing there, got another file; fix: choose another"
            )
