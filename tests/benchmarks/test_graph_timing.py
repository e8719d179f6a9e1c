"""How the kernels' benchmark takes turns, with timers that need no GPU."""

import time

import pytest

pytest.importorskip("triton")
from graph_timing import ROUNDS, Spread, time_in_turn


class Timer:
    """Stands for `GraphTimer`: samples of 1, 2, 3 and on, each a millisecond after the one before."""

    def __init__(self, taken: list["Timer"]) -> None:
        self.count = 0
        self._taken = taken

    def sample(self) -> float:
        time.sleep(1e-3)
        self._taken.append(self)
        self.count += 1
        return float(self.count)


@pytest.mark.parametrize("replays", [5, 6])
def test_each_turn_settles_before_it_is_timed(replays: int) -> None:
    taken: list[Timer] = []
    timers = {name: Timer(taken) for name in ("first", "second", "third")}
    spreads = time_in_turn(timers, replays, settle=0.02)  # type: ignore[arg-type]
    turns = [timer for i, timer in enumerate(taken) if i == 0 or taken[i - 1] is not timer]
    for name, timer in timers.items():
        assert 1 <= turns.count(timer) <= ROUNDS
        settled = timer.count - replays
        assert 0 < settled <= ROUNDS * 20
        # The first samples of a turn are not among those of the spread.
        assert spreads[name].low > 1


def test_without_settling_every_sample_counts() -> None:
    timer = Timer([])
    spread = time_in_turn({"only": timer}, 4, settle=0.0)["only"]  # type: ignore[dict-item]
    assert timer.count == 4
    assert spread == Spread.of([1.0, 2.0, 3.0, 4.0], spread.clock)
    assert (spread.median, spread.low) == (2.5, pytest.approx(1.3))
