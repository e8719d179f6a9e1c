"""What a machine has left, and the refusal of a run that needs more."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bbb_ao.errors import ResourceError
from bbb_ao.outputs import free_space, size
from bbb_ao.planning.memory import Phase
from bbb_ao.recipes.stages import Recipe

MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """Bytes that are free now; None where that cannot be known.

    Attributes:
        device: memory of the GPU; None on a CPU.
        host: memory of the machine, or of the container where that is less.
        output: disk of the output folder; temporary: of the folder for temporary files.
    """

    device: int | None
    host: int | None
    output: int | None
    temporary: int | None


def read_limits(device: torch.device, output: str | Path | None) -> Limits:
    """What this machine has left now.

    Args:
        output: a folder that need not exist yet, or None.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    disk = None if output is None else free_space(output)
    return Limits(free, _host_memory(), disk, free_space(tempfile.gettempdir()))


def _host_memory() -> int | None:
    found = list(_available())
    return min(found) if found else None


def _available() -> Iterator[int]:
    if MEMORY_INFO.exists():
        lines = dict(line.split(":", 1) for line in MEMORY_INFO.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            yield int(lines["MemAvailable"].split()[0]) * 1024
    for most, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, current = (CGROUP / most).read_text().strip(), int((CGROUP / used).read_text())
            rows = (CGROUP / most).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        # Pages of files count as used, but are given up when memory is asked for.
        reclaimable = next((int(row.split()[1]) for row in rows if row.split()[0] == cache), 0)
        if limit.isdigit():
            yield max(0, int(limit) - current + reclaimable)


def check_limits(recipe: Recipe, found: list[Phase], limits: Limits) -> None:
    """Refuse a run that cannot fit into memory, or its caches on their disk.

    Raises:
        ResourceError: names what is short, in which phase, by how much, and the keys of the recipe to change.
    """
    smaller = "micro_batch" if (recipe.micro_batch or 2) > 1 else "sequence_length"
    worst = max(found, key=lambda phase: phase.device_bytes)
    _expect(f"{worst.name}: GPU memory", worst.device_bytes, limits.device, f"lower {smaller} with --set {smaller}=...")
    worst = max(found, key=lambda phase: phase.host_bytes)
    largest = max(worst.host, key=lambda term: worst.host[term], default="")
    fixes = {
        "streams": "write --set cache=disk, or lower sequences",
        "step": f"lower {smaller}",
        "batch": "lower batch_size",
    }
    fixed = max(sum(count for term, count in phase.host.items() if term not in fixes) for phase in found)
    hopeless = limits.host is not None and fixed > limits.host
    fix = "use a machine with more memory" if hopeless or largest not in fixes else fixes[largest]
    _expect(f"{worst.name}: memory", worst.host_bytes, limits.host, fix)
    disk = max(phase.disk for phase in found)
    _expect(f"{tempfile.gettempdir()}: disk", disk, limits.temporary, "set TMPDIR, or lower sequences")


def _expect(what: str, needed: int, available: int | None, fix: str) -> None:
    if available is not None and needed > available:
        raise ResourceError(f"{what}: expected {size(needed)} free, got {size(available)}; fix: {fix}")
