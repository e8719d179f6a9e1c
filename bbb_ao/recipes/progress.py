"""What a run shows while it trains: progress bars on a terminal, plain lines elsewhere, and a log in JSON lines."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from bbb_ao.durable import append_line
from bbb_ao.errors import ResourceError

if TYPE_CHECKING:
    from bbb_ao.recipes.optimization import Fit

# Reading a loss waits for the device; a bar does so at most once in this many seconds.
BAR_SECONDS = 0.5
# Without a terminal: a line at the end of every block, and within one at most every so many seconds.
PLAIN_SECONDS = 30.0


class JsonLog:
    """One JSON object a line, each written as a whole, so that a run that goes on finds whole lines.

    Each has "seconds" (since the log was made) and "event"; NaN and infinities are written as strings. The file is
    made by the first line, so that a run refused before its start leaves none.

    Args:
        path: file to append to; its folder is made.
    Raises:
        ResourceError: the file cannot be written (from `write`); nothing of the line is left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = time.monotonic()

    def write(self, event: str, **values: Any) -> None:
        record = {"seconds": round(time.monotonic() - self._start, 3), "event": event, **values}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, json.dumps(_finite(record), allow_nan=False, default=str))
        except OSError as error:
            reason = f"expected a writable file, got {error.strerror}; fix: free space or permissions"
            raise ResourceError(f"{self.path}: log: {reason}") from None


class Progress:
    """Reports a run: a bar of the stage's blocks, one of the block's steps (loss, remaining time), and the log.

    Fits `compress`'s `report`; use it as a context manager.

    Args:
        stages: how many stages the run has.
        log: JSON-lines file, or None for none.
        stream: where to draw; None takes stderr. Bars are drawn on terminals only.
    """

    def __init__(self, stages: int, log: Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._log = JsonLog(log) if log else None
        console = Console(file=self._stream)
        self._bars = Bars(*_columns(), console=console, transient=True) if console.is_terminal else None
        self._stages, self._blocks, self._done, self._before = stages, 0, 0, 0
        self._name = ""
        self._stage_start = self._spoke = time.monotonic()

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
            self._block_bar = self._bars.add_task("preparing", total=None, unit="blocks", loss="")
            self._step_bar = self._bars.add_task("", total=None, visible=False, unit="steps", loss="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def event(self, kind: str, **values: Any) -> None:
        """One line of the log."""
        if self._log:
            self._log.write(kind, **values)

    def notice(self, kind: str, text: str, **values: Any) -> None:
        """A line for the reader, and one of the log."""
        self.event(kind, text=text, **values)
        if self._bars:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            self._line(text)

    def stage(self, number: int, name: str, blocks: int, done: int = 0) -> None:
        """A stage begins: its number from 0, its name, how many blocks it trains (1 for an end-to-end stage), and how
        many of these were done before."""
        self._name = f"stage {number + 1}/{self._stages} {name}"
        self._blocks, self._done, self._before = blocks, done, done
        self._stage_start = self._spoke = time.monotonic()
        self.event("stage", stage=number, name=name, blocks=blocks, done=done)
        if self._bars:
            self._bars.reset(
                self._block_bar, total=blocks, completed=done, description=self._name, unit="blocks", loss=""
            )
        elif done < blocks:
            self._line(f"{self._name}: begins at block {done + 1}/{blocks}")

    def step(self, step: int, steps: int, loss: Callable[[], float]) -> None:
        """Step `step` (from 1) of `steps` of the current block is done; `loss()` may wait for the device."""
        now = time.monotonic()
        if self._bars:
            if step == 1:
                label = f"block {self._done + 1}"
                self._bars.reset(self._step_bar, total=steps, visible=True, description=label, unit="steps", loss="")
            self._bars.update(self._step_bar, completed=step)
            if now - self._spoke > BAR_SECONDS or step == steps:
                self._spoke = now
                self._bars.update(self._step_bar, loss=f"loss {loss():.3e}")
        elif now - self._spoke > PLAIN_SECONDS:
            self._line(f"{self._name}: block {self._done + 1}/{self._blocks}, step {step}/{steps}, loss {loss():.3e}")

    def block(self, number: int, name: str, fit: "Fit") -> None:
        """A block (its number from 0) is done."""
        self._done = number + 1
        self.event("block", block=number, name=name, **asdict(fit))
        if self._bars:
            self._bars.update(self._block_bar, completed=self._done)
            return
        each = (time.monotonic() - self._stage_start) / (self._done - self._before)
        left = each * (self._blocks - self._done)
        self._line(
            f"{self._name}: block {self._done}/{self._blocks} done, loss {fit.last_loss:.3e}, {left:.0f} s left in it"
        )

    def _line(self, text: str) -> None:
        self._spoke = time.monotonic()
        print(text, file=self._stream, flush=True)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: these become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
