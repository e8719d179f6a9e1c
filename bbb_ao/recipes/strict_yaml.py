"""YAML for recipes: the data that JSON can hold, read without surprises.

Narrower than YAML 1.1: scalars follow YAML 1.2's core schema (`1e-4` is a number, `yes` and `1:30` are text), and
duplicate keys, explicit tags, anchors, aliases and deep nesting are refused, so that no file can run code or grow.
"""

import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from bbb_ao.errors import RecipeError

MOST_BYTES = 2**16
MOST_LEVELS = 16


class StrictLoader(yaml.SafeLoader):
    """yaml.SafeLoader with the narrower rules of this module."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ComposerError(None, None, "an anchor or alias", event.start_mark)
        if getattr(event, "tag", None):
            raise ComposerError(None, None, f"the tag {event.tag}", event.start_mark)
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise ComposerError(None, None, f"more than {MOST_LEVELS} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise ConstructorError(None, None, "a key that is not text", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# A table of its own, without YAML 1.1's; the class attribute is shared with SafeLoader otherwise.
StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|~|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,30})", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        list("-+.0123456789"),
    ),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse(text: str, where: str) -> Any:
    """The data in a YAML text.

    Raises:
        RecipeError: with `where` and the position in the message.
    """
    try:
        return yaml.load(text, Loader=StrictLoader)
    except ReaderError as error:
        raise RecipeError(
            f"{where}: character {error.position}: expected printable text, got {error.character!r}; "
            "fix: save it as UTF-8 text"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "content"
        raise RecipeError(
            f"{where}: {place}: expected plain YAML, got {error.problem}; fix: correct this line"
        ) from None


def read(path: Path) -> Any:
    """The data in a YAML file of at most 64 KiB, which this loader reads in seconds.

    Raises:
        RecipeError: missing, unreadable, too large, empty, with a byte-order mark, not UTF-8, or not plain YAML.
    """
    try:
        status = path.stat()
        if status.st_size > MOST_BYTES:
            raise RecipeError(
                f"{path}: size: expected at most {MOST_BYTES} bytes, got {status.st_size}; fix: give a recipe"
            )
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError(f"{path}: file: expected a readable recipe, got another kind; fix: check the path")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: file: expected a readable recipe, got {reason}; fix: check the path") from None
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path}: encoding: expected UTF-8 without a byte-order mark, got one; fix: save it without")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: encoding: expected UTF-8 text, got byte {error.start} outside it; fix: save it as UTF-8 text"
        ) from None
    data = parse(text, str(path))
    if data is None:
        raise RecipeError(f"{path}: content: expected a mapping, got an empty file; fix: start from a shipped recipe")
    return data
