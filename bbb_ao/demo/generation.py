"""Greedy generation from a packed model with a compiled decoder block."""

import os
import shutil
import time
from typing import Any

import torch

from bbb_ao.passes import find_blocks


def has_compiler() -> bool:
    """Whether Inductor finds the C++ compiler that it needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def generate(model: Any, tokenizer: Any, prompt: str, tokens: int, compiled: bool) -> tuple[str, float]:
    """Continue a prompt greedily with a static cache.

    Args:
        compiled: run the last decoder block's decoding steps (one row) through torch.compile, without graph breaks; the
            rest runs eagerly: compiling every layer of a model this small takes minutes and saves seconds.
    Returns:
        (the continuation, tokens a second after compilation).
    """
    bos = torch.tensor([[tokenizer.bos_token_id]])
    ids = torch.cat([bos, tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids], 1)
    settings = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": tokenizer.bos_token_id,
        "attention_mask": torch.ones_like(ids),
    }
    block = find_blocks(model)[-1][1]
    eager = block.forward
    step = torch.compile(eager, fullgraph=True, dynamic=False)

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (step if hidden_states.shape[1] == 1 else eager)(hidden_states, *args, **kwargs)

    if compiled:
        block.forward = forward
    try:
        with torch.no_grad():
            model.generate(ids, **settings)
            start = time.perf_counter()
            output = model.generate(ids, **settings)
            seconds = time.perf_counter() - start
    finally:
        block.forward = eager
    return tokenizer.decode(output[0, ids.shape[1] :]), tokens / seconds
