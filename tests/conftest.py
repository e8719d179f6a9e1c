"""A tiny model directory, and a way to run the command line in this process.

Where there is no GPU, Triton kernels run in Triton's interpreter; it has to be chosen before Triton is imported.
"""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before transformers, which takes benchmarks/kernels.py for the package of that name: it would set up a package without
# its front. Machines for the kernels alone have neither torchao nor transformers.
with contextlib.suppress(ImportError):
    import bbb_ao  # noqa: F401

REFUSAL_SECONDS = 10


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one block and a tokenizer of single bytes (BOS is id 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    from bbb_ao.cli import main

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def snapshot(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """Mode, size, time of change and hash of everything below a folder, links as links."""

    def entry(path: Path) -> tuple[int, int, int, str]:
        status, whole = path.lstat(), path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if whole and path.stat().st_size < 2**24 else ""
        return status.st_mode, status.st_size, status.st_mtime_ns, digest

    return {str(path): entry(path) for path in folder.rglob("*")}


@pytest.fixture
def refused(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail with a code: one line, within seconds, and nothing written.

    Neither below `tmp_path`, which holds the test's files, nor in the current directory, nor among temporary files:
    the last two lie there, too. With `reports`, it prints what it has done before.
    """
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def call(code: int, *arguments: object, reports: bool = False) -> str:
        before, start = snapshot(tmp_path), time.perf_counter()
        result = run(*arguments)
        seconds = time.perf_counter() - start
        assert result.code == code, result
        line, newline, rest = result.err.partition("\n")
        assert (newline, rest) == ("\n", ""), result.err
        assert line.startswith("bbb-ao: error: "), line
        assert line.isprintable(), line
        # `train` prints what it is going to do before it opens weights and text.
        plan = ("LlamaForCausalLM: ", "result: ", "disk: ", "memory: ") if arguments[:1] == ("train",) else ()
        assert reports or all(line.startswith(plan) for line in result.out.splitlines()), result.out
        assert "Traceback" not in result.err
        assert snapshot(tmp_path) == before
        assert seconds < REFUSAL_SECONDS
        return result.err

    return call
