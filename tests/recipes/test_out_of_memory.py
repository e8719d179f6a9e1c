"""Memory that runs out: smaller micro-batches with the same batch, then caches on disk, then one error."""

from dataclasses import replace

import pytest
import torch

from bbb_ao.errors import ResourceError
from bbb_ao.qat_linear import qat_linears
from bbb_ao.recipes import compress as engine
from bbb_ao.recipes import distill, optimization
from bbb_ao.recipes.blockwise import BlockRun
from bbb_ao.recipes.compress import Silent, train
from bbb_ao.recipes.memory import Memory, out_of_memory
from bbb_ao.recipes.stages import Stage
from bbb_ao.recipes.streams import Stream

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


class Told(Silent):
    """Keeps the notices."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, str, dict]] = []

    def notice(self, kind: str, text: str, **values) -> None:
        self.notices.append((kind, text, values))


def fits(most: int, function, size_of):
    """`function`, which runs out of memory with more than `most` sequences."""

    def call(*arguments, **named):
        if size_of(*arguments, **named) > most:
            raise FULL
        return function(*arguments, **named)

    return call


def weights(result) -> torch.Tensor:
    return torch.cat([linear.weight.detach().flatten() for linear in qat_linears(result.model).values()])


@pytest.mark.parametrize("scope", ["block", "model"])
def test_the_batch_stays_when_the_micro_batch_is_halved(scope, make_model, make_recipe, ids, monkeypatch):
    stage = Stage(scope=scope, weight_bits=4, batch_size=8, epochs=3, lr=1e-3)
    recipe = make_recipe(stages=(stage,), default_bits=4, micro_batch=None, split=None)
    whole, halves = (train(make_model("llama"), ids, replace(recipe, micro_batch=size), CPU) for size in (None, 2))
    logits = distill.divergence
    monkeypatch.setattr(BlockRun, "run", fits(2, BlockRun.run, lambda run, call, block, hidden: len(hidden)))
    monkeypatch.setattr(distill, "divergence", fits(2, logits, lambda teacher, student, *rest: len(teacher)))
    driven = train(make_model("llama"), ids, recipe, CPU, report := Told())
    where, seen = ("model.layers.0", [4]) if scope == "block" else ("w4a16 model", [8, 4])
    assert [(kind, text) for kind, text, _ in report.notices] == [
        ("memory", f"{where}: out of memory with {n} sequences at once, going on with {n // 2}") for n in seen
    ]
    assert report.notices[-1][2] == {"micro_batch": 2, "cache": "memory", "reason": str(FULL).splitlines()[0]}
    # No step was taken twice or in part; and the batch is the same one, summed in another order.
    assert torch.equal(weights(driven), weights(halves))
    assert [fit.steps for fit in driven.fits[0]] == [fit.steps for fit in whole.fits[0]]
    start = train(make_model("llama"), ids, replace(recipe, stages=(replace(stage, epochs=0),)), CPU)
    moved = (weights(whole) - weights(start)).abs().mean()
    assert (weights(driven) - weights(whole)).abs().mean() < 1e-3 * moved


def test_caches_go_to_disk_when_one_sequence_is_too_much(make_model, make_recipe, ids, monkeypatch):
    recipe = make_recipe(stages=(Stage(batch_size=2),), micro_batch=1)
    expected = train(make_model("llama"), ids, recipe, CPU)
    update, used, caches = optimization.update, [], set()

    def until_moved(*given):
        (memory,) = used
        if memory.cache == "memory":
            raise MemoryError
        caches.update(stream.cache for stream in memory.streams)
        return update(*given)

    def noted(*given, **named):
        used.append(Memory(*given, **named))
        return used[-1]

    monkeypatch.setattr(engine, "Memory", noted)
    monkeypatch.setattr(optimization, "update", until_moved)
    result = train(make_model("llama"), ids, recipe, CPU, report := Told())
    assert [notice[1] for notice in report.notices] == [
        "model.layers.0: w2a16: out of memory with one sequence at once, going on with the caches on disk"
    ]
    assert caches == {"disk"}
    assert torch.equal(weights(result), weights(expected)), "a cache's place changes no number"


def test_what_never_fits_is_one_error(make_model, make_recipe, ids, monkeypatch):
    monkeypatch.setattr(BlockRun, "run", fits(0, BlockRun.run, lambda run, call, block, hidden: len(hidden)))
    with pytest.raises(
        ResourceError, match=r"^model\.layers\.0: memory: expected enough for one sequence, got: CUDA o"
    ):
        train(make_model("llama"), ids, make_recipe(), CPU)


def test_memory_for_the_optimizer_is_not_asked_for_twice(make_model, make_recipe, ids, monkeypatch):
    """A step that was taken in part must not be taken again."""

    def full(self, before) -> None:
        raise FULL

    monkeypatch.setattr(optimization.CopiesRate, "after", full)
    with pytest.raises(
        ResourceError, match=r"^optimizer: memory: expected room for its state, got: CUDA out of memory"
    ):
        train(make_model("llama"), ids, make_recipe(), CPU)


def test_generation_goes_on_with_fewer_at_once(make_model, make_recipe, ids, monkeypatch):
    seen = []

    def generate(model, sequences, count, seed, device, size):
        seen.append(size)
        if size > 16:
            raise FULL
        return sequences[:count]

    monkeypatch.setattr(engine, "generate_sequences", generate)
    recipe = make_recipe(generated=2, stages=(Stage(text="generated", batch_size=2),))
    report = Told()
    train(make_model("llama"), ids, recipe, CPU, report)
    assert seen == [64, 32, 16]
    assert [notice[1].partition(":")[0] for notice in report.notices] == ["generation"] * 2


def test_other_errors_pass(ids):
    for error, expected in ((FULL, True), (MemoryError(), True), (RuntimeError("shape"), False)):
        assert out_of_memory(error) is expected
    with pytest.raises(RuntimeError, match=r"^shape$"):
        Memory().retry(lambda size: (_ for _ in ()).throw(RuntimeError("shape")), 4, "here")


def test_a_moved_stream_keeps_its_states_and_its_successors_follow():
    stream = Stream(2, 3, 4, torch.float32)
    stream.states.copy_(torch.arange(24.0).view(2, 3, 4))
    before = stream.states.clone()
    stream.move_to_disk()
    assert torch.equal(stream.states, before)
    assert (stream.cache, stream.like().cache) == ("disk", "disk")
