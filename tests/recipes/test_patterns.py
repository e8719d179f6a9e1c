"""The bound on patterns is a bound: accepted ones are fast on hostile names, exponential ones are refused."""

import re
import time

import pytest

from bbb_ao.errors import RecipeError
from bbb_ao.recipes.patterns import MOST_WAYS, _ways, check_pattern

ACCEPTED = [
    r".*",
    r".*\.mlp\.(gate|up|down)_proj",
    r"model\.layers\.\d+\.self_attn\.[qkv]_proj",
    r"model\.layers\.(0|1|31)\..*proj",
    r".*layers\.[0-9]{1,2}\..*",
    r"(?:a|b)c",
    r"[]()*+?{}]+x",
    r"[^]]a",
    r"\(a\+\)",
    r"a{3}b{,4}c{2,}?",
    r".*.*.*x",
]
REFUSED = {
    r"(a+)+": "backtrack",
    r"(a*)*b": "backtrack",
    r"(?:a|a)*": "backtrack",
    r"(a|ab){30}c": "backtrack",
    r"(.*a){12}": "backtrack",
    r"a?" * 40 + "a" * 40: "backtrack",
    r".*.*.*.*x": "backtrack",
    r"(a|a)" * 30: "backtrack",
    r"((((a{9}){9}){9}){9}b*)*": "backtrack",
    r"(a)\1": "plain groups",
    r"(?=a)b": "plain groups",
    r"(?x)a +": "plain groups",
    r"(?P<n>a)": "plain groups",
    r"(": "regular expression",
    r"*": "regular expression",
    r"a{2,1}": "regular expression",
    r"a{99999999999999999999}": "regular expression",
    "": "1 to 256 characters",
    "a" * 300: "1 to 256 characters",
}


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_plain_patterns_are_accepted(pattern: str) -> None:
    check_pattern(pattern, "targets.0")


@pytest.mark.parametrize("pattern", REFUSED)
def test_runaway_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=rf"^targets\.0: expected .*{REFUSED[pattern]}"):
        check_pattern(pattern, "targets.0")


@pytest.mark.parametrize("pattern", [p for p in ACCEPTED if "x" in p])
def test_accepted_patterns_are_fast_on_hostile_names(pattern: str) -> None:
    start = time.perf_counter()
    assert re.fullmatch(pattern, "a" * 128) is None
    # Milliseconds on any machine; an exponential pattern would not end.
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("abc", 1),
        ("a|b|c", 3),
        ("(a|b)(c|d)", 4),
        ("a?", 2),
        ("a{2,5}", 4),
        ("(a|b){2}", 4),
        ("(a|b)?", 3),
        ("a*", 129),
        ("[|*]", 1),
    ],
)
def test_ways_are_counted(pattern: str, count: int) -> None:
    assert _ways(pattern) == count <= MOST_WAYS
