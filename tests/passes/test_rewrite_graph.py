import pytest
import torch

from bbb_ao.passes import (
    apply_plan,
    choose_indices,
    duplicate_channels,
    insert_fake_quantize,
    plan_block,
    plan_graph,
)
from bbb_ao.qat_linear import QATLinear
from bbb_ao.quantize import bitbybit_qat
from bbb_ao.splitting import split_channels

aten = torch.ops.aten


def targets(gm, target):
    return [node for node in gm.graph.nodes if node.target is target]


def test_duplication_inserts_one_gather_a_norm_and_one_for_o_and_none_for_down(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    gm = duplicate_channels(kind.graph, plan, choose_indices(kind.block, plan, 0.4))
    gathers = targets(gm, aten.index_select.default)
    assert [sorted(str(user.args[1]) for user in node.users) for node in gathers] == [
        ["self_attn_k_proj_weight", "self_attn_q_proj_weight", "self_attn_v_proj_weight"],
        ["self_attn_o_proj_weight"],
        ["mlp_gate_proj_weight", "mlp_up_proj_weight"],
    ]
    assert gm.get_parameter("mlp.gate_proj.weight").shape == (128, 96)
    assert gm.get_parameter("mlp.down_proj.weight").shape == (64, 128)
    assert not targets(kind.graph, aten.index_select.default), "the pass returns a copy"
    assert kind.graph.get_parameter("mlp.down_proj.weight") is kind.block.mlp.down_proj.weight


def test_sites_without_an_index_stay_as_they_are(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    index = choose_indices(kind.block, plan, 0.4)["self_attn.o_proj"]
    gm = duplicate_channels(kind.graph, plan, {"self_attn.o_proj": index})
    assert len(targets(gm, aten.index_select.default)) == 1
    assert gm.get_parameter("mlp.down_proj.weight") is kind.block.mlp.down_proj.weight


def test_given_split_weights_replace_halves(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    indices = choose_indices(kind.block, plan, 0.4)
    weight = kind.block.self_attn.o_proj.weight.detach()
    split = split_channels(weight, indices["self_attn.o_proj"], torch.full_like(weight, 0.125))
    gm = duplicate_channels(kind.graph, plan, indices, {"self_attn.o_proj": split})
    assert torch.equal(gm.get_parameter("self_attn.o_proj.weight"), split)
    with pytest.raises(ValueError, match=r"split weight of self_attn.o_proj: expected shape \(64, 96\)"):
        duplicate_channels(kind.graph, plan, indices, {"self_attn.o_proj": weight})


def test_bad_indices_are_refused_by_name(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    with pytest.raises(ValueError, match=r"no site mlp.up_proj in the plan; it has mlp.down_proj"):
        duplicate_channels(kind.graph, plan, {"mlp.up_proj": torch.arange(64, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"index of mlp.down_proj"):
        duplicate_channels(kind.graph, plan, {"mlp.down_proj": torch.arange(64, dtype=torch.int32)})


def test_padding_columns_read_zero(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    pad = torch.full((32,), 64, dtype=torch.int32)
    indices = {name: torch.cat([torch.arange(64, dtype=torch.int32), pad]) for name in ("self_attn.q_proj",)}
    gm = duplicate_channels(kind.graph, plan, indices)
    with torch.no_grad():
        # Weights that are not zero in the padding show what arrives there.
        for name in ("q_proj", "k_proj", "v_proj"):
            gm.get_parameter(f"self_attn.{name}.weight")[:, 64:] = 1e6
        expected = kind.graph(*kind.args, **kind.kwargs)
        torch.testing.assert_close(gm(*kind.args, **kind.kwargs), expected, rtol=1e-5, atol=1e-5)


def test_fake_quantize_goes_before_each_linear_weight_and_once_on_a_shared_input(captured):
    kind = captured("mixtral")[0]
    gm = insert_fake_quantize(kind.graph, bitbybit_qat(bits=2, act_bits=8))
    modules = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    assert sorted(modules) == [
        "self_attn.k_proj.fake_quantize_weight",
        "self_attn.o_proj.fake_quantize_input",
        "self_attn.o_proj.fake_quantize_weight",
        "self_attn.q_proj.fake_quantize_input",
        "self_attn.q_proj.fake_quantize_weight",
        "self_attn.v_proj.fake_quantize_weight",
    ]
    only = insert_fake_quantize(kind.graph, bitbybit_qat(bits=2), ["self_attn.o_proj"])
    assert [str(n.target) for n in only.graph.nodes if n.op == "call_module"] == [
        "self_attn.o_proj.fake_quantize_weight"
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_both_passes_give_the_numbers_of_the_live_training_form(make_model, captured, name, act_bits):
    kind = captured(name)[0]
    plan = plan_block(kind)
    indices = choose_indices(kind.block, plan, 0.4)
    # The tail of this index is padding: zero is no level of the grid, so it must be held at zero.
    indices[plan.sites[0].name] = torch.cat([indices[plan.sites[0].name], torch.full((32,), 64, dtype=torch.int32)])
    config = bitbybit_qat(bits=2, act_bits=act_bits)
    gm = insert_fake_quantize(duplicate_channels(kind.graph, plan, indices), config)
    model = make_model(name)
    live = model.get_submodule(kind.names[0])
    apply_plan(
        live, plan, indices, lambda linear, **kw: QATLinear.from_linear(linear, 2, act_bits, config.grid(), **kw)
    )
    with torch.no_grad():
        expected, y = live(*kind.args, **kind.kwargs), gm(*kind.args, **kind.kwargs)
        original = kind.graph(*kind.args, **kind.kwargs)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (y - original).abs().max() > 1e-3 * original.abs().max(), "two bits must show"


def test_gradients_reach_the_weights_of_a_fake_quantized_graph(captured):
    kind = captured("llama")[0]
    gm = insert_fake_quantize(kind.graph, bitbybit_qat(bits=4, act_bits=8))
    gm(*kind.args, **kind.kwargs).square().sum().backward()
    weights = [gm.get_parameter(f"self_attn.{name}.weight") for name in ("q_proj", "o_proj")]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)
    gm.zero_grad()


def test_a_rewritten_graph_can_be_planned_again(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    gm = duplicate_channels(kind.graph, plan, choose_indices(kind.block, plan, 0.4))
    assert {site.rule for site in plan_graph(gm).sites} <= {"norm", "rows", "index"}
