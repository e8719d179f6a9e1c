"""Launch settings of the kernels: shipped for measured devices, else measured on first use and kept in a cache folder.

A table is JSON: {"kernel shape": [settings]}. The shipped ones lie in `tuned/<device name>.json`; the cache is
`$BBB_AO_CACHE` or `~/.cache/bbb_ao`, one file for each device name. While a CUDA graph is captured nothing can be
measured: an unknown shape then takes the first candidate, without keeping it; so it does with BBB_AO_TUNING=off.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import triton.testing

SHIPPED = Path(__file__).parent / "tuned"
COLD_BYTES = 2**27  # more than the L2 cache of any GPU today
Settings = tuple[int, ...]


def cache_folder() -> Path:
    """Where measured settings are kept."""
    return Path(os.environ.get("BBB_AO_CACHE") or Path.home() / ".cache" / "bbb_ao")


def device_name(index: int) -> str:
    """The GPU's name as a file name, such as NVIDIA_H200."""
    return torch.cuda.get_device_name(index).replace(" ", "_").replace("/", "_")


def _read(path: Path) -> dict[str, Settings]:
    """A table, empty where there is no file."""
    return {key: tuple(value) for key, value in json.loads(path.read_text()).items()} if path.is_file() else {}


@cache
def _tables(device: str) -> tuple[dict[str, Settings], dict[str, Settings]]:
    """Known settings: those of the cache, which go first, and the shipped ones."""
    return _read(cache_folder() / f"{device}.json"), _read(SHIPPED / f"{device}.json")


def settings_for(key: str, candidates: Sequence[Settings], run: Callable[[Settings], object], device: int) -> Settings:
    """The fastest settings for `key`.

    Args:
        key: kernel and shape.
        candidates: settings to choose from; the first is taken where nothing can be measured.
        run: one launch with given settings, on operands of this shape.
        device: index of the GPU.
    """
    name = device_name(device)
    cached, shipped = _tables(name)
    for table in (cached, shipped):
        # A cache may be older than the kernel, which then takes other numbers.
        if len(table.get(key, ())) == len(candidates[0]):
            return table[key]
    if os.environ.get("BBB_AO_TUNING") == "off" or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    # Milliseconds; the L2 cache is emptied before each launch.
    times = milliseconds(candidates, run, device)
    cached[key] = min(times, key=times.__getitem__)
    _keep(name, key, cached[key])
    return cached[key]


def milliseconds(
    candidates: Sequence[Settings], run: Callable[[Settings], object], device: int
) -> dict[Settings, float]:
    """Time of one launch with each candidate and of emptying the L2 cache, which is the same for all.

    In a graph, where starting a launch takes no time. No weight is in the cache, as between a model's layers.
    """
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=f"cuda:{device}")

    def replay(choice: Settings) -> None:
        cold.zero_()
        run(choice)

    bench = partial(triton.testing.do_bench_cudagraph, rep=4, return_mode="median")
    return {each: float(bench(partial(replay, each))) for each in candidates}  # type: ignore[arg-type]


def _keep(device: str, key: str, settings: Settings) -> None:
    """Add one entry to the cache; a folder that cannot be written costs only the measurement next time."""
    path = cache_folder() / f"{device}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[key] = settings
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(known, indent=0))
        partial.replace(path)
    except OSError:
        return
