"""Block stages: one block at a time, on its own stream, against its full-precision twin."""

import copy
from functools import cache, partial
from itertools import pairwise

import pytest
import torch

from bbb_ao.errors import NumericsError
from bbb_ao.qat_linear import qat_linears, set_training_bits
from bbb_ao.recipes import blockwise, optimization
from bbb_ao.recipes.blockwise import BlockRun, stream_widths, train_block_stage
from bbb_ao.recipes.distill import divergence
from bbb_ao.recipes.head import Head
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import Split, Stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(make_model, make_recipe, ids):
    """A function: architecture -> an untrained student of one's own, split."""

    @cache
    def student(name):
        model = make_model(name)
        prepare_student(model, make_recipe(split=Split(ratio_min=0.5, ratio_max=0.5, metric="weight")), None)
        return model

    return lambda name: copy.deepcopy(student(name))


@pytest.fixture
def run(make_model, make_recipe, ids):
    """A function: architecture and recipe fields -> a BlockRun."""

    def made(name, **fields):
        model, recipe = make_model(name), make_recipe(**fields)
        return BlockRun(model, ids, recipe, CPU, head=Head(model, ids[:1]) if recipe.logits else None)

    return made


def stage(**fields):
    return Stage(**{"weight_bits": 2, "epochs": 4, "lr": 2e-3, "batch_size": 4} | fields)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "gemma3_text"])
def test_the_loss_of_every_block_falls(name, prepared, run):
    student, teacher = prepared(name), run(name)
    before = state(teacher.teacher)
    fits = train_block_stage(teacher, student, stage(), None, 0)
    assert [fit.steps for fit in fits] == [8, 8]
    assert all(fit.last_loss < fit.first_loss for fit in fits)
    assert same(state(teacher.teacher), before), "the teacher is not trained"
    assert not any(p.requires_grad for name, p in student.named_parameters() if ".layers." in name)
    assert all(p.grad is None for p in student.parameters()), "gradients take as much memory as the model"
    assert {linear.bits for linear in qat_linears(student).values()} == {2}


def relative_errors(teacher, student, ids):
    """Error of each block's output in the whole student against the whole model, relative to the block's change."""
    values = {}

    def keep(block, args, output, key):
        values[key] = output[0] if isinstance(output, tuple) else output

    for tag, model in (("t", teacher), ("s", student)):
        for number, block in enumerate(model.model.layers):
            block.register_forward_hook(partial(keep, key=(tag, number)))
    with torch.no_grad():
        entering = teacher.model.embed_tokens(ids)
        teacher(ids, use_cache=False)
        student(ids, use_cache=False)
    errors = []
    for number in range(2):
        before = entering if number == 0 else values["t", number - 1]
        change = (values["t", number] - before).square().mean()
        errors.append(float((values["s", number] - values["t", number]).square().mean() / change))
    return errors


def test_the_loss_is_the_error_inside_the_whole_model(prepared, run, ids):
    """One step on all sequences at a rate of (almost) zero reports the loss of what the student is."""
    student, teacher = prepared("llama"), run("llama")
    untrained = copy.deepcopy(student)
    fits = train_block_stage(teacher, student, stage(epochs=1, batch_size=8, lr=1e-30), None, 0)
    expected = relative_errors(teacher.teacher, untrained, ids)
    assert [fit.first_loss for fit in fits] == pytest.approx(expected, rel=1e-4)


def test_input_streams_by_recipe(make_recipe):
    quantized, higher = make_recipe(), make_recipe(input_stream="next_higher")
    w8, joint = Stage(weight_bits=8), Stage(weight_bits=(8, 4, 2), act_bits=8)
    assert stream_widths(joint, w8, quantized) == [(8, 8), (4, 8), (2, 8)]
    assert stream_widths(joint, w8, higher) == [(8, None), (8, 8), (4, 8)]
    assert stream_widths(w8, None, higher) == [(None, None)]
    assert stream_widths(Stage(weight_bits=2, act_bits=8), Stage(weight_bits=2), higher) == [(2, None)]


def test_next_higher_feeds_a_block_with_the_wider_prefix(prepared, run, ids):
    teacher = run("llama", input_stream="next_higher")
    student = prepared("llama")
    fits = train_block_stage(teacher, student, stage(epochs=1, batch_size=8, lr=1e-30), Stage(weight_bits=4), 0)
    reference = prepared("llama")
    set_training_bits(reference.model.layers[0], 4)
    set_training_bits(reference.model.layers[1], 2)
    expected = relative_errors(teacher.teacher, reference, ids)
    assert fits[1].first_loss == pytest.approx(expected[1], rel=1e-4)
    own = train_block_stage(run("llama"), prepared("llama"), stage(epochs=1, batch_size=8, lr=1e-30), None, 0)
    assert own[0].first_loss == fits[0].first_loss, "the first block reads the embeddings in either case"
    assert own[1].first_loss != pytest.approx(fits[1].first_loss, rel=1e-2)


def test_the_students_target_is_the_teacher_on_the_students_input(prepared, run):
    teacher, student = run("llama", target_stream="student"), prepared("llama")
    fits = train_block_stage(teacher, student, stage(epochs=1, batch_size=8, lr=1e-30), None, 0)
    reference = prepared("llama")
    with torch.no_grad():
        x = teacher.entry.states
        x_student = teacher.run(teacher.calls[0], reference.model.layers[0], x)
        x_teacher = teacher.run(teacher.calls[0], teacher.teacher_blocks[0], x)
        y_student = teacher.run(teacher.calls[1], reference.model.layers[1], x_student)
        target = teacher.run(teacher.calls[1], teacher.teacher_blocks[1], x_student)
        change = teacher.run(teacher.calls[1], teacher.teacher_blocks[1], x_teacher) - x_teacher
    expected = float((y_student - target).square().mean() / change.square().mean())
    assert fits[1].first_loss == pytest.approx(expected, rel=1e-4)


def test_joint_widths_are_summed_with_their_weights(prepared, run):
    def losses(widths, weights=None):
        joint = stage(weight_bits=widths, loss_weights=weights, epochs=1, batch_size=8, lr=1e-30)
        return [fit.first_loss for fit in train_block_stage(run("llama"), prepared("llama"), joint, None, 0)]

    eight, four, two = losses(8), losses(4), losses(2)
    for block in range(2):
        assert losses((8, 4, 2))[block] == pytest.approx(eight[block] + four[block] + two[block], rel=1e-4)
        weighted = losses((8, 4, 2), (0.5, 0.0, 3.0))[block]
        assert weighted == pytest.approx(0.5 * eight[block] + 3 * two[block], rel=1e-4)


def test_joint_training_keeps_the_wider_width_usable(prepared, run, ids):
    teacher = run("llama")
    errors = {}
    for widths in ((2,), (4, 2), None):
        student = prepared("llama")
        if widths:
            train_block_stage(teacher, student, stage(weight_bits=widths, epochs=8), None, 0)
        for bits in (4, 2):
            model = copy.deepcopy(student)
            set_training_bits(model, bits)
            errors[widths, bits] = relative_errors(copy.deepcopy(teacher.teacher), model, ids)[1]
    assert errors[(4, 2), 2] < errors[None, 2], errors
    assert errors[(4, 2), 4] < errors[(2,), 4], errors


def test_stages_chain_and_go_on_from_the_last_weights(prepared, run):
    teacher, student = run("llama"), prepared("llama")
    train_block_stage(teacher, student, stage(weight_bits=4), None, 0)
    after = state(student)
    fits = train_block_stage(teacher, student, stage(epochs=1, batch_size=8, lr=1e-30), stage(weight_bits=4), 1)
    assert same(state(student), after)
    untrained = train_block_stage(teacher, prepared("llama"), stage(epochs=1, batch_size=8, lr=1e-30), None, 1)
    assert fits[1].first_loss < untrained[1].first_loss, "the first stage helped the second"
    train_block_stage(teacher, student, stage(act_bits=8), stage(), 2)
    assert {(linear.bits, linear.act_bits) for linear in qat_linears(student).values()} == {(2, 8)}


@pytest.mark.parametrize("fields", [{}, {"cache": "disk"}, {"micro_batch": 1}])
def test_one_seed_is_bit_identical_and_another_differs(fields, prepared, run):
    states = []
    for seed in (3, 3, 4):
        student = prepared("llama")
        train_block_stage(run("llama", **fields), student, stage(epochs=1), None, seed)
        states.append(state(student))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_memory_and_disk_give_the_same_weights(prepared, run):
    states = []
    for cache_kind in ("memory", "disk"):
        student = prepared("llama")
        train_block_stage(run("llama", cache=cache_kind), student, stage(epochs=1), None, 0)
        states.append(state(student))
    assert same(*states)


def test_kept_streams_change_nothing_but_time(prepared, run, monkeypatch):
    states, kept = [], []
    for budget in (blockwise.STREAM_BUDGET, 0):
        monkeypatch.setattr(blockwise, "STREAM_BUDGET", budget)
        student, teacher = prepared("llama"), run("llama")
        for number, bits in enumerate((4, 2)):
            train_block_stage(teacher, student, stage(weight_bits=bits, epochs=1), None, number)
        states.append(state(student))
        kept.append(sorted(teacher.kept))
    assert kept == [[0, 1], []]
    assert same(*states)


def test_progress_is_reported_for_every_step_and_block(prepared, run):
    steps, blocks = [], []
    fits = train_block_stage(
        run("llama"),
        prepared("llama"),
        stage(epochs=1),
        None,
        0,
        lambda *values: blocks.append(values),
        lambda step, count, loss: steps.append((step, count, loss())),
    )
    assert blocks == [(0, "model.layers.0", fits[0]), (1, "model.layers.1", fits[1])]
    assert [(step, count) for step, count, _ in steps] == [(1, 2), (2, 2)] * 2
    assert steps[0][2] == fits[0].first_loss


def test_norms_are_trained_or_not_as_the_recipe_says(prepared, run):
    for train_norms in (True, False):
        student = prepared("llama")
        before = student.model.layers[0].input_layernorm.weight.clone()
        train_block_stage(run("llama", train_norms=train_norms), student, stage(epochs=1), None, 0)
        assert torch.equal(student.model.layers[0].input_layernorm.weight, before) != train_norms


def test_a_student_that_diverges_is_named_with_its_block(prepared, run):
    student = prepared("llama")
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^model\.layers\.1: w2a16: the loss is NaN or infinite at step 1"):
        train_block_stage(run("llama"), student, stage(epochs=1), None, 0)


def test_bfloat16_products_train_as_well(prepared, run, monkeypatch):
    """What CPUs with bfloat16 instructions and GPUs run: autocast, streams in bfloat16, masters in float32."""
    exact = train_block_stage(run("llama"), prepared("llama"), stage(), None, 0)
    monkeypatch.setattr(optimization, "_cpu_multiplies_bfloat16", lambda: True)
    student, teacher = prepared("llama"), run("llama")
    assert teacher.entry.states.dtype == torch.bfloat16
    fits = train_block_stage(teacher, student, stage(), None, 0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert [fit.last_loss for fit in fits] == pytest.approx([fit.last_loss for fit in exact], rel=0.1)


def test_a_bfloat16_model_is_trained_with_float32_masters(make_model, make_recipe, ids):
    model = make_model("llama").to(torch.bfloat16)
    run = BlockRun(model, ids, make_recipe(), CPU)
    student = copy.deepcopy(model).float()
    prepare_student(student, run.recipe, run)
    fits = train_block_stage(run, student, stage(), None, 0)
    assert all(fit.last_loss < fit.first_loss for fit in fits)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_lookahead_runs_the_output_through_the_blocks_behind(prepared, run, monkeypatch):
    """The loss of each block is the mean of its own and that of as many full-precision blocks as there are."""
    teacher = run("llama", lookahead=5)
    losses = {}

    def remember(module, stage, recipe, count, loss_of, seed, where, on_step, load, memory, saving):
        losses[where] = float(loss_of(*load(torch.arange(4))).detach())
        return optimization.Fit(0.0, 0.0, 0, "")

    monkeypatch.setattr(blockwise, "fit", remember)
    student = prepared("llama")
    train_block_stage(teacher, student, stage(), None, 0)
    set_training_bits(student, 2)
    first, second = (student.get_submodule(name) for name in teacher.names)
    behind, last = teacher.teacher_blocks
    entry = teacher.entry.states[:4]
    targets = [entry, out := teacher.run(teacher.calls[0], behind, entry), teacher.run(teacher.calls[1], last, out)]
    whole = [teacher.entry.states]
    for call, block in zip(teacher.calls, (behind, last), strict=True):
        whole.append(teacher.run(call, block, whole[-1]))
    changes = [(b - a).square().mean() for a, b in pairwise(whole)]
    hidden = teacher.run(teacher.calls[0], first, entry)
    errors = [(hidden - targets[1]).square().mean() / changes[0]]
    errors.append((teacher.run(teacher.calls[1], last, hidden) - targets[2]).square().mean() / changes[1])
    expected = [sum(errors) / 2]
    expected.append((teacher.run(teacher.calls[1], second, hidden) - targets[2]).square().mean() / changes[1])
    assert list(losses.values()) == pytest.approx([float(value.detach()) for value in expected], rel=1e-4)


def first_losses(teacher, student, monkeypatch, **fields):
    """Block -> the loss of the untrained student on the first four sequences, and that of two halves of them."""
    losses = []

    def remember(module, stage, recipe, count, loss_of, seed, where, on_step, load, memory, saving):
        whole, *halves = (float(loss_of(*load(torch.tensor(rows))).detach()) for rows in ([0, 1, 2, 3], [0, 1], [2, 3]))
        assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5), "micro-batches give the mean"
        losses.append(whole)
        return optimization.Fit(0.0, 0.0, 0, "")

    monkeypatch.setattr(blockwise, "fit", remember)
    train_block_stage(teacher, student, stage(**fields), None, 0)
    return losses


@pytest.mark.parametrize("target_stream", ["full_precision", "student"])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_logits_count_where_the_path_reaches_behind_the_last_block(
    target_stream, lookahead, prepared, run, ids, monkeypatch
):
    fields = {"lookahead": lookahead, "target_stream": target_stream}
    joint = {"weight_bits": (8, 2), "loss_weights": (1.0, 2.0)}
    without = first_losses(run("gemma3_text", **fields), prepared("gemma3_text"), monkeypatch, **joint)
    losses = first_losses(run("gemma3_text", logits=3.0, **fields), prepared("gemma3_text"), monkeypatch, **joint)
    teacher, student = run("gemma3_text", **fields).teacher, prepared("gemma3_text")
    # The student's blocks, but for those behind the one in training; what enters the last one, from either prefix.
    expected = []
    for trained in range(2):
        total = 0.0
        for width, factor in ((8, 1.0), (2, 2.0)):
            made = copy.deepcopy(teacher)
            for number in range(trained + 1):
                made.model.layers[number] = copy.deepcopy(student.model.layers[number])
                set_training_bits(made.model.layers[number], width)
            wanted = copy.deepcopy(teacher)
            if target_stream == "student" and trained == 1:
                wanted.model.layers[0] = copy.deepcopy(made.model.layers[0])
            with torch.no_grad():
                logits = [model(ids[:4], use_cache=False).logits for model in (wanted, made)]
            total += factor * 3.0 * float(divergence(*logits))
        expected.append(total if trained + lookahead > 1 else 0.0)
    assert expected[1] > 0.1
    assert [a - b for a, b in zip(losses, without, strict=True)] == pytest.approx(expected, rel=1e-3)
    assert (losses[0] == without[0]) == (lookahead == 1)


def test_logits_change_only_the_blocks_that_reach_them(prepared, run):
    states = []
    for logits in (0.0, 1.0):
        student = prepared("llama")
        fits = train_block_stage(run("llama", lookahead=1, logits=logits), student, stage(), None, 0)
        assert all(fit.last_loss < fit.first_loss for fit in fits)
        states.append(state(student))
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)
