"""Where a figure was measured: the fields that every row of benchmarks/results carries, and whether there is a GPU."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch


def commit() -> str:
    """$COMMIT, or the checked-out commit, with "-dirty" where files differ from it, or "unknown"."""
    if named := os.environ.get("COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment(seed: int) -> dict[str, object]:
    """Device (the GPU, where there is one), versions (None: not installed), commit and seed."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "seed": seed,
    }


def lacks_gpu(benchmark: str, instead: str = "") -> bool:
    """Whether there is no NVIDIA GPU; then a line on standard error says so, and what can be done `instead`."""
    if torch.cuda.is_available():
        return False
    print(f"{benchmark}: expected an NVIDIA GPU, found none{instead}", file=sys.stderr)
    return True


def package_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
