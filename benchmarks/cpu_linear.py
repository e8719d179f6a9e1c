"""One row through a packed 4096 x 4096 Linear on one CPU thread, compiled, against bf16 F.linear.

    python benchmarks/cpu_linear.py [--output benchmarks/results/cpu_linear.json] [--pairs 60]

Packed and bf16 calls alternate in one process; each rotates through copies of its weight that together exceed the
caches, as the layers of a model do. The baseline is the faster of eager and compiled F.linear. `speedup` is the median
over pairs of bf16 time / packed time; low and high are the 10th and 90th percentiles. Times are in milliseconds.
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

FEATURES = 4096
GROUP_SIZE = 32
ZERO_POINT_BITS = 4
SPLIT_RATIO = 0.05
# Bytes of rotating weights: four times the last-level cache of the machines this was written on.
ROTATION = 128 * 2**20


def random_packed(generator: torch.Generator, bits: int, split: bool) -> tuple[Tensor | None, ...]:
    """Operands of `packed_linear` after x, up to the index, for random codes of a width.

    Args:
        split: with SPLIT_RATIO of the channels duplicated at the end and padded to a multiple of 32, else no index.
    """
    index, columns = None, FEATURES
    if split:
        copies = torch.randperm(FEATURES, generator=generator)[: int(FEATURES * SPLIT_RATIO)]
        index = torch.cat([torch.arange(FEATURES), copies])
        padding = -len(index) % GROUP_SIZE
        index = torch.cat([index, torch.full((padding,), FEATURES)]).to(torch.int32)
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
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, 10th percentile, 90th percentile)."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    median, low, high = quantiles.tolist()
    return median, low, high


def make_baseline(x: Tensor, pairs: int) -> tuple[str, Callable[[], Tensor]]:
    """(name, call) of the faster of eager and compiled bf16 F.linear."""
    copies = max(2, ROTATION // (2 * FEATURES * FEATURES))
    weights = [(x, torch.randn(FEATURES, FEATURES, dtype=torch.bfloat16)) for _ in range(copies)]
    calls = {"eager": rotated(F.linear, weights), "compiled": rotated(torch.compile(F.linear), weights)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(pairs):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    fastest = min(times, key=lambda name: spread(times[name])[0])
    return fastest, calls[fastest]


def measure(x: Tensor, bits: int, split: bool, baseline: Callable[[], Tensor], pairs: int, seed: int) -> dict:
    """One row of the result: alternating pairs of a packed and a bf16 call."""
    generator = torch.Generator().manual_seed(seed)
    first = random_packed(generator, bits, split)
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
    baseline()
    for _ in operands:
        call()
    times, reference = [], []
    for _ in range(pairs):
        reference.append(milliseconds(baseline))
        times.append(milliseconds(call))
    median, low, high = spread(times)
    bf16, bf16_low, bf16_high = spread(reference)
    speedup, speedup_low, speedup_high = spread([r / t for r, t in zip(reference, times, strict=True)])
    return {
        "bits": bits,
        "split_ratio": SPLIT_RATIO if split else 0.0,
        "stored_features": first[3].shape[1] * GROUP_SIZE if first[3] is not None else 0,
        "bytes": size,
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
        name, baseline = make_baseline(x, arguments.pairs)
        for bits in (2, 4, 8):
            for split in (False, True):
                row = measure(x, bits, split, baseline, arguments.pairs, arguments.seed)
                rows.append({"name": "packed_linear", **row, "baseline": name, **environment(arguments.seed)})
                print(
                    f"W{bits}, {row['stored_features']} columns: {row['median_ms']:.2f} ms"
                    f" [{row['low_ms']:.2f}, {row['high_ms']:.2f}], bf16 {name} {row['bf16_median_ms']:.2f} ms,"
                    f" {row['speedup']:.2f} times as fast [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
                )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
