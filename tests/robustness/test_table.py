"""The book's table of bad input names tests that exist, and every file of this folder."""

import ast
import re
from pathlib import Path

from doc_examples import ROOT

TESTS = ROOT / "tests"


def named() -> set[str]:
    return set(re.findall(r"`([\w/]+\.py::\w+)`", (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")))


def functions(file: Path) -> set[str]:
    module = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in module.body if isinstance(node, ast.FunctionDef)}


def test_named_tests_exist() -> None:
    assert len(named()) > 20
    for name in named():
        file, _, function = name.partition("::")
        assert function in functions(TESTS / file), name


def test_every_file_is_named() -> None:
    files = {f"robustness/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert files - {"robustness/test_table.py"} <= {name.partition("::")[0] for name in named()}
