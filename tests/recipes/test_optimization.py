"""The training loop's parts: which parameters, in which order, at which rate; and the loop itself."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bbb_ao.errors import NumericsError
from bbb_ao.grid import Grid
from bbb_ao.qat_linear import QATLinear
from bbb_ao.recipes import optimization
from bbb_ao.recipes.optimization import (
    CopiesRate,
    TailAverage,
    autocast,
    batches,
    fit,
    learning_rate_factor,
    stage_rows,
    stage_steps,
    stream_dtype,
    trainable_groups,
)
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import Stage
from bbb_ao.splitting import choose_index

CPU = torch.device("cpu")


@settings(deadline=None, derandomize=True, max_examples=50)
@given(count=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 2**63))
def test_every_sequence_comes_once_an_epoch(count, size, seed):
    size = min(size, count)
    epochs = 3
    steps = epochs * count // size
    rows = list(batches(count, size, steps, seed))
    assert all(len(batch) == size and batch.dtype == torch.int64 for batch in rows)
    drawn = torch.cat(rows)
    for epoch in drawn.split(count):
        assert epoch.unique().numel() == epoch.numel(), "none twice"
    assert all(torch.equal(a, b) for a, b in zip(rows, batches(count, size, steps, seed), strict=True))


def test_epochs_and_seeds_have_their_own_order():
    first, second = torch.cat(list(batches(32, 8, 8, 0))).split(32)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.cat(list(batches(32, 8, 4, 1))))


def test_a_batch_larger_than_the_data_is_the_data():
    assert [sorted(batch.tolist()) for batch in batches(3, 8, 2, 0)] == [[0, 1, 2]] * 2
    assert stage_steps(Stage(epochs=2, batch_size=8), 3) == 2
    assert stage_steps(Stage(epochs=1.5, batch_size=4), 16) == 6
    assert stage_steps(Stage(epochs=1e-3, batch_size=4), 16) == 1


@settings(deadline=None, derandomize=True, max_examples=50)
@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_linearly_then_falls_to_nothing(steps, warmup):
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    rising = warmup * steps
    assert all(0 < factor <= 1 for factor in factors), "no step without effect"
    for step, (a, b) in enumerate(itertools.pairwise(factors)):
        assert a < b if step + 1 < rising else (step < rising or a > b), (step, a, b)
    assert learning_rate_factor(0, 100, 0.0) == 1.0
    assert learning_rate_factor(1, 100, 0.1) == pytest.approx(2 / 11)
    assert learning_rate_factor(55, 100, 0.1) == pytest.approx(0.5), "half way down"
    assert learning_rate_factor(100, 100, 0.1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_only_quantized_linears_and_norms_are_trained(train_norms, learned, make_model, make_recipe):
    model = make_model("gpt_neox")
    recipe = make_recipe(learned_scales=learned, skip=(r".*dense_4h_to_h",), split=None)
    prepare_student(model, recipe, None)
    stage = replace(recipe.stages[0], lr_scale=1e-5)
    groups = trainable_groups(nn.ModuleList(model.gpt_neox.layers), stage, train_norms)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = [{names[id(p)] for p in group["params"]} for group in groups]
    blocks = {name for name in names.values() if ".layers." in name and "dense_4h_to_h" not in name}
    norms = {name for name in blocks if "layernorm" in name}
    scales = {name for name in blocks if name.endswith((".scale", ".zero_point"))}
    assert len(norms) == 8
    assert len(scales) == (2 * 3 * 2 if learned else 0)
    assert chosen[0] == blocks - scales - (set() if train_norms else norms)
    assert chosen[1:] == ([scales] if learned else [])
    assert [group["peak"] for group in groups] == [stage.lr, 1e-5][: len(groups)]
    inside = {name for name, p in model.named_parameters() if p.requires_grad and ".layers." in name}
    assert inside == set().union(*chosen)


def test_learned_scales_take_the_weights_rate_by_default():
    linear = QATLinear.from_linear(nn.Linear(32, 4), 2, learned_scales=True)
    assert [group["peak"] for group in trainable_groups(linear, Stage(lr=0.5, lr_scale=None), True)] == [0.5, 0.5]
    assert [group["peak"] for group in trainable_groups(linear, Stage(lr=0.5, lr_scale=0.0), True)] == [0.5, 0.0]


def split_linear(seed=0, bits=4, dtype=torch.float32):
    torch.manual_seed(seed)
    linear = nn.Linear(32, 8, dtype=dtype)
    index = choose_index(linear.weight.abs().amax(0), 0.9)
    return QATLinear.from_linear(linear, bits, None, Grid(), index)


@pytest.mark.parametrize("factor", [0.5, 2.0, 1.0])
def test_copies_move_by_a_factor_and_other_columns_as_they_would(factor):
    linear = split_linear()
    copies = torch.bincount(linear.ocs_index.long(), minlength=33)[linear.ocs_index.long()] == 2
    assert 0 < int(copies.sum()) <= 64
    start = linear.weight.detach().clone()
    rate = CopiesRate(linear, factor)
    before = rate.before()
    step = torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        linear.weight += step
    moved = linear.weight.detach().clone()
    rate.after(before)
    expected = torch.where(copies, torch.lerp(start, moved, factor), moved)
    assert torch.equal(linear.weight.detach(), expected)


def regression(linear, seed=0, tokens=24):
    """A loss on a fixed random target, the mean over rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, linear.in_features, generator=generator, dtype=linear.weight.dtype)
    with torch.no_grad():
        y = x @ torch.randn(linear.in_features, 8, generator=generator, dtype=x.dtype) / 8
    return lambda rows: (linear(x[rows]) - y[rows]).square().mean()


def test_the_loss_falls_and_steps_are_reported(make_recipe):
    linear = split_linear()
    seen = []
    stage = Stage(epochs=20, lr=1e-2, batch_size=8)
    result = fit(
        linear, stage, make_recipe(micro_batch=None), 24, regression(linear), 0, "x", lambda *a: seen.append(a)
    )
    assert result.steps == 60
    assert result.how == "eager: the step's inputs are not on a GPU"
    assert result.last_loss < 0.3 * result.first_loss
    assert [(step, steps) for step, steps, _ in seen] == [(i + 1, 60) for i in range(60)]
    losses = [loss() for _, _, loss in seen]
    assert result.first_loss == pytest.approx(sum(losses[:6]) / 6)
    assert result.last_loss == pytest.approx(sum(losses[-6:]) / 6)


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_accumulated_micro_batches_equal_the_whole_batch(micro_batch, make_recipe):
    stage = Stage(epochs=4, lr=1e-3, batch_size=8)
    weights, losses = [], []
    for size in (None, micro_batch):
        # In float64, so that rounding cannot flip a code, which AdamW would turn into a whole step.
        linear = split_linear(dtype=torch.float64)
        assert linear.weight.dtype == torch.float64
        result = fit(linear, stage, make_recipe(micro_batch=size), 24, regression(linear), 0, "x")
        weights.append(linear.weight.detach())
        losses.append(result.last_loss)
    assert not torch.equal(weights[0], split_linear(dtype=torch.float64).weight), "it moved"
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_loaded_batches_train_as_their_numbers_do(micro_batch, make_recipe):
    linears = [split_linear(), split_linear()]
    stage, recipe = Stage(epochs=4, lr=1e-3, batch_size=8), make_recipe(micro_batch=micro_batch)
    fit(linears[0], stage, recipe, 24, regression(linears[0]), 0, "x")
    read = []

    def load(rows):
        read.append(rows)
        return rows, rows * 2

    by_number = regression(linears[1])

    def loss_of(rows, doubled):
        assert torch.equal(doubled, rows * 2)
        assert len(rows) <= (micro_batch or 8)
        return by_number(rows)

    fit(linears[1], stage, recipe, 24, loss_of, 0, "x", load=load)
    assert torch.equal(linears[0].weight, linears[1].weight)
    assert [len(rows) for rows in read] == [8] * 12


def test_one_seed_gives_one_result_and_another_seed_another(make_recipe):
    weights = []
    for seed in (0, 0, 1):
        linear = split_linear()
        fit(linear, Stage(epochs=2, lr=1e-2), make_recipe(), 24, regression(linear), seed, "x")
        weights.append(linear.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_slower_rate_for_copies_moves_them_less(make_recipe):
    moved = []
    for factor in (1.0, 0.25):
        linear = split_linear()
        start = linear.weight.detach().clone()
        recipe = make_recipe(copies_lr_factor=factor)
        fit(linear, Stage(epochs=1, lr=1e-3, batch_size=24), recipe, 24, regression(linear), 0, "x")
        moved.append(linear.weight.detach() - start)
    copies = torch.bincount(linear.ocs_index.long(), minlength=33)[linear.ocs_index.long()] == 2
    # One AdamW step: the factor scales it exactly, up to the rounding of w + step.
    torch.testing.assert_close(moved[1][:, copies], 0.25 * moved[0][:, copies], rtol=0, atol=2**-22)
    assert torch.equal(moved[1][:, ~copies], moved[0][:, ~copies])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_names_layer_and_step(bad, make_recipe):
    linear = split_linear()
    loss = regression(linear)
    calls = itertools.count(1)

    def fails_in_step_three(rows):
        return loss(rows) * (bad if next(calls) == 3 else 1.0)

    stage = Stage(epochs=2, lr=1e-3, batch_size=8)
    with pytest.raises(NumericsError, match=r"^model\.layers\.7: the loss is NaN or infinite at step 3; fix: "):
        fit(linear, stage, make_recipe(micro_batch=None), 24, fails_in_step_three, 0, "model.layers.7")


def test_an_overflow_in_the_last_gradient_is_refused(make_recipe):
    linear = split_linear()
    loss = regression(linear)

    def steep(rows):
        value = loss(rows)
        return value.detach() + (value - value.detach()) * math.inf

    with pytest.raises(NumericsError, match=r"^here: .* NaN or infinite at step 1; fix: "):
        fit(linear, Stage(epochs=1, batch_size=24), make_recipe(micro_batch=None), 24, steep, 0, "here")


def test_gradients_are_clipped(make_recipe, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def observe(self, *args):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", observe)
    for clip in (1e-3, None):
        linear = split_linear()
        fit(linear, Stage(epochs=1, batch_size=8), make_recipe(gradient_clip=clip), 24, regression(linear), 0, "x")
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in norms[:3])
    assert all(norm > 1e-2 for norm in norms[3:])


def test_autocast_decides_the_type_of_streams(monkeypatch):
    assert stream_dtype(CPU) == torch.float32
    monkeypatch.setattr(optimization, "_cpu_multiplies_bfloat16", lambda: True)
    assert stream_dtype(CPU) == torch.bfloat16
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("share", "taken"), [(0.0, 1), (0.3, 3), (1.0, 10)])
def test_the_average_is_over_the_last_steps(share, taken):
    values = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = nn.Parameter(torch.empty(4, dtype=torch.float64))
    average = TailAverage([parameter], share, 10)
    for step, value in enumerate(values):
        parameter.data.copy_(value)
        average.after(step)
    average.finish()
    torch.testing.assert_close(parameter.detach(), values[-taken:].mean(0), rtol=1e-14, atol=1e-15)


def test_a_recipe_averages_its_weights(make_recipe):
    weights = {}
    for share in (0.0, 0.5):
        linear = split_linear()
        seen = []
        stage = Stage(epochs=4, lr=1e-2, batch_size=24)
        fit(
            linear,
            stage,
            make_recipe(average=share, micro_batch=None),
            24,
            regression(linear),
            0,
            "x",
            lambda *_, linear=linear, seen=seen: seen.append(linear.weight.detach().clone()),
        )
        weights[share] = (linear.weight.detach(), torch.stack(seen))
    torch.testing.assert_close(weights[0.5][0], weights[0.5][1][2:].mean(0), rtol=1e-6, atol=1e-7)
    assert torch.equal(weights[0.0][0], weights[0.0][1][-1])


def test_rows_of_a_stage():
    rows = {text: stage_rows(Stage(text=text), 2, 5).tolist() for text in ("calibration", "generated", "both")}
    assert rows == {"calibration": [0, 1, 2], "generated": [3, 4], "both": [0, 1, 2, 3, 4]}
