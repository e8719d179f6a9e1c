"""Plain tables for the terminal."""

from collections.abc import Sequence
from typing import Any

import typer


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their cells; the first to the left, the others to the right."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        typer.echo("  ".join([row[0].ljust(sizes[0]), *(c.rjust(s) for c, s in zip(row[1:], sizes[1:], strict=True))]))
