"""How charts stand on the page: in a size for wide windows and one for narrow ones, alone or side by side."""

from collections.abc import Callable, Sequence

from bbb_ao.report.markup import plain, tag

WIDE, NARROW = 720.0, 340.0  # px
WIDE_PANEL, NARROW_PANEL = (224.0, 150.0), (166.0, 136.0)
MOST_PANELS = 16

Draw = Callable[[str, float], str]


def chart(identity: str, draw: Draw) -> str:
    """A chart in both sizes, of which the style sheet shows one.

    Args:
        draw: (identity, width) -> picture.
    """
    kinds = (("wide", WIDE), ("narrow", NARROW))
    return "".join(tag("div", draw(f"{identity}-{kind}", width), class_=f"chart {kind}") for kind, width in kinds)


def panels(drawn: Sequence[tuple[str, Callable[[str, float, float], str]]], identity: str) -> str:
    """Small charts with their headings, side by side; at most MOST_PANELS.

    Args:
        drawn: (heading, (identity, width, height) -> picture).
    """
    cells = []
    for number, (name, draw) in enumerate(drawn[:MOST_PANELS]):
        pictures = [
            tag("div", draw(f"{identity}-{number}-{kind}", *size), class_=kind)
            for kind, size in (("wide", WIDE_PANEL), ("narrow", NARROW_PANEL))
        ]
        cells.append(tag("div", tag("h3", plain(name)), *pictures))
    return tag("div", *cells, class_="panels")


def legend(*entries: tuple[str, str]) -> str:
    """What the kinds of lines mean: (kind, name)."""
    return tag("p", *(tag("span", plain(name), class_=f"key {kind}") for kind, name in entries), class_="legend")
