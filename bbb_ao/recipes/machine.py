"""What a figure depends on besides recipe and data: versions, the device, and how much memory was taken."""

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "torchao", "transformers", "triton", "safetensors")


def versions() -> dict[str, str]:
    """Of Python, bbb_ao and the packages that compute; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    # Benchmarks of the kernels set the package up without its front, which has the version.
    if own := vars(sys.modules["bbb_ao"]).get("__version__"):
        found["bbb_ao"] = own
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most bytes that this process has held so far: host memory, and what torch allocated on a GPU (else None)."""
    on_gpu = device.type == "cuda"
    return {
        # Linux counts in KiB.
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }
