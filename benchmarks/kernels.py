"""Linear layers of Llama-3 shapes on one NVIDIA GPU: ours, bf16 and two peers in one run, interleaved.

    python benchmarks/kernels.py [--output FILE] [--model 8b] [--m 1 16 64] [--impl bf16 w2a16 humming]
    python benchmarks/kernels.py --peers-only      # a small shape, nothing written: are the peers called rightly?

Every call runs on a weight that is not in the L2 cache, inside a CUDA graph (graph_timing.py); whatever it does to its
activations counts. One flat row for each (model, shape, m, impl): `microseconds` is the median over replays, `low` and
`high` the 10th and 90th percentiles, `clock_megahertz` what the GPU ran at, `bytes` those of the weight,
`bytes_per_second` bytes / microseconds. A result that is wrong or faster than the measured read bandwidth becomes a row
with `error` in place of a time, as does a peer that fails; the exit status is 1 unless only peers failed. Peers come
from wheels (gpu_setup.sh).
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from environment import environment, lacks_gpu
from graph_timing import GraphTimer, Spread, read_bandwidth, time_in_turn
from layers import Layer, make_dense, make_packed
from peers import PEERS, load_tuning, save_tuning, set_gemlite_autotune

# [out_features, in_features]; q, k and v merged, gate and up too.
SHAPES = {
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "small": {"small": (4096, 2048)},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
IMPLS = ("bf16", "w2a16", "w4a16", "w8a16", "w2a2", "w4a4", *PEERS)

Row = dict[str, object]


def build(impl: str, shape: tuple[int, int], rows: Sequence[int], rotation: int, generator: torch.Generator) -> Layer:
    """The layer that `impl` names, [N, K] = shape, tuned for `rows` where it is tuned ahead."""
    if impl == "bf16":
        return make_dense(*shape, rotation, generator)
    if impl in PEERS:
        return PEERS[impl](*shape, rotation, rows, generator)
    return make_packed(impl, *shape, rotation, generator)


def describe(error: Exception) -> str:
    """One line for a row; the traceback goes to the log."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def figures(layer: Layer, spread: Spread, bandwidth: float) -> Row:
    """The measured part of a row.

    Raises:
        ValueError: the weight was read faster than memory can be.
    """
    rate = layer.weight_bytes / (spread.median * 1e-6)
    if rate > bandwidth:
        raise ValueError(
            f"bytes_per_second: expected at most the read bandwidth {bandwidth:.4g}, found {rate:.4g}; the weights "
            "came from a cache, or not all of them were read"
        )
    return {
        "microseconds": round(spread.median, 3),
        "low": round(spread.low, 3),
        "high": round(spread.high, 3),
        "clock_megahertz": spread.clock,
        "bytes": layer.weight_bytes,
        "bytes_per_second": round(rate),
    }


def measure(
    layers: dict[str, Layer], m: int, k: int, replays: int, bandwidth: float, generator: torch.Generator
) -> dict[str, Row]:
    """One row a layer: check it, capture it, time all in turn."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=generator.device, generator=generator)
    rows: dict[str, Row] = {}
    timers: dict[str, GraphTimer] = {}
    for impl, layer in layers.items():
        rows[impl] = {**layer.details, "copies": len(layer.calls)}
        try:
            rows[impl]["relative_error"] = layer.relative_error(x)
            timers[impl] = GraphTimer(layer.calls, x)
        except Exception as error:  # noqa: BLE001 - one failing layer must not end the run; it is reported in its row
            rows[impl] |= {"microseconds": None, "error": describe(error)}
    for impl, spread in time_in_turn(timers, replays).items():
        try:
            rows[impl] |= figures(layers[impl], spread, bandwidth)
        except ValueError as error:
            rows[impl] |= {"microseconds": None, "error": describe(error)}
    return rows


def run_shape(shape: tuple[int, int], arguments: argparse.Namespace, bandwidth: float) -> list[Row]:
    """Rows of one shape; the layers live as long as this call."""
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    layers, rows = {}, []
    chosen: dict[str, list[int]] = {impl: list(arguments.m) for impl in arguments.impl}
    if "gemlite" in chosen and arguments.gemlite_m:
        chosen["gemlite"] = [m for m in arguments.m if m in arguments.gemlite_m]
    for impl, ms in chosen.items():
        start = time.monotonic()
        try:
            layers[impl] = build(impl, shape, ms, arguments.rotation * 2**20, generator)
        except Exception as error:  # noqa: BLE001 - as in `measure`
            rows += [{"m": m, "impl": impl, "microseconds": None, "error": describe(error)} for m in ms]
        print(f"{impl}: built in {time.monotonic() - start:.1f} s", flush=True)
    for m in arguments.m:
        wanted = {impl: layer for impl, layer in layers.items() if m in chosen[impl]}
        measured = measure(wanted, m, shape[1], arguments.replays, bandwidth, generator)
        rows += [{"m": m, "impl": impl, **row} for impl, row in measured.items()]
    return rows


def table(rows: Sequence[Row], impls: Sequence[str]) -> str:
    """Microseconds by shape and m, one column an impl; `!` marks an error, `-` what was not asked for."""
    lines = [" ".join(["model shape       m", *(f"{impl:>9}" for impl in impls)])]
    cells = {(row["model"], row["shape"], row["m"], row["impl"]): row for row in rows}
    for model, shape, m in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((model, shape, m, impl), {"microseconds": "-"}) for impl in impls]
        values = [row["microseconds"] for row in found]
        shown = [f"{value:9.2f}" if isinstance(value, float) else f"{value or '!':>9}" for value in values]
        lines.append(" ".join([f"{model!s:5} {shape!s:8} {m:>4}", *shown]))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=["8b", "70b"])
    parser.add_argument("--shape", nargs="+", help="only these shapes of the models")
    parser.add_argument("--m", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--impl", nargs="+", default=list(IMPLS), help=f"of {', '.join(IMPLS)} and any w[2-8]a[2-8|16]")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--rotation", type=int, default=256, help="MiB of other weights between two uses of one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gemlite-autotune", choices=["fast", "max"], default="fast")
    parser.add_argument("--gemlite-m", nargs="+", type=int, help="gemlite at these m only; it tunes for each")
    parser.add_argument("--gemlite-tuning", help="file that keeps what gemlite's autotuner found")
    parser.add_argument("--peers-only", action="store_true", help="a small shape, no file")
    arguments = parser.parse_args()
    if arguments.peers_only:
        arguments.model, arguments.m, arguments.impl = ["small"], [1, 16, 128], ["bf16", *PEERS]
    return arguments


def tune_gemlite(arguments: argparse.Namespace, done: bool) -> None:
    """Apply the options about gemlite before the run, or keep its tuning after it; where it is absent say so."""
    if "gemlite" not in arguments.impl:
        return
    try:
        if not done and arguments.gemlite_autotune != "fast":
            set_gemlite_autotune(arguments.gemlite_autotune)
        if arguments.gemlite_tuning:
            (save_tuning if done else load_tuning)(arguments.gemlite_tuning)
    except Exception as error:  # noqa: BLE001 - as in `measure`
        print(f"gemlite: {describe(error)}", file=sys.stderr)


def main() -> int:
    arguments = parse()
    if lacks_gpu("kernels"):
        return 5
    torch.set_grad_enabled(False)
    tune_gemlite(arguments, done=False)
    bandwidth = read_bandwidth()
    common = {**environment(arguments.seed), "replays": arguments.replays, "read_bandwidth": round(bandwidth)}
    print(f"{common['device']}: reads {bandwidth / 1e12:.3f} TB/s", flush=True)
    rows: list[Row] = []
    for model in arguments.model:
        for shape, size in SHAPES[model].items():
            if arguments.shape and shape not in arguments.shape:
                continue
            print(f"{model} {shape} {size[0]}x{size[1]}", flush=True)
            found = run_shape(size, arguments, bandwidth)
            rows += [{"model": model, "shape": shape, "n": size[0], "k": size[1], **row, **common} for row in found]
            torch.cuda.empty_cache()
            # After every shape, so that a run cut short leaves what it measured.
            if not arguments.peers_only:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    tune_gemlite(arguments, done=True)
    failed = [row for row in rows if "error" in row]
    for message in dict.fromkeys(f"{row['impl']}: {row['error']}" for row in failed):
        print(f"error: {message}")
    print(table(rows, arguments.impl))
    return int(any(row["impl"] not in PEERS for row in failed))


if __name__ == "__main__":
    sys.exit(main())
