"""What a run goes on with when its recipe was amended."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bbb_ao.recipes.identity import Inputs
from bbb_ao.recipes.keeper import Keeper
from bbb_ao.recipes.run_folder import RunFolder
from bbb_ao.recipes.stages import Recipe, Stage

RECIPE = Recipe(name="amended", stages=(Stage(),), micro_batch=4)
# As it was saved where memory had run out.
STATE = {
    "format_version": 1,
    "names": ["w2a16"],
    "stage": 0,
    "block": 1,
    "loop": {"file": "loop.safetensors", "block": 1, "step": 7},
    "micro_batch": 1,
    "cache": "disk",
}


@pytest.mark.parametrize(
    ("changed", "goes_on", "limit", "cache"),
    [
        ((), True, 1, "disk"),
        (("lr",), True, 1, "disk"),
        (("lr", "epochs"), False, 1, "disk"),
        (("batch_size",), False, 1, "disk"),
        (("micro_batch",), True, 4, "memory"),
        (("cache",), True, 4, "memory"),
    ],
)
def test_a_loop_begins_again_where_its_schedule_was_amended(
    changed: tuple[str, ...], goes_on: bool, limit: int, cache: str, tmp_path: Path
) -> None:
    saved = {"losses": torch.zeros(7)}
    with RunFolder(tmp_path / "out") as run:
        run.commit({"loop.safetensors": lambda path: save_file(saved, path)}, set(), **STATE)
        keeper = Keeper(run, RECIPE, Inputs({}, {}), lambda *_: None, changed)
        assert (keeper.loop(1).load() is not None) == goes_on
        assert keeper.loop(0).load() is None, "the loop is another block's"
        assert (keeper.memory.limit, keeper.memory.cache) == (limit, cache)
