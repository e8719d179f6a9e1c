"""What is fuzzed: readers of files that anyone may have written, each as a function of bytes.

A target passes when its reader accepts the bytes or refuses them with the one error that it declares, in one line that
says what was expected, what was found and what to do. Anything else that is raised is a finding. Two sections of an
input are divided by a line with three dashes.
"""

import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bbb_ao.cli.entry import escape
from bbb_ao.errors import BitByBitError, ModelError, RecipeError
from bbb_ao.manifest import MANIFEST, check_manifest
from bbb_ao.modeldir import CONFIG, INDEX, WEIGHTS, check_model_directory, weight_entries
from bbb_ao.recipes.loader import dump_recipe, load_recipe

DIVIDER = b"\n---\n"
LINE = re.compile(r".+: .*expected .+, got\b.+; fix: .+")
# Of the corpus's checkpoint: one layer of 32 rows and 64 columns behind one norm.
DATA_BYTES = 2404
SHARDS = {"a.safetensors": ("x", "y"), "b.safetensors": ("z",)}


@contextmanager
def refusal(kind: type[BitByBitError]) -> Iterator[None]:
    """Pass over an error of this kind whose message has the form of all messages."""
    try:
        yield
    except kind as error:
        if not LINE.fullmatch(escape(str(error))):
            raise AssertionError(f"not a line of the known form: {error}") from error


def checkpoint(content: bytes) -> None:
    """config.json, a divider, and model.safetensors; where the latter starts with { it is a header before zeros."""
    config, _, weights = content.partition(DIVIDER)
    if weights.startswith(b"{"):
        weights = struct.pack("<Q", len(weights)) + weights + bytes(DATA_BYTES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        with refusal(ModelError):
            check_model_directory(folder, allow_bitbybit=True, needs_tokenizer=False)


def recipe(content: bytes) -> None:
    """A recipe; what loads must load again from what is stored beside a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "recipe.yaml"
        path.write_bytes(content)
        with refusal(RecipeError):
            loaded = load_recipe(path)
            path.write_text(dump_recipe(loaded), encoding="utf-8")
            again = load_recipe(path)
            differ = [field for field, value in vars(loaded).items() if vars(again)[field] != value]
            assert not differ, f"loaded again from what is stored, these keys differ: {differ}"


def shard(names: tuple[str, ...]) -> bytes:
    """A safetensors file of one byte for each tensor."""
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [position, position + 1]}
        for position, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(len(names))


def index(content: bytes) -> None:
    """model.safetensors.index.json beside two shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, names in SHARDS.items():
            (folder / file).write_bytes(shard(names))
        (folder / INDEX).write_bytes(content)
        with refusal(ModelError):
            entries, files = weight_entries(folder)
            # An index may leave a shard out, but no tensor of one that it names.
            named = {name for file in files for name in SHARDS[file]}
            assert entries.keys() == named, (
                f"expected the tensors {sorted(named)} of {sorted(files)}, got {list(entries)}"
            )


def manifest(content: bytes) -> None:
    """manifest.json beside two shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, names in SHARDS.items():
            (folder / file).write_bytes(shard(names))
        (folder / MANIFEST).write_bytes(content)
        with refusal(ModelError):
            found = check_manifest(folder)
            assert found is not None, "a manifest that is there was passed over"
            assert found.files.keys() == SHARDS.keys(), f"expected the files {list(SHARDS)}, got {list(found.files)}"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "checkpoint": checkpoint,
    "recipe": recipe,
    "index": index,
    "manifest": manifest,
}
