"""A packed checkpoint from anyone, opened by transformers itself: refused in one line before a tensor is used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bbb_ao import packed_tensor
from bbb_ao.checkpoint import describe
from bbb_ao.errors import ModelError
from bbb_ao.manifest import MANIFEST
from bbb_ao.modeldir import MOST_JSON_BYTES, check_model_directory
from bbb_ao.recipes.loading import load_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def copied(checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage; a product of packed weights fails the test."""

    def used(*operands: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(packed_tensor, "packed_linear", used)
    path = Path(shutil.copytree(checkpoint.path, tmp_path / "copy"))
    (path / MANIFEST).unlink()
    return path


def refused(path: Path) -> str:
    """The line with which both doors, the package's own and transformers', refuse a directory."""

    def opened() -> None:
        check_model_directory(path, allow_bitbybit=True, needs_tokenizer=False)
        load_model(path)

    with pytest.raises(ModelError) as first:
        opened()
    with pytest.raises(ModelError) as second:
        AutoModelForCausalLM.from_pretrained(path)
    for error in (first, second):
        assert "\n" not in str(error.value)
        assert "; fix: " in str(error.value)
    return str(second.value)


def edit(path: Path, change: Callable[[dict], object], name: str = "config.json") -> None:
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))


def split(path: Path, **files: str) -> None:
    """Two shards of the weights with an index; `files` renames them in it."""
    state = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names, weight_map = sorted(state), {}
    for file, part in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: state[name] for name in part}, path / f"{file}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, files.get(file, f"{file}.safetensors"))
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_whole_shards_load(copied: Path) -> None:
    split(copied)
    check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)
    assert load_model(copied).model.layers[0].mlp.up_proj.bits == 4


@pytest.mark.parametrize("how", ["../elsewhere.safetensors", "absolute", "link"])
def test_weights_outside_the_directory_are_refused(copied: Path, how: str) -> None:
    outside = copied.parent / "elsewhere.safetensors"
    split(copied, a={"absolute": str(outside), "link": "a.safetensors"}.get(how, how))
    (copied / "a.safetensors").rename(outside)
    if how == "link":
        (copied / "a.safetensors").symlink_to(outside)
    assert "expected a file inside" in refused(copied)


def test_a_linked_single_file_is_refused(copied: Path) -> None:
    (copied / WEIGHTS).rename(copied.parent / "elsewhere.safetensors")
    (copied / WEIGHTS).symlink_to(copied.parent / "elsewhere.safetensors")
    assert "link out of it" in refused(copied)


def test_pickled_weights_are_refused(copied: Path) -> None:
    torch.save(load_file(copied / WEIGHTS), copied / "pytorch_model.bin")
    (copied / WEIGHTS).unlink()
    assert "expected safetensors, got 'pytorch_model.bin'" in refused(copied)


def test_a_tensor_in_two_shards_is_refused(copied: Path) -> None:
    split(copied)
    both = load_file(copied / "b.safetensors") | {f"{UP}.scale": torch.zeros(96, 3, dtype=torch.uint8)}
    for file in ("a", "b"):
        state = load_file(copied / f"{file}.safetensors")
        save_file(state | {f"{UP}.scale": both[f"{UP}.scale"]}, copied / f"{file}.safetensors", {"format": "pt"})
    assert "in one file only, got it in two" in refused(copied)


def test_an_index_that_names_the_wrong_shard_is_refused(copied: Path) -> None:
    split(copied)
    edit(copied, lambda index: index["weight_map"].update({f"{UP}.scale": "b.safetensors"}), INDEX)
    edit(copied, lambda index: index["weight_map"].update({f"{UP}.plane_high": "a.safetensors"}), INDEX)
    with pytest.raises(ModelError, match=r"weight_map: expected .* got it in"):
        check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)


def test_a_surplus_shard_is_refused(copied: Path) -> None:
    save_file({"x": torch.ones(1)}, copied / "extra.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"extra\.safetensors: file: expected only the weights' files"):
        check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_values_that_are_not_finite_are_refused(copied: Path, name: str) -> None:
    state = load_file(copied / WEIGHTS)
    state[name][0] = float("nan")
    save_file(state, copied / WEIGHTS, {"format": "pt"})
    assert f"{name}: values: expected finite ones, got nan" in refused(copied)


def test_ten_times_the_tensors_are_refused(copied: Path) -> None:
    state = load_file(copied / WEIGHTS)
    save_file(state | {f"x{i}": torch.ones(1) for i in range(10 * len(state))}, copied / WEIGHTS, {"format": "pt"})
    check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)
    with pytest.raises(ModelError, match=rf"got {10 * len(state)} more, first x0"):
        load_model(copied)


@pytest.mark.parametrize("change", [{"vocab_size": 256}, {"intermediate_size": 128}, {"hidden_size": 2**20}])
def test_sizes_are_compared_with_the_configuration(copied: Path, change: dict) -> None:
    edit(copied, lambda config: config.update(change))
    assert "expected" in refused(copied)


@pytest.mark.parametrize("blocks", [10**9, -1, True, 1.0, "2", []])
def test_more_blocks_than_tensors_are_refused_at_once(copied: Path, blocks: object) -> None:
    edit(copied, lambda config: config.update(num_hidden_layers=blocks))
    with pytest.raises(ModelError, match=r"num_hidden_layers: expected at most"):
        check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)


DESCRIPTIONS = {
    "no modules": lambda q: q.update(modules={}),
    "a forgotten module": lambda q: q["modules"].pop(UP),
    "a module that is no Linear": lambda q: q["modules"].update({"model.layers.0.mlp": q["modules"].pop(UP)}),
    "odd activations": lambda q: q["modules"][UP].update(act_bits=99),
    "a size of text": lambda q: q["modules"][UP].update(in_features="64"),
    "another plane count": lambda q: q["modules"][UP].update(max_bits=4),
    "padding that is none": lambda q: q["modules"][UP].update(padding=32),
    "an unknown field": lambda q: q["modules"][UP].update(target="os.system"),
    "wider columns": lambda q: q["modules"][UP].update(stored_features=128),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_do_not_fit_are_refused(copied: Path, name: str) -> None:
    edit(copied, lambda config: DESCRIPTIONS[name](config["quantization_config"]))
    refused(copied)
    if name not in ("a module that is no Linear", "padding that is none", "a forgotten module"):
        with pytest.raises(ModelError):
            check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)


def test_sizes_of_another_linear_are_refused(copied: Path) -> None:
    # Consistent in itself: the packed layer is half as tall as the Linear that it stands for.
    name = "model.layers.0.self_attn.o_proj"
    state = load_file(copied / WEIGHTS)
    for key in ("plane_high", "plane_mid", "plane_low", "scale", "zero_point", "bias"):
        state[f"{name}.{key}"] = state[f"{name}.{key}"][:32].clone()
    save_file(state, copied / WEIGHTS, {"format": "pt"})
    edit(copied, lambda config: config["quantization_config"]["modules"][name].update(out_features=32))
    assert "sizes [64, 32]" in refused(copied)


def test_description_of_a_damaged_configuration_is_refused(copied: Path) -> None:
    edit(copied, lambda config: config["quantization_config"].update(modules=["x"]))
    with pytest.raises(ModelError, match="modules: expected at least one packed layer"):
        describe(copied)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "someone/else"}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"tokenizer_file": "../../secret.json"}),
    ],
)
def test_files_that_name_files_elsewhere_are_refused(copied: Path, name: str, change: dict) -> None:
    (copied / name).write_text(json.dumps(change))
    with pytest.raises(ModelError, match=rf"{name}: .*expected .*; fix: "):
        check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.model", "chat_template.jinja"])
def test_other_links_out_of_the_directory_are_refused(copied: Path, name: str) -> None:
    (copied / name).symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="link out of it"):
        check_model_directory(copied, allow_bitbybit=True, needs_tokenizer=False)


def test_a_json_file_of_more_than_64_mib_is_refused_unread(copied: Path) -> None:
    os.truncate(copied / "config.json", MOST_JSON_BYTES + 1)
    with pytest.raises(ModelError, match=r"config\.json: size: expected at most 64 MiB, got 67108865 bytes"):
        check_model_directory(copied, allow_bitbybit=True)


def test_an_index_that_no_layer_reads_is_refused(copied: Path) -> None:
    # It would widen the norm's output for a layer that takes as many channels as there were.
    state = load_file(copied / WEIGHTS)
    state["model.norm.duplicate_index"] = torch.arange(64, dtype=torch.int32)
    save_file(state, copied / WEIGHTS, {"format": "pt"})
    norms = {"model.norm": 64}
    edit(copied, lambda config: config["quantization_config"]["duplicated_outputs"].update(norms))
    with pytest.raises(ModelError, match=r"^model\.norm\.duplicate_index: expected an index that a layer reads"):
        load_model(copied)
