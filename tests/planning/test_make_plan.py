"""What a plan says about the result is what conversion gives, to the byte."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model

from bbb_ao.errors import ModelError, RecipeError
from bbb_ao.packed_linear import packed_linears
from bbb_ao.planning import make_plan
from bbb_ao.recipes.compress import pack
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import GridSettings, Split, Stage
from bbb_ao.safetensors_header import read_header
from bbb_ao.splitting import split_mask
from bbb_ao.storage import footprint, layer_footprint

CPU = torch.device("cpu")
JOINT = (Stage(weight_bits=(8, 4, 2), epochs=0),)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "split": ("llama", {"split": Split(ratio_min=0.5, ratio_max=0.5), "stages": JOINT}),
    "tied": ("tied", {}),
    "tied, packed head": ("tied", {"head_bits": 4}),
    "ragged, packed head": ("ragged", {"split": None, "head_bits": 8}),
    "ragged, split": ("ragged", {"split": Split(ratio_min=0.5, ratio_max=1.0, producer_rows=False)}),
    "skip": ("llama", {"skip": (r".*\.0\.mlp\.(up|down)_proj",), "targets": (r".*mlp.*", r".*o_proj")}),
    "symmetric groups of 64": ("qwen2", {"grid": GridSettings(group_size=64, zero_point_bits=0)}),
    "integer": ("phi", {"grid": GridSettings(kind="integer", zero_point_bits=2)}),
    "biases": ("opt", {"learned_scales": True}),
}


def packed(model: Any, recipe: Any) -> Any:
    """The model as training would pack it, without training."""
    student = copy.deepcopy(model).float()
    prepare_student(student, recipe, None)
    return pack(student, model, recipe)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_converted_model(case: str, make_directory, make_model, make_recipe, tmp_path) -> None:
    architecture, changes = CASES[case]
    recipe = make_recipe(**changes)
    plan = make_plan(make_directory(architecture), recipe, CPU, probe=False)
    result = packed(make_model(architecture), recipe)
    layers = packed_linears(result)
    assert [layer.name for layer in plan.layers] == list(layers)
    for planned in plan.layers:
        layer = layers[planned.name]
        assert (planned.in_features, planned.out_features) == (layer.in_features, layer.out_features)
        assert (planned.stored_features, planned.padding) == (layer.stored_features, layer.padding), planned.name
        assert (planned.bits, planned.bytes) == (layer.max_bits, layer_footprint(layer).bytes)
        if layer.ocs_index is not None:
            assert planned.split_channels == int(split_mask(layer.ocs_index, layer.in_features).sum()) / 2
    assert plan.bits_per_weight == footprint(result).bits_per_weight
    assert plan.default_bits_per_weight == footprint(result, recipe.default_bits).bits_per_weight
    save_model(result, str(tmp_path / "model.safetensors"))
    stored = sum(entry.end - entry.begin for entry in read_header(tmp_path / "model.safetensors").values())
    assert plan.checkpoint_bytes == stored


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt_neox", "mixtral"])
def test_architectures_are_planned_from_their_configuration(architecture: str, make_directory, make_recipe) -> None:
    plan = make_plan(make_directory(architecture), make_recipe(), CPU, probe=False)
    assert plan.layers
    assert max(phase.host["step"] for phase in plan.phases if "step" in phase.host) > 0
    skipped = dict(plan.skipped)
    assert ("model.layers.0.mlp.experts.down_proj" in skipped) == (architecture == "mixtral")
    assert any("outside the decoder blocks" in reason for reason in skipped.values())


def test_left_out_layers_have_a_reason(make_directory, make_recipe) -> None:
    plan = make_plan(make_directory("llama"), make_recipe(skip=(r".*q_proj",), head_bits=4), CPU, probe=False)
    skipped = dict(plan.skipped)
    assert skipped.keys() == {"model.embed_tokens", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))}
    assert "skip" in skipped["model.layers.0.self_attn.q_proj"]


def test_refusals_are_those_of_training(make_directory, make_model, make_recipe, tmp_path: Path) -> None:
    for architecture, changes, kind in (
        ("gpt2", {}, ModelError),
        ("llama", {"skip": (".*nothing",)}, RecipeError),
        ("llama", {"targets": (".*",), "skip": (".*",)}, RecipeError),
    ):
        recipe = make_recipe(**changes)
        with pytest.raises(kind) as planned:
            make_plan(make_directory(architecture), recipe, CPU)
        with pytest.raises(kind) as trained:
            prepare_student(make_model(architecture).float(), recipe, None)
        assert str(planned.value) == str(trained.value)
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ModelError, match="model: expected one that transformers loads"):
        make_plan(tmp_path, make_recipe(), CPU)


def test_type_is_that_of_the_stored_weights(make_directory, make_model, make_recipe) -> None:
    directory = make_directory("llama")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"dtype": "bfloat16",', ""))
    save_model(make_model("llama").half(), str(directory / "model.safetensors"))
    plan = make_plan(directory, make_recipe(), CPU, probe=False)
    assert plan.phases[0].host["model"] == pytest.approx(2 * make_model("llama").num_parameters(), rel=0.001)
