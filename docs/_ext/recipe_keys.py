"""Directives that read the recipe language from its code.

`recipe-keys` has a section for the recipe and one for each part of it (grid, split, stages, ...): fields, types,
defaults, and what the dataclass's docstring says of each. A field that "Attributes:" does not describe, or a
description without a field, ends the build. `shipped-recipes` is a table of the recipes that come with the package.
"""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bbb_ao.recipes.loader import load_recipe, shipped_recipes
from bbb_ao.recipes.stages import Recipe


def described(cls: type) -> dict[str, str]:
    """Field -> its text, from the docstring's "Attributes:"."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines():
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        elif line.startswith("        "):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            break
    fields = {field.name for field in dataclasses.fields(cls)}
    if different := fields ^ texts.keys():
        raise ValueError(f"{cls.__name__}: fields and described Attributes differ: {', '.join(sorted(different))}")
    return texts


def type_text(hint: Any) -> str:
    """A type as a reader of YAML thinks of it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " | ".join(type_text(argument) for argument in arguments)
    if typing.get_origin(hint) is tuple:
        return f"list of {type_text(arguments[0])}"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint.__name__
    return {int: "whole number", float: "number", str: "text", bool: "true | false", types.NoneType: "null"}[hint]


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as YAML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return "its own defaults"
    if field.default is dataclasses.MISSING:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    names = {None: "null", True: "true", False: "false", "": '""'}
    plain = isinstance(value, bool | str | None)
    return f"default {names.get(value, value) if plain else value}"


def text_nodes(text: str) -> list[nodes.Node]:
    """Plain text in which `backticks` mark literals."""
    parts = text.split("`")
    return [nodes.literal(part, part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts)]


def parts(cls: type) -> dict[str, type]:
    """Key -> dataclass, for every field of `cls` whose type holds one."""

    def inside(hint: Any) -> type | None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return hint
        return next((found for argument in typing.get_args(hint) if (found := inside(argument))), None)

    return {name: part for name, hint in typing.get_type_hints(cls).items() if (part := inside(hint))}


class RecipeKeys(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(inspect.getfile(Recipe))
        return [self._section("", Recipe), *(self._section(key, part) for key, part in parts(Recipe).items())]

    def _section(self, key: str, cls: type) -> nodes.Node:
        title = f"Keys of {key}" if key else "Keys of a recipe"
        section = nodes.section(ids=[nodes.make_id(title)], names=[title])
        section += nodes.title("", title)
        section += nodes.paragraph("", inspect.cleandoc(cls.__doc__ or "").partition("\n")[0])
        texts, hints = described(cls), typing.get_type_hints(cls)
        listing = nodes.definition_list(classes=["keys"])
        for field in dataclasses.fields(cls):
            term = nodes.term("", "", nodes.literal(field.name, field.name))
            term += nodes.Text(f"  {type_text(hints[field.name])}; {default_text(field)}")
            text = texts[field.name]
            body = nodes.definition("", nodes.paragraph("", "", *text_nodes(text[0].upper() + text[1:])))
            listing += nodes.definition_list_item("", term, body)
        section += listing
        return section


class ShippedRecipes(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        rows = [("recipe", "what it is for", "stages", "text")]
        for name in shipped_recipes():
            recipe = load_recipe(name)
            schedule = ", ".join(stage.name for stage in recipe.stages)
            rows.append((name, recipe.description, schedule, f"{recipe.sequences} x {recipe.sequence_length} tokens"))
        group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in (15, 40, 30, 15)), cols=4)
        head, *body = [
            nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in row), classes=[]) for row in rows
        ]
        group += [nodes.thead("", head), nodes.tbody("", *body)]
        return [nodes.table("", group)]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("recipe-keys", RecipeKeys)
    app.add_directive("shipped-recipes", ShippedRecipes)
    return {"parallel_read_safe": True}
