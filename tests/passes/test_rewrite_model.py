import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from bbb_ao.errors import ModelError
from bbb_ao.passes import (
    apply_plan,
    capture_block,
    choose_indices,
    plan_block,
    undo_plan,
    verify_block,
)
from bbb_ao.qat_linear import QATLinear

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}


class GatedBlock(nn.Module):
    def __init__(self, features, hidden, bias, activation, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(features)
        self.gate, self.up = nn.Linear(features, hidden, bias), nn.Linear(features, hidden, bias)
        self.down, self.out = nn.Linear(hidden, features, bias), nn.Linear(features, features, bias)
        self.activation = activation

    def forward(self, x):
        h = self.norm(x)
        return self.out(x) + self.down(ACTIVATIONS[self.activation](self.gate(h)) * self.up(h))


@settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    features=st.integers(1, 80),
    hidden=st.integers(1, 80),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    ratio=st.floats(0, 1),
    magnitude=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 2**31),
)
def test_splitting_is_an_identity_and_merging_inverts_it(features, hidden, bias, activation, ratio, magnitude, seed):
    block = GatedBlock(features, hidden, bias, activation, seed)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    x = torch.randn(2, 3, features)
    kind = capture_block(block, (x,))
    plan = plan_block(kind)
    assert {site.name: site.rule for site in plan.sites} == {"out": "index", "gate": "norm", "down": "rows"}
    widths = {"gate": features, "down": hidden, "out": features}
    norms = {name: magnitude * torch.rand(width) for name, width in widths.items()}
    indices = choose_indices(block, plan, ratio, norms)
    assert all(index.numel() % 32 == 0 for index in indices.values())
    verify_block(kind, plan, indices, seed=seed)
    apply_plan(block, plan, indices)
    undo_plan(block)
    assert all(type(module) is not QATLinear for module in block.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_modules_keep_their_identity_and_only_rows_and_norm_sites_skip_the_gather(make_model, captured):
    block = make_model("llama").model.layers[0]
    plan = plan_block(captured("llama")[0])
    modules = dict(block.named_modules())
    apply_plan(block, plan, choose_indices(block, plan, 0.4))
    assert all(block.get_submodule(name) is module for name, module in modules.items())
    hosts = {name: module for name, module in modules.items() if isinstance(module, QATLinear)}
    assert {name for name, host in hosts.items() if host.expands_input} == {"self_attn.o_proj"}
    assert {name for name, host in hosts.items() if host.out_index is not None} == {"mlp.gate_proj", "mlp.up_proj"}
    norms = {name for name, module in modules.items() if hasattr(module, "duplicate_index")}
    assert norms == {"input_layernorm", "post_attention_layernorm"}


def test_linears_of_sites_without_an_index_are_built_too(make_model, captured):
    block = make_model("llama").model.layers[0]
    plan = plan_block(captured("llama")[0])
    apply_plan(block, plan, {}, lambda linear, **kw: QATLinear.from_linear(linear, 4, **kw))
    assert sum(isinstance(module, QATLinear) for module in block.modules()) == 7


def test_a_block_is_rewritten_once(make_model, captured):
    block = make_model("llama").model.layers[0]
    plan = plan_block(captured("llama")[0])
    indices = choose_indices(block, plan, 0.4)
    apply_plan(block, plan, indices)
    with pytest.raises(ModelError, match=r"self_attn.q_proj: expected an nn.Linear, got QATLinear.*fresh block"):
        apply_plan(block, plan, indices)


def test_indices_rank_by_activation_norm_times_the_largest_row_of_all_consumers(make_model, captured):
    block = make_model("llama").model.layers[0]
    plan = plan_block(captured("llama")[0])
    with torch.no_grad():
        block.self_attn.v_proj.weight[3, 17] = 50.0
        block.self_attn.q_proj.weight[3, 40] = 40.0
    by_weight = choose_indices(block, plan, 0.4)["self_attn.q_proj"]
    assert by_weight[64:66].tolist() == [17, 40]
    norm = torch.ones(64)
    norm[40] = 2.0
    norms = {"self_attn.k_proj": norm, "self_attn.o_proj": norm, "mlp.up_proj": norm, "mlp.down_proj": torch.ones(96)}
    assert choose_indices(block, plan, 0.4, norms)["self_attn.q_proj"][64:66].tolist() == [40, 17]
    del norms["mlp.down_proj"]
    with pytest.raises(ValueError, match=r"activation_norms: none for mlp.down_proj"):
        choose_indices(block, plan, 0.4, norms)
