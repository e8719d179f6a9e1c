"""The passes of fused fake quantization alone, and plain torch casts that move the same bytes.

    python benchmarks/fake_quantize.py [--tiles 2048] [--warps 4] [--output benchmarks/results/fake_quantize.json]

A float32 weight [14336, 4096] of 2 bits to bfloat16 (`largest`: the pass for the second level, `forward`, `backward`
from a bfloat16 gradient to float32), on the half-step and the integer grid; and activations [2048, 14336] in bfloat16.
Every call reads at least 59 MB, more than the L2 cache holds. Median of CUDA events, in microseconds; `gbps` is the
bytes that the pass has to move over that time.
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]

from bbb_ao.kernels.fake_quantize import launch
from bbb_ao.kernels.fake_quantize.launch import Settings

WEIGHT, ACTIVATION = (14336, 4096), (2048, 14336)


def microseconds(call: Callable[[], Any], repeats: int = 20) -> tuple[float, float, float]:
    """(median, 10th, 90th percentile)."""
    for _ in range(3):
        call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) * 1e3 for start, end in marks], dtype=torch.float64)
    median, low, high = times.quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)).tolist()
    return median, low, high


def passes(x: torch.Tensor, settings: Settings) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each pass by name, with the bytes per element that it has to move."""
    half = torch.bfloat16
    gradient = torch.randn_like(x, dtype=half)
    largest = launch.largest_scales(x, settings)
    own = x.element_size()
    return {
        "largest": (lambda: launch.largest_scales(x, settings), own),
        "forward": (lambda: launch.forward(x, largest, None, None, settings, half), own + 2),
        "backward": (lambda: launch.backward(gradient, x, largest, None, None, settings), 2 + 2 * own),
    }


def casts(x: torch.Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """What autocast does to a float32 weight: a cast forward, and one backward."""
    narrow = x.bfloat16()
    return {"forward": (lambda: x.bfloat16(), 6), "backward": (lambda: narrow.float(), 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[launch.TILE])
    parser.add_argument("--warps", type=int, nargs="+", default=[launch.WARPS])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fake_quantize.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": done.stdout.strip() or "unknown",
        "seed": arguments.seed,
    }
    torch.manual_seed(arguments.seed)
    weight = torch.randn(WEIGHT, device="cuda") / 64
    activation = torch.randn(ACTIVATION, device="cuda", dtype=torch.bfloat16)
    cases = {
        "weight_half_step": (weight, Settings(2, 8, 32, True, 4, True)),
        "weight_integer": (weight, Settings(2, 8, 32, False, 2, True)),
        "activation_half_step": (activation, Settings(2, 2, 32, True, 0, True, activation=True)),
    }
    rows: list[dict[str, Any]] = []

    def add(case: str, name: str, call: Callable[[], Any], moved: int, **values: Any) -> None:
        median, low, high = microseconds(call)
        row = {"case": case, "pass": name, **values, "microseconds": median, "low": low, "high": high}
        rows.append(row | {"gbps": moved / median / 1e3} | about)
        print(f"{case:22} {name:9} {values} {median:8.1f} us {moved / median / 1e3:7.0f} GB/s", flush=True)

    for name, (call, each) in casts(weight).items():
        add("torch_cast", name, call, each * weight.numel())
    for tile in arguments.tiles:
        for warps in arguments.warps:
            launch.TILE, launch.WARPS = tile, warps
            for case, (x, settings) in cases.items():
                for name, (call, each) in passes(x, settings).items():
                    add(case, name, call, each * x.numel(), tile=tile, warps=warps)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
