"""Several values after one option."""

import pytest

from bbb_ao.cli.spread import spread

REPEATABLE, SINGLE = {"--bits", "--data", "--set"}, {"--output", "--recipe"}
CASES = {
    "DIR --bits 8 4 2": "DIR --bits 8 --bits 4 --bits 2",
    "DIR --bits 8 --bits 4": "DIR --bits 8 --bits 4",
    "DIR --bits=8 4": "DIR --bits=8 --bits 4",
    "DIR --bits 8 4 --json": "DIR --bits 8 --bits 4 --json",
    "--bits 8 4 2 DIR": "--bits 8 --bits 4 --bits 2 DIR",
    "--bits 8 4 2 DIR --data a": "--bits 8 --bits 4 --bits 2 DIR --data a",
    "--data a MODEL --output o": "--data a MODEL --output o",
    "--output o --data a MODEL": "--output o --data a MODEL",
    "--output o MODEL --data a b": "--output o MODEL --data a --data b",
    "--data a b --output o MODEL": "--data a --data b --output o MODEL",
    "--data a b --output o -- MODEL": "--data a --data b --output o -- MODEL",
    "--data a --output o": "--data a --output o",
    "MODEL --data": "MODEL --data",
    "MODEL --data - b": "MODEL --data - --data b",
    "": "",
}


@pytest.mark.parametrize("given", CASES)
def test_values_are_spread(given: str) -> None:
    assert " ".join(spread(given.split(), REPEATABLE, SINGLE)) == CASES[given]
