"""Charts as inline SVG, without scripts; colours and fonts come from the page's style sheet by class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bbb_ao.report.markup import plain, tag
from bbb_ao.report.scale import Scale, short

CHARACTER = 8.5  # width of a bold digit of a wide font at the charts' 12 px
LINE = 15.0  # least distance of two labels, px
NEAR = 100.0  # a line that ends so close to the names' column has its name there, px
TOP, BOTTOM = 26.0, 40.0  # room for the axes' names and numbers, px


@dataclass(frozen=True)
class Axis:
    """A scale with its name (and unit), and where it has ticks; None leaves them to the scale."""

    scale: Scale
    label: str
    ticks: Sequence[float] | None = None


@dataclass(frozen=True)
class Point:
    """A place in a chart; `note` is what it says of itself, and a thin line leads to it from the height `start`."""

    x: float
    y: float
    note: str = ""
    start: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that a line joins, named at their end.

    Attributes:
        kind: class of the style sheet: "main", "other" or "muted".
        marker: "dot" or "ring".
    """

    name: str
    points: Sequence[Point]
    kind: str = "main"
    marker: str = "dot"


@dataclass(frozen=True)
class Rule:
    """A horizontal line over the whole width, named at its end."""

    y: float
    name: str


def text_width(text: str) -> float:
    """At most as wide as this text is likely to be, px."""
    return CHARACTER * len(text)


def frame(identity: str, size: tuple[float, float], words: tuple[str, str], body: str) -> str:
    """A complete picture with its text alternatives; see `line_chart`."""
    width, height = size
    return tag(
        "svg",
        tag("title", plain(words[0]), id=f"{identity}-t"),
        tag("desc", plain(words[1]), id=f"{identity}-d"),
        body,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_labelledby=f"{identity}-t {identity}-d",
    )


class _Plot:
    """The area between the axes, px; `margin` stays free to its right, and a line above it for `marks`."""

    def __init__(self, size: tuple[float, float], x: Axis, y: Axis, margin: float, marks: bool) -> None:
        width, height = size
        self.x, self.y, self.height = x, y, height
        self.x_ticks = x.scale.ticks(max(2, int(width / 70))) if x.ticks is None else x.ticks
        self.y_ticks = y.scale.ticks(max(3, int(height / 40))) if y.ticks is None else y.ticks
        self.left = 10 + max((text_width(short(tick)) for tick in self.y_ticks), default=0.0)
        self.right = width - margin
        self.top = (TOP if y.label else 8.0) + (LINE if marks else 0.0)
        self.bottom = height - BOTTOM

    def across(self, value: float) -> float:
        return self.left + self.x.scale.place(value) * (self.right - self.left)

    def up(self, value: float) -> float:
        return self.bottom - self.y.scale.place(value) * (self.bottom - self.top)

    def axes(self) -> list[str]:
        """Grid, ticks and names."""
        left, right, bottom = self.left, self.right, self.bottom
        parts = [tag("text", plain(self.y.label), x=0, y=12, class_="name")] if self.y.label else []
        for value in self.y_ticks:
            high = self.up(value)
            parts.append(tag("line", x1=left, x2=right, y1=high, y2=high, class_="grid"))
            parts.append(tag("text", short(value), x=left - 6, y=high + 4, class_="tick end"))
        for value in self.x_ticks:
            at = self.across(value)
            parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(tag("text", short(value), x=at, y=bottom + 17, class_="tick middle"))
        parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        name = tag("text", plain(self.x.label), x=(left + right) / 2, y=self.height - 4, class_="name middle")
        return [*parts, name]


def line_chart(
    identity: str,
    size: tuple[float, float],
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    words: tuple[str, str],
    rules: Sequence[Rule] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Series over two axes. What does not lie on an axis (NaN, infinity) is left out; the table has it.

    Args:
        identity: of the picture, unique in the page.
        size: width and height, px.
        words: title and description, for those who do not see it.
        marks: named places on the horizontal axis, as (value, name).
    """
    names = [each.name for each in (*series, *rules) if each.name]
    plot = _Plot(size, x, y, max(16.0, 14 + max(map(text_width, names), default=0.0)), bool(marks))
    up = plot.up
    parts = plot.axes()
    for value, name in marks:
        if x.scale.shows(value):
            at = plot.across(value)
            parts.append(tag("line", x1=at, x2=at, y1=plot.top, y2=plot.bottom, class_="mark"))
            parts.append(tag("text", plain(name), x=at, y=plot.top - 6, class_="note middle"))
    ends: list[tuple[str, str, float, float]] = []
    for rule in rules:
        if y.scale.shows(rule.y):
            parts.append(tag("line", x1=plot.left, x2=plot.right, y1=up(rule.y), y2=up(rule.y), class_="rule"))
            if rule.name:
                ends.append((rule.name, "ink", plot.right, up(rule.y)))
    for each in series:
        shown = [p for p in each.points if x.scale.shows(p.x) and y.scale.shows(p.y)]
        parts.append(_line(plot, each, shown))
        if shown and each.name:
            ends.append((each.name, each.kind, plot.across(shown[-1].x), up(shown[-1].y)))
    # The name of a rule is at the right edge, and the others stand in one column with it.
    parts += _end_labels(ends, plot.top, plot.bottom, plot.right if rules else 0.0)
    return frame(identity, size, words, "".join(parts))


def _line(plot: _Plot, series: Series, shown: Sequence[Point]) -> str:
    """The line, its markers and what they say; markers too close to be told apart are there but do not show."""
    places = [(plot.across(point.x), plot.up(point.y)) for point in shown]
    apart = (places[-1][0] - places[0][0]) / (len(places) - 1) if len(places) > 2 else plot.right
    radius, marker = (3.5, series.marker) if apart >= 9 else (1.8, series.marker if apart >= 5 else "hidden")
    parts = []
    for point, (across, high) in zip(shown, places, strict=True):
        if point.start is not None and plot.y.scale.shows(point.start):
            start = plot.up(point.start)
            parts.append(tag("line", x1=across, x2=across, y1=start, y2=high, class_="whisker"))
    if len(places) > 1:
        path = " ".join(f"{across:.1f},{high:.1f}" for across, high in places)
        parts.append(tag("polyline", points=path, class_="line"))
    for point, (across, high) in zip(shown, places, strict=True):
        note = tag("title", plain(point.note)) if point.note else ""
        parts.append(tag("circle", note, cx=across, cy=high, r=radius, class_=marker))
    return tag("g", *parts, class_=series.kind)


def _end_labels(ends: Sequence[tuple[str, str, float, float]], top: float, bottom: float, column: float) -> list[str]:
    """Names beside the ends of lines: those near `column` stand in it, moved apart where they would touch."""
    near = sorted((end for end in ends if end[2] > column - NEAR), key=lambda end: end[3])
    heights: list[float] = []
    for *_, high in near:
        heights.append(max(high, heights[-1] + LINE) if heights else max(high, top))
    for number in reversed(range(len(heights))):
        limit = bottom if number == len(heights) - 1 else heights[number + 1] - LINE
        heights[number] = min(heights[number], limit)
    placed = [(*end, max(end[2], column), moved) for end, moved in zip(near, heights, strict=True)]
    placed += [(*end, end[2], end[3]) for end in ends if end not in near]
    parts = []
    for name, kind, across, high, at, moved in placed:
        if abs(moved - high) > 3 or at - across > 3:
            parts.append(tag("line", x1=across + 5, x2=at + 10, y1=high, y2=moved, class_="leader"))
        parts.append(tag("text", plain(name), x=at + 12, y=moved + 4, class_=f"label {kind}"))
    return parts


def bar_chart(identity: str, width: float, bars: Sequence[tuple[str, float, str]], words: tuple[str, str]) -> str:
    """Horizontal bars from zero: (name, value, the value as text); each name stands above its bar."""
    largest = max((value for _, value, _ in bars if math.isfinite(value)), default=0.0) or 1.0
    room = width - 8 - max((text_width(text) for *_, text in bars), default=0)
    parts = []
    for number, (name, value, text) in enumerate(bars):
        top = 36.0 * number
        length = max(1.0, room * value / largest) if math.isfinite(value) else 0.0
        parts.append(tag("text", plain(name), x=0, y=top + 12, class_="name"))
        parts.append(tag("rect", x=0, y=top + 17, width=length, height=12, class_="bar"))
        parts.append(tag("text", plain(text), x=length + 6, y=top + 27.5, class_="label ink"))
    return frame(identity, (width, 36.0 * len(bars)), words, "".join(parts))
