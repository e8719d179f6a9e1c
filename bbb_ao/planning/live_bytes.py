"""Peak memory of a computation, found by running it on tensors without values."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, until nothing refers to it any more.

    It works on fake tensors as on real ones. Scratch memory inside an operator is not seen.

    Args:
        known: tensors, or containers of them, that were there before; they are not counted.
    Attributes:
        now, peak: bytes.
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        self._watch(list(known), counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watch(result)
        return result

    def _watch(self, tree: Any, counted: bool = True) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            # A storage's object, and so its id, lives as long as the storage.
            key, size = id(storage), storage.nbytes() if counted else 0
            if key not in self._seen:
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(function: Callable[[], Any], known: Iterable[Any]) -> int:
    """The most that `function` holds at any moment beyond what is `known`."""
    with LiveBytes(known) as live:
        result = function()
    del result
    return live.peak
