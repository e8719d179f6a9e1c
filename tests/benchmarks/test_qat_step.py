"""The benchmark of a training step, on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import qat_step
import torch


def test_every_variant_of_a_tiny_block_gives_a_row(tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "rows.json"
    options = ["--models", "tiny", "--device", "cpu", "--tokens", "16", "--steps", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["qat_step.py", *options])
    assert qat_step.main() == 0
    rows = json.loads(output.read_text())
    assert [row["impl"] for row in rows] == [variant.impl for variant in qat_step.VARIANTS]
    assert all(row["milliseconds"] > 0 and row["mode"] == "eager" and row["tokens"] == 16 for row in rows)
    stored = {row["impl"]: row["stored_weights"] for row in rows}
    assert stored["w2a16_split"] == stored["w2a2_split"] > stored["w2a16"] == stored["bf16"]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    output = tmp_path / "rows.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["qat_step.py", "--output", str(output)])
    assert qat_step.main() == 5
    assert capsys.readouterr().err.startswith("qat_step: expected an NVIDIA GPU, found none")
    assert not output.exists()


@pytest.mark.parametrize(("name", "weights"), [("7b", 202375168), ("8b", 218103808)])
def test_blocks_have_the_shapes_of_llama_2_7b_and_llama_3_8b(name: str, weights: int) -> None:
    # 4096 channels; with 11008 inner ones and 32 key-value heads, or 14336 and 8.
    model = qat_step.make_model(name, torch.device("meta"))
    assert sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2) == weights
    assert model.config.num_attention_heads == 32
