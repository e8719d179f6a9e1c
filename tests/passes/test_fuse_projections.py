"""Layers that read one input share one product: the same results, storage and checkpoint, and one op in the graph."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from bbb_ao import footprint, fuse_projections, set_bits, unfuse_projections
from bbb_ao.checkpoint import save_packed
from bbb_ao.fused_rows import FusedRows
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.passes import capture_block, capture_model, shared_inputs
from bbb_ao.qat_linear import QATLinear
from bbb_ao.splitting import choose_index

# Products of each decoder block that several Linears share.
SHARED = {"llama": 2, "qwen3": 2, "mistral": 2, "gemma2": 2, "olmo2": 2, "phi": 1, "opt": 1, "phi3": 0, "gpt_neox": 0}


def make_ids(tokens: int = 12) -> Tensor:
    return torch.randint(2, 128, (2, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model) -> Tensor:
    return model(make_ids()).logits


@pytest.fixture
def llama(make_packed):
    """A function: activation width -> a fused model of one's own."""

    def make(act_bits: int | None = None):
        model = make_packed("llama", act_bits)
        fuse_projections(model)
        return model

    return make


def fused_products(model) -> set[int]:
    return {id(layer.fused) for layer in packed_linears(model).values() if layer.fused is not None}


@pytest.mark.parametrize("name", SHARED)
def test_fused_model_gives_the_same_and_unfusing_gives_it_bit_for_bit(make_packed, name: str) -> None:
    model = make_packed(name)
    before = logits(model)
    report = fuse_projections(model)
    blocks = model.config.num_hidden_layers
    assert len(report.fused) == SHARED[name] * blocks == len(fused_products(model))
    assert report.refused == ()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    ids = make_ids()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(ids, **settings)
    unfuse_projections(model)
    assert not fused_products(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(model.generate(ids, **settings), tokens)


def test_groups_are_those_that_the_graph_shows(make_packed) -> None:
    model = make_packed("llama")
    (captured,) = capture_model(model)
    groups = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
    assert captured.graph is not None
    assert shared_inputs(captured.graph) == groups
    report = fuse_projections(model)
    assert report.fused[0] == tuple(f"model.layers.0.{name}" for name in groups[0])
    assert "fused: model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in str(report)
    # Fusing again starts from single layers.
    assert fuse_projections(model) == report


@pytest.mark.parametrize("act_bits", [None, 4])
def test_compiled_graph_holds_one_product_for_each_group(llama, act_bits: int | None) -> None:
    model = llama(act_bits)
    expected = logits(model)
    seen: list[Counter] = []

    def backend(gm, inputs):
        seen.append(Counter(str(node.target) for node in gm.graph.nodes if "packed_linear" in str(node.target)))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(make_ids()).logits, expected)
    # q/k/v, o, gate/up, down in each of two blocks; one graph, so that there was no break and nothing compiled twice.
    (counts,) = seen
    assert sum(counts.values()) == 8
    assert all(layer.fused.held is None for layer in packed_linears(model).values() if layer.fused)


def test_shared_weight_is_static_for_cuda_graphs(llama) -> None:
    """CUDA graphs copy what may move at every replay; the weights must not be among it."""
    model = llama()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(make_ids())
    rows = model.model.layers[0].mlp.gate_proj.fused
    for name in ("plane_high", "plane_mid", "plane_low", "scale", "scale_exponent", "zero_point"):
        assert getattr(rows, name)._dynamo_static_input_type is not None, name


def test_nothing_is_stored_twice(make_packed) -> None:
    model = make_packed("llama", ratio=0.0)

    def stored() -> int:
        tensors = [b for layer in packed_linears(model).values() for b in layer.buffers()]
        tensors += [b for rows in products() for b in vars(rows).values() if isinstance(b, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def products() -> list[FusedRows]:
        return [layer.fused for layer in packed_linears(model).values() if layer.fused and layer.position == 0]

    before, size = stored(), footprint(model)
    fuse_projections(model)
    exponents = 4 * sum(rows.ends[-1] for rows in products())
    assert stored() == before + exponents
    assert footprint(model) == size


def test_saved_checkpoint_is_that_of_the_single_layers(llama, tmp_path) -> None:
    model = llama()
    save_packed(model, None, tmp_path / "fused", 4)
    unfuse_projections(model)
    save_packed(model, None, tmp_path / "single", 4)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "single" / file).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "fused").eval()
    expected = logits(set_bits(model, 4))
    assert torch.equal(logits(loaded), expected)
    fuse_projections(loaded)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act_bits", [None, 4])
def test_every_width_and_a_layer_of_its_own_width(llama, act_bits: int | None) -> None:
    model = llama(act_bits)
    single = copy.deepcopy(model)
    unfuse_projections(single)
    for bits in (2, 3, 4, 8):
        torch.testing.assert_close(logits(set_bits(model, bits)), logits(set_bits(single, bits)), rtol=1e-3, atol=1e-3)
    for changed in (model, single):
        changed.model.layers[0].self_attn.k_proj.set_bits(2)
    torch.testing.assert_close(logits(model), logits(single), rtol=1e-3, atol=1e-3)
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(weight.dequantize(), single.model.layers[0].self_attn.k_proj.weight.dequantize())


def make_layers(bias: bool = True, **settings) -> list[PackedLinear]:
    torch.manual_seed(0)
    linears = [nn.Linear(64, rows, bias) for rows in (40, 8, 24)]
    # Far apart, so that each layer has a second level of its own.
    with torch.no_grad():
        linears[1].weight.mul_(1e-3)
    return [PackedLinear.from_qat(QATLinear.from_linear(linear, 8, **settings), 8).eval() for linear in linears]


def test_layers_called_with_other_inputs_compute_their_own_rows() -> None:
    layers = make_layers()
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    single = [[layer(value) for value in (x, other)] for layer in layers]
    rows = FusedRows(layers)
    assert len({int(exponent) for exponent in rows.scale_exponent}) > 1
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(layers[0](x), single[0][0], **close)
    torch.testing.assert_close(layers[1](other), single[1][1], **close)
    torch.testing.assert_close(layers[1](x.clone()), single[1][0], **close)
    torch.testing.assert_close(layers[2](x), single[2][0], **close)
    assert rows.held is None
    torch.testing.assert_close(layers[2](other), single[2][1], **close)
    torch.testing.assert_close(layers[0](x), single[0][0], **close)
    torch.testing.assert_close(layers[0](other), single[0][1], **close)
    torch.testing.assert_close(layers[1](x), single[1][0], **close)


def test_gradients_reach_the_input_through_the_shared_product() -> None:
    layers = make_layers()
    x = torch.randn(3, 64, requires_grad=True)

    def gradient() -> Tensor:
        (result,) = torch.autograd.grad(sum(layer(x).square().sum() for layer in layers), x)
        return result

    expected = gradient()
    FusedRows(layers)
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["bias", "load", "move", "drop"])
def test_a_changed_model_computes_single_products(change: str) -> None:
    module = nn.ModuleList(make_layers())
    rows = FusedRows([layer for layer in module if isinstance(layer, PackedLinear)])
    x = torch.randn(3, 64)
    if change == "bias":
        module.to(torch.bfloat16)
    elif change == "move":
        module.to("meta")
    elif change == "drop":
        module[1].set_bits(2)
        before = module[1](x)
        module[1].drop_planes(2)
        assert torch.equal(module[1](x), before)
    else:
        state = module.state_dict()
        state["1.scale_exponent"] = state["1.scale_exponent"] + 1
        # Equal sizes of the product before and after would hide a second level that is out of date.
        before = module[1](x) - module[1].bias
        module.load_state_dict(state)
        torch.testing.assert_close(module[1](x) - module[1].bias, 2 * before, rtol=1e-4, atol=1e-6)
    assert all(layer.fused is None for layer in module)
    assert rows.held is None
    if change == "bias":
        assert module[1](x.bfloat16()).dtype == torch.bfloat16


def test_casting_a_model_without_biases_keeps_the_product_and_so_does_a_copy() -> None:
    module = nn.ModuleList(make_layers(bias=False))
    FusedRows([layer for layer in module if isinstance(layer, PackedLinear)])
    x = torch.randn(3, 64)
    expected = [layer(x) for layer in module]
    assert all(layer.fused is not None for layer in module.to(torch.bfloat16))
    twin = copy.deepcopy(module)
    assert all(isinstance(layer, PackedLinear) and layer.fused.holds(layer) for layer in twin)
    assert twin[0].fused is not module[0].fused
    assert all(torch.equal(layer(x), y) for layer, y in zip(twin, expected, strict=True))


def test_layers_that_differ_stay_apart_and_the_report_says_why(make_packed, make_model) -> None:
    model = make_packed("llama")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.v_proj.act_bits = 8
    mlp.up_proj.set_bits(2)
    expected = logits(model)
    report = fuse_projections(model)
    assert ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj") in report.fused
    reasons = dict(report.refused)
    assert reasons["model.layers.0.self_attn.v_proj"] == "self_attn.q_proj differs in act_bits: None and 8"
    assert reasons["model.layers.1.mlp.up_proj"] == "mlp.gate_proj differs in bits: 8 and 2"
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no packed layers"):
        fuse_projections(make_model("llama"))


def test_different_channels_are_not_fused() -> None:
    linear = nn.Linear(64, 40)
    layers = []
    for seed in (0, 1):
        index = choose_index(torch.rand(64, generator=torch.Generator().manual_seed(seed)), 0.5)
        layers.append(PackedLinear.from_qat(QATLinear.from_linear(linear, 8, index=index), 8))
    with pytest.raises(ValueError, match="ocs_index: different channels"):
        FusedRows(layers)
    with pytest.raises(ValueError, match="at least two"):
        FusedRows(layers[:1])
    assert all(layer.fused is None for layer in layers)


def test_equal_channels_are_gathered_once_inside_the_op() -> None:
    torch.manual_seed(0)
    index = choose_index(torch.rand(64), 0.5)
    qats = [QATLinear.from_linear(nn.Linear(64, 40), 8, act, index=index) for act in (None, None)]
    layers = [PackedLinear.from_qat(qat, 8) for qat in qats]
    x = torch.randn(3, 64)
    expected = [layer(x) for layer in layers]
    FusedRows(layers)
    pair = nn.ModuleList(layers)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = pair

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.pair], -1)

    graph = capture_block(Both(), (x,)).graph
    assert graph is not None
    assert sum("packed_linear" in str(node.target) for node in graph.graph.nodes) == 1
    assert not any("index" in str(node.target) and node.op == "call_function" for node in graph.graph.nodes)
    torch.testing.assert_close(Both()(x), torch.cat(expected, -1), rtol=1e-5, atol=1e-5)
