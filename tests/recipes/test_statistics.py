"""What the log says of layers and channels is what it claims to be."""

import copy

import pytest
import torch
from torch import nn

from bbb_ao import bitbybit_qat, quantize_
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.blockwise import BlockRun
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import Split
from bbb_ao.recipes.statistics import PROBE_SEQUENCES, compared, layer_errors

CPU = torch.device("cpu")


@pytest.fixture
def prepare(make_model, make_recipe, ids):
    """A function: (architecture, fields of the recipe) -> run, student and what was prepared."""

    def build(name="llama", **fields):
        recipe = make_recipe(**fields)
        run = BlockRun(make_model(name), ids, recipe, CPU)
        student = copy.deepcopy(run.teacher).float()
        return run, student, prepare_student(student, recipe, run)

    return build


def test_a_model_that_is_only_split_has_no_error(prepare):
    run, student, prepared = prepare()
    set_training_bits(student, None)
    errors = layer_errors(run, student)
    assert errors.keys() == set(prepared.layers)
    assert max(errors.values()) < 1e-10


def test_errors_are_those_of_the_outputs(prepare):
    """Against whole models with hooks, on the same sequences."""
    run, student, prepared = prepare()
    set_training_bits(student, 2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in student.modules()]
    found = layer_errors(run, student)
    outputs = []
    for model in (run.teacher, student):
        kept = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, y, name=name, kept=kept: kept.update({name: y})
            )
            for name in prepared.layers
        ]
        with torch.no_grad():
            model(run.sequences[:PROBE_SEQUENCES], use_cache=False)
        for handle in handles:
            handle.remove()
        outputs.append(kept)
    for name in prepared.layers:
        exact, quantized = (kept[name].double() for kept in outputs)
        expected = (quantized[..., : exact.shape[-1]] - exact).square().sum() / exact.square().sum()
        assert found[name] == pytest.approx(expected.item(), rel=2e-3), name
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert [len(module._forward_hooks) for module in student.modules()] == hooks


def test_an_output_that_the_student_lacks_is_not_compared_later(prepare):
    class Expert(nn.Module):
        """Runs its Linear where its input is positive."""

        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x) if bool(x.sum() > 0) else x

    linear = nn.Linear(32, 32)
    teacher, student = Expert(linear), Expert(copy.deepcopy(linear))
    quantize_(student, bitbybit_qat(bits=8))
    with compared(teacher, student) as sums, torch.no_grad():
        teacher(torch.ones(4, 32)), student(-torch.ones(4, 32))
        teacher(-torch.ones(4, 32)), student(2 * torch.ones(4, 32))
    assert sums == {}


def test_wider_codes_have_smaller_errors(prepare):
    run, student, _ = prepare()
    by_width = []
    for bits in (2, 4, 8):
        set_training_bits(student, bits)
        by_width.append(layer_errors(run, student))
    for name in by_width[0]:
        assert by_width[0][name] > 4 * by_width[1][name] > 16 * by_width[2][name] > 0, name


@pytest.mark.parametrize("metric", ["joint", "weight"])
def test_channels_before_and_after_splitting(metric, prepare):
    """The largest half is split; each of its channels is half as large afterwards."""
    _, _, prepared = prepare(split=Split(ratio_min=0.5, ratio_max=0.5, metric=metric))
    assert sorted({layer for site in prepared.channels for layer in site.layers}) == sorted(prepared.layers)
    for site in prepared.channels:
        assert site.metric == metric
        # Half of them, to the next multiple of 32.
        assert site.split == {64: 32, 96: 64}[site.channels]
        assert site.ranks[0] == 1
        assert site.ranks[-1] == site.channels
        assert list(site.before) == sorted(site.before, reverse=True)
        assert list(site.after) == sorted(site.after, reverse=True)
        # At least half of the channels are split, so that no other one is above the median.
        assert site.after[0] <= max(site.before[0] / 2, 1.0) * 1.001
        assert site.before[0] > 1 > site.before[-1]


def test_without_splitting_nothing_changes(prepare):
    _, _, prepared = prepare(split=None)
    for site in prepared.channels:
        assert (site.split, site.metric) == (0, "weight")
        assert site.before == site.after
        assert site.outliers_before == site.outliers_after


def test_padding_is_no_channel(prepare):
    _, _, prepared = prepare("ragged", split=None)
    assert {site.channels for site in prepared.channels} == {60, 100}
    assert all(site.split == 0 and site.before == site.after for site in prepared.channels)
