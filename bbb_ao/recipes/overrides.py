"""Changes to a recipe's data, `stages.*.lr=1e-4`, before it is checked."""

import re
from typing import Any

from bbb_ao.errors import RecipeError
from bbb_ao.recipes import strict_yaml


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one field in place, `key=value`; unknown names are left for validation to report.

    Args:
        data: a recipe as read from YAML.
        override: the key is a dotted path ("grid.kind", "stages.0.lr", "stages.*.lr"), the value YAML.
    Raises:
        RecipeError: no such form, or a path through something that is not there.
    """
    key, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not re.fullmatch(r"[a-z_]+(\.([a-z_]+|\d{1,4}|\*))*", key):
        raise RecipeError(f"{where}: expected key=value, got {override!r}; fix: for example --set stages.0.lr=1e-4")
    value = strict_yaml.parse(text, where)
    owners: list[Any] = [data]
    *parents, last = key.split(".")
    for part in parents:
        owners = [child for owner in owners for child in _children(owner, part, where)]
    for owner in owners:
        if isinstance(owner, dict) and last != "*":
            owner[last] = value
        elif isinstance(owner, list) and last == "*":
            owner[:] = [value] * len(owner)
        elif isinstance(owner, list) and last.isdigit() and int(last) < len(owner):
            owner[int(last)] = value
        else:
            raise RecipeError(f"{where}: expected a field of the recipe, got {last!r}; fix: see the recipe's YAML")


def _children(owner: Any, part: str, where: str) -> list[Any]:
    if isinstance(owner, list) and part == "*":
        return owner
    if isinstance(owner, list) and part.isdigit() and int(part) < len(owner):
        return [owner[int(part)]]
    if isinstance(owner, dict) and part != "*":
        # `split.ratio_max=0.1` on a recipe without a split starts from the part's defaults.
        if owner.get(part) is None:
            owner[part] = {}
        return [owner[part]]
    raise RecipeError(f"{where}: expected a field of the recipe, got {part!r}; fix: see the recipe's YAML")
