"""A tiny model directory, and a way to run the command line in this process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bbb_ao.checkpoint import save_packed
from bbb_ao.cli import main
from bbb_ao.convert import convert_model
from bbb_ao.recipes.loading import load_model, load_tokenizer
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import Recipe, Stage


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one block and a tokenizer of single bytes (BOS is id 0)."""
    directory = tmp_path_factory.mktemp("tiny")
    alphabet = ["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: position for position, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def packed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model rounded to nearest, with all widths; it opens at 2 bits. Its tokenizer has a chat template."""
    recipe = Recipe(name="rtn", stages=(Stage(weight_bits=2),))
    packed = convert_model(round_to_nearest(load_model(tiny_model, "float32"), recipe), 8)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}[{{ m.content }}]{% endfor %}"
    )
    save_packed(packed, tokenizer, directory := tmp_path_factory.mktemp("packed") / "model", 2)
    return directory


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(20)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def refused(run: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail with a code: one line on stderr, nothing on stdout, nothing written."""

    def listing() -> dict[str, tuple[int, int]]:
        return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")}

    def call(code: int, *arguments: object) -> str:
        before = listing()
        result = run(*arguments)
        assert result.code == code, result
        line, newline, rest = result.err.partition("\n")
        assert (newline, rest) == ("\n", ""), result.err
        assert line.startswith("bbb-ao: error: "), line
        assert line.isprintable(), line
        assert result.out == ""
        assert "Traceback" not in result.err
        assert listing() == before
        return result.err

    return call
