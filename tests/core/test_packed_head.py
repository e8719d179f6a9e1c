"""The packed head: a width of its own, a copy where it was tied, and the way to disk and back."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bbb_ao import footprint, pack_head, set_bits
from bbb_ao.checkpoint import describe, export_dense, save_packed
from bbb_ao.errors import ModelError, NumericsError
from bbb_ao.grid import Grid, dequantize_weight, quantize_weight, scale_and_zero_point
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.storage import layer_footprint
from core.conftest import TOKENS, dense_llama, packed_llama, prepared_llama


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def packed(tied: bool, bits: int = 4):
    from bbb_ao.convert import convert_model

    return pack_head(convert_model(prepared_llama(0.5, tied=tied), 8).eval(), bits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_head_is_rounded_to_nearest_and_the_embedding_stays(tied: bool, bits: int) -> None:
    dense = dense_llama(tied)
    model = pack_head(copy.deepcopy(dense), bits)
    assert isinstance(model.lm_head, PackedLinear)
    weight, original = model.lm_head.weight.dequantize(), dense.lm_head.weight
    quantized = quantize_weight(original.detach(), *scale_and_zero_point(original.detach(), Grid()), Grid())
    assert torch.equal(weight, dequantize_weight(quantized, bits, Grid()))
    # design.md, section 2.9: 0.0069 at 4 bits and 0.00025 at 8 on Gaussian weights.
    assert (weight - original).square().sum() < {4: 0.01, 8: 0.0005}[bits] * original.square().sum()
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert not model.config.tie_word_embeddings
    assert dense.config.tie_word_embeddings == tied, "a copy's configuration is its own"
    hidden = model.model(TOKENS).last_hidden_state
    torch.testing.assert_close(logits(model), hidden @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_disk_and_dense_export(tied: bool, tmp_path: Path) -> None:
    model = packed(tied)
    expected = logits(set_bits(model, 2))
    save_packed(model, None, tmp_path / "packed", 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(loaded), expected)
    assert {name: layer.bits for name, layer in packed_linears(loaded).items()}["lm_head"] == 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "packed", bits=8).lm_head.bits == 4
    export_dense(loaded, None, tmp_path / "dense", dtype=torch.float32)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert type(dense.lm_head) is nn.Linear
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_head_keeps_its_width_and_is_counted(tmp_path: Path) -> None:
    model = packed(True)
    head = model.lm_head
    for bits in (2, 8, 3):
        set_bits(model, bits)
        assert (head.bits, model.model.layers[0].mlp.up_proj.bits) == (4, bits)
    with pytest.raises(ValueError, match="this layer stores widths 4 to 4, got 2"):
        head.set_bits(2)
    blocks = footprint(packed_llama(), 2)
    # 4 bits of codes, 8 of scale and 4 of zero offset for 32 weights, 4 bytes for the second level.
    size = 128 * 64 * 4 // 8 + 128 * 2 * 12 // 8 + 4
    assert layer_footprint(head, 2).bytes == layer_footprint(head).bytes == size
    assert footprint(model, 2).bytes == blocks.bytes + size
    save_packed(model, None, tmp_path / "out", 2)
    (row,) = [row for row in describe(tmp_path / "out") if row.name == "lm_head"]
    assert (row.widths, row.fixed_bits, row.bytes, row.act_bits) == ((4,), True, size, None)
    before = tmp_path / "before"
    save_packed(copy.deepcopy(packed_llama()), None, before, 2)
    sizes = [sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (before, tmp_path / "out")]
    assert 0 < sizes[1] - sizes[0] - size < 4096, "the embedding stays, the head's copy comes on top of it"


def test_head_takes_the_grid_of_the_other_layers_and_pads_ragged_inputs() -> None:
    from bbb_ao.convert import convert_model

    model = convert_model(prepared_llama(None, hidden=80, zero_point_bits=2), 4)
    dense = dense_llama(hidden=80)
    pack_head(model, 8)
    assert model.lm_head.grid == Grid(zero_point_bits=2)
    assert (model.lm_head.stored_features, model.lm_head.padding) == (96, 16)
    weight, original = model.lm_head.weight.dequantize(), dense.lm_head.weight
    assert weight.shape == original.shape
    # A zero offset in whole 2-bit steps clips, and the padded group's range starts at zero.
    assert (weight - original).square().sum() < 0.02 * original.square().sum()


def test_heads_that_cannot_be_packed_are_refused() -> None:
    model = packed(False)
    with pytest.raises(ModelError, match=r"expected an nn\.Linear as output embedding, got PackedLinear"):
        pack_head(model, 8)
    with pytest.raises(ModelError, match="got NoneType"):
        pack_head(nn.Linear(2, 2), 8)
    broken = copy.deepcopy(dense_llama(False))
    with torch.no_grad():
        broken.lm_head.weight[3, 5] = torch.nan
    with pytest.raises((NumericsError, ValueError), match="finite"):
        pack_head(broken, 8)
    with pytest.raises(ValueError, match="whole number from 2 to 8, got 9"):
        pack_head(copy.deepcopy(dense_llama()), 9)
