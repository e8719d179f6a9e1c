"""What happens when memory runs out: smaller micro-batches first, then the caches go to disk, then an error."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from bbb_ao.errors import ResourceError
from bbb_ao.recipes.streams import Stream

T = TypeVar("T")


class Noticing(Protocol):
    """What is told when memory ran out: kind of the event, a sentence for people, values for the log."""

    def __call__(self, kind: str, text: str, **values: Any) -> None: ...


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of the device or of the host did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Memory:
    """How a run fits into memory; what was learned in one block holds for all that follow.

    Args:
        limit: most sequences in one forward pass; None for no limit.
        cache: where streams are kept, "memory" or "disk".
    Attributes:
        notice: told of every change, if set.
        reliefs: how often memory ran out.
        streams: the caches that can be moved to disk.
    """

    def __init__(self, limit: int | None = None, cache: str = "memory") -> None:
        self.limit, self.cache, self.reliefs = limit, cache, 0
        self.streams: WeakSet[Stream] = WeakSet()
        self.notice: Noticing | None = None

    def retry(self, attempt: Callable[[int], T], size: int, where: str) -> T:
        """Call `attempt` with a number of sequences in a forward pass, at most `size`, until it fits.

        Args:
            attempt: must be repeatable after a failure.
            where: for the notice.
        Raises:
            ResourceError: it does not fit one sequence at a time.
        """
        while True:
            sequences = min(size, self.limit or size)
            try:
                return attempt(sequences)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = (str(error).splitlines() or ["memory"])[0]
            # Out of the handler: the error's traceback holds what the attempt allocated.
            self._relieve(sequences, where, reason)

    def _relieve(self, sequences: int, where: str, reason: str) -> None:
        self.reliefs += 1
        if sequences > 1:
            self.limit = sequences // 2
            text = f"{where}: out of memory with {sequences} sequences at once, going on with {self.limit}"
        elif self.cache != "disk" and self.streams:
            self.cache = "disk"
            for stream in list(self.streams):
                stream.move_to_disk()
            text = f"{where}: out of memory with one sequence at once, going on with the caches on disk"
        else:
            raise ResourceError(
                f"{where}: memory: expected enough for one sequence, got: {reason}; fix: lower sequence_length"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.notice:
            self.notice("memory", text, micro_batch=self.limit, cache=self.cache, reason=reason)
