"""The streams between decoder blocks: what enters each block for every calibration sequence, and how to run a block."""

import copy
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bbb_ao.errors import ModelError, NumericsError, ResourceError


class Stream:
    """Hidden states of all calibration sequences, [sequences, tokens, hidden], in CPU memory or on disk.

    Args:
        sequences, tokens, hidden: shape.
        dtype: of the stored states.
        cache: "memory", or "disk" for a temporary file that the operating system pages in and out. The file has no
            name once it is mapped, so that nothing is left of it however the process ends.
    Raises:
        ResourceError: the disk has no room for the file.
    """

    def __init__(self, sequences: int, tokens: int, hidden: int, dtype: torch.dtype, cache: str = "memory") -> None:
        self.cache = cache
        if cache == "disk":
            flat = _map_file(sequences * tokens * hidden, dtype)
            self.states = flat.view(sequences, tokens, hidden)
        else:
            self.states = torch.empty(sequences, tokens, hidden, dtype=dtype)

    @property
    def bytes(self) -> int:
        return self.states.numel() * self.states.element_size()

    def like(self) -> "Stream":
        """An empty stream of the same shape, type and place."""
        return Stream(*self.states.shape, dtype=self.states.dtype, cache=self.cache)

    def move_to_disk(self) -> None:
        """Give back the memory of the states; see `cache`."""
        if self.cache != "disk":
            moved = _map_file(self.states.numel(), self.states.dtype).view(self.states.shape)
            self.states, self.cache = moved.copy_(self.states), "disk"

    def read(self, rows: Tensor | slice, device: torch.device) -> Tensor:
        """The states of these sequences on `device`, float32."""
        return self.states[rows].to(device, non_blocking=True).float()

    def write(self, rows: slice, states: Tensor) -> None:
        self.states[rows] = states.to(self.states.dtype).to(self.states.device)

    def chunks(self, size: int) -> Iterator[slice]:
        """Consecutive slices of at most `size` sequences."""
        count = len(self.states)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _map_file(count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements in a temporary file that is gone when the tensor is."""
    size = count * dtype.itemsize
    try:
        # Without a name from the start, so that no kill can leave it.
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                # A sparse file would end the process with SIGBUS at the first page that finds the disk full.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)
    except OSError as error:
        raise ResourceError(
            f"{tempfile.gettempdir()}: stream: expected {size} bytes, got: {error}; fix: free space, set TMPDIR, "
            "or set cache: memory"
        ) from None


@dataclass
class BlockCall:
    """How the model calls a block: everything but the hidden states, recorded from one sequence.

    Arguments of a single full sequence broadcast over a batch of sequences of the same length, or are repeated.

    Attributes:
        folded: place or keyword -> the dimension that counts sequences, times something else or not, as in BLOOM's
            biases of attention, [batch * heads, 1, tokens], and in masks, [batch, 1, tokens, tokens].
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    folded: Mapping[int | str, int] = field(default_factory=dict)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for these hidden states, [batch, tokens, hidden], on the device of this call."""
        arguments = _named(self.args, self.kwargs)
        for name, dim in self.folded.items():
            arguments[name] = _repeated(arguments[name], dim, hidden.shape[0])
        arguments["hidden_states" if "hidden_states" in arguments else 0] = hidden
        kwargs = {name: value for name, value in arguments.items() if isinstance(name, str)}
        output = block(*(value for name, value in arguments.items() if isinstance(name, int)), **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def to(self, device: torch.device) -> "BlockCall":
        """The same call with its tensors on `device`."""
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (self.args, dict(self.kwargs)))
        return BlockCall(args, kwargs, self.folded)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """Arguments by their places, in their order, and keywords."""
    return {**dict(enumerate(args)), **kwargs}


def _repeated(tensor: Tensor, dim: int, times: int) -> Tensor:
    """As many copies of a tensor behind each other; a view of it where its size is 1."""
    if tensor.shape[dim] == 1:
        return tensor.expand([times if i == dim else -1 for i in range(tensor.dim())])
    return torch.cat([tensor] * times, dim)


class _Reached(Exception):
    """Raised by the hook on the first block: what follows is not needed."""


def record_calls(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> list[BlockCall]:
    """Run one sequence through the model and keep what each block is called with.

    Args:
        ids: [1, tokens], int64.
    Raises:
        ModelError: a block that the model does not reach, or an argument that depends on the batch in another way than
            by repetition.
    """
    calls: dict[nn.Module, BlockCall] = {}

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = tree_map_only(Tensor, _float32, (args, kwargs))
        # The hidden states themselves are replaced in every call.
        calls[block] = BlockCall((None, *kept[0][1:]) if args else (), kept[1])

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model(ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [position for position, block in enumerate(blocks) if block not in calls]
    if missing:
        raise ModelError(f"{type(model).__name__}: decoder block {missing[0]} is not reached by the model")
    folded = _folded(model, blocks[0], calls[blocks[0]], ids)
    for call in calls.values():
        arguments = _named(call.args, call.kwargs)
        call.folded = {name: dim for name, dim in folded.items() if isinstance(arguments.get(name), Tensor)}
    return [calls[block] for block in blocks]


def _first_call(model: nn.Module, first_block: nn.Module, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) that the first block is called with for these ids; nothing behind its call is run."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    with first_block.register_forward_pre_hook(catch, with_kwargs=True), torch.no_grad(), suppress(_Reached):
        model(ids.to(next(model.parameters()).device), use_cache=False)
    return caught.pop()


def _folded(model: nn.Module, first_block: nn.Module, call: BlockCall, ids: Tensor) -> dict[int | str, int]:
    """`BlockCall.folded`, found by a second sequence like the first; `call` is that of one."""
    pair = _named(*_first_call(model, first_block, ids.repeat(2, 1)))
    found = {}
    for name, one in _named(call.args, call.kwargs).items():
        two = pair.get(name)
        if not (isinstance(one, Tensor) and isinstance(two, Tensor) and one.dim() == two.dim()):
            continue
        for dim, (size, doubled) in enumerate(zip(one.shape, two.shape, strict=True)):
            if doubled == 2 * size:
                found[name] = dim
                if not two.is_meta and not torch.equal(_repeated(one, dim, 2), _float32(two)):
                    raise ModelError(
                        f"{type(model).__name__}: {name}: expected the same for each sequence of a batch, one after "
                        "the other, got something else; fix: give a model whose decoder blocks are called so"
                    )
    return found


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def embed(model: nn.Module, first_block: nn.Module, sequences: Tensor, dtype: torch.dtype, cache: str) -> Stream:
    """The stream that enters the first block.

    Args:
        sequences: [sequences, tokens], int64.
    """
    stream: Stream | None = None
    for row in range(len(sequences)):
        args, kwargs = _first_call(model, first_block, sequences[row : row + 1])
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if stream is None:
            stream = Stream(len(sequences), states.shape[1], states.shape[2], dtype, cache)
        stream.write(slice(row, row + 1), states)
    assert stream is not None, "sequences is never empty: the data loader refuses that"
    return stream


def working_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """A frozen float32 copy of a full-precision block on `device`."""
    return copy.deepcopy(block).to(device, torch.float32).requires_grad_(False).eval()


def advance(
    stream: Stream, run: Callable[[Tensor], Tensor], device: torch.device, micro_batch: int, where: str
) -> Stream:
    """The stream behind a block.

    Args:
        run: the block, [batch, tokens, hidden] -> the same shape.
        where: the block's name, for the error.
    Raises:
        NumericsError: NaN or infinity in the output.
    """
    following = stream.like()
    with torch.no_grad():
        for rows in stream.chunks(micro_batch):
            output = run(stream.read(rows, device))
            if not bool(torch.isfinite(output).all()):
                raise NumericsError(f"{where}: NaN or infinity in the block's output; fix: check the model's weights")
            following.write(rows, output)
    return following
