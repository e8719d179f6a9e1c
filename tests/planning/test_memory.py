"""Terms of the memory's sum against what the training engine really holds."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.passes import capture_model, find_blocks, verified_plan
from bbb_ao.planning import memory
from bbb_ao.planning.job import Job
from bbb_ao.planning.live_bytes import LiveBytes, peak_bytes
from bbb_ao.planning.trace import materialize, materialize_call, step_bytes, step_loss
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes import blockwise
from bbb_ao.recipes.compress import train
from bbb_ao.recipes.optimization import TailAverage, make_optimizer
from bbb_ao.recipes.prepare import activation_norms, prepare_student
from bbb_ao.recipes.skeleton import build_skeleton, trained_bytes, training
from bbb_ao.recipes.stages import Split, Stage
from bbb_ao.recipes.statistics import layer_errors
from bbb_ao.recipes.streams import Stream

CPU = torch.device("cpu")


def make_job(make_directory, recipe, blocks: int = 2) -> Job:
    return Job.prepare(build_skeleton(make_directory("llama", blocks)), recipe, CPU)


def test_live_bytes_follow_storages() -> None:
    x = torch.zeros(1000)

    def run() -> torch.Tensor:
        y = x + 1  # 4,000 bytes
        z = y.view(10, 100)[2:]
        del y
        w = z * 2  # 3,200 more; y's storage lives on in z
        del z
        return w + w  # 3,200 more, the first 4,000 gone

    assert peak_bytes(run, [x]) == 4000 + 3200
    assert peak_bytes(lambda: x.view(-1).add_(1), [x]) == 0


@pytest.mark.parametrize(
    ("stage", "lookahead", "logits"),
    [
        (Stage(weight_bits=(8, 2), act_bits=4), 1, 0.0),
        (Stage(weight_bits=2, train="scales"), 0, 0.0),
        (Stage(weight_bits=(8, 2)), 2, 1.0),
    ],
    ids=["all", "scales", "logits"],
)
def test_traced_step_holds_what_a_real_one_does(
    stage: Stage, lookahead: int, logits: float, make_directory, make_recipe
) -> None:
    recipe = make_recipe(stages=(stage,), micro_batch=2, lookahead=lookahead, logits=logits)
    job = make_job(make_directory, recipe)
    block, call, shape = job.blocks[-1], job.calls[-1], (2, 32, 64)
    teacher, head = find_blocks(job.model)[-1][1].float(), job.head and job.head.float()
    traced = step_bytes(block, teacher, call, stage, recipe, shape, CPU, accumulates=True, head=head)
    real, *frozen = (
        materialize(each, CPU, lambda x: x.normal_(0, 0.1)).eval() for each in (block, teacher, head) if each
    )
    twin, *behind = (each.requires_grad_(False) for each in frozen)
    call = materialize_call(call, CPU)
    hidden, target = torch.randn(shape), torch.randn(shape)
    ahead = [twin] * (lookahead - len(behind))
    with training(real, stage, recipe):

        def step() -> None:
            for _ in range(2):
                step_loss(real, ahead, call, stage, hidden, target, *behind).backward()

        held = [list(each.parameters()) + list(each.buffers()) for each in (real, *frozen)]
        found = peak_bytes(step, [held, call.args, call.kwargs, hidden, target])
    assert found == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize(("logits_bytes", "counts"), [(10**9, True), (0, False)])
def test_the_head_counts_where_its_path_holds_more(
    logits_bytes: int, counts: bool, make_directory, make_recipe, monkeypatch
) -> None:
    """It stands for the last of the blocks behind."""
    monkeypatch.setattr(memory, "step", lambda job, stage, head: 0 if head is None else logits_bytes)
    job = make_job(make_directory, make_recipe(lookahead=2, logits=1.0))
    found = memory.block_stage(job, 0).host
    block = sum(4 * p.numel() for p in find_blocks(job.model)[0][1].parameters())
    blocks = 2 if counts else 3
    assert found["teacher"] == blocks * block
    assert found["batch"] == 4 * 32 * 64 * 4 * (1 + blocks)
    # The projection, the final norm and frequencies of the position embedding, twice.
    assert found.get("head") == (4 * (128 * 64 + 64 + 2 * 8) if counts else None)


def test_norms_hold_what_a_real_pass_does(make_directory, make_model, make_recipe) -> None:
    recipe = make_recipe(sequence_length=128)
    job = Job.prepare(build_skeleton(make_directory("llama")), recipe, CPU)
    model = make_model("llama")
    run = blockwise.BlockRun(model, torch.randint(100, (recipe.sequences, recipe.sequence_length)), recipe, CPU)
    plans = {name: plan for plan in job.prepared.plans for name in plan.blocks}
    known = [list(model.parameters()), list(model.buffers()), run.entry.states, [vars(call) for call in run.calls]]
    with LiveBytes(known) as live:
        activation_norms(run, plans)
    terms = memory.activations(job).host
    assert live.peak == pytest.approx(
        terms["teacher"] + terms["forward"] + terms["streams"] - run.entry.bytes, rel=0.02
    )


@pytest.mark.parametrize(("kind", "tokens"), [("llama", 128), ("llama", 16), ("mixtral", 64)])
def test_errors_hold_what_a_real_pass_does(kind, tokens, make_directory, make_model, make_recipe) -> None:
    # Nothing is trained, so that no stage takes more.
    recipe = make_recipe(sequence_length=tokens, stages=(Stage(weight_bits=2, epochs=0),))
    job = Job.prepare(build_skeleton(make_directory(kind)), recipe, CPU)
    model = make_model(kind)
    run = blockwise.BlockRun(model, torch.randint(100, (recipe.sequences, recipe.sequence_length)), recipe, CPU)
    student = copy.deepcopy(model).float()
    prepare_student(student, recipe, run)
    set_training_bits(student, recipe.default_bits, None)
    known = [[*part.parameters(), *part.buffers()] for part in (model, student)]
    with LiveBytes([*known, run.entry.states, [vars(call) for call in run.calls]]) as live:
        layer_errors(run, student)
    terms = memory.errors(job).host
    expected = terms["teacher"] + terms["batch"] + terms["forward"]
    assert live.peak == pytest.approx(expected, rel=0.05)
    assert [phase.name for phase in memory.phases(job)] == ["verify", "norms", "errors", "pack"]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_verification_holds_what_is_counted_and_leaves_nothing(
    kind: str, make_directory, make_recipe, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(make_directory(kind))
    # Activations, which are not counted, are small beside weights of this size.
    config.hidden_size, config.intermediate_size = 512, 1024
    config.save_pretrained(tmp_path)
    job = Job.prepare(build_skeleton(tmp_path), make_recipe(), CPU)
    model = materialize(job.model, CPU, lambda tensor: tensor.normal_(0, 0.1)).float()
    captured, *_ = capture_model(model)
    gc.disable()
    try:
        with LiveBytes([[*model.parameters(), *model.buffers()]]) as live:
            verified_plan(captured)
        left = live.now
    finally:
        gc.enable()
    assert memory.verification(job).host["copies"] == pytest.approx(live.peak, rel=0.05)
    assert left < live.peak / 100


def test_optimizer_counts_its_states(make_directory, make_recipe) -> None:
    for stage, average in ((Stage(weight_bits=2), 0.0), (Stage(weight_bits=2, train="scales"), 0.5)):
        recipe = make_recipe(stages=(stage,), average=average)
        job = make_job(make_directory, recipe)
        block: Any = materialize(job.blocks[job.largest], CPU)
        with training(block, stage, recipe) as groups:
            parameters = [p for group in groups for p in group["params"]]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer = make_optimizer(groups)
            optimizer.step()
            tail = TailAverage(parameters, average, 2)
            tail.after(1)
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        held = sum(4 * tensor.numel() for tensor in (*moments, *tail.means))
        assert memory.optimizer(job, stage) == held
        assert trained_bytes(job.blocks[job.largest], stage, recipe) == sum(4 * p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("blocks", "kept", "lookahead"), [(1, False, 0), (2, False, 0), (4, False, 0), (4, True, 0), (4, False, 1)]
)
def test_live_streams_are_those_of_a_run(
    blocks: int, kept: bool, lookahead: int, make_directory, make_recipe, monkeypatch
) -> None:
    budget = 2**30 if kept else 0
    monkeypatch.setattr(blockwise, "STREAM_BUDGET", budget)
    monkeypatch.setattr(memory, "STREAM_BUDGET", budget)
    recipe = make_recipe(
        stages=(Stage(weight_bits=(8, 2), epochs=0.5), Stage(weight_bits=2, epochs=0.5)),
        lookahead=lookahead,
    )
    directory = make_directory("llama", blocks)
    config = AutoConfig.from_pretrained(directory)
    live, most = set(), 0
    make = Stream.__init__

    def count(stream: Stream, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        make(stream, *args, **kwargs)
        live.add(id(stream))
        most = max(most, len(live))
        weakref.finalize(stream, live.discard, id(stream))

    monkeypatch.setattr(Stream, "__init__", count)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    train(model, torch.randint(100, (8, 32)), recipe, CPU)
    job = Job.prepare(build_skeleton(directory), recipe, CPU)
    assert max(memory.live_streams(job, sources) for sources in (2, 1)) == most
    assert job.stream_bytes == 8 * 32 * 64 * 4


def test_end_to_end_memory_is_linear_in_blocks(make_directory, make_recipe) -> None:
    stage = Stage(scope="model", weight_bits=2, batch_size=2)
    alike = make_recipe(stages=(stage,), sequence_length=64, split=Split(ratio_min=0.5, ratio_max=0.5))
    job = make_job(make_directory, alike, blocks=3)
    traced = memory.model_step_bytes(job.model, job.student, job.calls, stage, job.recipe, (2, 64), CPU, False)
    assert memory.model_step(job, stage) == traced


def test_cache_on_disk_leaves_memory(make_directory, make_recipe) -> None:
    job = make_job(make_directory, make_recipe(cache="disk"))
    phase = memory.block_stage(job, 0)
    assert "streams" not in phase.host
    assert phase.disk == memory.live_streams(job, 1) * job.stream_bytes
