"""Every bad model directory of the robustness list: exit code 3, one line, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bbb_ao.errors import ModelError
from bbb_ao.modeldir import check_model_directory, check_weights
from robustness.damage import (
    FILES,
    INDEX,
    LFS,
    WEIGHTS,
    Damage,
    cast,
    edit_json,
    edit_tensor,
    edit_tensors,
    put,
    remove,
    replace,
    two_shards,
)

UP = "model.layers.0.mlp.up_proj.weight"
# The least that trains.
SMALL = ("--set", "sequences=2", "sequence_length=16", "stages.*.epochs=0", "generated=0", "stages.*.text=calibration")


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


DAMAGE: dict[str, tuple[Damage, str]] = FILES | {
    "config missing": (remove("config.json"), "config.json: file: expected it"),
    "config truncated": (replace("config.json", b'{"model_type": "lla'), "config.json: content: expected JSON"),
    "config empty": (replace("config.json", b""), "config.json: content: expected JSON"),
    "config binary": (replace("config.json", b"\xff\xfe\x00"), "config.json: content: expected JSON"),
    "config deeply nested": (replace("config.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "nesting"),
    "config nested a little too deeply": (replace("config.json", b"[" * 40 + b"]" * 40), "nesting"),
    "config a list": (replace("config.json", b"[]"), "model_type"),
    "config without architecture": (replace("config.json", b"{}"), "model_type"),
    "config an LFS pointer": (replace("config.json", LFS), "Git LFS pointer"),
    "config a link in a circle": (
        lambda m: (remove("config.json")(m), (m / "config.json").symlink_to("config.json")),
        "config.json: path: expected a file's",
    ),
    "remote code": (edit_json("config.json", auto_map={"AutoModel": "code.Model"}), "auto_map"),
    "remote code inside": (edit_json("config.json", text_config={"auto_map": {"AutoModel": "a.B"}}), "auto_map"),
    "remote code in a list": (edit_json("config.json", parts=[[{"auto_map": {"AutoModel": "a.B"}}]]), "auto_map"),
    "remote tokenizer": (edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}), "auto_map"),
    "already quantized": (edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "'gptq'"),
    "compressed": (edit_json("config.json", compression_config={"quant_method": "x"}), "quantization_config"),
    "quantization of no kind": (edit_json("config.json", quantization_config=["?"]), "quantization_config"),
    "tokenizer missing": (no_tokenizer, "tokenizer"),
    "tokenizer truncated": (replace("tokenizer.json", b'{"version": '), "tokenizer.json: content"),
    "fp8 weights": (cast(UP, torch.float8_e4m3fn), "F8_E4M3"),
    "integer weights": (cast(UP, torch.int8), "I8"),
    "more blocks than tensors": (edit_json("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
}
# What shows only in a loaded model.
LOADED: dict[str, tuple[Damage, str]] = {
    "NaN": (put(UP, (1, 2), float("nan")), f"{UP}: values: expected finite ones, got nan at [1, 2] and 1 in all"),
    "infinity": (put(UP, (1, 2), float("-inf")), f"{UP}: values: expected finite ones, got -inf at [1, 2]"),
    "missing tensor": (edit_tensor(UP, lambda t: None), f"1 missing, first {UP}"),
    "3-D weights": (edit_tensor(UP, lambda t: t[None]), "model: expected one that transformers loads"),
    "weights of another size": (edit_json("config.json", intermediate_size=96), "model: expected one that"),
    "unknown architecture": (edit_json("config.json", model_type="llamma"), "model: expected one that"),
    "an encoder": (edit_json("config.json", model_type="vit"), "model: expected one that transformers loads"),
    "tokenizer of nothing": (replace("tokenizer.json", b"{}"), "tokenizer: expected one that transformers loads"),
}


def train(model: object, data: Path, tmp_path: Path, recipe: str = "smoke") -> tuple[object, ...]:
    return ("train", model, "--data", data, "--recipe", recipe, "--output", tmp_path / "out", *SMALL)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directory_is_refused(name: str, refused, model: Path, data: Path, tmp_path: Path) -> None:
    damage, expected = DAMAGE[name]
    damage(model)
    message = refused(3, *train(model, data, tmp_path))
    assert expected in message
    if name != "already quantized":
        assert refused(3, "eval", model, "--data", data) == message
    for command in ("inspect", *(("verify", "doctor") if name != "tokenizer missing" else ())):
        refused(3, command, model)


@pytest.mark.parametrize("name", LOADED)
def test_damage_that_shows_in_the_loaded_model_is_refused(
    name: str, refused, model: Path, data: Path, tmp_path: Path
) -> None:
    damage, expected = LOADED[name]
    damage(model)
    assert expected in refused(3, *train(model, data, tmp_path))
    assert expected in refused(3, "eval", model, "--data", data)


@pytest.mark.parametrize("name", ["missing", "/dev/null", "a/b/c", "org/name", "", "no\nsuch", "x" * 300, "x\0y"])
def test_missing_model_is_refused(name: str, refused, data: Path, tmp_path: Path) -> None:
    expected = {"/dev/null": "got a file", "org/name": "offline"}.get(name, "got nothing there")
    assert expected in refused(3, *train(name, data, tmp_path))
    for command in ("inspect", "verify", "doctor"):
        refused(3, command, name)


def test_hub_id_while_offline_says_so(refused, data: Path, tmp_path: Path) -> None:
    assert "offline" in refused(3, *train("org/name", data, tmp_path))


def test_of_a_hub_model_only_the_configuration_is_downloaded_before_what_may_be_refused(
    refused, run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(model)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    command = train("org/name", data, tmp_path)
    assert "expected a directory, got a file" in refused(2, *command[:-1], "--output", data)
    assert asked == []
    assert "at most the model's 64 positions" in refused(2, *command, "--set", "sequence_length=65")
    assert asked == [["config.json"]]
    assert run(*command).code == 0
    assert asked[1] == ["config.json"]
    assert "*.safetensors" in asked[2]


def test_models_without_blocks_or_linears_are_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    edit_json("config.json", num_hidden_layers=0)(model)
    assert "decoder blocks" in refused(3, *train(model, data, tmp_path))
    remove(WEIGHTS)(model)
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(model)
    assert "Conv1D" in refused(3, *train(model, data, tmp_path))


def test_whole_shards_are_accepted_and_others_refused(model: Path) -> None:
    two_shards(model)
    assert check_model_directory(model)["model_type"] == "llama"
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["extra"] = "a.safetensors"
    replace(INDEX, json.dumps(index).encode())(model)
    with pytest.raises(ModelError, match="1 missing, first 'extra'"):
        check_model_directory(model)
    del index["weight_map"]["extra"], index["weight_map"][UP]
    replace(INDEX, json.dumps(index).encode())(model)
    with pytest.raises(ModelError, match="1 surplus"):
        check_model_directory(model)


def test_links_of_the_hub_cache_are_accepted(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert check_model_directory(snapshot)["model_type"] == "llama"


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
def test_values_that_are_not_finite_are_named(value: float, shown: str) -> None:
    weight = torch.zeros(4, 5, dtype=torch.bfloat16)
    weight[2, 3] = weight[3, 0] = value
    layer = torch.nn.Linear(1, 1)
    layer.weight = torch.nn.Parameter(weight)
    expected = rf"^1\.weight: values: expected finite ones, got {shown} at \[2, 3\] and 2 in all"
    with pytest.raises(ModelError, match=expected):
        check_weights(torch.nn.Sequential(torch.nn.Linear(3, 3), layer))


def test_finite_extremes_are_accepted() -> None:
    layer = torch.nn.Linear(9, 9, dtype=torch.float16)
    torch.nn.init.constant_(layer.weight, 65504.0)
    layer.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
    check_weights(layer)


def zero_and_constant(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP].zero_()
    tensors["model.layers.0.mlp.gate_proj.weight"].fill_(0.5)


def half_precision_extremes(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})
    tensors[UP][::2] = 65504.0
    tensors[UP][1::2, ::2] = -65504.0
    tensors["model.layers.0.mlp.down_proj.weight"][:, ::2] = 2.0**-24


def tied(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


FINE: dict[str, Callable[[Path], object]] = {
    "zero and constant groups": edit_tensors(zero_and_constant),
    "extremes of float16": lambda m: (
        edit_tensors(half_precision_extremes)(m),
        edit_json("config.json", dtype="float16")(m),
    ),
    "tied weights": lambda m: (edit_tensors(tied)(m), edit_json("config.json", tie_word_embeddings=True)(m)),
}


@pytest.mark.parametrize("name", FINE)
def test_odd_models_are_compressed(name: str, run, model: Path, data: Path, tmp_path: Path) -> None:
    FINE[name](model)
    before = load_file(model / WEIGHTS)
    assert run(*train(model, data, tmp_path, "any_precision")).code == 0
    verified = run("verify", tmp_path / "out")
    assert (verified.code, verified.err) == (0, "")
    assert run("eval", tmp_path / "out", "--data", data, "--limit", 1).code == 0
    after = load_file(tmp_path / "out" / WEIGHTS)
    # The head is as it was: neither quantized nor untied.
    assert {n for n in after if "lm_head" in n} == {n for n in before if "lm_head" in n}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_columns_that_are_no_whole_groups_are_padded(run, model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=1, max_position_embeddings=64, bos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(model)
    assert run(*train(model, data, tmp_path, "any_precision")).code == 0
    assert run("verify", tmp_path / "out").code == 0
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert {shape["in_features"] for shape in modules.values()} == {40, 72}
    assert {shape["stored_features"] % 32 for shape in modules.values()} == {0}
