"""The Python standard library's own source files as text: data that every machine has.

A file belongs to a family of modules, and the family decides whether its text is held out:

    held out  <=>  zlib.crc32(family) % HELD_OUT_MODULUS == HELD_OUT_RESIDUE

The rule knows neither the Python version nor the machine, so the text that the demo model was trained on, the text it
is calibrated on and the text it is judged on never share a module. This file imports the standard library alone:
`benchmarks/train_demo_model.py` loads it without the rest of the package.
"""

import argparse
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "held_out"]

HELD_OUT_MODULUS = 12
HELD_OUT_RESIDUE = 6
MINIMUM_CHARACTERS = 512
# Tests are as long as the library itself and mostly lists of cases; `encodings` and `pydoc_data` are generated.
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data"})
# Written by the build of the interpreter: it describes one machine.
EXCLUDED_PREFIX = "_sysconfigdata"
CALIBRATION_FILE = "calibration.jsonl"
HELD_OUT_FILE = "held_out.jsonl"


class Document(NamedTuple):
    """One source file: its path below the library's folder, with slashes, and its text."""

    path: str
    text: str

    @property
    def split(self) -> Split:
        """Where the file's text belongs."""
        return split_of(self.path.split("/")[0].removesuffix(".py"))


def family_of(module: str) -> str:
    """The name that a top-level module shares with its helpers: `datetime` for both `datetime` and `_pydatetime`.

    Leading underscores and a `py` after them go, then everything from the next underscore on.
    """
    return re.sub(r"^_+(py_?(?=.))?", "", module).split("_")[0]


def split_of(module: str) -> Split:
    """The side of the split that a top-level module's text is on; see the equation at the top of this file."""
    held_out = zlib.crc32(family_of(module).encode()) % HELD_OUT_MODULUS == HELD_OUT_RESIDUE
    return "held_out" if held_out else "train"


def find_documents(root: str | os.PathLike[str] | None = None) -> list[Document]:
    """Read the library's source files, sorted by path.

    Left out: tests, generated files, installed packages, files below `MINIMUM_CHARACTERS` and files that are not UTF-8.

    Args:
        root: the library's folder; None asks `sysconfig` for the running interpreter's.
    Raises:
        RuntimeError: there is no source file there (an interpreter that carries its library in a zip file, say).
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    documents = sorted(_read_documents(folder))
    if not documents:
        raise RuntimeError(
            f"{folder}: expected the source files (.py) of Python's standard library, found none; "
            "use an interpreter that has them, or give your own text"
        )
    return documents


def write_corpus(folder: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """Write the split as `calibration.jsonl` and `held_out.jsonl`, one {"text": ...} a file of the library.

    Args:
        folder: where to write; created if missing, files of these names are replaced.
        root: as in `find_documents`.
    Returns:
        The two paths, calibration text first.
    Raises:
        RuntimeError: as in `find_documents`.
    """
    documents = find_documents(root)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    calibration, held_out = target / CALIBRATION_FILE, target / HELD_OUT_FILE
    _write_lines(calibration, (document.text for document in documents if document.split == "train"))
    _write_lines(held_out, (document.text for document in documents if document.split == "held_out"))
    return calibration, held_out


def _read_documents(root: Path) -> Iterator[Document]:
    for current, folders, files in os.walk(root):
        # `site-packages`, `dist-packages`, `lib-dynload` and `config-3.12-…` are no identifiers, packages are.
        folders[:] = [name for name in folders if name.isidentifier() and name not in EXCLUDED_FOLDERS]
        for name in files:
            if not name.endswith(".py") or name.startswith(EXCLUDED_PREFIX):
                continue
            path = Path(current, name)
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                # Unreadable files are no text; that nothing at all is readable is reported by the caller.
                continue
            if len(text) >= MINIMUM_CHARACTERS:
                yield Document(path.relative_to(root).as_posix(), text)


def _write_lines(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    program, text = "python -m bbb_ao.demo.stdlib_corpus", "Write the standard library's source as text to train on."
    parser = argparse.ArgumentParser(prog=program, description=text)
    parser.add_argument("folder", help=f"gets {CALIBRATION_FILE} and {HELD_OUT_FILE}, which must not be there")
    folder = parser.parse_args().folder
    for present in filter(Path.exists, (Path(folder, CALIBRATION_FILE), Path(folder, HELD_OUT_FILE))):
        parser.error(f"{present}: expected no such file, found one; fix: name another folder, or remove it")
    for written in write_corpus(folder):
        print(written)
