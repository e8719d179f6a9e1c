"""`bbb-ao doctor` on a machine without a GPU: what it prints, with a checkpoint, and without Triton."""

import copy
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from core.conftest import packed_llama

from bbb_ao.checkpoint import save_packed

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save_packed(copy.deepcopy(packed_llama()), None, tmp_path / "packed", 3)
    return tmp_path / "packed"


def test_versions_and_device_are_named(run) -> None:
    start = time.perf_counter()
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    assert time.perf_counter() - start < 10
    lines = result.out.splitlines()
    assert lines[0].startswith("python 3.")
    assert any(line == f"torch {torch.__version__}" or line.startswith("torch 2.") for line in lines)
    for name in ("triton", "torchao", "transformers", "safetensors"):
        assert any(line.startswith((f"{name} ", f"{name}:")) for line in lines), name
    assert any(line.startswith("GPU: ") for line in lines)


@on_a_cpu
def test_a_checkpoint_gets_a_line_for_each_kind_of_layer_and_number_of_rows(run, packed: Path) -> None:
    lines = run("doctor", packed).out.splitlines()
    kinds = [line for line in lines if " layers of " in line]
    assert sum(int(line.split()[0]) for line in kinds) == 14
    assert "4 layers of 96 x 96 at 3 bits, x in float32:" in kinds
    first = lines.index(kinds[0])
    assert lines[first + 1] == "  M = 1: dequantize (3 bits (not 2, 4 or 8))"
    others = [f"  M = {rows}: dequantize" for rows in (8, 16, 256)]
    assert lines[first + 2 : first + 5] == others
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"bits": 2}))
    assert "  M = 1: fused row" in run("doctor", packed).out.splitlines()


@on_a_cpu
def test_a_machine_without_triton_is_told_so(run, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    # An import of the GPU's kernels would raise.
    monkeypatch.setitem(sys.modules, "bbb_ao.kernels.packed_linear.cuda", None)
    result = run("doctor", packed)
    assert (result.code, result.err) == (0, "")
    assert "triton: not installed, so that there are no GPU kernels" in result.out.splitlines()
    assert " layers of " in result.out


def test_bad_directories_are_refused(refused, model: Path, tmp_path: Path) -> None:
    assert "plain model" in refused(3, "doctor", model)
    refused(3, "doctor", tmp_path / "none")
