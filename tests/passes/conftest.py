"""Small random models of Hugging Face architectures: 2 layers, hidden size 64, and their captures."""

import copy
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.convert import convert_model
from bbb_ao.passes import capture_model
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.prepare import prepare_student
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
}
GROUPED = {"num_key_value_heads": 2}
SETTINGS = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "mistral": GROUPED,
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": GROUPED | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6},
    "phi": {},
    "gpt_neox": {},
    "phi3": GROUPED,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "olmo2": GROUPED,
    "bloom": {},
    # Its Linears write their product as a matrix product with the transposed weight.
    "falcon": {"alibi": True},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen2_moe": GROUPED
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "gpt2": {"n_inner": 96},
}


@cache
def _model(name):
    config = AutoConfig.for_model(name, **{**COMMON, **SETTINGS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # Default initialization makes norms trivial and biases zero, which would hide a duplicate in a wrong place.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


@cache
def _captured(name):
    return capture_model(_model(name))


@pytest.fixture(scope="session")
def make_model():
    """A function: architecture -> a model of one's own, the same weights in every call."""
    return lambda name: copy.deepcopy(_model(name))


@pytest.fixture(scope="session")
def captured():
    """A function: architecture -> the captures of a shared model; do not change its blocks."""
    return _captured


@pytest.fixture(scope="session")
def make_packed():
    """A function: architecture, activation width, split ratio -> a converted model of one's own, widths up to 8."""

    def make(name, act_bits=None, ratio=0.4):
        split = Split(ratio_min=ratio, ratio_max=ratio, metric="weight")
        model = copy.deepcopy(_model(name))
        prepare_student(model, Recipe(name="test", stages=(Stage(weight_bits=2),), split=split), None)
        set_training_bits(model, 8, act_bits)
        return convert_model(model, 8).eval()

    return make
