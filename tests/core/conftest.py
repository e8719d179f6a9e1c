"""Tiny random Llamas: prepared by the passes, converted, saved once for all tests that only read them."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.checkpoint import save_packed
from bbb_ao.convert import convert_model
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import GridSettings, Recipe, Split, Stage

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 70], [4, 4, 90, 127, 0, 3]])


@cache
def dense_llama(tied: bool = True, hidden: int = 64) -> Any:
    """A 2-layer Llama with biases in its attention and norms that are not all one."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def prepared_llama(
    split: float | None,
    act_bits: int | None = None,
    tied: bool = True,
    hidden: int = 64,
    skip: tuple[str, ...] = (),
    **grid: Any,
) -> Any:
    """The tiny Llama with QATLinears; splitting uses every producer rule of the passes, unless `skip` breaks one."""
    recipe = Recipe(
        name="test",
        stages=(Stage(weight_bits=2),),
        grid=GridSettings(**grid),
        skip=skip,
        split=None if split is None else Split(ratio_min=split, ratio_max=split, metric="weight"),
    )
    model = copy.deepcopy(dense_llama(tied, hidden))
    prepare_student(model, recipe, None)
    set_training_bits(model, 8, act_bits)
    return model.eval()


@cache
def packed_llama(split: float | None = 0.5, act_bits: int | None = None, max_bits: int = 8) -> Any:
    """Shared: do not change it but for its width, and set that."""
    return convert_model(prepared_llama(split, act_bits), max_bits).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A split model with all widths, saved at 4 bits: `.path`, `.model`."""
    path = Path(tmp_path_factory.mktemp("checkpoint")) / "packed"
    model = copy.deepcopy(packed_llama())
    save_packed(model, None, path, 4, "schema: 1\n")
    return SimpleNamespace(path=path, model=model)
