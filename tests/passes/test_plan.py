import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbb_ao.passes import capture_block, plan_block, plan_graph

NORM = "only these Linears read the norm"
ATTENTION = "attention output (aten.scaled_dot_product_attention through aten.reshape in self_attn)"
LLAMA = [
    ("rule", "Linears", "duplicated at", "why"),
    ("norm", "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "input_layernorm", NORM),
    ("index", "self_attn.o_proj", "own input", ATTENTION),
    ("norm", "mlp.gate_proj, mlp.up_proj", "post_attention_layernorm", NORM),
    ("rows", "mlp.down_proj", "mlp.gate_proj, mlp.up_proj", "element by element from these rows"),
]


def test_the_printed_plan_of_llama(captured):
    title, *lines = str(plan_block(captured("llama")[0])).splitlines()
    assert title == "LlamaDecoderLayer: 2 blocks, model.layers.0 to model.layers.1"
    assert [tuple(re.split(r" {2,}", line)) for line in lines] == LLAMA
    assert len({line.index(row[3]) for line, row in zip(lines, LLAMA, strict=True)}) == 1, "columns are aligned"


def test_a_parallel_block_shares_one_norm(captured):
    plan = plan_block(captured("phi")[0])
    site = plan.site_of("mlp.fc1")
    assert site.consumers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    assert (site.rule, site.producers) == ("norm", ("input_layernorm",))
    assert plan.site_of("mlp.fc2").producers == ("mlp.fc1",)


def test_fused_gate_up_keeps_an_index_behind_the_chunk_and_says_so(captured):
    site = plan_block(captured("phi3")[0]).site_of("mlp.down_proj")
    assert (site.rule, site.reason) == ("index", "a part of a fused output (aten.chunk in mlp)")


def test_linears_that_read_the_block_input_share_an_index(captured):
    plan = plan_block(captured("olmo2")[0])
    assert plan.site_of("self_attn.k_proj").consumers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert plan.site_of("self_attn.k_proj").reason == "reads the block's input hidden_states"
    assert "post_attention_layernorm" in plan.site_of("mlp.up_proj").reason


def test_a_norm_that_a_router_reads_too_is_not_duplicated(captured):
    site = plan_block(captured("qwen2_moe")[0]).site_of("mlp.shared_expert.gate_proj")
    assert site.rule == "index"
    assert "post_attention_layernorm" in site.reason


def test_unsupported_weights_are_printed(captured):
    text = str(plan_block(captured("mixtral")[0]))
    assert "mlp.experts.gate_up_proj" in text
    assert "fused experts" in text
    assert "none  attn.c_attn.weight" in str(plan_block(captured("gpt2")[0]))


class Block(nn.Module):
    """Two Linears behind a norm, one behind them; `variant` breaks one condition of a rule."""

    def __init__(self, variant=""):
        super().__init__()
        self.variant = variant
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)
        self.gate, self.down = nn.Linear(32, 32), nn.Linear(32, 32)
        self.gain = nn.Parameter(torch.rand(32))

    def forward(self, x):
        h = self.norm(x)
        up, gate = self.up(h), self.gate(h)
        y = F.silu(gate) * up
        extra = {
            "norm read": lambda: h * 2,
            "norm twice": lambda: self.norm(h.detach() + x),
            "rows read": lambda: up * 2,
            "linear twice": lambda: self.down(x),
            "weight read": lambda: F.linear(x, self.down.weight),
        }.get(self.variant, lambda: 0)()
        if self.variant == "not zero":
            y = torch.sigmoid(gate) * F.softplus(up)
        if self.variant == "broadcast":
            y = y * self.gain
        if self.variant == "softmax":
            y = y.softmax(-1)
        return self.down(y) + extra


@pytest.mark.parametrize(
    ("variant", "linear", "rule", "reason"),
    [
        ("", "up", "norm", "only these"),
        ("", "down", "rows", "element by element"),
        ("norm read", "up", "index", "norm is also read by aten.mul in the block"),
        ("norm twice", "up", "index", "norm is called more than once"),
        ("rows read", "down", "index", "up is also read by aten.mul in the block"),
        ("linear twice", "down", "index", "called 2 times in a block"),
        ("not zero", "down", "index", "zero rows do not give a zero input"),
        ("broadcast", "down", "index", "aten.mul in the block broadcasts its operands"),
        ("softmax", "down", "index", "reads aten.softmax in the block"),
    ],
)
def test_each_condition_of_a_rule(variant, linear, rule, reason):
    plan = plan_block(capture_block(Block(variant), (torch.randn(2, 3, 32),)))
    site = plan.site_of(linear)
    assert site.rule == rule
    assert reason in site.reason


def test_a_linear_whose_weight_is_read_elsewhere_is_not_planned():
    plan = plan_block(capture_block(Block("weight read"), (torch.randn(2, 3, 32),)))
    assert ("down", "its weight is also read outside of its own forward") in plan.unsupported
    with pytest.raises(KeyError, match="down"):
        plan.site_of("down")


def test_a_linear_whose_weight_is_read_without_a_call_is_not_planned():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.called(x) + x @ self.read.weight.T

    plan = plan_block(capture_block(Block(), (torch.ones(1, 4, 32),)))
    assert [site.consumers for site in plan.sites] == [("called",)]
    assert plan.unsupported == (("read", "its weight is read, and it is never called"),)


def test_a_graph_alone_gives_the_same_sites(captured):
    kind = captured("mixtral")[0]
    assert plan_graph(kind.graph).sites == plan_block(kind).sites
