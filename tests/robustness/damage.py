"""Ways to damage the weights of a directory, for models and checkpoints alike."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Damage = Callable[[Path], object]


def edit_json(name: str, **values: object) -> Damage:
    def edit(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return edit


def replace(name: str, content: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def resize(change: int) -> Damage:
    """Cut bytes off the weights, or add zeros."""

    def edit(model: Path) -> None:
        os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size + change)

    return edit


def edit_header(change: Callable[[dict], object]) -> Damage:
    """Change the header of the weights in place, or return another text for it."""

    def edit(model: Path) -> None:
        content = (model / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        text = change(header)
        raw = (text if isinstance(text, str) else json.dumps(header)).encode()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def edit(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, {"format": "pt"})

    return edit


def edit_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Damage:
    """Replace one tensor; None removes it."""

    def edit(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()

    return edit_tensors(edit)


def cast(name: str, dtype: torch.dtype) -> Damage:
    return edit_tensor(name, lambda tensor: tensor.to(dtype))


def put(name: str, position: tuple[int, ...], value: float) -> Damage:
    def change(tensor: Tensor) -> Tensor:
        tensor[position] = value
        return tensor

    return edit_tensor(name, change)


def shard(*files: str, link: str | None = None) -> Damage:
    """Replace the single file by an index that names these files, the first of them in every entry but the others'."""

    def edit(model: Path) -> None:
        names = list(load_file(model / WEIGHTS))
        (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
        weight_map = dict.fromkeys(names, files[0]) | dict(zip(names, files[1:], strict=False))
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        if link:
            (model / link).symlink_to(model.parent / "elsewhere.safetensors")

    return edit


def two_shards(model: Path) -> None:
    """Split the weights into a.safetensors and b.safetensors, with an index."""
    state = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names, weight_map = sorted(state), {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: state[name] for name in part}, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def linked(model: Path) -> None:
    (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
    (model / WEIGHTS).symlink_to(model.parent / "elsewhere.safetensors")


def pickled(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def duplicate_name(header: dict) -> str:
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def first_entry(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


# What no safetensors file may be, and a part of the line that says so.
FILES: dict[str, tuple[Damage, str]] = {
    "one byte short": (resize(-1), WEIGHTS),
    "half": (resize(-5000), WEIGHTS),
    "only a length": (lambda model: os.truncate(model / WEIGHTS, 8), WEIGHTS),
    "empty": (replace(WEIGHTS, b""), WEIGHTS),
    "one byte long": (resize(1), WEIGHTS),
    "header length 2**64 - 1": (replace(WEIGHTS, b"\xff" * 8 + b"{}"), "header"),
    "LFS pointer": (replace(WEIGHTS, LFS), "Git LFS pointer"),
    "HTML": (replace(WEIGHTS, b"<!DOCTYPE html><html></html>"), "HTML"),
    "zip archive": (replace(WEIGHTS, b"PK\x03\x04\x14\x00\x08\x08" + b"\0" * 99), "archive"),
    "no tensors": (replace(WEIGHTS, struct.pack("<Q", 2) + b"{}"), "expected tensors, got none"),
    "header no JSON": (edit_header(lambda header: "{" * 99), "JSON"),
    "header a list": (edit_header(lambda header: "[]"), "JSON object"),
    "duplicate name": (edit_header(duplicate_name), "twice"),
    "duplicate name in the metadata": (
        edit_header(lambda h: json.dumps(h).replace('"format"', '"format": "pt", "format"')),
        "twice",
    ),
    "control character in a name": (edit_header(lambda h: h.update({"a\x1b[2J": first_entry(h)})), "printable"),
    "hole": (edit_header(lambda h: first_entry(h).update(data_offsets=[0, 4], shape=[1], dtype="F32")), "hole"),
    "overlap": (edit_header(lambda h: h.update(x=first_entry(h))), "overlap"),
    "more bytes than values": (edit_header(lambda h: first_entry(h).update(shape=[1])), "bytes for"),
    "shape overflow": (edit_header(lambda h: first_entry(h).update(shape=[2**40, 2**40])), "bytes for"),
    "shape of no values": (
        edit_header(lambda h: h.update(x={"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]})),
        "a tensor with values",
    ),
    "negative shape": (edit_header(lambda h: first_entry(h).update(shape=[-1])), "whole numbers"),
    "unknown dtype": (edit_header(lambda h: first_entry(h).update(dtype="F7")), "known dtype"),
    "dtype a list": (edit_header(lambda h: first_entry(h).update(dtype=[])), "known dtype"),
    "entry a number": (edit_header(lambda h: h.update(x=3)), "data_offsets"),
    "index outside": (shard("../elsewhere.safetensors"), "plain file names"),
    "index absolute": (shard("/etc/hostname"), "plain file names"),
    "index of a device": (shard("/dev/zero"), "plain file names"),
    "index of a pickle": (shard("pytorch_model.bin"), "plain file names"),
    "index linked outside": (shard("part.safetensors", link="part.safetensors"), "link out of it"),
    "shard missing": (shard("part.safetensors"), "nothing there"),
    "index without a map": (lambda m: (remove(WEIGHTS)(m), replace(INDEX, b"{}")(m)), "weight_map"),
    "weights linked outside": (linked, "link out of it"),
    "weights linked to themselves": (lambda m: (remove(WEIGHTS)(m), (m / WEIGHTS).symlink_to(WEIGHTS)), WEIGHTS),
    "weights a folder": (lambda m: (remove(WEIGHTS)(m), (m / WEIGHTS).mkdir()), WEIGHTS),
    "weights a pipe": (lambda m: (remove(WEIGHTS)(m), os.mkfifo(m / WEIGHTS)), WEIGHTS),
    "only pickles": (pickled, "only pickled weights"),
    "no weights": (remove(WEIGHTS), "no weights"),
}
