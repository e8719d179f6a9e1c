"""Every bad model directory of the robustness list that its files show: exit code 3, one line, nothing written."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bbb_ao.errors import ModelError
from bbb_ao.modeldir import check_model_directory, check_weights

WEIGHTS = "model.safetensors"


def edit_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return edit


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: [(model / name).write_bytes(content)].clear()


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def resize(change: int) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        content = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(content[:change] if change < 0 else content + b"\0" * change)

    return edit


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        content = (model / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        text = change(header)
        raw = (text if isinstance(text, str) else json.dumps(header)).encode()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return edit


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        state = load_file(model / WEIGHTS)
        state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(dtype)
        save_file(state, model / WEIGHTS, {"format": "pt"})

    return edit


def shard(*files: str, link: str | None = None) -> Callable[[Path], None]:
    """Replace the single file by an index that names these files, the first of them in every entry but the others'."""

    def edit(model: Path) -> None:
        names = list(load_file(model / WEIGHTS))
        (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
        weight_map = dict.fromkeys(names, files[0]) | dict(zip(names, files[1:], strict=False))
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        if link:
            (model / link).symlink_to(model.parent / "elsewhere.safetensors")

    return edit


def pickled(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def linked(model: Path) -> None:
    (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
    (model / WEIGHTS).symlink_to(model.parent / "elsewhere.safetensors")


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def duplicate_name(header: dict) -> str:
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def first_entry(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config missing": (remove("config.json"), "config.json: file: expected it"),
    "config truncated": (replace("config.json", b'{"model_type": "lla'), "config.json: content: expected JSON"),
    "config empty": (replace("config.json", b""), "config.json: content: expected JSON"),
    "config binary": (replace("config.json", b"\xff\xfe\x00"), "config.json: content: expected JSON"),
    "config deeply nested": (replace("config.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "nesting"),
    "config nested a little too deeply": (replace("config.json", b"[" * 40 + b"]" * 40), "nesting"),
    "config a list": (replace("config.json", b"[]"), "model_type"),
    "config without architecture": (replace("config.json", b"{}"), "model_type"),
    "config an LFS pointer": (replace("config.json", LFS), "Git LFS pointer"),
    "remote code": (edit_json("config.json", auto_map={"AutoModel": "code.Model"}), "auto_map"),
    "remote code inside": (edit_json("config.json", text_config={"auto_map": {"AutoModel": "a.B"}}), "auto_map"),
    "remote tokenizer": (edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}), "auto_map"),
    "already quantized": (edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "'gptq'"),
    "compressed": (edit_json("config.json", compression_config={"quant_method": "x"}), "quantization_config"),
    "quantization of no kind": (edit_json("config.json", quantization_config=["?"]), "quantization_config"),
    "tokenizer missing": (no_tokenizer, "tokenizer"),
    "tokenizer truncated": (replace("tokenizer.json", b'{"version": '), "tokenizer.json: content"),
    "only pickles": (pickled, "only pickled weights"),
    "no weights": (remove(WEIGHTS), "no weights"),
    "one byte short": (resize(-1), WEIGHTS),
    "half": (resize(-5000), WEIGHTS),
    "only a length": (lambda model: os.truncate(model / WEIGHTS, 8), WEIGHTS),
    "empty weights": (replace(WEIGHTS, b""), WEIGHTS),
    "one byte long": (resize(1), WEIGHTS),
    "header length 2**64 - 1": (replace(WEIGHTS, b"\xff" * 8 + b"{}"), "header"),
    "LFS pointer": (replace(WEIGHTS, LFS), "Git LFS pointer"),
    "HTML": (replace(WEIGHTS, b"<!DOCTYPE html><html></html>"), "HTML"),
    "a zip archive": (replace(WEIGHTS, b"PK\x03\x04\x14\x00\x08\x08" + b"\0" * 99), "archive"),
    "header no JSON": (edit_header(lambda header: "{" * 99), "JSON"),
    "header a list": (edit_header(lambda header: "[]"), "JSON object"),
    "duplicate name": (edit_header(duplicate_name), "twice"),
    "overlap": (
        edit_header(lambda header: first_entry(header).update(data_offsets=[0, 4], shape=[1], dtype="F32")),
        "hole",
    ),
    "shape overflow": (edit_header(lambda header: first_entry(header).update(shape=[2**40, 2**40])), "bytes for"),
    "negative shape": (edit_header(lambda header: first_entry(header).update(shape=[-1])), "whole numbers"),
    "unknown dtype": (edit_header(lambda header: first_entry(header).update(dtype="F7")), "known dtype"),
    "dtype a list": (edit_header(lambda header: first_entry(header).update(dtype=[])), "known dtype"),
    "entry a number": (edit_header(lambda header: header.update(x=3)), "data_offsets"),
    "empty tensor": (
        edit_header(lambda h: h.update(x={"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]})),
        "[0, 4]",
    ),
    "fp8 weights": (cast(torch.float8_e4m3fn), "F8_E4M3"),
    "integer weights": (cast(torch.int8), "I8"),
    "index outside": (shard("../elsewhere.safetensors"), "plain file names"),
    "index absolute": (shard("/etc/hostname"), "plain file names"),
    "index of a device": (shard("/dev/zero"), "plain file names"),
    "index of a pickle": (shard("pytorch_model.bin"), "plain file names"),
    "index linked outside": (shard("part.safetensors", link="part.safetensors"), "link out of it"),
    "shard missing": (shard("part.safetensors"), "nothing there"),
    "index without a map": (lambda m: (remove(WEIGHTS)(m), replace(f"{WEIGHTS}.index.json", b"{}")(m)), "weight_map"),
    "weights linked outside": (linked, "link out of it"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directory_is_refused(name: str, refused, model: Path, data: Path, tmp_path: Path) -> None:
    damage, expected = DAMAGE[name]
    damage(model)
    out = tmp_path / "out"
    message = refused(3, "train", model, "--data", data, "--recipe", "smoke", "--output", out)
    assert expected in message
    assert "; fix: " in message
    assert "expected" in message
    if name != "already quantized":
        assert refused(3, "eval", model, "--data", data) == message
    refused(3, "inspect", model)


@pytest.mark.parametrize("name", ["missing", "/dev/null", "a/b/c", "org/name", "", "no\nsuch"])
def test_missing_model_is_refused(name: str, refused, data: Path, tmp_path: Path) -> None:
    refused(3, "train", name, "--data", data, "--recipe", "smoke", "--output", tmp_path / "out")


def test_hub_id_while_offline_says_so(refused, data: Path, tmp_path: Path) -> None:
    arguments = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    assert "offline" in refused(3, "train", "org/name", *arguments)


def test_whole_shards_are_accepted_and_others_refused(model: Path) -> None:
    state = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, model / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path = model / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps(index))
    assert check_model_directory(model)["model_type"] == "llama"
    index["weight_map"]["extra"] = "a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="1 missing, first 'extra'"):
        check_model_directory(model)
    del index["weight_map"]["extra"], index["weight_map"][names[0]]
    path.write_text(json.dumps(index))
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


def test_eval_names_a_nan_weight_and_a_missing_tensor(refused, model: Path, data: Path) -> None:
    state = load_file(model / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name][1, 2] = float("nan")
    save_file(state, model / WEIGHTS, {"format": "pt"})
    assert f"{name}: values: expected finite ones, got nan at [1, 2]" in refused(3, "eval", model, "--data", data)
    del state[name]
    save_file(state, model / WEIGHTS, {"format": "pt"})
    assert f"1 missing, first {name}" in refused(3, "eval", model, "--data", data)
