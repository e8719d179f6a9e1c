import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from bbb_ao import bitbybit_qat, quantize_
from bbb_ao.errors import ModelError
from bbb_ao.passes import block_linears, find_blocks, unsupported_weights
from bbb_ao.qat_linear import QATLinear


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("llama", "model.layers"),
        ("opt", "model.decoder.layers"),
        ("gpt_neox", "gpt_neox.layers"),
        ("gpt2", "transformer.h"),
    ],
)
def test_blocks_are_found_in_order(make_model, name, prefix):
    model = make_model(name)
    blocks = find_blocks(model)
    assert [fqn for fqn, _ in blocks] == [f"{prefix}.0", f"{prefix}.1"]
    assert all(model.get_submodule(fqn) is block for fqn, block in blocks)


def test_the_decoder_counts_in_an_encoder_decoder_model():
    config = AutoConfig.for_model(
        "bart", d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    names = [fqn for fqn, _ in find_blocks(AutoModelForSeq2SeqLM.from_config(config))]
    assert names == ["model.decoder.layers.0", "model.decoder.layers.1"]


def test_lists_inside_blocks_and_lists_of_heads_do_not_count():
    def block():
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(5))})

    model = nn.ModuleDict(
        {"heads": nn.ModuleList(nn.Linear(8, 999) for _ in range(4)), "layers": nn.ModuleList([block(), block()])}
    )
    assert [fqn for fqn, _ in find_blocks(model)] == ["layers.0", "layers.1"]


def test_a_model_without_blocks_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"Sequential: decoder blocks: expected .*fix: ") as caught:
        find_blocks(nn.Sequential(nn.Linear(8, 8)))
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_plain_linear_are_named_with_the_reason(make_model):
    mixtral = dict(unsupported_weights(make_model("mixtral").model.layers[0]))
    assert set(mixtral) == {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert "router" in mixtral["mlp.gate.weight"]
    assert "3-D weight [4, 192, 64]" in mixtral["mlp.experts.gate_up_proj"]
    gpt2 = make_model("gpt2").transformer.h[0]
    assert block_linears(gpt2) == []
    assert all("Conv1D" in reason for _, reason in unsupported_weights(gpt2))


def test_linears_that_cannot_be_quantized_are_named():
    block = nn.ModuleDict({"empty": nn.Linear(4, 4), "integer": nn.Linear(4, 4), "good": nn.Linear(4, 4)})
    block["empty"].weight = nn.Parameter(torch.zeros(4, 0))
    block["integer"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert block_linears(block) == ["good"]
    assert dict(unsupported_weights(block)).keys() == {"empty", "integer"}


def test_linears_that_compute_something_else_are_left_out_and_named():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1), None

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Product(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    block = nn.ModuleDict({"router": Router(8, 4), "doubled": Doubled(8, 4), "product": Product(8, 4)})
    assert block_linears(block) == ["product"]
    reason = "computes something else than x @ weight^T + bias"
    assert unsupported_weights(block) == [("router", f"Router {reason}"), ("doubled", f"Doubled {reason}")]
    quantize_(block, bitbybit_qat(bits=2))
    assert [isinstance(module, QATLinear) for module in block.values()] == [False, False, True]
