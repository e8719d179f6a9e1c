"""Times of GPU calls inside CUDA graphs, and the read bandwidth that no figure may exceed.

A call is timed over copies of its weight that together exceed the L2 cache, one after the other in one graph, as the
layers of a model follow each other in decoding. Graphs of several implementations take turns, in an order drawn anew
every round, and each turn is long enough that a graph runs at the clocks that the GPU gives it.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

Call = Callable[[Tensor], Tensor]

# A replay at least this long keeps the time to start a graph, a few microseconds, below half a percent.
REPLAY_MICROSECONDS = 2000.0
# At its power limit a GPU lowers its clocks with a delay. Shorter turns would be at clocks that other graphs left.
SETTLE_SECONDS = 0.2
ROUNDS = 2
READ_BYTES = 2**30
READ_TILES = ((2048, 4), (4096, 8), (8192, 8))
READ_PROGRAMS = (1, 4, 16)


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of the time of one call, microseconds, and the clock meanwhile, megahertz."""

    median: float
    low: float
    high: float
    clock: int | None

    @classmethod
    def of(cls, values: Sequence[float], clock: int | None) -> "Spread":
        shares = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
        median, low, high = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
        return cls(median, low, high, clock)


class GraphTimer:
    """One CUDA graph of every call in turn, as many times as fill `REPLAY_MICROSECONDS`.

    Args:
        calls: the same layer with different copies of its weight; each may tune or compile when first called.
        x: what they are called with, on the GPU.
    """

    def __init__(self, calls: Sequence[Call], x: Tensor) -> None:
        self._calls = calls  # with the weights that the graph reads
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (calls[0], *calls):
                call(x)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._capture(calls, x, 1)
        self.sample()
        once = min(self.sample() for _ in range(3)) * len(calls)
        if once < REPLAY_MICROSECONDS:
            self._capture(calls, x, math.ceil(REPLAY_MICROSECONDS / once))
            self.sample()

    def _capture(self, calls: Sequence[Call], x: Tensor, passes: int) -> None:
        self._count = len(calls) * passes
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(passes):
                for call in calls:
                    call(x)

    def sample(self) -> float:
        """Microseconds a call takes in one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self._count


def clock_rate() -> int | None:
    """Of the multiprocessors, megahertz; None where NVML is missing."""
    try:
        return torch.cuda.clock_rate()
    except (ImportError, RuntimeError):
        return None


def time_in_turn(timers: dict[str, GraphTimer], replays: int, settle: float = SETTLE_SECONDS) -> dict[str, Spread]:
    """The spread of each timer over so many replays, in `ROUNDS` turns, each begun by `settle` seconds of its own."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    clocks: dict[str, int | None] = {}
    order = random.Random(0)
    for turn in range(ROUNDS):
        for name in order.sample(list(timers), len(timers)):
            timer, begun = timers[name], time.monotonic()
            while time.monotonic() - begun < settle:
                timer.sample()
            samples[name] += [timer.sample() for _ in range(turn, replays, ROUNDS)]
            clocks[name] = clock_rate()
    return {name: Spread.of(values, clocks[name]) for name, values in samples.items()}


@triton.jit
def _read_kernel(source, sink, TILES: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros([TILE], tl.int32)
    for i in range(TILES):
        total += tl.load(source + (program * TILES + i) * TILE + tl.arange(0, TILE))
    tl.store(sink + program, tl.sum(total))


def read_bandwidth() -> float:
    """Bytes per second of the fastest of several kernels that read 1 GiB and write next to nothing."""
    words = READ_BYTES // 4
    source = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device="cuda")
    sink = torch.empty(words, dtype=torch.int32, device="cuda")
    fastest = math.inf
    for tile, warps in READ_TILES:
        for tiles in READ_PROGRAMS:

            def read(x: Tensor, tile: int = tile, tiles: int = tiles, warps: int = warps) -> Tensor:
                _read_kernel[(words // (tile * tiles),)](x, sink, tiles, tile, num_warps=warps)  # type: ignore[arg-type]
                return sink

            timer = GraphTimer([read], source)
            fastest = min(fastest, *(timer.sample() for _ in range(5)))
    return READ_BYTES / (fastest * 1e-6)
