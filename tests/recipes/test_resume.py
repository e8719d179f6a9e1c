"""A run that is stopped anywhere goes on and ends with the very files of one that was not."""

import copy
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bbb_ao.checkpoint import describe
from bbb_ao.errors import NumericsError, ResourceError, ResumeError
from bbb_ao.passes import capture_model, verified_plan
from bbb_ao.recipes import keeper as keeping
from bbb_ao.recipes import optimization, prepare
from bbb_ao.recipes.compress import Silent, compress, train
from bbb_ao.recipes.run_folder import RunFolder
from bbb_ao.recipes.stages import Recipe, Split, Stage

CPU = torch.device("cpu")
RECIPE = Recipe(
    name="tiny",
    generated=2,
    average=0.5,
    copies_lr_factor=0.5,
    split=Split(ratio_min=0.5, ratio_max=0.5),
    micro_batch=1,
    stages=(
        Stage(weight_bits=8, epochs=1, batch_size=2),
        Stage(weight_bits=(8, 4, 2), epochs=1, batch_size=2, text="both"),
        Stage(scope="model", weight_bits=(8, 4, 2), epochs=1, batch_size=1, objective="mixed_kl", text="generated"),
        Stage(scope="model", weight_bits=(8, 4, 2), epochs=1, batch_size=1, train="scales"),
    ),
)


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


class Steps(Silent):
    """Notes the number of every step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, step: int, steps: int, loss: Callable[[], float]) -> None:
        self.seen.append(step)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def few(ids):
    return ids[:2, :8].clone()


@pytest.fixture(scope="module")
def model(make_model):
    """A model whose capture, which takes most of a tiny run's time, is done once."""
    source = make_model("llama")
    plans = [verified_plan(captured) for captured in capture_model(source)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "capture_model", lambda student: plans)
        patch.setattr(prepare, "verified_plan", lambda plan: plan)
        yield source


@pytest.fixture(scope="module")
def go(model, few):
    """A function: run, or go on with, a recipe."""

    def call(output: Path, recipe: Recipe = RECIPE, report=None, save_steps: int = 1, **options: bool):
        with RunFolder(output, save_steps=save_steps, **options) as run:
            return compress(model, recipe, few, output, device=CPU, report=report, run=run)

    return call


@pytest.fixture(scope="module")
def whole(model, few, tmp_path_factory):
    """A function: the files of an uninterrupted run that keeps no state."""

    @cache
    def call(recipe: Recipe = RECIPE) -> dict[str, str]:
        output = tmp_path_factory.mktemp("whole") / "out"
        compress(model, recipe, few, output, device=CPU)
        return digests(output)

    return call


def test_a_run_that_keeps_its_state_leaves_the_files_of_one_that_does_not(go, whole, tmp_path):
    go(tmp_path / "out")
    assert digests(tmp_path / "out") == whole()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Snapshots:
    """Copies of a folder as it is before every call that changes names in it, and with a torn file in it.

    An fsync changes nothing that another process sees, so that no snapshot is needed for it.
    """

    def __init__(self, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.folder, self.count, self.paused = root, folder, 0, False
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self.before(getattr(os, name)))
        write = keeping.save_file

        def torn(tensors, path: Path) -> None:
            write(tensors, path)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            self.take()
            path.write_bytes(content)

        monkeypatch.setattr(keeping, "save_file", torn)

    def before(self, function):
        def call(*arguments, **named):
            self.take()
            return function(*arguments, **named)

        return call

    def take(self) -> None:
        if not self.paused:
            self.paused = True
            shutil.copytree(self.root, self.folder / f"{self.count:03}")
            self.count += 1
            self.paused = False


def test_every_write_rename_and_removal_may_be_the_last(go, whole, tmp_path):
    """What a kill leaves at any boundary opens as a state that was valid, and each such state ends the same way."""
    root, recipe = tmp_path / "run", replace(RECIPE, stages=(RECIPE.stages[1], RECIPE.stages[2]))
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        taken = Snapshots(root, tmp_path / "snapshots", patch)
        go(root / "out", recipe)
        taken.paused = True
    assert taken.count > 60
    ended = set()
    for copied in sorted(taken.folder.iterdir()):
        output = copied / "out"
        with RunFolder(output) as run:
            state = (run.record.get("serial"), output.exists())
            left = {path.name for path in run.folder.iterdir() if not path.is_dir()}
            assert left == {"lock"} | ({"manifest.json", *run._files} if run.record else set())
            assert not [path for path in (*copied.iterdir(), *run.folder.iterdir()) if path.name.startswith(".")]
        if state in ended:
            continue
        ended.add(state)
        if state != (None, True):
            go(output, recipe)
        assert digests(output) == whole(recipe)
        assert [path.name for path in copied.iterdir()] == ["out"]
    assert len(ended) > 10


@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_a_loop_goes_on_between_two_saves(steps, go, whole, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Stop):
        go(output, report=StopsAtStep(steps), save_steps=3)
    go(output, save_steps=2)
    assert digests(output) == whole()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("steps", [6, 10, 14, 18, 20])
def test_stages_that_keep_bits_go_on(go, whole, tmp_path, steps):
    """What is kept comes from the finished stage, where the lower bits start from the model, both also half way."""
    below = Stage(weight_bits=(8, 4), keep_bits=2, epochs=2, batch_size=1)
    stages = (Stage(epochs=2, batch_size=1), below, replace(below, scope="model"))
    recipe, output = replace(RECIPE, lookahead=1, logits=1.0, generated=0, stages=stages), tmp_path / "out"
    with pytest.raises(Stop):
        go(output, recipe, report=StopsAtStep(steps))
    go(output, recipe)
    assert digests(output) == whole(recipe)


def test_finished_stages_are_checkpoints(go, tmp_path):
    output = tmp_path / "out"
    go(output, keep_stages=True)
    folders = sorted(path.name for path in (tmp_path / "out.run").iterdir())
    assert folders == ["1-w8a16", "2-w8+4+2a16", "3-w8+4+2a16-model"]
    assert {row.widths[-1] for row in describe(tmp_path / "out.run" / "1-w8a16")} == {8}


def test_a_stages_checkpoint_is_what_its_recipe_alone_gives(go, model, few, tmp_path):
    go(tmp_path / "out", replace(RECIPE, generated=0, stages=(RECIPE.stages[0], Stage(epochs=0))), keep_stages=True)
    alone = replace(RECIPE, generated=0, stages=RECIPE.stages[:1], default_bits=8)
    compress(model, alone, few, tmp_path / "alone", device=CPU)
    assert digests(tmp_path / "out.run" / "1-w8a16") == digests(tmp_path / "alone")


def test_training_draws_nothing_from_the_global_generator(model, few):
    """Why its state need not be saved."""
    torch.manual_seed(RECIPE.seed)
    expected = torch.get_rng_state()
    train(model, few, RECIPE, CPU)
    assert torch.equal(torch.get_rng_state(), expected)


def test_nan_keeps_the_last_good_state(go, whole, tmp_path, monkeypatch):
    output, good = tmp_path / "out", optimization.update
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        # Stages of 2 x 1, 2 x 2, 2 and 2 steps: the eighth is the second of the model stage.
        patch.setattr(optimization, "update", lambda *given: good(*given) * (float("nan") if next(calls) == 7 else 1.0))
        with pytest.raises(NumericsError, match=r"^w8\+4\+2a16 model: the loss is NaN or infinite at step 2; fix"):
            go(output)
    with RunFolder(output) as run:
        assert run.position == "stage 3/4 w8+4+2a16 model, step 1"
    go(output)
    assert digests(output) == whole()


@pytest.mark.parametrize(("number", "stage"), [(1, "stage 1/4 w8a16, block 1 done"), (2, "stage 2/4 w8+4+2a16")])
def test_a_weight_that_no_loss_has_seen_is_not_saved(number, stage, go, tmp_path, monkeypatch):
    """Of the last step of a block, and of one after which the loop is saved."""
    good, calls = optimization.update, iter(range(1000))

    def update(optimizer, *given):
        loss = good(optimizer, *given)
        if next(calls) == number:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(optimization, "update", update)
        with pytest.raises(NumericsError, match=r"^model\.layers\.\d: \S+: a weight is NaN or infinite at step 1; fix"):
            go(tmp_path / "out")
    with RunFolder(tmp_path / "out") as run:
        assert run.position == stage


def test_a_loss_that_grows_is_refused(make_model, make_recipe, ids):
    stage = Stage(epochs=30, lr=5.0, batch_size=4)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: w2a16: the loss has grown from .* at step \d+; fix"):
        train(make_model("llama"), ids, make_recipe(stages=(stage,), split=None), CPU)


def test_another_recipe_is_refused_unless_unfinished_stages_are_amended(go, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Stop):
        go(output, report=StopsAtStep(8))

    def changed(number: int, **fields) -> Recipe:
        stages = [replace(stage, **(fields if i == number else {})) for i, stage in enumerate(RECIPE.stages)]
        return replace(RECIPE, stages=tuple(stages))

    with pytest.raises(ResumeError, match=r"^stages\.2\.lr: recipe: expected 0\.0003.* got 0\.0001; fix: .*--amend"):
        go(output, changed(2, lr=1e-4))
    refused = [changed(0, lr=1e-4), changed(3, train="all"), replace(RECIPE, seed=1), replace(RECIPE, split=None)]
    refused += [replace(RECIPE, stages=stages) for stages in (RECIPE.stages[:3], (*RECIPE.stages, RECIPE.stages[3]))]
    for recipe in refused:
        with pytest.raises(ResumeError, match=r"^[\w.]+: recipe: expected .* fix: restore it, or begin afresh"):
            go(output, recipe, amend=True)
    with RunFolder(output) as run:
        assert run.position.endswith("model, step 1"), "refusals leave the state"
    go(output, changed(2, lr=1e-4), amend=True, report=(report := Steps()))
    assert report.seen == [2, 1, 2], "the stage goes on where it stopped, then the last one"
    assert "lr: 0.0001" in (output / "recipe.yaml").read_text()


def test_another_model_or_other_data_are_refused_by_name(go, model, few, tmp_path):
    with pytest.raises(Stop):
        go(tmp_path / "out", report=StopsAtStep(1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    for source, data, name in ((other, few, "model: model.layers.1.mlp.up_proj.weight"), (model, few + 1, "data")):
        with (
            RunFolder(tmp_path / "out") as run,
            pytest.raises(ResumeError, match=f"^{name}: content: expected sha256 .* fix: restore it, or begin afresh"),
        ):
            compress(source, RECIPE, data, tmp_path / "out", run=run)


def test_restart_forgets_the_state(go, whole, tmp_path):
    output, shorter = tmp_path / "out", replace(RECIPE, stages=RECIPE.stages[:1], default_bits=8)
    with pytest.raises(Stop):
        go(output, report=StopsAtStep(3))
    assert (tmp_path / "out.run" / "1-w8a16").is_dir()
    go(output, shorter, restart=True, keep_stages=True)
    assert digests(output) == whole(shorter)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no checkpoint of the forgotten run is left"


@pytest.mark.parametrize("change", ["a name", "a shape", "a channel"])
def test_a_state_that_was_prepared_otherwise_is_refused(change, go, tmp_path, monkeypatch):
    recipe = replace(RECIPE, generated=0, stages=RECIPE.stages[:1], default_bits=8)
    with pytest.raises(Stop):
        go(tmp_path / "out", recipe, report=StopsAtStep(2))
    before = digests(tmp_path / "out.run")

    def load(path: Path) -> dict[str, torch.Tensor]:
        held = load_file(path)
        if change == "a name":
            del held["mlp.up_proj.weight"]
        elif change == "a shape":
            held["mlp.up_proj.weight"] = held["mlp.up_proj.weight"][1:]
        else:
            held["input_layernorm.duplicate_index"] = held["input_layernorm.duplicate_index"].flip(0)
        return held

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "load_file", load)
        name = {"a channel": "input_layernorm.duplicate_index"}.get(change, "mlp.up_proj.weight")
        with pytest.raises(
            ResumeError, match=rf"layers\.0\.safetensors: {name}: expected what this machine and version"
        ):
            go(tmp_path / "out", recipe)
    assert digests(tmp_path / "out.run") == before


def test_a_damaged_state_is_refused(go, tmp_path):
    output, folder = tmp_path / "out", tmp_path / "out.run"
    with pytest.raises(Stop):
        go(output, report=StopsAtStep(3))
    (block,) = folder.glob("stage-1-*layers.1.safetensors")
    content = block.read_bytes()
    block.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ResumeError, match=r"layers\.1\.safetensors: .* sha256 .* or begin afresh with --restart"):
        go(output)
    block.write_bytes(content)
    record = max(folder.glob("run-*.json"))
    record.write_text(record.read_text().replace('"stage": 1', '"stage": 0'))
    with pytest.raises(ResumeError, match=r"run-\d+\.json: content: .* sha256"):
        go(output)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ResumeError, match=r"manifest\.json: content: expected JSON"):
        go(output)
    assert block.exists(), "nothing of a state that cannot be read is removed"
    go(output, restart=True)


def test_a_full_disk_leaves_the_state_before(go, whole, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        calls = iter(range(1000))

        def fsync(descriptor: int) -> None:
            if next(calls) > 30:
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            ResourceError, match=r"out\.run/\S+: file: expected to write it, got: .*No space left"
        ) as full:
            go(output)
        with RunFolder(output) as run:
            assert full.value.__notes__ == [f"the same command goes on from {run.position}"]
    assert not [path for path in (tmp_path / "out.run").iterdir() if path.name.startswith(".")]
    go(output)
    assert digests(output) == whole()
