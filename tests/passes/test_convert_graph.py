import copy

import pytest
import torch
from torch.utils._pytree import tree_map_only

from bbb_ao.convert import convert_model
from bbb_ao.errors import NumericsError
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.passes import (
    apply_plan,
    bind,
    capture_block,
    choose_indices,
    convert_graph,
    duplicate_channels,
    float64_casts,
    insert_fake_quantize,
    plan_block,
)
from bbb_ao.qat_linear import QATLinear
from bbb_ao.quantize import bitbybit_qat

OPS = (torch.ops.bbb_ao.packed_linear.default, torch.ops.bbb_ao.packed_linear_dynamic.default)


def packed_calls(gm):
    return [node for node in gm.graph.nodes if node.target in OPS]


def double(values):
    """Arguments of a block in float64."""
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, values)


def rewritten(kind, act_bits, zero_tail, **settings):
    """A captured block's plan and indices, and its graph with duplicated channels and fake quantization."""
    plan = plan_block(kind)
    indices = choose_indices(kind.block, plan, 0.4)
    if zero_tail:
        tail = torch.full((32,), 64, dtype=torch.int32)
        indices[plan.sites[0].name] = torch.cat([indices[plan.sites[0].name], tail])
    config = bitbybit_qat(act_bits=act_bits, **settings)
    return plan, indices, config, insert_fake_quantize(duplicate_channels(kind.graph, plan, indices), config)


def single(in_features, out_features, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = torch.nn.Linear(in_features, out_features, bias)
    x = torch.randn(3, in_features)
    return linear, x, capture_block(linear, (x,)).graph


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["half_step", "integer"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_equals_its_fake_quantized_graph_to_a_derived_bound(bits, kind, bias):
    _, x, graph = single(160, 24, bias)
    fake = insert_fake_quantize(graph, bitbybit_qat(bits=bits, kind=kind))
    gm = convert_graph(fake, bitbybit_qat(bits=8, kind=kind))
    with torch.no_grad():
        y, expected = gm(x), fake(x)
        weight = fake.fake_quantize_weight(graph.weight)
        # Both sum the same K + 1 products in some order: (K + 1) eps sum |x| |w| each.
        size = x.abs() @ weight.abs().T + (graph.bias.abs() if bias else 0)
    assert ((y - expected).abs() <= 2 * 161 * 2**-24 * size).all()
    assert [node.args[9] for node in packed_calls(gm)] == [bits]


@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_plain_linear_takes_the_configuration(act_bits):
    linear, x, graph = single(100, 24)
    config = bitbybit_qat(bits=4, act_bits=act_bits)
    gm = convert_graph(graph, config)
    fake = insert_fake_quantize(graph, config)
    with torch.no_grad():
        assert (gm(x) - fake(x)).abs().max() <= 1e-5 * fake(x).abs().max()
    assert [node.target for node in packed_calls(gm)] == [OPS[act_bits is not None]]
    buffers = {name: tuple(buffer.shape) for name, buffer in gm.named_buffers()}
    # 100 columns are padded to 128; the widest slice of 4 bits needs two planes.
    assert buffers["plane_high"] == buffers["plane_mid"] == (24, 32)
    assert buffers["ocs_index"] == (128,)
    assert "plane_low" not in buffers
    assert [name for name, _ in gm.named_parameters()] == ["bias"], "the weight is gone"
    assert graph.weight is linear.weight, "the pass returns a copy"
    assert not dict(graph.named_buffers())


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_a_block_gives_the_numbers_of_the_fake_quantized_graph_and_of_the_live_block(
    name, act_bits, make_model, captured
):
    kind = captured(name)[0]
    plan, indices, config, fake = rewritten(kind, act_bits, zero_tail=True)
    gm = convert_graph(fake, config)
    assert len(packed_calls(gm)) == sum(len(site.consumers) for site in plan.sites)
    assert not [node for node in gm.graph.nodes if node.op == "call_module"]
    live = make_model(name).get_submodule(kind.names[0])
    apply_plan(
        live, plan, indices, lambda linear, **kw: QATLinear.from_linear(linear, 2, act_bits, config.grid(), **kw)
    )
    convert_model(live, 2)
    with torch.no_grad():
        y, expected = gm(*kind.args, **kind.kwargs), fake(*kind.args, **kind.kwargs)
        of_live = live(*kind.args, **kind.kwargs)
    assert (y - of_live).abs().max() <= 1e-5 * y.abs().max()
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, layer in packed_linears(live).items():
        if layer.out_index is None:
            assert torch.equal(gm.get_buffer(f"{name}.plane_high"), layer.plane_high), name
            assert torch.equal(gm.get_buffer(f"{name}.scale"), layer.scale), name


def test_in_float64_the_whole_block_is_the_same(make_model, captured):
    kind = captured("llama")[0]
    plan, indices, config, _ = rewritten(kind, None, zero_tail=False)
    block = make_model("llama").get_submodule(kind.names[0]).double()
    fake = insert_fake_quantize(duplicate_channels(bind(kind.graph, block), plan, indices), config)
    gm = convert_graph(fake, config)
    args, kwargs = double(kind.args), double(dict(kind.kwargs))
    with torch.no_grad(), float64_casts():
        y, expected = gm(*args, **kwargs), fake(*args, **kwargs)
    assert y.dtype == torch.float64
    assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_only_the_fake_quantized_linears_are_converted_or_the_chosen_ones(captured):
    kind = captured("llama")[0]
    config = bitbybit_qat(bits=2)
    partly = insert_fake_quantize(kind.graph, config, ["self_attn.o_proj"])
    gm = convert_graph(partly, config)
    assert [str(node.args[1].target) for node in packed_calls(gm)] == ["self_attn.o_proj.plane_high"]
    assert gm.get_parameter("mlp.up_proj.weight") is kind.block.mlp.up_proj.weight
    chosen = convert_graph(kind.graph, config, ["mlp.up_proj", "mlp.down_proj"])
    assert len(packed_calls(chosen)) == 2
    assert len(packed_calls(convert_graph(kind.graph, config))) == 7
    with pytest.raises(ValueError, match=r"no aten\.linear for mlp\.upproj; plan it"):
        convert_graph(kind.graph, config, ["mlp.upproj"])


def test_a_router_without_a_linear_module_stays(captured):
    kind = captured("mixtral")[0]
    gm = convert_graph(kind.graph, bitbybit_qat(bits=2))
    names = {str(node.args[1].target).rpartition(".")[0] for node in packed_calls(gm)}
    assert names == {f"self_attn.{n}_proj" for n in "qkvo"}


def test_a_converted_graph_compiles_without_a_break(captured):
    kind = captured("llama")[0]
    gm = convert_graph(rewritten(kind, None, zero_tail=False)[3], bitbybit_qat(bits=2))
    with torch.no_grad():
        expected = gm(*kind.args, **kind.kwargs)
        y = torch.compile(gm, fullgraph=True, backend="aot_eager")(*kind.args, **kind.kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_nan_is_refused():
    linear, _, graph = single(64, 8)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="weight: expected finite values, got 1 NaN or infinite"):
        convert_graph(graph, bitbybit_qat(bits=2))


def test_a_module_called_twice_is_packed_once():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.linear(self.linear(x).relu())

    block, x = Twice(), torch.randn(2, 32)
    gm = convert_graph(capture_block(block, (x,)).graph, bitbybit_qat(bits=8))
    assert len(packed_calls(gm)) == 2
    live = copy.deepcopy(block)
    live.linear = PackedLinear.from_qat(QATLinear.from_linear(block.linear, 8), 8)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), live(x), rtol=1e-6, atol=1e-6)
