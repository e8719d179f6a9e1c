"""Recipes from YAML: shipped ones by name, others by path, both with `key=value` overrides."""

import difflib
import json
from dataclasses import asdict, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from bbb_ao.errors import RecipeError
from bbb_ao.recipes import strict_yaml
from bbb_ao.recipes.overrides import apply_override
from bbb_ao.recipes.stages import SCHEMA, Clip, GridSettings, Recipe, Split, Stage

EXPECTED = {
    "int_type": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "a mapping",
    "missing": "a value",
}
PARTS = {"grid": GridSettings, "split": Split, "clip": Clip, "stages": Stage}


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    library = files("bbb_ao.recipes") / "library"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in library.iterdir() if item.name.endswith(".yaml")))


def load_recipe(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: a shipped name, or a file (anything with a slash or ending in .yaml or .yml).
        overrides: "key=value" in order; the key is a dotted path ("grid.kind", "stages.0.lr", "stages.*.lr"), the value
            is YAML.
    Raises:
        RecipeError: one line, `<file>: <field>: expected X, got Y; fix: ...`.
    """
    path = _find(str(name_or_path))
    data = strict_yaml.read(path)
    where = str(name_or_path)
    _check_schema(data, where)
    for override in overrides:
        apply_override(data, override)
    return _validate(data, where)


def dump_recipe(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back as an equal recipe: every field, defaults included."""
    # Through JSON, which turns tuples into lists.
    data = json.loads(json.dumps(asdict(recipe)))
    return str(yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True))


def _find(name: str) -> Path:
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    shipped = shipped_recipes()
    if name not in shipped:
        hint = difflib.get_close_matches(name, shipped, 1)
        fix = f"did you mean {hint[0]}?" if hint else "give a shipped name or a .yaml file"
        raise RecipeError(f"recipe: expected one of {', '.join(shipped)}, or a file, got {name!r}; fix: {fix}")
    return Path(str(files("bbb_ao.recipes") / "library" / f"{name}.yaml"))


def _check_schema(data: Any, where: str) -> None:
    """Before all else: a newer format may hold keys that only look wrong."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: content: expected a mapping, got {_short(data)}; fix: write `key: value` lines")
    schema = data.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise RecipeError(f"{where}: schema: expected {SCHEMA} or lower, got {schema}; fix: update bbb_ao")


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _validate(data: Any, where: str) -> Recipe:
    try:
        # Strict mode takes a mapping for a dataclass and a list for a tuple only from JSON.
        return _adapter().validate_json(json.dumps(data))
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, data)}") from None


def _explain(error: ValidationError, data: Any) -> str:
    """The first problem as `<field>: expected X, got Y; fix: ...`."""
    problems = error.errors(include_url=False)
    path = _path(problems[0]["loc"], data)
    name = ".".join(map(str, path))
    kind = problems[0]["type"]
    if kind == "value_error":
        message = str(problems[0]["ctx"]["error"])  # type: ignore[typeddict-item]
        return f"{name}.{message}" if name else message
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in fields(PARTS.get(str(path[0]), Recipe) if len(path) > 1 else Recipe)]
        parts = {"stages.*" if part == "stages" else part: kind for part, kind in PARTS.items()}
        inside = [f"{part}.{path[-1]}" for part, kind in parts.items() if path[-1] in [f.name for f in fields(kind)]]
        hint = inside or difflib.get_close_matches(str(path[-1]), known, 1)
        fix = f"did you mean {hint[0]}?" if hint else f"use one of {', '.join(known)}"
        return f"{name}: expected a known key, got {str(path[-1])!r}; fix: {fix}"
    same = [problem for problem in problems if _path(problem["loc"], data) == path]
    expected = " or ".join(dict.fromkeys(_expected(problem) for problem in same))
    got = "nothing" if kind == "missing" else _short(problems[0]["input"])
    return f"{name or 'content'}: expected {expected}, got {got}; fix: see `bbb-ao recipes smoke`"


def _expected(problem: Any) -> str:
    if problem["type"] == "literal_error":
        return str(problem["ctx"]["expected"]).replace("'", "")
    return EXPECTED.get(problem["type"], str(problem["msg"]))


def _path(location: tuple[int | str, ...], data: Any) -> list[int | str]:
    """The location without the names of union members, which stand for nothing in the data."""
    path: list[int | str] = []
    for part in location:
        inside = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if inside or (isinstance(data, dict) and part in data):
            data = data[part]  # type: ignore[index]
        elif not isinstance(data, dict):
            break
        path.append(part)
    return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
