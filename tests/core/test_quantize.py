"""`quantize_` through torchao's registration."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.packed_linear import PackedLinear, set_bits
from bbb_ao.qat_linear import QATLinear
from bbb_ao.quantize import bitbybit_qat, quantize_
from core.strategies import generator, make_linear


class Model(nn.Module):
    """An embedding, Linears with and without bias, ragged features, and a head that may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 40)
        self.up = make_linear(0, 40, 64)
        self.down = make_linear(1, 64, 40, bias=False)
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 50, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.emb(tokens)
        return self.head(self.norm(h + self.down(torch.relu(self.up(h)))))


TOKENS = torch.randint(0, 50, (2, 7), generator=generator(0))


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_children()}


def test_default_filter_takes_every_linear() -> None:
    model = Model()
    quantize_(model, bitbybit_qat(bits=2))
    assert [kinds(model)[name] for name in ("up", "down", "head")] == [QATLinear] * 3
    assert isinstance(model.norm, nn.LayerNorm)
    model(TOKENS).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    quantize_(model, bitbybit_qat(bits=8, step="convert"))
    assert [kinds(model)[name] for name in ("up", "down", "head")] == [PackedLinear] * 3


def test_packed_model_equals_the_prepared_one() -> None:
    model = Model().eval()
    quantize_(model, bitbybit_qat(bits=4, act_bits=8, split_ratio=0.4, learned_scales=True))
    assert model.up.weight.shape == (64, 64)
    assert model.down.weight.shape == (40, 96)
    assert model.up.scale is not None
    with torch.no_grad():
        expected = model(TOKENS)
        quantize_(model, bitbybit_qat(bits=8, step="convert"))
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(set_bits(model, 2)(TOKENS), expected)


def test_settings_reach_the_layers() -> None:
    model = Model()
    quantize_(model, bitbybit_qat(3, 4, group_size=64, kind="integer", detach_scales=True))
    up = model.up
    assert (up.bits, up.act_bits, up.detach_scales, up.grid.group_size, up.grid.kind) == (3, 4, True, 64, "integer")
    assert up.grid.zero_point_bits == 2
    assert up.stored_features == 64


@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_repeating_a_step_changes_nothing(step: str) -> None:
    model = Model()
    quantize_(model, bitbybit_qat(bits=2, split_ratio=0.4))
    if step == "convert":
        quantize_(model, bitbybit_qat(bits=4, step="convert"))
    before, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    # Another width would show: the first preparation stays.
    quantize_(
        model, bitbybit_qat(bits=4, split_ratio=0.9, step=step) if step == "prepare" else bitbybit_qat(8, step=step)
    )
    assert dict(model.named_modules()) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.up.bits == 2
    quantize_(model, bitbybit_qat(bits=8))
    assert dict(model.named_modules()) == before


def test_a_root_linear_is_transformed_in_place() -> None:
    linear = make_linear(0, 40, 24)
    x = torch.randn(3, 40, generator=generator(1))
    exact = linear(x)
    quantize_(linear, bitbybit_qat(bits=8))
    assert isinstance(linear, QATLinear)
    assert (linear(x) - exact).abs().max() < 0.1 * exact.abs().max()
    quantize_(linear, bitbybit_qat(bits=8, step="convert"))
    assert isinstance(linear, PackedLinear)
    assert (linear(x) - exact).abs().max() < 0.1 * exact.abs().max()


def test_filter_fn_chooses() -> None:
    model = Model()
    quantize_(model, bitbybit_qat(), filter_fn=lambda module, name: name == "down")
    assert kinds(model)["up"] is nn.Linear
    assert kinds(model)["down"] is QATLinear
    with pytest.raises(TypeError, match=r"LayerNorm.*isinstance"):
        quantize_(model, bitbybit_qat(), filter_fn=lambda module, name: name == "norm")


def test_fqn_to_config_gives_each_layer_its_own() -> None:
    model = Model()
    config = FqnToConfig({"up": bitbybit_qat(bits=4), "down": bitbybit_qat(bits=2, act_bits=4)})
    quantize_(model, config, filter_fn=None)
    assert (model.up.bits, model.down.bits, model.down.act_bits) == (4, 2, 4)
    assert kinds(model)["head"] is nn.Linear


@pytest.mark.parametrize("extra_references", [False, True])
def test_tied_heads_are_left_alone(extra_references: bool) -> None:
    model = Model(tied=True)
    optimizer = torch.optim.AdamW(model.parameters()) if extra_references else None
    kept = [model.down.weight, *model.parameters()] if extra_references else []
    quantize_(model, bitbybit_qat())
    assert kinds(model)["head"] is nn.Linear
    assert model.head.weight is model.emb.weight
    # References that are no modules do not make a weight tied.
    assert kinds(model)["down"] is QATLinear
    assert kinds(model)["up"] is QATLinear
    del optimizer, kept


def test_a_linear_used_under_two_names_is_not_tied() -> None:
    shared = make_linear(0, 64, 64)
    model = nn.ModuleDict({"first": shared, "second": shared})
    quantize_(model, bitbybit_qat())
    assert isinstance(model["first"], QATLinear)
    assert model["first"] is model["second"]


def test_tied_head_of_a_hugging_face_model_stays_tied() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    quantize_(model, bitbybit_qat(split_ratio=0.5))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.down_proj, QATLinear)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("filter_fn", [None, lambda module, name: isinstance(module, nn.Linear)])
def test_attention_that_reads_its_projection_itself_is_left_alone(filter_fn) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "linear": make_linear(0, 64, 64)})
    before = model["attention"].out_proj.weight
    if filter_fn is None:
        quantize_(model, bitbybit_qat(split_ratio=0.5))
    else:
        quantize_(model, bitbybit_qat(split_ratio=0.5), filter_fn=filter_fn)
    assert model["attention"].out_proj.weight is before
    assert isinstance(model["linear"], QATLinear)
    x = torch.randn(3, 2, 64)
    assert model["attention"](x, x, x)[0].shape == x.shape


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": True},
        {"act_bits": 16},
        {"group_size": 48},
        {"split_ratio": 1.5},
        {"split_ratio": float("nan")},
        {"kind": "both"},
        {"zero_point_bits": 9},
        {"step": "train"},
    ],
)
def test_values_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        bitbybit_qat(**settings)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="split"):
        bitbybit_qat(split=0.1)


def test_prepared_model_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = Model()
    quantize_(model, bitbybit_qat(bits=2, act_bits=4, split_ratio=0.4, learned_scales=True))
    assert torch._dynamo.explain(model)(TOKENS).graph_break_count == 0
    model(TOKENS).square().sum().backward()
    eager = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-3, atol=1e-4 * float(eager[name].abs().max()))
