"""What must hold on every architecture: the split identity, the same tokens from generate(), and its undoing."""

import pytest
import torch

from bbb_ao.passes import apply_plan, choose_indices, float64_casts, plan_block, undo_plan, verify_block

ARCHITECTURES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi",
    "gpt_neox",
    "phi3",
    "opt",
    "olmo2",
    "bloom",
    "falcon",
    "mixtral",
    "qwen2_moe",
]
RATIO = 0.4


def rewrite(model, kinds, ratio=RATIO):
    modules = dict(model.named_modules())
    for kind in kinds:
        plan = plan_block(kind)
        for name in kind.names:
            apply_plan(modules[name], plan, choose_indices(modules[name], plan, ratio))
    return [modules[name] for kind in kinds for name in kind.names]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_split_blocks_equal_the_original_in_float64(captured, name):
    for kind in captured(name):
        assert not kind.reason
        plan = plan_block(kind)
        indices = choose_indices(kind.block, plan, RATIO)
        assert set(indices) == {site.name for site in plan.sites}
        result = verify_block(kind, plan, indices)
        assert result.graph is not None
        assert max(result.capture, result.graph, result.live) <= 1e-12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_gives_the_same_tokens_before_and_after_and_undo_gives_the_weights_back(make_model, captured, name):
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(1))

    def generate():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)

    expected = generate()
    assert expected.unique().numel() > 12, "a model that repeats one token would pass whatever is rewritten"
    blocks = rewrite(model, captured(name))
    assert torch.equal(generate(), expected)
    for block in blocks:
        undo_plan(block)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_split_model_equals_the_original_in_float64(make_model, captured, name):
    model, kinds = make_model(name).double(), captured(name)
    ids = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), float64_casts():
        expected = model(ids).logits
        rewrite(model, kinds)
        logits = model(ids).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert not torch.equal(logits, expected), "splitting changes the order of summation, so something was rewritten"


def test_every_linear_of_the_blocks_is_a_consumer_of_one_site(captured):
    for name in ARCHITECTURES:
        for kind in captured(name):
            consumers = [linear for site in plan_block(kind).sites for linear in site.consumers]
            linears = [fqn for fqn, module in kind.block.named_modules() if isinstance(module, torch.nn.Linear)]
            assert sorted(consumers) == sorted(linears)
