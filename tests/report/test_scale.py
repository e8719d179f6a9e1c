"""Axes hold their values, and their ticks are few, round and inside."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from bbb_ao.report.scale import Scale, count_ticks, short, value_scale

VALUES = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=6)
POSITIVE = st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=6)


def check(scale: Scale, values: list[float], most: int) -> None:
    assert all(scale.shows(value) and 0 <= scale.place(value) <= 1 for value in values)
    ticks = scale.ticks(most)
    assert 1 <= len(ticks) <= most + 1, ticks
    # What a step of the sum rounds away is less than a pixel.
    assert all(-1e-3 <= scale.place(tick) <= 1.001 for tick in ticks)
    assert ticks == sorted(set(ticks))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(VALUES, st.integers(3, 12))
def test_linear_axes(values: list[float], most: int) -> None:
    check(value_scale(values, log=False), values, most)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(POSITIVE, st.integers(3, 12))
def test_logarithmic_axes(values: list[float], most: int) -> None:
    check(value_scale(values, log=True), values, most)


def test_the_spread_decides() -> None:
    assert value_scale([10, 39]).log is False
    assert value_scale([10, 41]).log is True
    assert value_scale([0, 41]).log is False


def test_what_is_no_number_is_left_out() -> None:
    scale = value_scale([math.nan, math.inf, 1.0, 2.0])
    assert 0.8 < scale.low < 1 < 2 < scale.high < 2.2
    assert not scale.shows(math.nan)
    assert not scale.shows(math.inf)
    assert value_scale([]).ticks(4)
    assert value_scale([0.0, -1.0], log=True).low > 0


def test_ticks_of_decades() -> None:
    assert Scale(0.0005, 2, True).ticks(4) == [0.001, 0.01, 0.1, 1]
    assert Scale(8, 60, True).ticks(4) == [10, 20, 50]


def test_ticks_of_counts_are_whole() -> None:
    assert count_ticks(5, 6) == [0, 1, 2, 3, 4]
    assert count_ticks(80, 8) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert count_ticks(1, 3) == [0]


def test_numbers_as_people_write_them() -> None:
    numbers = (0.00123, 8.5, 12345.0, 2.0e-7, 3e15, float("nan"), 100)
    assert [short(number) for number in numbers] == ["0.00123", "8.5", "12,345", "2e-7", "3e15", "nan", "100"]
