"""Self-speculative decoding on the shipped model: the text of 8 bits, drafted at 4 and 2 bits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbb_ao.demo import stdlib_corpus
from bbb_ao.quantize import bitbybit_qat, quantize_
from bbb_ao.speculation import at_bits, speculate

MODEL = Path(stdlib_corpus.__file__).parent / "model"


@pytest.fixture(scope="module")
def model():
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()
    quantize_(model.model.layers, bitbybit_qat(bits=8))
    quantize_(model.model.layers, bitbybit_qat(bits=8, step="convert"))
    return model


@pytest.mark.parametrize(
    ("prompt", "bits", "length"), [("import os\n", 4, 4), ("def read_lines(path):", 2, 1), ("class Queue:\n    ", 2, 6)]
)
def test_text_is_that_of_greedy_decoding(model, prompt: str, bits: int, length: int) -> None:
    ids = AutoTokenizer.from_pretrained(MODEL)(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)
    # The end of the text: some token that greedy decoding reaches.
    end = int(expected[0, -4])
    short = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=end)
    draft = at_bits(model, bits)
    found = speculate(model, draft, ids, length, max_new_tokens=16)
    assert torch.equal(found.sequences, expected)
    assert found.accepted > 0
    ended = speculate(model, draft, ids, length, max_new_tokens=16, eos_token_id=end)
    assert torch.equal(ended.sequences, short)
