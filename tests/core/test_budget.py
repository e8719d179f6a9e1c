"""`from_pretrained(directory, budget_gb=...)`: the widest width that fits, or one line."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bbb_ao.budget import fit_budget
from bbb_ao.checkpoint import save_packed
from bbb_ao.convert import convert_model
from bbb_ao.errors import ModelError, ResourceError
from bbb_ao.grid import Grid
from bbb_ao.packed_linear import PackedLinear, common_widths, packed_linears, set_bits
from core.conftest import TOKENS, prepared_llama


def load(path: Path, **settings):
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


def held(model: nn.Module) -> int:
    """Bytes of the loaded model; a tied tensor counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def sizes(checkpoint) -> dict[int, int]:
    """What the model holds at each width that has planes of its own, from budgets that are far too large or just so."""
    found, budget = {}, 1.0
    for bits in (8, 4, 2):
        model = load(checkpoint.path, budget_gb=budget)
        assert {layer.bits for layer in packed_linears(model).values()} == {bits} == {model.config.bits}
        found[bits] = held(model)
        budget = (found[bits] - 1) / 1e9
    return found


def test_the_widest_width_that_fits_is_opened(checkpoint, sizes: dict[int, int]) -> None:
    assert sizes[8] == held(load(checkpoint.path))
    assert sizes[8] > sizes[4] > sizes[2]
    for bits, size in sizes.items():
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, budget_gb=size / 1e9, output_loading_info=True
        )
        assert not any(report.values()), report
        assert held(model) == size
        with torch.no_grad():
            expected = set_bits(checkpoint.model, bits)(TOKENS).logits
            assert torch.equal(model.eval()(TOKENS).logits, expected)


def test_types_of_the_other_weights_count(checkpoint, sizes: dict[int, int]) -> None:
    model = load(checkpoint.path, budget_gb=(sizes[8] - 1) / 1e9, dtype=torch.bfloat16)
    assert held(model) < sizes[8]
    assert model.config.bits == 8


def test_no_width_fits(checkpoint, sizes: dict[int, int]) -> None:
    with pytest.raises(
        ResourceError, match=r"^budget_gb: expected at least 0\.001 GB, the size at 2 bits, got 1e-05; "
    ):
        load(checkpoint.path, budget_gb=0.00001)


def test_layers_without_a_common_width_have_no_budget() -> None:
    layers = nn.Sequential(*(PackedLinear(32, 8, 32, Grid(kind="integer", zero_point_bits=2), bits) for bits in (2, 4)))
    with pytest.raises(ModelError, match="a width that every layer stores, got none"):
        fit_budget(layers, 1)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "2", True])
def test_a_budget_is_a_positive_number(checkpoint, budget: object) -> None:
    with pytest.raises(ModelError, match=r"^budget_gb: expected a positive number"):
        load(checkpoint.path, budget_gb=budget)


def test_bits_and_a_budget_are_refused(checkpoint) -> None:
    with pytest.raises(ModelError, match=r"^bits: expected it or budget_gb, got both"):
        load(checkpoint.path, bits=2, budget_gb=1)


def test_what_was_opened_under_a_budget_can_be_saved(checkpoint, sizes: dict[int, int], tmp_path: Path) -> None:
    narrow = load(checkpoint.path, budget_gb=sizes[4] / 1e9)
    narrow.save_pretrained(tmp_path / "narrow")
    again = load(tmp_path / "narrow")
    assert common_widths(again) == [2, 3, 4]
    assert held(again) == sizes[4]
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, narrow(TOKENS).logits)


def test_the_integer_grid_has_one_size(tmp_path: Path) -> None:
    packed = convert_model(prepared_llama(None, kind="integer", zero_point_bits=2), 8)
    save_packed(packed, None, tmp_path / "out", 2)
    size = held(load(tmp_path / "out"))
    assert load(tmp_path / "out", budget_gb=size / 1e9).config.bits == 8
    with pytest.raises(ResourceError, match="at 2 bits"):
        load(tmp_path / "out", budget_gb=(size - 1) / 1e9)
