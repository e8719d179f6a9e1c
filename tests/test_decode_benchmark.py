"""The decoding loop of benchmarks/decode.py, on a CPU: the tokens of generate(), for every implementation."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from decode_model import IMPLEMENTATIONS, Decoder, build, llama_3_8b

from bbb_ao.packed_linear import packed_linears

NEW = 6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_decoder_gives_the_tokens_of_generate(impl: str) -> None:
    config = llama_3_8b(layers=2)
    config.update({"hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 4, "head_dim": 32})
    config.update({"num_key_value_heads": 2, "vocab_size": 320})
    model = build(config, impl, "cpu").float()
    bits, _, head_bits = IMPLEMENTATIONS[impl]
    assert len(packed_linears(model)) == (0 if bits is None else 14) + (head_bits is not None)
    prompt = torch.randint(0, 320, (3, 9), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "min_new_tokens": NEW}
    expected = model.generate(prompt, **settings, do_sample=False, pad_token_id=0, eos_token_id=None)
    decoder = Decoder(model, prompt, NEW, compiled=False)
    for _ in range(2):
        decoder.prefill()
        for _ in range(NEW - 1):
            decoder.step()
        assert torch.equal(decoder.output, expected)
    assert expected[:, 9:].unique().numel() > 3, "a model that repeats one token would pass any loop"


def test_blocks_share_one_compiled_graph() -> None:
    config = llama_3_8b(layers=4)
    config.update({"hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 4, "head_dim": 32})
    config.update({"num_key_value_heads": 2, "vocab_size": 320})
    model = build(config, "w2a16", "cpu")
    decoder = Decoder(model, torch.zeros(1, 3, dtype=torch.int64), NEW, compiled=False)
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    decoder.block = torch.compile(decoder.block, fullgraph=True, dynamic=False, backend=backend)
    decoder.prefill()
    for _ in range(NEW - 1):
        decoder.step()
    assert len(graphs) == 1
