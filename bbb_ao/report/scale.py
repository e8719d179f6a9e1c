"""Axes: from values to positions, with ticks at round numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

# Values that spread further than this factor get a logarithmic axis.
LOG_FACTOR = 4.0
# Beyond this, and below its inverse on a logarithmic axis, the arithmetic of axes overflows.
HUGE = 1e250


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic; low < high, and low > 0 where it is logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Position of a value: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def shows(self, value: float) -> bool:
        """Whether a value lies on the axis; NaN and infinities do not."""
        return self.low <= value <= self.high

    def ticks(self, most: int) -> list[float]:
        """At most `most` round numbers between the ends, at least one where that is possible."""
        if not self.log:
            return self._linear_ticks(most)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        # 1.5 and 7 keep the labels apart where the axis covers less than a decade.
        for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d, m in product(decades, mantissas) if self.shows(m * 10.0**d)]
            if 2 <= len(found) <= most:
                return found
        sparse = [10.0**d for d in decades if self.shows(10.0**d)]
        every = math.ceil(len(sparse) / most) if sparse else 1
        return sparse[::every] if len(sparse) > 1 else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def value_scale(values: Iterable[float], log: bool | None = None, room: float = 0.08) -> Scale:
    """The axis for values; NaN, infinities, what is beyond HUGE and, on a logarithmic axis, up to 0 are left out.

    Args:
        log: None decides by the spread: logarithmic where it exceeds LOG_FACTOR and all values are positive.
        room: share of the axis that stays free at either end.
    """
    known = [value for value in values if abs(value) < HUGE]
    if log is None:
        log = bool(known) and min(known) > 0 and max(known) / min(known) > LOG_FACTOR
    if log:
        logs = [math.log(value) for value in known if value > 1 / HUGE] or [0.0]
        low, high = _widened(min(logs), max(logs), room, 0.5)
        return Scale(math.exp(low), math.exp(high), True)
    return Scale(*_widened(min(known, default=0.0), max(known, default=1.0), room, 0.5))


def _widened(low: float, high: float, room: float, least: float) -> tuple[float, float]:
    spread = max(high - low, least * max(abs(low), abs(high)) * 0.1, 1e-12)
    return low - room * spread, low + (1 + room) * spread


def count_scale(count: int) -> Scale:
    """The axis of things numbered from 0, half a place free at either end."""
    return Scale(-0.5, max(count, 1) - 0.5)


def count_ticks(count: int, most: int) -> list[float]:
    """Whole numbers from 0 to count - 1, evenly apart."""
    step = next(m * 10**p for p in range(9) for m in (1, 2, 5) if m * 10**p * most >= count)
    return [float(number) for number in range(0, count, step)]


def short(value: float) -> str:
    """A number as people write it: 3 significant digits, no exponent between 0.0001 and 100,000."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.3g}"
    if "e" not in text:
        return text
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e5 else text.replace("e-0", "e-").replace("e+", "e")
