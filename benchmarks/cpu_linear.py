"""One row through a packed 4096 x 4096 Linear on one CPU thread, compiled, against bf16 F.linear.

    python benchmarks/cpu_linear.py [--output benchmarks/results/cpu_linear.json] [--pairs 60]

Packed and bf16 calls alternate in one process; each rotates through copies of its weight that together exceed the
caches, as the layers of a model do. The baseline is the faster of eager and compiled F.linear. `speedup` is the median
over pairs of bf16 time / packed time; low and high are the 10th and 90th percentiles. Times are milliseconds of the
thread's own CPU time, which on a shared machine leaves out the time slices of other processes.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels import pack_codes, pack_planes, packed_linear, scale_exponent
from bbb_ao.splitting import choose_index

FEATURES = 4096
GROUP_SIZE = 32
ZERO_POINT_BITS = 4
SPLIT_RATIO = 0.05
# Bytes of rotating weights: four times the last-level cache of the machines this was written on.
ROTATION = 128 * 2**20


def random_packed(generator: torch.Generator, bits: int, multiple: int | None) -> tuple[Tensor | None, ...]:
    """Operands of `packed_linear` after x, up to the index, for random codes of a width.

    Args:
        multiple: about SPLIT_RATIO of the channels are duplicated, to the nearest multiple of this many columns; a
            multiple of 128 fills the last block of the planes. None for no index.
    """
    index, columns = None, FEATURES
    if multiple is not None:
        index = choose_index(torch.rand(FEATURES, generator=generator), SPLIT_RATIO, multiple)
        assert index is not None, "the ratio splits some channels"
        columns = len(index)
    groups = columns // GROUP_SIZE

    def draw(low: int, high: int, width: int) -> Tensor:
        return torch.randint(low, high, (FEATURES, width), dtype=torch.uint8, generator=generator)

    high, mid, low = pack_planes(draw(0, 256, columns))
    zero_point = pack_codes(draw(0, 2**ZERO_POINT_BITS, groups), ZERO_POINT_BITS)
    # E4M3 patterns 40 to 100: scales from 1/64 to 3 times the second level, as in trained weights.
    scale, exponent = draw(40, 100, groups), scale_exponent(torch.tensor(4.0))
    return high, mid if bits > 2 else None, low if bits > 4 else None, scale, exponent, zero_point, index


def rotated(call: Callable[..., Tensor], operands: Sequence[tuple[Tensor | None, ...]]) -> Callable[[], Tensor]:
    """`call` on the next operands at each call."""
    turn = cycle(operands)
    return lambda: call(*next(turn))


def milliseconds(call: Callable[[], Tensor]) -> float:
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, 10th percentile, 90th percentile)."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    median, low, high = quantiles.tolist()
    return median, low, high


def make_baselines(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Eager and compiled bf16 F.linear by name."""
    copies = max(2, ROTATION // (2 * FEATURES * FEATURES))
    weights = [(x, torch.randn(FEATURES, FEATURES, dtype=torch.bfloat16)) for _ in range(copies)]
    return {"eager": rotated(F.linear, weights), "compiled": rotated(torch.compile(F.linear), weights)}


def measure(
    x: Tensor, bits: int, multiple: int | None, baselines: dict[str, Callable[[], Tensor]], pairs: int, seed: int
) -> dict[str, object]:
    """One row of the result: a packed call and one of each baseline in turn, `pairs` times."""
    generator = torch.Generator().manual_seed(seed)
    first = random_packed(generator, bits, multiple)
    size = sum(t.numel() * t.element_size() for t in first if t is not None)
    operands = [(x, *first)] + [
        (x, *(None if t is None else t.clone() for t in first)) for _ in range(max(1, ROTATION // size))
    ]

    def packed(x: Tensor, *weight: Tensor | None) -> Tensor:
        return packed_linear(x, *weight, None, bits, ZERO_POINT_BITS, True, GROUP_SIZE)  # type: ignore[arg-type]

    # Another shape for the same code would be compiled with dynamic sizes.
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True)
    torch.testing.assert_close(compiled(*operands[0]), packed(*operands[0]), rtol=0.02, atol=0.5)
    call = rotated(compiled, operands)
    for warm_up in (call, *baselines.values()):
        warm_up()
    times: list[float] = []
    references: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(pairs):
        for name, baseline in baselines.items():
            references[name].append(milliseconds(baseline))
        times.append(milliseconds(call))
    fastest = min(references, key=lambda name: spread(references[name])[0])
    reference = references[fastest]
    median, low, high = spread(times)
    bf16, bf16_low, bf16_high = spread(reference)
    speedup, speedup_low, speedup_high = spread([r / t for r, t in zip(reference, times, strict=True)])
    return {
        "bits": bits,
        "split_channels": 0 if first[-1] is None else len(first[-1]) - FEATURES,
        "stored_features": FEATURES if first[-1] is None else len(first[-1]),
        "bytes": size,
        "baseline": fastest,
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "bf16_median_ms": bf16,
        "bf16_low_ms": bf16_low,
        "bf16_high_ms": bf16_high,
        "speedup": speedup,
        "speedup_low": speedup_low,
        "speedup_high": speedup_high,
    }


def environment(seed: int) -> dict:
    """Where a row was measured: device, versions, commit."""

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
    return {
        "device": models[0] if models else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": output("git", "rev-parse", "HEAD") or "none",
        "modified": bool(output("git", "status", "--porcelain", "bbb_ao/kernels")),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu_linear.json")
    parser.add_argument("--pairs", type=int, default=60, help="alternating pairs of calls for each row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rows = []
    with torch.inference_mode():
        x = torch.randn(1, FEATURES, dtype=torch.bfloat16)
        baselines = make_baselines(x)
        for bits in (2, 4, 8):
            for multiple in (None, GROUP_SIZE, 128):
                row = measure(x, bits, multiple, baselines, arguments.pairs, arguments.seed)
                rows.append({"name": "packed_linear", **row, **environment(arguments.seed)})
                print(
                    f"W{bits}, {row['stored_features']} columns: {row['median_ms']:.2f} ms"
                    f" [{row['low_ms']:.2f}, {row['high_ms']:.2f}],"
                    f" bf16 {row['baseline']} {row['bf16_median_ms']:.2f} ms,"
                    f" {row['speedup']:.2f} times as fast [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]",
                    flush=True,
                )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
