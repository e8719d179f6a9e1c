"""Documents in local .jsonl and .txt files, read by position, so that a few can be drawn from a file of any size.

A file is scanned once for the positions of its pieces (24 bytes of memory each); text is read only when a piece is.
A .jsonl piece is one line, {"text": ...}. A .txt file is one document; where pieces of it are drawn they are about
64 KiB, cut at the end of a line.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bbb_ao.errors import DataError

TEXT_COLUMN = "text"
PIECE_BYTES = 64 * 2**10
MOST_LINE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Document:
    """A text and whether a beginning-of-sequence token precedes it."""

    text: str
    starts_with_bos: bool
    source: str


@dataclass(frozen=True)
class TextFile:
    """The pieces of one file: byte positions, sizes in bytes, and line numbers from 1 (0 in .txt files)."""

    path: Path
    starts: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))
    lines: array = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, position: int) -> Document:
        """One piece.

        Raises:
            DataError: not UTF-8, or a line that is no JSON object with the text column.
        """
        with self.path.open("rb") as file:
            file.seek(self.starts[position])
            content = file.read(self.sizes[position])
        line = self.lines[position]
        if line:
            return _parse_line(content, self.path, line)
        text = _decode(content, f"{self.path}: from byte {self.starts[position]}")
        return Document(text.replace("\r\n", "\n").replace("\r", "\n"), False, str(self.path))


def index_file(path: Path) -> TextFile:
    """Scan a .jsonl or .txt file for its pieces.

    Lines of a .jsonl are checked for their braces here and parsed when read, which keeps the scan at disk speed.

    Raises:
        DataError: empty, unreadable, or a line that does not start with { and end with }.
    """
    index = TextFile(path)
    scan = _scan_lines if path.suffix == ".jsonl" else _scan_pieces
    try:
        for start, size, line in scan(path):
            index.starts.append(start)
            index.sizes.append(size)
            index.lines.append(line)
    except OSError as error:
        raise DataError(f"{path}: file: expected readable text, got {error.strerror}; fix: check the path") from None
    if not len(index):
        raise DataError(f"{path}: content: expected text, got an empty file; fix: give a file with text")
    return index


def read_whole(path: Path) -> Iterator[Document]:
    """Every document of a .jsonl in order, or a .txt file as one document without a beginning token."""
    index = index_file(path)
    if path.suffix == ".jsonl":
        yield from map(index.read, range(len(index)))
        return
    text = "".join(index.read(position).text for position in range(len(index)))
    yield Document(text, False, str(path))


def _scan_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    start = 0
    with path.open("rb") as file:
        for number in range(1, 2**63):
            content = file.readline(MOST_LINE_BYTES + 1)
            if not content:
                return
            if len(content) > MOST_LINE_BYTES:
                raise DataError(
                    f"{path}: line {number}: expected at most {MOST_LINE_BYTES} bytes, got more; "
                    "fix: split the document"
                )
            stripped = content.strip()
            if stripped:
                if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
                    raise _malformed(path, number, stripped.decode("utf-8", "replace"))
                yield start, len(content), number
            start += len(content)


def _scan_pieces(path: Path) -> Iterator[tuple[int, int, int]]:
    start = 0
    with path.open("rb") as file:
        while block := file.read(PIECE_BYTES):
            size = len(block) if len(block) < PIECE_BYTES else _last_cut(block)
            yield start, size, 0
            start += size
            file.seek(start)


def _last_cut(block: bytes) -> int:
    """Where to end a full block: after its last line, else after its last space, else between two characters."""
    for separator in (b"\n", b" "):
        if position := block.rfind(separator) + 1:
            return position
    cut = len(block)
    # UTF-8 continuation bytes are 10xxxxxx; cut before the lead byte of the last character.
    while cut > len(block) - 4 and block[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1


def _parse_line(content: bytes, path: Path, number: int) -> Document:
    where = f"{path}: line {number}"
    text = _decode(content, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise _malformed(path, number, text.strip()) from None
    return document_of_row(row, where)


def document_of_row(row: dict, where: str) -> Document:
    """The document in a row of a table, which begins with a beginning-of-sequence token.

    Raises:
        DataError: no text column, or one that holds something else.
    """
    if TEXT_COLUMN not in row:
        columns = ", ".join(list(map(str, row))[:8]) or "none"
        raise DataError(f"{where}: column: expected {TEXT_COLUMN!r}, got {columns:.200}; fix: rename the text column")
    text = row[TEXT_COLUMN]
    if not isinstance(text, str):
        raise DataError(f"{where}: {TEXT_COLUMN}: expected a string, got {type(text).__name__}; fix: write it as text")
    return Document(text, True, where)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: encoding: expected UTF-8, got the byte 0x{content[error.start]:02x} at {error.start}; "
            "fix: convert it to UTF-8 text"
        ) from None


def _malformed(path: Path, number: int, text: str) -> DataError:
    return DataError(
        f'{path}: line {number}: expected a JSON object like {{"text": "..."}}, got {text[:40]!r}; '
        "fix: correct the line"
    )
