"""Every bad checkpoint of the robustness list, through every command that opens one: exit code 3, one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bbb_ao import packed_tensor
from bbb_ao.manifest import MANIFEST
from robustness.damage import FILES, WEIGHTS, cast, edit_tensor, edit_tensors, put, two_shards

UP = "model.layers.0.mlp.up_proj"
NORM_INDEX = "model.layers.0.input_layernorm.duplicate_index"
DOORS = ("inspect", "doctor", "verify", "eval", "assign")
# Those that read values, too.
READERS = DOORS[2:]


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*operands: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(packed_tensor, "packed_linear", used)


def arguments(command: str, checkpoint: Path, data: Path, tmp_path: Path) -> tuple[object, ...]:
    more: dict[str, tuple[object, ...]] = {
        "eval": ("--data", data),
        "assign": ("--data", data, "--output", tmp_path / "out", "--budget", 4),
    }
    return (command, checkpoint, *more.get(command, ()))


def edit_packed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        change(config["quantization_config"])
        (checkpoint / "config.json").write_text(json.dumps(config))

    return edit


def surplus_shard(checkpoint: Path) -> None:
    two_shards(checkpoint)
    shutil.copy(checkpoint / "a.safetensors", checkpoint / "c.safetensors")


def missing_shard(checkpoint: Path) -> None:
    two_shards(checkpoint)
    (checkpoint / "b.safetensors").unlink()


def flat(position: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[position] = value
        return tensor

    return change


HEADERS = {name: damage for name, damage in FILES.items() if name != "shape of no values"} | {
    "shard missing, of two": (missing_shard, "b.safetensors: file: expected it, got nothing there"),
    "shard surplus": (surplus_shard, "c.safetensors"),
    "tensor in two shards": (
        lambda c: (two_shards(c), shutil.copy(c / "a.safetensors", c / "b.safetensors")),
        "in one file only",
    ),
    "plane missing": (edit_tensor(f"{UP}.plane_low", lambda t: None), "load up to 4 bits"),
    "first plane missing": (edit_tensor(f"{UP}.plane_high", lambda t: None), "plane_high: expected U8"),
    "plane of another type": (cast(f"{UP}.plane_mid", torch.int8), "plane_mid: expected U8"),
    "plane of another shape": (edit_tensor(f"{UP}.plane_mid", lambda t: t[:-1]), "plane_mid: expected U8"),
    "more planes than configured": (
        edit_packed(lambda q: q["modules"][UP].update(max_bits=4)),
        "plane_low: expected no such tensor",
    ),
    "fewer planes than configured": (
        edit_tensors(lambda t: [t.pop(f"{UP}.{plane}") for plane in ("plane_mid", "plane_low")]),
        "load up to 2 bits",
    ),
    "another format version": (edit_packed(lambda q: q.update(format_version=2)), "format_version: expected 1, got 2"),
}
VALUES = {
    "scale NaN": (edit_tensor(f"{UP}.scale", flat(3, 0x7F)), "scale: expected finite values >= 0, got 1 NaN"),
    "scale negative": (edit_tensor(f"{UP}.scale", flat(3, 0x80 + 40)), "scale: expected finite values >= 0"),
    "second level out of range": (put(f"{UP}.scale_exponent", (), 2000), "scale_exponent: expected"),
    "index out of range": (edit_tensor(NORM_INDEX, flat(40, 33)), NORM_INDEX),
    "index negative": (edit_tensor(NORM_INDEX, flat(40, -1)), NORM_INDEX),
    "index far out of range": (edit_tensor(NORM_INDEX, flat(40, 2**31 - 1)), NORM_INDEX),
    "index that names a channel three times": (edit_tensor(NORM_INDEX, flat(33, 0)), NORM_INDEX),
    "norm NaN": (put("model.norm.weight", (3,), float("nan")), "model.norm.weight: values: expected finite ones"),
    "embedding missing": (edit_tensor("model.embed_tokens.weight", lambda t: None), "missing"),
    "ten times the tensors": (
        edit_tensors(lambda t: t.update({f"x{i}": torch.ones(1) for i in range(10 * len(t))})),
        "more, first x0",
    ),
}


def test_the_whole_checkpoint_is_accepted(run, whole_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for command in DOORS[:3]:
        assert run(command, whole_checkpoint).code == 0, command


def test_a_scale_of_zero_stands_for_zeros(run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group of zeros; no file can tell that the weights were others."""
    monkeypatch.undo()
    edit_tensor(f"{UP}.scale", lambda t: t.zero_())(checkpoint)
    (checkpoint / MANIFEST).unlink()
    assert run("verify", checkpoint).code == 0


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_named_by_verify(refused, checkpoint: Path, bit: int) -> None:
    name = f"{UP}.plane_mid"
    edit_tensor(name, lambda t: flat(77, int(t.view(-1)[77]) ^ (1 << bit))(t))(checkpoint)
    assert f"{WEIGHTS}: {name}: expected sha256" in refused(3, "verify", checkpoint, reports=True)


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_checkpoint_is_refused(name: str, refused, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    damage, expected = HEADERS[name]
    damage(checkpoint)
    for command in DOORS:
        assert expected in refused(3, *arguments(command, checkpoint, data, tmp_path)), command


@pytest.mark.parametrize("name", VALUES)
def test_bad_values_are_refused(name: str, refused, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    damage, expected = VALUES[name]
    damage(checkpoint)
    (checkpoint / MANIFEST).unlink()
    for command in READERS:
        line = refused(3, *arguments(command, checkpoint, data, tmp_path), reports=command == "verify")
        assert expected in line, command
