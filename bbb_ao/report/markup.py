"""Elements of the page. Text from elsewhere passes through `plain`, here and nowhere else."""

import shlex
from collections.abc import Iterable, Sequence
from html import escape


def plain(text: str) -> str:
    """Text for an element or an attribute: markup escaped, unprintable characters as in Python's source."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown))


def tag(name: str, *content: str, **attributes: float | str) -> str:
    """An element around content that is markup already.

    Args:
        attributes: text is escaped, floats are rounded to a tenth; class_ is class, aria_label is aria-label.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else plain(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{''.join(content)}</{name}>"


def section(identity: str, title: str, *content: str) -> str:
    """A part of the page that the heading names."""
    heading = tag("h2", plain(title), id=identity)
    return tag("section", heading, *content, aria_labelledby=identity) + "\n"


def paragraph(text: str, kind: str = "") -> str:
    return tag("p", plain(text), **({"class_": kind} if kind else {}))


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], folded: bool = True) -> str:
    """A table, folded away where it only repeats a chart; the first column names its rows."""
    head = tag("thead", tag("tr", *(tag("th", plain(name), scope="col") for name in heads))) if heads else ""
    body = (
        tag("tr", tag("th", plain(first), scope="row"), *(tag("td", plain(cell)) for cell in rest))
        for first, *rest in rows
    )
    whole = tag("table", tag("caption", plain(caption)), head, tag("tbody", *body))
    # Focusable, so that the keyboard can scroll it.
    scrolled = tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("details", tag("summary", f"Table: {plain(caption)}"), scrolled) if folded else scrolled


def shell(command: str) -> str:
    """A command, with a line for each option; the shell joins them again. What is no command line stays as it is."""
    try:
        words = map(shlex.quote, shlex.split(command))
    except ValueError:
        return tag("pre", tag("code", plain(command)), tabindex="0")
    lines = "".join(f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words)
    return tag("pre", tag("code", plain(lines.lstrip())), tabindex="0")


def missing(text: str, command: str = "") -> str:
    """What is not known of a run, and the command that adds it."""
    return tag("div", paragraph(text), shell(command) if command else "", class_="missing")
