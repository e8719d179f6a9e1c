"""Greedy generation from a packed model with a compiled decoding step."""

import os
import shutil
import time
from typing import Any

import torch


def has_compiler() -> bool:
    """Whether Inductor finds the C++ compiler that it needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def generate(model: Any, tokenizer: Any, prompt: str, tokens: int, compiled: bool) -> tuple[str, float]:
    """Continue a prompt greedily with a static cache.

    Args:
        compiled: run decoding steps (one row) through torch.compile, without graph breaks; the prompt runs eagerly.
    Returns:
        (the continuation, tokens a second after compilation).
    """
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    bos = torch.tensor([[tokenizer.bos_token_id]])
    ids = torch.cat([bos, inputs.input_ids], 1)
    settings = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": tokenizer.bos_token_id,
        "attention_mask": torch.ones_like(ids),
    }
    eager = model.forward
    step = torch.compile(eager, fullgraph=True, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        return (step if ids is not None and ids.shape[1] == 1 else eager)(*args, **kwargs)

    if compiled:
        model.forward = forward
    try:
        with torch.no_grad():
            model.generate(ids, **settings)
            start = time.perf_counter()
            output = model.generate(ids, **settings)
            seconds = time.perf_counter() - start
    finally:
        model.forward = eager
    return tokenizer.decode(output[0, ids.shape[1] :]), tokens / seconds
