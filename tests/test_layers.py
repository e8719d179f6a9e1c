"""The import layers: each layer may import those below it, and nothing above (design.md, section 3)."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bbb_ao"
LAYERS = ("kernels", "core", "passes", "recipes", "planning", "report", "cli")
# The front of the package names everything that is public; the demo is an application on top.
FRONT = {"__init__", "__main__", "demo"}


def layer_of(module: str) -> str | None:
    """The layer of a dotted module name inside bbb_ao, or None for the front."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in FRONT:
        return None
    return parts[0] if parts[0] in LAYERS else "core"


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_no_higher_layer(path: Path) -> None:
    name = ".".join(("bbb_ao", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    own = layer_of(name)
    if own is None:
        return
    for imported in imports(path):
        if imported.split(".")[0] != "bbb_ao":
            continue
        other = layer_of(imported)
        assert other is not None or imported == "bbb_ao.__version__", f"{name} imports the front: {imported}"
        if other is not None:
            assert LAYERS.index(other) <= LAYERS.index(own), f"{name} ({own}) imports {imported} ({other})"


def test_kernels_need_only_torch_and_triton() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "bbb_ao"}
    for path in (PACKAGE / "kernels").rglob("*.py"):
        for imported in imports(path):
            assert imported.split(".")[0] in allowed, f"{path.name} imports {imported}"


@pytest.mark.parametrize("library", ["pydantic", "datasets"])
def test_training_needs_neither_pydantic_nor_datasets(library: str) -> None:
    homes = {"recipes/loader.py", "recipes/data.py"}
    for path in MODULES:
        if str(path.relative_to(PACKAGE)) in homes:
            continue
        assert library not in {name.split(".")[0] for name in imports(path)}, f"{path} imports {library}"
