"""What a run is said to need on its disk is what it takes at its fullest moment."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bbb_ao.errors import ResourceError
from bbb_ao.outputs import check_space, free_space, size
from bbb_ao.passes import capture_model, verified_plan
from bbb_ao.recipes import keeper, prepare
from bbb_ao.recipes.compress import compress
from bbb_ao.recipes.disk import DiskUse, disk_use
from bbb_ao.recipes.run_folder import RunFolder
from bbb_ao.recipes.skeleton import prepare_skeleton
from bbb_ao.recipes.stages import Recipe, Split, Stage

BLOCKS = (Stage(weight_bits=8, epochs=1, batch_size=2), Stage(weight_bits=(8, 2), epochs=1, batch_size=2))
WHOLE = Stage(scope="model", weight_bits=(8, 2), epochs=1, batch_size=2)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """Large enough for files' headers to be a hundredth of it; its capture is done once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2
    )
    source = LlamaForCausalLM(config).eval()
    plans = [verified_plan(captured) for captured in capture_model(source)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "capture_model", lambda student: plans)
        patch.setattr(prepare, "verified_plan", lambda plan: plan)
        yield source


@pytest.mark.parametrize(
    ("stages", "average", "save_steps"), [(BLOCKS, 0.0, 1), (BLOCKS, 0.0, 200), ((*BLOCKS, WHOLE), 1.0, 2)]
)
def test_a_run_takes_what_was_predicted(
    model: Any, stages: tuple[Stage, ...], average: float, save_steps: int, tmp_path: Path, monkeypatch
) -> None:
    recipe = Recipe(name="t", stages=stages, average=average, split=Split(ratio_max=0.3), sequences=8)
    most = 0

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal most
            result = function(*arguments)
            most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
            return result

        return call

    monkeypatch.setattr(keeper, "save_file", measured(keeper.save_file))
    monkeypatch.setattr("bbb_ao.recipes.compress.save_packed", measured(compress.__globals__["save_packed"]))
    ids = torch.randint(64, (8, 16))
    with RunFolder(tmp_path / "out", save_steps=save_steps) as run:
        compress(model, recipe, ids, tmp_path / "out", device=torch.device("cpu"), run=run)
    shapes = copy.deepcopy(model).to("meta")
    student, _ = prepare_skeleton(shapes, recipe)
    found = disk_use(shapes, student, recipe, save_steps)
    assert 0.97 * most < found.run < 1.1 * most
    assert found.result == pytest.approx((tmp_path / "out" / "model.safetensors").stat().st_size, rel=0.05)
    assert disk_use(shapes, student, recipe, None) == DiskUse(found.result, found.result)


def test_what_an_earlier_start_left_counts_as_room(tmp_path: Path) -> None:
    free = free_space(tmp_path)
    check_space(tmp_path / "out", free + 10**12, held=2 * 10**12)
    with pytest.raises(ResourceError, match=r"disk: expected .* and the run's state, got \S+ .?B; fix"):
        check_space(tmp_path / "out", free + 10**12)
    with pytest.raises(ResourceError, match=r"got \S+ .B beside 1\.0 kB that the run has written; fix"):
        check_space(tmp_path / "out", free + 10**12, held=1000)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 10**13)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "10.00 TB"]
