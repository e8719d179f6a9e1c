"""Widths for each layer of a nested checkpoint: what is measured, what is chosen, and what is saved."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import bbb_ao.huggingface  # noqa: F401  registers the quantizer
from bbb_ao.checkpoint import describe, save_packed
from bbb_ao.convert import convert_model
from bbb_ao.errors import ModelError, NumericsError, RecipeError
from bbb_ao.packed_head import pack_head
from bbb_ao.packed_linear import packed_linears, set_bits, set_layer_bits
from bbb_ao.recipes import allocation
from bbb_ao.recipes.allocation import assign_checkpoint, assign_widths, measure_sensitivity
from bbb_ao.recipes.distill import divergence, next_token_loss
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import GridSettings, Stage
from bbb_ao.storage import footprint, layer_footprint

CPU = torch.device("cpu")
WIDTHS = (2, 4, 8)


def make_packed(make_model, make_recipe, **fields):
    model = make_model("llama")
    joint = make_recipe(stages=(Stage(weight_bits=WIDTHS[::-1]),), split=None, **fields)
    prepare_student(model, joint, None)
    return convert_model(model, 8)


@pytest.fixture(scope="module")
def packed(make_model, make_recipe):
    return make_packed(make_model, make_recipe)


@pytest.fixture(scope="module")
def sensitivity(packed, ids):
    return measure_sensitivity(packed, ids, WIDTHS, batch_size=3)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_it_is_the_divergence_with_one_layer_widened(metric, packed, ids):
    found = measure_sensitivity(packed, ids, WIDTHS, metric, batch_size=3)
    assert {layer.bits for layer in packed_linears(packed).values()} == {2}
    target = logits(set_bits(packed, 8), ids)
    for name, width in (("model.layers.1.mlp.down_proj", 4), ("model.layers.0.self_attn.q_proj", 2)):
        set_bits(packed, 2)
        packed_linears(packed)[name].set_bits(width)
        output = logits(packed, ids)
        expected = divergence(target, output) if metric == "kl" else next_token_loss(output, ids)
        assert found[name][width] == pytest.approx(float(expected), rel=1e-4)
    assert found.keys() == packed_linears(packed).keys()
    assert all(list(losses) == list(WIDTHS) for losses in found.values())


@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data())
def test_the_budget_is_kept_and_no_gain_is_left_that_fits(data, packed):
    layers = packed_linears(packed)
    losses = st.floats(0, 1, allow_nan=False)
    found = {name: {width: data.draw(losses) for width in WIDTHS} for name in layers}
    low, high = (footprint(packed, dict.fromkeys(layers, width)).bytes for width in (2, 8))
    budget = data.draw(st.integers(low, high))
    chosen = assign_widths(packed, found, budget)
    spent = footprint(packed, chosen).bytes
    assert low <= spent <= budget
    for name, layer in layers.items():
        assert found[name][chosen[name]] <= found[name][2]
        for width in WIDTHS:
            more = layer_footprint(layer, width).bytes - layer_footprint(layer, chosen[name]).bytes
            gains = width > chosen[name] and found[name][width] < found[name][chosen[name]]
            assert not (gains and spent + more <= budget), (name, width)


def test_the_steepest_gain_for_each_byte_comes_first(packed):
    layers = packed_linears(packed)
    flat = {name: {2: 1.0, 4: 1.0, 8: 1.0} for name in layers}
    small, large = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    found = flat | {small: {2: 1.0, 4: 0.9, 8: 0.9}, large: {2: 1.0, 4: 0.85, 8: 0.85}}
    low = footprint(packed, dict.fromkeys(layers, 2)).bytes
    step = layer_footprint(layers[small], 4).bytes - layer_footprint(layers[small], 2).bytes
    # k_proj has a third of up_proj's weights, and two thirds of its gain.
    chosen = assign_widths(packed, found, low + step)
    assert [name for name, width in chosen.items() if width > 2] == [small]
    with pytest.raises(RecipeError, match=rf"^budget: expected at least {low} bytes, .*, got {low - 1}; fix: "):
        assign_widths(packed, found, low - 1)


def test_a_model_of_nan_names_the_layer(make_model, make_recipe, ids):
    model = make_packed(make_model, make_recipe)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: expected finite losses"):
        measure_sensitivity(model, ids, WIDTHS)


@pytest.mark.parametrize("kind", ["half_step", "integer"])
@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_planes_that_are_dropped_are_not_missed(kind, width, make_model, make_recipe, ids):
    grid = GridSettings(kind=kind, zero_point_bits=4 if kind == "half_step" else 2)
    model = make_packed(make_model, make_recipe, grid=grid)
    before = logits(set_bits(model, width), ids)
    stored = footprint(model).bytes
    for layer in packed_linears(model).values():
        layer.drop_planes(width)
    assert torch.equal(logits(model, ids), before)
    assert (footprint(model).bytes < stored) == (width <= 4)
    layer = next(iter(packed_linears(model).values()))
    assert (layer.plane_mid is None, layer.plane_low is None) == (width <= 2, width <= 4)
    if width < 8:
        with pytest.raises(ValueError, match=f"to {width}, got 8"):
            layer.set_bits(8)


def test_widths_are_set_by_name_or_not_at_all(packed):
    set_bits(packed, 2)
    names = list(packed_linears(packed))
    for widths in (dict.fromkeys(names[1:], 4), dict.fromkeys([*names, "x"], 4), dict.fromkeys(names, 9)):
        with pytest.raises(ValueError, match=r"set_layer_bits|bits"):
            set_layer_bits(packed, widths)
        assert {layer.bits for layer in packed_linears(packed).values()} == {2}


def test_a_packed_head_keeps_its_width(make_model, make_recipe, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(allocation, "load_tokenizer", lambda directory: None)
    model = pack_head(make_packed(make_model, make_recipe), 4)
    head = layer_footprint(packed_linears(model)["lm_head"])
    with pytest.raises(ValueError, match="a difference in lm_head"):
        set_layer_bits(model, dict.fromkeys(packed_linears(model), 2))
    save_packed(set_bits(model, 8), None, tmp_path / "all", 8)
    found = assign_checkpoint(tmp_path / "all", tmp_path / "mixed", ids, WIDTHS, "kl", 3, True, CPU, bits_per_weight=4)
    assert "lm_head" not in found.widths
    assert len(set(found.widths.values())) > 1
    # The budget is for all that is read, the head with it.
    layers = packed_linears(model)
    read = sum((layer_footprint(layers[name], width) for name, width in found.widths.items()), head)
    assert found.bits_per_weight == read.bits_per_weight <= 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert {name: layer.bits for name, layer in packed_linears(loaded).items()} == found.widths | {"lm_head": 4}
    assert torch.equal(logits(loaded, ids), logits(set_layer_bits(model, found.widths), ids))
    rows = {row.name: (row.bits, row.fixed_bits) for row in describe(tmp_path / "mixed")}
    assert rows == {name: (width, False) for name, width in found.widths.items()} | {"lm_head": (4, True)}


@pytest.fixture
def checkpoint(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(allocation, "load_tokenizer", lambda directory: None)
    save_packed(set_bits(packed, 8), None, tmp_path / "all", 8, "schema: 1\n")
    return tmp_path / "all"


@pytest.mark.parametrize("drop", [False, True])
def test_the_checkpoint_opens_at_its_widths(drop, checkpoint, packed, sensitivity, ids, tmp_path):
    output = tmp_path / "mixed"
    found = assign_checkpoint(checkpoint, output, ids, WIDTHS, "kl", 3, drop, CPU, bits_per_weight=3.5)
    limit = int(3.5 * footprint(packed).weights / 8)
    assert found.widths == assign_widths(packed, sensitivity, limit)
    assert len(set(found.widths.values())) > 1
    assert found.bits_per_weight <= 3.5
    assert (found.stored_bits == footprint(packed).bits_per_weight) is (not drop)
    assert (output / "recipe.yaml").read_text() == "schema: 1\n"
    expected = logits(set_layer_bits(packed, found.widths), ids)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert {name: layer.bits for name, layer in packed_linears(loaded).items()} == found.widths
    assert torch.equal(logits(loaded, ids), expected)
    assert loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    rows = {row.name: (row.bits, row.widths[-1]) for row in describe(output)}
    assert rows == {name: (width, width if drop else 8) for name, width in found.widths.items()}
    assert json.loads((output / "config.json").read_text()).get("bits") is None
    if drop:
        with pytest.raises(ModelError, match="this layer stores widths"):
            AutoModelForCausalLM.from_pretrained(output, bits=8)
    else:
        wide = AutoModelForCausalLM.from_pretrained(output, bits=8)
        assert torch.equal(logits(wide, ids), logits(set_bits(packed, 8), ids))
    # And once more, as any checkpoint.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), expected)


def test_a_damaged_width_is_refused(checkpoint, ids, tmp_path):
    output = tmp_path / "mixed"
    assign_checkpoint(checkpoint, output, ids, WIDTHS, "kl", 4, True, CPU, bits_per_weight=3.0)
    config = json.loads((output / "config.json").read_text())
    next(iter(config["quantization_config"]["modules"].values()))["bits"] = 9
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^config\.json: quantization_config\.modules: .*_proj: bits: expected"):
        AutoModelForCausalLM.from_pretrained(output)
