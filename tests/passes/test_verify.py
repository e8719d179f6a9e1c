from dataclasses import replace

import pytest
import torch

from bbb_ao.errors import NumericsError
from bbb_ao.passes import (
    apply_plan,
    capture_block,
    choose_indices,
    float64_casts,
    plan_block,
    verified_plan,
    verify,
    verify_block,
)


def test_a_rewrite_that_changes_numbers_is_refused_by_name(captured, monkeypatch):
    def wrong(block, plan, indices):
        apply_plan(block, plan, indices)
        with torch.no_grad():
            block.mlp.up_proj.weight[5, 70] *= 1.001

    monkeypatch.setattr(verify, "apply_plan", wrong)
    kind = captured("llama")[0]
    plan = plan_block(kind)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: rewritten block: expected a relative error"):
        verify_block(kind, plan, choose_indices(kind.block, plan, 0.4))


def test_a_rewrite_that_does_not_run_is_refused_by_name(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    indices = {"mlp.gate_proj": choose_indices(kind.block, plan, 0.4)["mlp.gate_proj"]}
    sites = tuple(replace(s, producers=("input_layernorm",)) if s.rule == "norm" else s for s in plan.sites)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: rewritten block does not run: RuntimeError"):
        verify_block(kind, replace(plan, sites=sites), indices)


class ChecksWidth(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        h = self.norm(x)
        assert h.shape[-1] == 32, "width"
        return self.down(self.up(h).relu())


def test_a_rule_that_the_live_block_refuses_becomes_an_index_with_the_reason():
    kind = capture_block(ChecksWidth(), (torch.randn(2, 32),), names=("layers.5",))
    assert [site.rule for site in plan_block(kind).sites] == ["norm", "rows"]
    plan = verified_plan(kind)
    assert [site.rule for site in plan.sites] == ["index", "rows"]
    assert plan.sites[0].reason == "norm rule refused: layers.5: rewritten block does not run: AssertionError: width"
    assert verify_block(kind, plan, choose_indices(kind.block, plan, 1.0)).live <= 1e-12


def test_a_plan_that_holds_stays_as_it_is(captured):
    kind = captured("llama")[0]
    assert verified_plan(kind) == plan_block(kind)


def test_an_error_above_the_tolerance_names_form_and_size(captured):
    kind = captured("llama")[0]
    plan = plan_block(kind)
    indices = choose_indices(kind.block, plan, 0.4)
    with pytest.raises(NumericsError, match=r"model\.layers\.1: rewritten \w+: expected .* at most 0 .*, got \d"):
        verify_block(kind, plan, indices, name="model.layers.1", tolerance=0.0)


def test_nan_is_an_error_not_a_pass():
    linear = torch.nn.Linear(32, 32)
    block = torch.nn.Sequential(torch.nn.LayerNorm(32), linear)
    kind = capture_block(block, (torch.randn(2, 32),), names=("layers.3",))
    plan = plan_block(kind)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.3: captured graph: .*nan"):
        verify_block(kind, plan, {})


def test_other_blocks_of_a_kind_are_verified_with_their_own_weights(make_model, captured):
    kind = captured("llama")[0]
    other = make_model("llama").model.layers[1]
    plan = plan_block(kind)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    result = verify_block(kind, plan, choose_indices(other, plan, 0.2), name="model.layers.1", block=other)
    assert result.block == "model.layers.1"
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_float64_stays_float64_through_narrow_casts():
    x = torch.randn(4, 8, dtype=torch.float64)
    with float64_casts():
        y = x.float().to(torch.bfloat16).softmax(-1, dtype=torch.float32)
    assert y.dtype == torch.float64
    assert torch.equal(y, x.softmax(-1))
