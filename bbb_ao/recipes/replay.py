"""A training step as a CUDA graph: recorded once, then replayed with a single launch.

A small model's step is a thousand short kernels whose launches take longer than their work. The rule: a step whose
inputs are CUDA tensors is recorded, where it is repeated at least WORTHWHILE times. Everything else runs as it is, and
`Recorded.how` says why; so does a step that cannot be recorded (one that waits for the device, say).
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

# Steps that run as they are before one is recorded: kernels are compiled and the optimizer's state is made.
WARM_UP = 3
# Recording costs about as much as a few steps.
WORTHWHILE = 20


def reason_against(inputs: Sequence[Tensor], steps: int) -> str | None:
    """Why a step that is repeated `steps` times with such inputs is not recorded, or None."""
    if any(not tensor.is_cuda for tensor in inputs):
        return "the step's inputs are not on a GPU"
    if steps < WORTHWHILE:
        return f"{steps} steps are fewer than {WORTHWHILE}"
    return None


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are recorded: one, since cuBLAS keeps memory for every stream that it ran on."""
    return torch.cuda.Stream(device)


class Recorded:
    """A function of CUDA tensors, replayed as one CUDA graph after WARM_UP calls.

    Replays do what the calls would have done, in the same order on the same numbers. The function must read nothing
    that changes between calls but its inputs and tensors that are written in place, must not wait for the device, and
    inputs must keep their shapes.

    Args:
        function: tensors -> one tensor.
        steps: how often it will be called.
    Attributes:
        how: "recorded", or "eager: " and the reason.
    """

    def __init__(self, function: Callable[..., Tensor], steps: int) -> None:
        self.function, self.steps = function, steps
        self.how = "eager: not called"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 1:
            reason = reason_against(inputs, self.steps)
            self.how = "recorded" if reason is None else f"eager: {reason}"
            if reason is None:
                self._stream = recording_stream(inputs[0].device)
        if self.how != "recorded":
            return self.function(*inputs)
        if self._calls <= WARM_UP:
            return self._on_own_stream(inputs)
        if self._graph is None and not self._record(inputs):
            return self.function(*inputs)
        assert self._graph is not None, "recorded"
        assert self._output is not None, "recorded"
        for static, current in zip(self._inputs, inputs, strict=True):
            static.copy_(current)
        self._graph.replay()
        # The next replay overwrites it.
        return self._output.clone()

    def _on_own_stream(self, inputs: Sequence[Tensor]) -> Tensor:
        """Autograd remembers on which stream a parameter was used; recording happens on the same one."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self.function(*inputs)
        current.wait_stream(self._stream)
        return output

    def _record(self, inputs: Sequence[Tensor]) -> bool:
        """Record the function, which computes nothing yet; False, with the reason in `how`, where it cannot be."""
        self._inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._output = self.function(*self._inputs)
        except RuntimeError as error:
            # The first error tells why; ending the broken recording raises another and leaves its stream current.
            torch.cuda.set_stream(current)
            self.how = f"eager: {str(error.__context__ or error).splitlines()[0]}"
            self._inputs, self._output = [], None
            return False
        self._graph = graph
        return True
