"""Outliers on demand: the function stays, the tails grow."""

import copy

import pytest
import torch

from bbb_ao.errors import NumericsError
from bbb_ao.passes import find_blocks, find_pairs, float64_casts, make_outliers, plan_block
from bbb_ao.passes.outliers import ScalePair

GATED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
EXPECTED = {
    "llama": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "opt": {
        "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.v_proj": ("self_attn.out_proj",),
        "final_layer_norm": ("fc1",),
        # relu(f x) = f relu(x) for f > 0.
        "fc1": ("fc2",),
    },
    "gpt_neox": {
        "input_layernorm": ("attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
}


def logits(model, seed=0):
    ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), float64_casts():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", EXPECTED)
def test_the_pairs_are_those_that_keep_the_function(name, captured):
    (kind,) = captured(name)
    pairs = find_pairs(kind, plan_block(kind))
    assert {pair.producer: tuple(sorted(pair.consumers)) for pair in pairs} == {
        producer: tuple(sorted(consumers)) for producer, consumers in EXPECTED[name].items()
    }
    assert all(pair.form == "weight" for pair in pairs)


@pytest.mark.parametrize("where", ["weights", "activations"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt", "gpt_neox", "phi3"])
def test_the_whole_model_is_the_same_in_float64(name, where, make_model):
    # 1 + weight, Gemma's, is not exact in less.
    model = make_model(name).to(torch.float64 if name == "gemma2" else torch.float32)
    before = logits(copy.deepcopy(model).double())
    found = make_outliers(model, share=0.05, strength=32, where=where)
    after = logits(model.double())
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    assert list(found) == [block for block, _ in find_blocks(model)]
    assert all(found.values())


def test_gemmas_norms_multiply_by_one_plus_their_weight(captured):
    kind = captured("gemma2")[0]
    forms = {pair.producer: pair.form for pair in find_pairs(kind, plan_block(kind))}
    assert forms["input_layernorm"] == "1 + weight"
    assert forms["mlp.up_proj"] == "weight"


def test_chosen_columns_grow_by_powers_of_two_and_others_stay(make_model):
    model, plain = make_model("llama"), make_model("llama")
    make_outliers(model, share=0.1, strength=16, where="weights", seed=3)
    ratio = model.model.layers[1].mlp.down_proj.weight / plain.model.layers[1].mlp.down_proj.weight
    columns = ratio[0]
    assert torch.equal(ratio, columns.expand_as(ratio))
    assert set(columns.tolist()) <= {1.0, 2.0, 4.0, 8.0, 16.0}
    assert int((columns > 1).sum()) == round(0.1 * 96)
    rows = model.model.layers[1].mlp.up_proj.weight / plain.model.layers[1].mlp.up_proj.weight
    # up_proj's own columns are scaled with its norm.
    norm = plain.model.layers[1].post_attention_layernorm.weight / model.model.layers[1].post_attention_layernorm.weight
    torch.testing.assert_close(rows, norm[None, :] / columns[:, None], rtol=0, atol=0)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, same in ((3, True), (4, False)):
        again = make_model("llama")
        make_outliers(again, share=0.1, strength=16, where="weights", seed=seed)
        assert all(torch.equal(first[name], tensor) for name, tensor in again.state_dict().items()) is same


def test_powers_of_two_are_exact_in_bfloat16_and_gemmas_norms_are_refused(make_model):
    model = make_model("llama").to(torch.bfloat16)
    before = logits(copy.deepcopy(model).double())
    make_outliers(model)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert (logits(model.double()) - before).abs().max() <= 1e-10 * before.abs().max()
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: expected a relative error .*; fix: load .* float64"):
        make_outliers(make_model("gemma2"), share=0.5)


def test_value_heads_are_spread_over_the_query_heads_that_share_them():
    pair = ScalePair("v", ("o",), repeats=2, head=3)
    assert pair.spread(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
