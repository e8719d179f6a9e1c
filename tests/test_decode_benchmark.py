"""The decoding loop of benchmarks/decode.py on a CPU: the tokens of generate() for all implementations; its options."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

pytest.importorskip("triton", reason="the loop imports the attention kernel of its one_launch")
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import decode as benchmark
from decode_model import IMPLEMENTATIONS, Decoder, build, llama_3_8b, rotary_parts

from bbb_ao.packed_linear import packed_linears

NEW = 6


def tiny():
    config = llama_3_8b(layers=3)
    config.update({"hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 4, "head_dim": 32})
    config.update({"num_key_value_heads": 2, "vocab_size": 320})
    return config


def decode(decoder: Decoder) -> torch.Tensor:
    decoder.prefill()
    for _ in range(NEW - 1):
        decoder.step()
    return decoder.output.clone()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_decoder_gives_the_tokens_of_generate(impl: str) -> None:
    model = build(tiny(), impl, "cpu").float()
    bits, _, head_bits = IMPLEMENTATIONS[impl]
    assert len(packed_linears(model)) == (0 if bits is None else 21) + (head_bits is not None)
    prompt = torch.randint(0, 320, (3, 9), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "min_new_tokens": NEW}
    expected = model.generate(prompt, **settings, do_sample=False, pad_token_id=0, eos_token_id=None)
    # The last function has one block of three.
    decoder = Decoder(model, prompt, NEW, compiled=False, span=2)
    for _ in range(2):
        assert torch.equal(decode(decoder), expected)
    assert expected[:, 9:].unique().numel() > 3, "a model that repeats one token would pass any loop"


def test_compiled_decoder_has_three_graphs_for_the_prompt_and_three_for_a_step() -> None:
    model = build(tiny(), "w2a16_head8", "cpu").float()
    decoder = Decoder(model, torch.tensor([[3, 200, 71]]), NEW, compiled=False)
    expected = decode(decoder)
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return aot_eager(gm, inputs)

    torch._dynamo.reset()
    for name in ("start", "blocks", "tail"):
        compiled = torch.compile(getattr(decoder, name), fullgraph=True, dynamic=False, backend=backend)
        setattr(decoder, name, compiled)
    assert torch.equal(decode(decoder), expected)
    assert len(graphs) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs kernels on a CPU only where there is no GPU")
def test_attention_in_one_launch_gives_the_same_tokens() -> None:
    model = build(tiny(), "w2a16", "cpu").float()
    prompt = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = decode(Decoder(model, prompt, NEW, compiled=False))
    decoder = Decoder(model, prompt, NEW, compiled=False, span=2, attention="one_launch")
    for _ in range(2):
        assert torch.equal(decode(decoder), expected)


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attention: expected one of products, one_launch, got 'flash'"):
        Decoder(build(tiny(), "bf16", "cpu"), torch.zeros(1, 3, dtype=torch.int64), NEW, False, attention="flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_parts_are_those_of_transformers(dtype: torch.dtype) -> None:
    model = build(tiny(), "bf16", "cpu").model
    for position in (torch.arange(7), torch.tensor([8191])):
        hidden = torch.zeros(1, len(position), 128, dtype=dtype)
        parts = rotary_parts(model.rotary_emb, position, dtype)
        for part, expected in zip(parts, model.rotary_emb(hidden, position.unsqueeze(0)), strict=True):
            assert part.dtype == dtype
            assert torch.equal(part, expected)


def test_settings_of_inductor_take_the_type_of_its_own() -> None:
    texts = ["triton.enable_pdl=True", "max_autotune_gemm_backends=ATEN,TRITON", "combo_kernel_allow_mixed_sizes=2"]
    settings = dict(map(benchmark.inductor_setting, texts))
    assert settings == {
        "triton.enable_pdl": True,
        "max_autotune_gemm_backends": "ATEN,TRITON",
        "combo_kernel_allow_mixed_sizes": 2,
    }
    # As the benchmark hands them over.
    assert torch.compile(lambda x: x + 1, options=settings)


@pytest.mark.parametrize(
    "text",
    ["triton.pdl=True", "combo_kernels", "combo_kernels=yes", "combo_kernels=1", "=", "max_autotune_gemm_backends"],
)
def test_a_setting_that_inductor_has_not_or_of_another_type_is_refused(text: str, monkeypatch, capsys) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        benchmark.inductor_setting(text)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--inductor", text])
    with pytest.raises(SystemExit) as refused:
        benchmark.main()
    assert refused.value.code == 2
    assert "decode.py: error: argument --inductor: " in capsys.readouterr().err.splitlines()[-1]
