"""Tiny models as directories, with and without their weights, and recipes for them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.recipes import optimization
from bbb_ao.recipes.stages import Recipe, Split, Stage

torch.set_num_threads(1)

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
GROUPED = {"num_key_value_heads": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "tied": GROUPED | {"tie_word_embeddings": True},
    # Ragged: 60 is no multiple of 32, 100 neither.
    "ragged": GROUPED
    | {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "mistral": GROUPED,
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 8},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "gpt2": {"n_inner": 96},
}


def config_of(name: str) -> Any:
    kind = "llama" if name in ("tied", "ragged") else name
    return AutoConfig.for_model(kind, **{**COMMON, **SETTINGS[name]})


@pytest.fixture(scope="session")
def make_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: architecture, decoder blocks -> a folder that holds its config.json alone."""

    def make(name: str, blocks: int = 2) -> Path:
        directory = tmp_path_factory.mktemp(name)
        config = config_of(name)
        config.num_hidden_layers = blocks
        config.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    """A function: architecture -> the model with random weights, in the type of its configuration."""

    def make(name: str) -> Any:
        torch.manual_seed(0)
        config = config_of(name)
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """A function: a recipe with one W2 block stage and splitting, and any fields changed."""
    defaults: dict[str, Any] = {
        "name": "tiny",
        "stages": (Stage(weight_bits=2, epochs=1, batch_size=4),),
        "split": Split(ratio_min=0.0, ratio_max=0.6),
        "sequences": 8,
        "sequence_length": 32,
    }
    return lambda **values: Recipe(**(defaults | values))


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sizes on CPUs with and without bfloat16 products."""
    monkeypatch.setattr(optimization, "_cpu_multiplies_bfloat16", lambda: False)
