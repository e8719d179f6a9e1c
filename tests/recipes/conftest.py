"""Tiny random models of several architectures, calibration ids and recipes for the training engine's tests."""

import copy
import os
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.recipes import optimization
from bbb_ao.recipes.stages import Recipe, Split, Stage

torch.set_num_threads(1)

VOCABULARY = 200
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
GROUPED = {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    # Ragged: 60 is no multiple of 32, 100 neither.
    "ragged": GROUPED
    | {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3},
    "gemma2": WINDOWED | {"query_pre_attn_scalar": 16},
    "gemma3_text": WINDOWED | {"query_pre_attn_scalar": 16},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.1},
    "phi": {},
    # Its blocks return tuples.
    "falcon": {"hidden_dropout": 0.1},
    # Its blocks get a tensor of all sequences' heads.
    "bloom": {},
    # Its attention checks the size of the mask.
    "xglm": {"ffn_dim": 96, "dropout": 0.1},
    # It reads a Linear's weight without calling it, hands over no cache of keys, and initializes a weight by its name.
    "mamba": {"state_size": 4, "time_step_rank": 4},
    # Its model unpacks two values from each block.
    "bamba": GROUPED,
    # Its loss reads what the routers of its blocks gave.
    "mixtral": GROUPED | {"num_local_experts": 2, "output_router_logits": True},
}


@cache
def _model(name: str) -> Any:
    kind = "llama" if name == "ragged" else name
    config = AutoConfig.for_model(kind, **{**COMMON, **SETTINGS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Default initialization makes norms trivial and biases zero, which would hide what is left out.
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand_like(parameter) - 0.1)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    """A function: architecture -> a model of one's own, the same weights in every call."""
    return lambda name: copy.deepcopy(_model(name))


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Calibration ids, int64 [8, 32]."""
    return torch.randint(2, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """A function: a recipe with one short W2 block stage and splitting, and any fields changed."""
    defaults: dict[str, Any] = {
        "name": "tiny",
        "stages": (Stage(weight_bits=2, epochs=2, lr=2e-3, batch_size=4),),
        "split": Split(ratio_min=0.5, ratio_max=0.5),
        "micro_batch": 4,
    }
    return lambda **values: Recipe(**(defaults | values))


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers on CPUs with and without bfloat16 products; a test that wants autocast asks for it itself."""
    monkeypatch.setattr(optimization, "_cpu_multiplies_bfloat16", lambda: False)
