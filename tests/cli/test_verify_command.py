"""`bbb-ao verify`: what it prints for a good checkpoint, and exit code and line for each kind of damage."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from core.conftest import packed_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbb_ao import packed_tensor
from bbb_ao.checkpoint import export_dense, save_packed
from bbb_ao.manifest import write_manifest

WEIGHTS = "model.safetensors"
PLANE = "model.layers.1.mlp.down_proj.plane_low"


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "packed"
    save_packed(copy.deepcopy(packed_llama()), AutoTokenizer.from_pretrained(tiny_model), path, 4)
    return path


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def change_bit(path: Path, name: str) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + (begin + end) // 2] ^= 16
    path.write_bytes(content)


def test_a_good_checkpoint_is_compared_at_every_width(run, packed: Path) -> None:
    result = run("verify", packed)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("structure: ")
    assert lines[1].startswith("manifest.json: ")
    assert [line.partition(":")[0] for line in lines[2:]] == [f"{bits} bits" for bits in range(2, 9)]
    assert all("14 layers as the fake-quant reference" in line for line in lines[2:])
    assert run("verify", packed, "--files").out.splitlines() == lines[:2]


def test_without_a_manifest_the_rest_still_runs(run, refused, copied: Path) -> None:
    (copied / "manifest.json").unlink()
    lines = run("verify", copied).out.splitlines()
    assert lines[1].startswith("manifest.json: none")
    assert len(lines) == 9
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert run("verify", copied).code == 0
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:-1])
    assert WEIGHTS in refused(3, "verify", copied)


def test_a_flipped_bit_is_named_by_tensor(run, copied: Path) -> None:
    change_bit(copied / WEIGHTS, PLANE)
    result = run("verify", copied)
    assert result.code == 3
    assert f"{WEIGHTS}: {PLANE}: expected sha256" in result.err
    assert result.err.count("\n") == 1


def test_a_bad_scale_is_refused_where_there_is_no_manifest(run, copied: Path) -> None:
    state = load_file(copied / WEIGHTS)
    state["model.layers.0.mlp.up_proj.scale"][2, 1] = 0x7F
    save_file(state, copied / WEIGHTS, {"format": "pt"})
    write_manifest(copied)
    result = run("verify", copied)
    assert result.code == 3
    assert "model.layers.0.mlp.up_proj.scale: expected finite values" in result.err


def test_wrong_numbers_exit_with_6(run, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_tensor.packed_linear
    monkeypatch.setattr(packed_tensor, "packed_linear", lambda *operands: right(*operands) * 1.001)
    result = run("verify", packed)
    assert result.code == 6
    assert "output at 2 bits: expected" in result.err
    assert result.err.count("\n") == 1


def test_plain_models_have_nothing_to_compare(run, packed: Path, model: Path, tmp_path: Path) -> None:
    assert run("verify", model).out.splitlines()[-1] == "no packed layers: nothing to compare"
    export_dense(AutoModelForCausalLM.from_pretrained(packed), None, tmp_path / "dense", 2)
    lines = run("verify", tmp_path / "dense").out.splitlines()
    assert "tensors" in lines[1]
    assert lines[2] == "no packed layers: nothing to compare"


def test_missing_directories_are_refused(refused, tmp_path: Path) -> None:
    refused(3, "verify", tmp_path / "none")
    refused(2, "verify")
    refused(3, "verify", tmp_path)
