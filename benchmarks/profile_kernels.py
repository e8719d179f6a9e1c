"""Hardware counters of single products, by NVIDIA Nsight Compute (`ncu`): why a kernel takes as long as it does.

    python benchmarks/profile_kernels.py [--shape qkv --rows 128 256] [--impl bf16 w2a16] [--output FILE]

Each product of kernels.py runs once in a process of its own, with cold caches and clocks as they are; one flat row for
each kernel that it launches. Fields are those of `METRICS`: bytes, `percent` of what the device sustains, `stalled_*`
warps that wait for a reason at each issue. A counter that this `ncu` does not know is null. Times are those of a kernel
alone, without launches that overlap: compare them here, and take figures from kernels.py.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from environment import environment, lacks_gpu
from kernels import IMPLS, SHAPES, Row, build

METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "multiprocessor_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_instructions": "sm__inst_executed_pipe_tensor_op_hmma.sum",
    "warpgroup_instructions": "sm__inst_executed_pipe_tensor_op_gmma.sum",
    "instructions": "smsp__inst_executed.sum",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers_per_thread": "launch__registers_per_thread",
    "grid_size": "launch__grid_size",
    "block_size": "launch__block_size",
    "waves_per_multiprocessor": "launch__waves_per_multiprocessor",
} | {
    f"stalled_{reason}": f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in ("long_scoreboard", "short_scoreboard", "barrier", "gmma", "math_pipe_throttle", "wait")
}
# What values are multiplied by, so that they are microseconds and bytes.
UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}
UNITS |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
POINTS = (("qkv", 128), ("qkv", 256), ("qkv", 1024), ("o", 256), ("down", 256))
TIMEOUT = 300


# Without permission; in a virtual machine whose GPU has no counters.
REFUSALS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler")


class CountersRefused(RuntimeError):
    """`ncu` cannot read the GPU's counters here, and says why."""


def find_ncu() -> str | None:
    """On the PATH, or of the CUDA toolkit with the highest version."""
    installed = sorted(Path("/usr/local").glob("cuda*/bin/ncu"))
    return shutil.which("ncu") or (str(installed[-1]) if installed else None)


def parse(text: str) -> list[Row]:
    """One row for each kernel of what `ncu --csv --page raw` writes: a line of names, one of units, then kernels.

    Raises:
        ValueError: there are no such lines.
    """
    lines = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(lines) < 3 or "Kernel Name" not in lines[0]:
        raise ValueError("expected counters of at least one kernel, got none")
    names, units, *kernels = lines
    scales = dict(zip(names, (UNITS.get(unit, 1.0) for unit in units), strict=True))
    rows: list[Row] = []
    for launch, values in enumerate(kernels):
        found = dict(zip(names, values, strict=True))
        row: Row = {"launch": launch, "kernel": found["Kernel Name"]}
        rows.append(row | {field: number(found.get(name), scales.get(name, 1.0)) for field, name in METRICS.items()})
    return rows


def number(text: str | None, scale: float) -> float | None:
    """None where there is no value ("n/a")."""
    try:
        return float((text or "").replace(",", "")) * scale
    except ValueError:
        return None


def profile(ncu: str, target: Sequence[str]) -> list[Row]:
    """Counters of each kernel that `target` launches between cudaProfilerStart and cudaProfilerStop.

    Metrics that `ncu` does not know are left out: it would measure nothing.

    Raises:
        CountersRefused: no permission, or no counters.
        RuntimeError: `ncu` or its target failed.
    """
    wanted = list(METRICS.values())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log), "--clock-control", "none"]
        while True:
            log.unlink(missing_ok=True)
            command = [ncu, *options, "--profile-from-start", "off", "--metrics", ",".join(wanted), *target]
            done = subprocess.run(
                command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
            text = (log.read_text() if log.exists() else "") + done.stdout + done.stderr
            lines = text.strip().splitlines() or ["nothing"]
            if refused := next((line for line in lines if any(reason in line for reason in REFUSALS)), None):
                raise CountersRefused(refused)
            unknown = [line.replace("\\", "") for line in lines if "Failed to find metric" in line]
            known = [name for name in wanted if not any(name.split(".")[0] in line for line in unknown)]
            if done.returncode == 0 or len(known) == len(wanted):
                break
            wanted = known
        try:
            return parse(log.read_text())
        except (OSError, ValueError) as error:
            raise RuntimeError(f"ncu: {error}; exit status {done.returncode}, last line: {lines[-1]}") from None


def run_product(model: str, shape: str, m: int, impl: str, seed: int) -> None:
    """Check one product, which also compiles it, and run it once more where a profiler sees it."""
    torch.set_grad_enabled(False)
    generator = torch.Generator("cuda").manual_seed(seed)
    size = SHAPES[model][shape]
    layer = build(impl, size, [m], 1, generator)
    x = torch.randn(m, size[1], dtype=torch.bfloat16, device="cuda", generator=generator)
    layer.relative_error(x)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    layer.calls[-1](x)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "profile.json")
    parser.add_argument("--model", choices=list(SHAPES), default="8b")
    parser.add_argument("--shape", nargs="+", help="without it and --rows: " + ", ".join(f"{s} {m}" for s, m in POINTS))
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--impl", nargs="+", default=["bf16", "w2a16"], help=f"of {', '.join(IMPLS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", action="store_true", help="run the products, and start no profiler")
    arguments = parser.parse_args()
    shapes, model = SHAPES[arguments.model], arguments.model
    points: Iterable[tuple[str, int]] = POINTS
    if arguments.shape or arguments.rows:
        points = list(itertools.product(arguments.shape or shapes, arguments.rows or [256]))
    if unknown := {shape for shape, _ in points} - set(shapes):
        parser.error(f"--shape: expected some of {', '.join(shapes)}, got {', '.join(unknown)}")
    ncu = None if arguments.bare else find_ncu()
    if ncu is None and not arguments.bare:
        print("profile_kernels: expected ncu on the PATH or in /usr/local/cuda*/bin, found none", file=sys.stderr)
        return 5
    if lacks_gpu("profile_kernels"):
        return 5
    cases = [(shape, m, impl) for shape, m in points for impl in arguments.impl]
    if ncu is None:
        for case in cases:
            run_product(model, *case, arguments.seed)
        return 0
    return profile_all(ncu, model, cases, arguments.seed, arguments.output)


def profile_all(ncu: str, model: str, cases: Sequence[tuple[str, int, str]], seed: int, output: Path) -> int:
    """Profile every case, and write all rows after each; 0, 1 if a case failed, 5 without counters."""
    rows: list[Row] = []
    where = environment(seed)
    for shape, m, impl in cases:
        n, k = SHAPES[model][shape]
        case: Row = {"model": model, "shape": shape, "n": n, "k": k, "m": m, "impl": impl}
        options = ["--model", model, "--shape", shape, "--rows", str(m), "--impl", impl, "--seed", str(seed), "--bare"]
        try:
            found = profile(ncu, [sys.executable, str(Path(__file__).resolve()), *options])
        except CountersRefused as error:
            print(f"profile_kernels: ncu: expected permission to read GPU counters, got {error}", file=sys.stderr)
            return 5
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found = [{"error": str(error)}]
        rows += [case | row | where for row in found]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rows, indent=1) + "\n")
        for row in found:
            shown = {name: value for name, value in row.items() if name != "kernel"}
            print(f"{shape} {m} {impl}: {str(row.get('kernel', ''))[:60]} {shown}", flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
