import torch
from torch import nn

from bbb_ao.passes import bind, capture_block, capture_model, choose_indices, plan_block, verify_block


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden.relu() if bool(hidden.sum() > 0) else hidden)


def test_one_block_of_each_kind_is_captured(captured):
    assert [kind.names for kind in captured("llama")] == [("model.layers.0", "model.layers.1")]
    sliding, full = captured("gemma3_text")
    assert sliding.names == tuple(f"model.layers.{i}" for i in range(5))
    assert full.names == ("model.layers.5",)


def test_parameters_of_the_graph_are_those_of_the_block(captured):
    kind = captured("llama")[0]
    own = dict(kind.block.named_parameters())
    assert dict(kind.graph.named_parameters()).keys() == own.keys()
    assert all(parameter is own[name] for name, parameter in kind.graph.named_parameters())


def test_a_bound_graph_computes_with_the_other_block(make_model):
    model = make_model("llama")
    kind = capture_model(model)[0]
    assert kind.graph is not None
    other = model.model.layers[1]
    with torch.no_grad():
        expected = other(*kind.args, **kind.kwargs)
        assert torch.equal(bind(kind.graph, other)(*kind.args, **kind.kwargs), expected)
        assert not torch.equal(kind.graph(*kind.args, **kind.kwargs), expected)


def test_the_training_flag_and_the_hooks_are_restored(make_model):
    model = make_model("llama").train()
    capture_model(model, torch.ones(1, 4, dtype=torch.int64))
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[0]._forward_pre_hooks


def test_a_block_that_cannot_be_captured_falls_back_to_one_index_a_linear_and_says_why():
    kind = capture_block(Branches(), (torch.randn(2, 3, 32),), names=("layers.7",))
    assert kind.graph is None
    plan = plan_block(kind)
    assert [(site.rule, site.consumers) for site in plan.sites] == [("index", ("up",)), ("index", ("down",))]
    assert "layers.7" in str(plan)
    assert f"not captured, one index for each Linear: {kind.reason}" in str(plan)
    result = verify_block(kind, plan, choose_indices(kind.block, plan, 0.5))
    assert result.graph is None
    assert result.live <= 1e-12
