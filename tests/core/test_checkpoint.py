"""Saving and loading through Hugging Face, the dense export, and the description of a checkpoint."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bbb_ao.checkpoint import describe, export_dense, new_directory, save_packed
from bbb_ao.convert import convert_model, to_dense
from bbb_ao.errors import ModelError, RecipeError, ResourceError
from bbb_ao.packed_linear import packed_linears, set_bits
from bbb_ao.qat_linear import qat_linears
from bbb_ao.storage import footprint
from core.conftest import TOKENS, dense_llama, packed_llama, prepared_llama


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS.to(model.device)).logits


def load(path: Path, **settings):
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


@pytest.mark.parametrize("bits", [None, 8, 4, 3, 2])
def test_loaded_model_equals_the_one_in_memory(checkpoint, bits: int | None) -> None:
    loaded = load(checkpoint.path, **({} if bits is None else {"bits": bits}))
    assert {layer.bits for layer in packed_linears(loaded).values()} == {bits or 4}
    assert torch.equal(logits(loaded), logits(set_bits(checkpoint.model, bits or 4)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_in_another_type_keeps_the_packed_state(checkpoint, dtype: torch.dtype) -> None:
    loaded = load(checkpoint.path, dtype=dtype)
    expected = copy.deepcopy(set_bits(checkpoint.model, 4)).to(dtype)
    state = expected.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    # No part of the checkpoint: transformers keeps the rotary frequencies in float32, a cast of the model does not.
    expected.model.rotary_emb = loaded.model.rotary_emb
    assert torch.equal(logits(loaded), logits(expected))
    assert logits(loaded).dtype == dtype


def test_every_file_is_for_the_same_readers(checkpoint) -> None:
    assert len({path.stat().st_mode for path in checkpoint.path.iterdir()}) == 1


def test_generate_gives_the_same_tokens_before_and_after(checkpoint) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False}
    before = set_bits(checkpoint.model, 4).generate(TOKENS, **settings)
    assert before.shape[1] > TOKENS.shape[1]
    assert torch.equal(load(checkpoint.path).generate(TOKENS, **settings), before)


def test_importing_the_package_is_enough_to_load(checkpoint) -> None:
    code = (
        "import bbb_ao, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], bits=2)\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, model.model.layers[0].mlp.up_proj.bits)"
    )
    command = [sys.executable, "-c", code, str(checkpoint.path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split() == ["PackedLinear", "2"]


def test_every_producer_rule_is_in_the_checkpoint(checkpoint) -> None:
    config = json.loads((checkpoint.path / "config.json").read_text())["quantization_config"]
    sources = {name: shape["index_source"] for name, shape in config["modules"].items()}
    block = "model.layers.1"
    assert sources[f"{block}.self_attn.q_proj"] == f"{block}.input_layernorm.duplicate_index"
    assert sources[f"{block}.mlp.gate_proj"] == f"{block}.post_attention_layernorm.duplicate_index"
    assert sources[f"{block}.mlp.down_proj"].startswith(f"{block}.mlp.")
    assert sources[f"{block}.self_attn.o_proj"] == f"{block}.self_attn.o_proj.ocs_index"
    assert len(config["duplicated_outputs"]) == 4
    assert config["quant_method"] == "bitbybit"
    assert not list(checkpoint.path.glob("*.bin"))
    assert (checkpoint.path / "recipe.yaml").read_text() == "schema: 1\n"


@pytest.mark.parametrize("act_bits", [None, 4])
def test_packed_model_equals_the_trained_one(act_bits: int | None) -> None:
    trained = prepared_llama(0.5, act_bits)
    expected = logits(trained)
    packed = convert_model(copy.deepcopy(trained), 8)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-4)
    assert not qat_linears(packed)


@pytest.mark.parametrize("act_bits", [None, 2])
def test_ragged_hidden_sizes_are_padded_through_the_norms(tmp_path: Path, act_bits: int | None) -> None:
    trained = prepared_llama(0.0, act_bits, hidden=80)
    expected = logits(trained)
    packed = convert_model(trained, 8)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-3, atol=1e-3)
    save_packed(packed, None, tmp_path / "out", 8)
    assert torch.equal(logits(load(tmp_path / "out")), logits(packed))


@pytest.mark.parametrize(
    "settings", [{"kind": "integer", "zero_point_bits": 2}, {"zero_point_bits": 0}, {"group_size": 64}]
)
def test_other_grids_round_trip(tmp_path: Path, settings: dict) -> None:
    packed = convert_model(prepared_llama(None if "group_size" not in settings else 0.5, **settings), 4)
    save_packed(packed, None, tmp_path / "out", 4)
    assert torch.equal(logits(load(tmp_path / "out")), logits(packed))


def test_layers_that_gather_by_equal_indices_are_saved_apart(tmp_path: Path) -> None:
    packed = convert_model(prepared_llama(0.5, skip=(r".*\.q_proj",)), 4)
    attention = packed.model.layers[0].self_attn
    assert type(attention.q_proj) is torch.nn.Linear
    assert torch.equal(attention.k_proj.ocs_index, attention.v_proj.ocs_index)
    buffers = [buffer for name, buffer in packed.named_buffers(remove_duplicate=False) if name.endswith("_index")]
    assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers)
    save_packed(packed, None, tmp_path / "out", 4)
    assert torch.equal(logits(load(tmp_path / "out")), logits(packed))


def test_split_model_without_quantization_is_the_dense_one() -> None:
    model = prepared_llama(0.5)
    for layer in qat_linears(model).values():
        layer.set_bits(None)
    model, dense = model.double(), copy.deepcopy(dense_llama()).double()
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_dense_export_is_a_plain_model_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    packed = convert_model(prepared_llama(0.5, tied=tied), 8)
    expected = logits(set_bits(packed, 3))
    export_dense(packed, None, tmp_path / "dense", 3, torch.float32)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "bits" not in config
    names = set(load_file(tmp_path / "dense" / "model.safetensors"))
    original = {n for n, _ in dense_llama(tied).named_parameters()}
    assert names == original
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-4, atol=1e-4)
    assert type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_dense_export_of_a_loaded_checkpoint_in_bfloat16(checkpoint, tmp_path: Path) -> None:
    export_dense(load(checkpoint.path, bits=2), None, tmp_path / "dense")
    loaded = load(tmp_path / "dense")
    assert loaded.dtype == torch.bfloat16
    expected = logits(load(checkpoint.path, bits=2))
    assert (logits(loaded) - expected).abs().max() <= 2.0**-4 * expected.abs().max()


def test_layers_that_expand_their_own_input_are_made_dense_without_conversion_records() -> None:
    packed = copy.deepcopy(packed_llama())
    expected = logits(set_bits(packed, 8))
    for layer in packed_linears(packed).values():
        if layer.expands_input:
            layer.index_source = None
    assert torch.allclose(logits(to_dense(packed, torch.float32)), expected, atol=1e-4)
    unknown = copy.deepcopy(packed_llama())
    unknown.model.layers[1].self_attn.q_proj.index_source = None
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: its input is expanded elsewhere"):
        to_dense(unknown, torch.float32)
    assert len(packed_linears(unknown)) == 14


def test_saving_a_loaded_checkpoint_again_changes_nothing(checkpoint, tmp_path: Path) -> None:
    load(checkpoint.path).save_pretrained(tmp_path / "again")
    first, second = (load_file(p / "model.safetensors") for p in (checkpoint.path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(checkpoint.path)))


def test_description_counts_what_is_stored(checkpoint) -> None:
    rows = describe(checkpoint.path)
    layers = packed_linears(checkpoint.model)
    assert {row.name for row in rows} == set(layers)
    assert [row.name.split(".")[2] for row in rows] == ["0"] * 7 + ["1"] * 7
    assert sum(row.bytes for row in rows) == footprint(checkpoint.model).bytes
    for row in rows:
        layer = layers[row.name]
        assert (row.in_features, row.out_features, row.widths) == (
            layer.in_features,
            layer.out_features,
            tuple(range(2, 9)),
        )
        assert row.split_channels == layer.stored_features - layer.in_features
        assert row.bits_per_weight == 8 * row.bytes / (layer.in_features * layer.out_features)


@pytest.fixture
def damaged(checkpoint, tmp_path: Path):
    """A function: change the tensors and the configuration of a copy of the checkpoint -> its path."""

    def change(tensors=lambda t: None, config=lambda c: None) -> Path:
        path = tmp_path / "damaged"
        shutil.copytree(checkpoint.path, path)
        stored = load_file(path / "model.safetensors")
        tensors(stored)
        save_file(stored, path / "model.safetensors", {"format": "pt"})
        settings = json.loads((path / "config.json").read_text())
        config(settings)
        (path / "config.json").write_text(json.dumps(settings))
        return path

    return change


O_INDEX = "model.layers.0.self_attn.o_proj.ocs_index"
NORM_INDEX = "model.layers.0.input_layernorm.duplicate_index"


@pytest.mark.parametrize("name", [O_INDEX, NORM_INDEX])
@pytest.mark.parametrize(("position", "value"), [(70, 65), (70, -1), (0, 1), (71, None), (70, 2**31 - 1)])
def test_indices_out_of_range_are_refused(damaged, name: str, position: int, value: int | None) -> None:
    def change(tensors) -> None:
        index = tensors[name]
        index[position] = index[position - 1] if value is None else value

    with pytest.raises(ModelError, match=name):
        load(damaged(change))


@pytest.mark.parametrize("pattern", [0x7F, 0xFF, 0x80, 0xC0])
def test_nan_and_negative_scales_are_refused(damaged, pattern: int) -> None:
    name = "model.layers.1.mlp.up_proj.scale"
    with pytest.raises(ModelError, match=rf"{name}: expected finite values >= 0, got 1"):
        load(damaged(lambda tensors: tensors[name].view(-1).__setitem__(3, pattern)))


def test_second_level_out_of_range_is_refused(damaged) -> None:
    name = "model.layers.1.mlp.up_proj.scale_exponent"
    with pytest.raises(ModelError, match=name):
        load(damaged(lambda tensors: tensors[name].fill_(2000)))


@pytest.mark.parametrize("name", ["plane_high", "scale", "zero_point", "plane_low", "bias"])
def test_missing_and_mistyped_tensors_are_refused(damaged, name: str) -> None:
    key = f"model.layers.1.self_attn.q_proj.{name}"
    with pytest.raises(ModelError, match=rf"{key}: expected .* got none"):
        load(damaged(lambda tensors: tensors.pop(key)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_planes_of_another_type_are_refused(damaged, dtype: torch.dtype) -> None:
    key = "model.layers.1.self_attn.q_proj.plane_mid"
    with pytest.raises(ModelError, match=key):
        load(damaged(lambda tensors: tensors.update({key: tensors[key].to(dtype)})))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization_config"].update(format_version=2),
        lambda c: c["quantization_config"]["modules"].update({"model.layers.9.mlp.up_proj": {}}),
        lambda c: c["quantization_config"]["duplicated_outputs"].update({"model.layers.9.norm": 96}),
        lambda c: c["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].pop("index_source"),
        lambda c: c["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].update(max_bits=12),
        lambda c: c["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].update(stored_features=32),
        lambda c: c["quantization_config"]["grid"].update(kind="both"),
        lambda c: c.update(bits=9),
        lambda c: c.update(bits="4"),
        lambda c: c.update(bits=1),
    ],
    ids=["version", "module", "norm", "missing", "max_bits", "columns", "grid", "bits", "text", "low"],
)
def test_configurations_that_do_not_fit_are_refused(damaged, change) -> None:
    with pytest.raises(ModelError):
        load(damaged(config=change))


def test_dense_export_loads_where_the_package_is_not(tmp_path: Path) -> None:
    packed = copy.deepcopy(packed_llama())
    expected = logits(set_bits(packed, 2)).argmax(-1)
    export_dense(packed, None, tmp_path / "dense", 2, torch.float32)
    code = (
        "import json, sys\n"
        "sys.modules['bbb_ao'] = None  # an import of it fails\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad():\n"
        "    print(model(torch.tensor(json.loads(sys.argv[2]))).logits.argmax(-1).tolist())\n"
        "assert not [name for name in sys.modules if name.startswith('bbb_ao.')]"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dense"), str(TOKENS.tolist())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.tolist()


@pytest.mark.parametrize("bits", [1, 9, 3.5, "2"])
def test_widths_that_are_not_stored_are_refused(checkpoint, bits: object) -> None:
    with pytest.raises(ModelError, match="bits"):
        load(checkpoint.path, bits=bits)


def test_narrow_checkpoints_refuse_wide_widths(tmp_path: Path) -> None:
    packed = copy.deepcopy(packed_llama(0.5, None, 4))
    with pytest.raises(ValueError, match=r"q_proj: bits: this layer stores widths 2 to 4, got 8"):
        save_packed(packed, None, tmp_path / "out", 8)
    assert not list(tmp_path.iterdir())
    save_packed(packed, None, tmp_path / "out", 2)
    assert not any("plane_low" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    with pytest.raises(ModelError, match="widths 2 to 4, got 8"):
        load(tmp_path / "out", bits=8)


def test_directories_that_hold_something_are_refused_and_left_alone(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model = copy.deepcopy(checkpoint.model)
    model.config.bits = 7
    with pytest.raises(RecipeError):
        save_packed(model, None, tmp_path / "out", 2)
    assert model.config.bits == 7
    with pytest.raises(RecipeError):
        export_dense(model, None, tmp_path / "out")
    assert len(packed_linears(model)) == 14
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]
    (tmp_path / "empty").mkdir()
    save_packed(model, None, tmp_path / "empty", 2)
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(28, "No space left on device"), ResourceError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failed_saves_leave_nothing(tmp_path: Path, error: BaseException, expected: type[BaseException]) -> None:
    def save() -> None:
        with new_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(expected):
        save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_only_bitbybit_checkpoints_are_described(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError):
        describe(tmp_path)


def test_description_names_modules_without_tensors(damaged) -> None:
    def drop(tensors) -> None:
        for key in [key for key in tensors if key.startswith("model.layers.1.mlp.up_proj.")]:
            del tensors[key]

    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj"):
        describe(damaged(drop))
