"""A run on a GPU that is stopped between replays of its CUDA graph ends with the weights of one that was not."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bbb_ao.recipes.compress import Silent, train
from bbb_ao.recipes.identity import Inputs
from bbb_ao.recipes.keeper import Keeper
from bbb_ao.recipes.run_folder import RunFolder
from bbb_ao.recipes.stages import Recipe

from .test_replay_gpu import IDS, OTHER, RECIPE, tiny_llama


class Stop(Exception):
    pass


class StopsAtStep(Silent):
    """Ends a run after so many steps of all its loops."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, step: int, steps: int, loss: Callable[[], float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def weights(output: Path, recipe: Recipe, save_steps: int, stop: int = 0) -> list[torch.Tensor]:
    with RunFolder(output, save_steps=save_steps) as run:
        keeper = Keeper(run, recipe, Inputs({}, {}), lambda student, number, folder: None)
        result = train(copy.deepcopy(tiny_llama()), IDS, recipe, torch.device("cuda"), StopsAtStep(stop), keeper=keeper)
    return [parameter.detach() for parameter in result.model.parameters()]


@pytest.mark.parametrize("recipe", [RECIPE, OTHER], ids=["plain", "other"])
def test_stopped_runs_end_alike(recipe: Recipe, tmp_path: Path) -> None:
    whole = weights(tmp_path / "whole", recipe, 10**6)
    # Loops of 24 steps, two to each block stage: in the warm-up, at its end, between replays, in a later stage.
    for stop, save_steps in ((2, 1), (4, 3), (20, 7), (24 * 3 + 20, 9)):
        output = tmp_path / f"stopped-{stop}"
        with pytest.raises(Stop):
            weights(output, recipe, save_steps, stop)
        resumed = weights(output, recipe, save_steps)
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)), stop
