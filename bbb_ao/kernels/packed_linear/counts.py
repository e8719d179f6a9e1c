"""Counters by which programs of a launch meet: zeros at first, then as the launch before left them. See `warpgroup`.

Launches of a kernel on one stream follow each other, so they share counters. A captured launch has its own for good:
graphs of one capturing stream may run side by side.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

POOL = 2**20  # counters kept ready for captured launches
ALIGNED = 32  # counters of a cache line; Triton would compile a kernel again for a pointer to less than 16 bytes


def _lasting_zeros(size: int, device: int) -> Tensor:
    """int32 zeros, written, that are in no graph's pool of memory.

    Before it captures a graph, torch.compile sends all that its thread allocates to the graph's pool, where nothing may
    outlive a run. So another thread allocates these.
    """

    def allocate() -> Tensor:
        zeros = torch.zeros(size, dtype=torch.int32, device=f"cuda:{device}")
        torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as other:
        return other.submit(allocate).result()


@cache
def _of_stream(kernel: str, device: int, stream: int, size: int) -> Tensor:
    return _lasting_zeros(size, device)


@cache
def _pools(device: int) -> list[Tensor]:
    """The rest of the pool, in a list to change it; empty until a launch that is not captured."""
    return []


def lasting_counts(kernel: str, size: int, device: int) -> Tensor:
    """At least `size` int32 for one launch of `kernel` on the current stream of the current device.

    Without a launch outside of a capture before, or where the pool is used up, zeroing them becomes part of the graph.
    """
    size = -(-size // ALIGNED) * ALIGNED
    pool = _pools(device)
    if not torch.cuda.is_current_stream_capturing():
        if not pool or pool[0].numel() < POOL // 2:
            pool[:] = [_lasting_zeros(POOL, device)]
        # Few sizes, so that growing layers keep no buffer each.
        size = 1 << max(12, (size - 1).bit_length())
        return _of_stream(kernel, device, torch.cuda.current_stream().cuda_stream, size)
    if not pool or pool[0].numel() < size:
        return torch.zeros(size, dtype=torch.int32, device=f"cuda:{device}")
    own, pool[0] = pool[0].split((size, pool[0].numel() - size))
    return own
