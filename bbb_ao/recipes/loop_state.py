"""What a training loop carries from step to step, and how it is written down and taken up again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class TailAverage:
    """The mean of parameters over the last `share` of `steps` steps; 0 keeps their last values."""

    def __init__(self, parameters: list[Tensor], share: float, steps: int) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.first = steps - round(share * steps)
        self.means: list[Tensor] = []

    def after(self, step: int) -> None:
        """Take in the values after step `step`, from 0."""
        if step == self.first:
            self.means = [parameter.clone() for parameter in self.parameters]
        elif step > self.first:
            torch._foreach_lerp_(self.means, self.parameters, 1 / (step - self.first + 1))

    def finish(self) -> None:
        """Set the parameters to their means."""
        if self.means:
            torch._foreach_copy_(self.parameters, self.means)


@dataclass
class LoopState:
    """Parameters, optimizer, average and losses of a training loop.

    The order of the sequences follows from the seed and the step alone, and nothing else in training is random.

    Attributes:
        parameters: what is trained; `optimizer` and `average` hold the same ones in the same order.
        losses: of the steps so far, scalars on the device.
    """

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    average: TailAverage
    losses: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """The state by names, sharing memory with the loop: losses [steps], and for parameter i parameter.i, its
        optimizer.i.*, and mean.i where averaging has begun."""
        tensors = {"losses": torch.stack(self.losses)}
        for number, parameter in enumerate(self.parameters):
            tensors[f"parameter.{number}"] = parameter.detach()
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{number}.{name}"] = value
        return tensors | {f"mean.{number}": mean for number, mean in enumerate(self.average.means)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> int:
        """Take up a state that `tensors` gave.

        Returns:
            the number of steps done.
        """
        device = self.parameters[0].device
        held = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.average.means.clear()
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(held[f"parameter.{number}"])
            prefix = f"optimizer.{number}."
            state = {name.removeprefix(prefix): t for name, t in held.items() if name.startswith(prefix)}
            self.optimizer.state[parameter] = state
            if (mean := held.get(f"mean.{number}")) is not None:
                self.average.means.append(mean)
        self.losses[:] = held["losses"].unbind()
        return len(self.losses)


class Saving(Protocol):
    """Where a training loop is saved.

    Attributes:
        steps: how many steps lie between two states.
    """

    steps: int

    def load(self) -> Mapping[str, Tensor] | None:
        """The loop's state, if one was saved."""
        ...

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the state after so many steps."""
        ...
