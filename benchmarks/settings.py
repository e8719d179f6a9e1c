"""Launch settings of the packed kernels on one NVIDIA GPU, for the files in bbb_ao/kernels/packed_linear/tuned.

    python benchmarks/settings.py --kernel decode --bits 2 4 8 --m 1 2
    python benchmarks/settings.py --kernel few_rows --bits 2 4 8 --m 8
    python benchmarks/settings.py --kernel warpgroup --bits 2 --m 16 32 64 128 256 1024
    python benchmarks/settings.py --kernel dynamic --bits 2 --m 1 [--output FILE] [--seconds 120]

Tuning on first use empties the cache before every launch, so that launches cannot overlap. Here each setting runs as
layers follow each other in a model: over copies of the weight that exceed the L2 cache, in one CUDA graph, beside bf16
in the same run. One flat row for each (shape, m, impl, setting): `microseconds` is the median over replays. Rows are
added to those of the file, in the place of older ones; the best of each key is printed as a line of the tuned file.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ["BBB_AO_TUNING"] = "off"

import bare_kernels  # noqa: F401
import torch
from environment import environment, lacks_gpu
from graph_timing import GraphTimer, time_in_turn
from kernels import SHAPES
from layers import copies_for, make_dense, nbytes, random_packed
from torch import Tensor

from bbb_ao.kernels.packed_linear import launch
from bbb_ao.kernels.packed_linear_dynamic import cuda as dynamic

Setting = tuple[int, ...]
ROTATION = 256 * 2**20
REPLAYS = 10
# Neighbours are kernels of the same kind, which draw as much power.
SETTLE_SECONDS = 0.03
# Beside those that the package tries: fewer registers, so that more programs of the next launch fit, and more ahead.
MORE = [
    (1, 2, 0, 1),
    (1, 4, 80, 1),
    (1, 4, 112, 1),
    (1, 4, 112, 2),
    (1, 8, 64, 1),
    (1, 8, 80, 1),
    (1, 8, 80, 2),
    (1, 8, 96, 2),
    (1, 8, 112, 1),
    (1, 8, 128, 2),
    (1, 8, 128, 3),
    (1, 16, 64, 1),
    (2, 4, 128, 1),
    (2, 4, 128, 2),
    (2, 4, 168, 1),
    (2, 8, 128, 1),
    (2, 8, 128, 2),
    (2, 8, 168, 1),
    (2, 16, 128, 1),
    (3, 4, 168, 3),
    (3, 8, 168, 3),
    (4, 8, 168, 4),
]
MORE_FEW = [(4, 2, 16, 1), (4, 1, 16, 1), (2, 2, 8, 2), (1, 4, 4, 2), (1, 1, 8, 3), (2, 1, 4, 4)]
COMPILED_ROWS = 256  # of the weight: what is compiled does not depend on how many there are


def candidates(kernel: str, m: int, n: int, k: int) -> list[Setting]:
    if kernel == "decode":
        found: Iterable[Setting] = [*launch.DECODE_SETTINGS, *MORE]
    elif kernel == "few_rows":
        found = [*launch.FEW_ROWS_SETTINGS, *MORE_FEW]
    elif kernel == "dynamic":
        found = [*dynamic.DECODE_SETTINGS, *MORE]
        found = [c for c in found if c[0] * -(-k // (4 * launch.BLOCK * c[1])) <= dynamic.UNROLLED]
    else:
        found = launch.warpgroup_settings(m, n, k, torch.cuda.get_device_properties(0).multi_processor_count)
    return list(dict.fromkeys(found))


def call(kernel: str, setting: Setting, x: Tensor, weight: tuple[Tensor | None, ...], bits: int) -> Tensor:
    """One launch of `kernel` with a setting."""
    launch.settings_for = dynamic.settings_for = lambda *_: setting
    planes, scales, settings = weight[:3], weight[3:], (bits, 4, True, 32)
    if kernel == "dynamic":
        return dynamic.dynamic_decode(x, planes, scales, None, None, settings, (2, True))  # type: ignore[arg-type]
    if kernel == "decode":
        return launch.decode_linear(x, planes, scales, None, None, settings)  # type: ignore[arg-type]
    if kernel == "few_rows":
        return launch.few_rows_linear(x, planes, scales, None, None, settings)  # type: ignore[arg-type]
    return launch.warpgroup_linear(x, planes, scales, None, settings)  # type: ignore[arg-type]


def compile_one(task: tuple[str, int, int, int, Setting]) -> str | None:
    """Compile in a process of its own; Triton's cache keeps it. What fails is reported again when it is timed."""
    kernel, bits, k, m, setting = task
    generator = torch.Generator("cuda").manual_seed(0)
    try:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        call(kernel, setting, x, random_packed(COMPILED_ROWS, k, bits, generator), bits)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - one setting that does not fit must not end the run
        return f"{task}: {type(error).__name__}: {str(error)[:120]}"
    return None


def key_of(kernel: str, n: int, k: int, bits: int, m: int) -> str:
    """The line of the tuned file that a choice belongs to."""
    name = {"decode": "decode", "few_rows": "few rows", "dynamic": "dynamic decode", "warpgroup": "matmul"}[kernel]
    return f"{name} {n}x{k} {bits} bits" + (f", {m} rows" if kernel in ("decode", "warpgroup") else "")


def time_settings(kernel: str, shape: tuple[int, int], bits: int, m: int) -> dict[Setting | None, float]:
    """Median microseconds of each setting; None is bf16."""
    n, k = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda", generator=generator)
    first = random_packed(n, k, bits, generator)
    weights = [first] + [random_packed(n, k, bits, generator) for _ in range(copies_for(nbytes(first), ROTATION) - 1)]
    timers = {"bf16": GraphTimer(make_dense(n, k, ROTATION, generator).calls, x)}
    settings = {str(setting): setting for setting in candidates(kernel, m, n, k)}
    for name, setting in settings.items():
        calls = [lambda x, w=weight, s=setting: call(kernel, s, x, w, bits) for weight in weights]
        try:
            timers[name] = GraphTimer(calls, x)
        except Exception as error:  # noqa: BLE001 - as in `compile_one`
            print(f"{key_of(kernel, n, k, bits, m)} {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    return {settings.get(name): spread.median for name, spread in time_in_turn(timers, REPLAYS, SETTLE_SECONDS).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=("decode", "few_rows", "dynamic", "warpgroup"), required=True)
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 4, 8), default=[2])
    parser.add_argument("--m", nargs="+", type=int, default=[1])
    parser.add_argument("--model", choices=list(SHAPES), default="8b")
    parser.add_argument("--shape", nargs="+", help="only these shapes of the model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further shape is begun after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "settings.json")
    arguments = parser.parse_args()
    if lacks_gpu("settings"):
        return 5
    torch.set_grad_enabled(False)
    begun, kernel = time.monotonic(), arguments.kernel
    wanted = [
        (name, shape, bits, m)
        for bits in arguments.bits
        for name, shape in SHAPES[arguments.model].items()
        for m in arguments.m
        if arguments.shape is None or name in arguments.shape
    ]
    tasks = dict.fromkeys(
        (kernel, bits, shape[1], m, setting)
        for _, shape, bits, m in wanted
        for setting in candidates(kernel, m, *shape)
    )
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for failure in filter(None, pool.imap_unordered(compile_one, tasks)):
            print(failure, flush=True)
    where, rows = environment(0), json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for name, (n, k), bits, m in wanted:
        if time.monotonic() - begun > arguments.seconds:
            print("out of time; run the same command with fewer shapes")
            return 1
        times = time_settings(kernel, (n, k), bits, m)
        dense = times.pop(None)
        best, *_ = sorted(times, key=lambda setting: times[setting])
        print(
            f'"{key_of(kernel, n, k, bits, m)}": {json.dumps(best)},  {times[best]:.2f} us, bf16 {dense:.2f}',
            flush=True,
        )
        same = {"model": arguments.model, "shape": name, "m": m, "impl": f"w{bits}a{2 if kernel == 'dynamic' else 16}"}
        same["kernel"] = kernel
        rows = [row for row in rows if not same.items() <= row.items()]
        for setting, median in sorted(times.items(), key=lambda item: item[1]):
            figures = {"microseconds": round(median, 2), "bf16_microseconds": round(dense, 2)}
            rows.append(same | {"setting": setting} | figures | where)
        arguments.output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
