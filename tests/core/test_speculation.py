"""Drafts of narrow widths, verified by wide ones: the same tokens, from the same tensors."""

import copy

import pytest
import torch

from bbb_ao.packed_linear import packed_linears, set_bits
from bbb_ao.passes.fuse_projections import fuse_projections
from bbb_ao.speculation import at_bits, speculate
from core.conftest import packed_llama

PROMPTS = ([[1]], [[1, 5, 9, 33, 2, 70]], [[4, 4, 90, 127, 0, 3, 17, 17, 64, 2, 99]])
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    return set_bits(copy.deepcopy(packed_llama()), 8)


def storages(model) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_tree_shares_every_tensor(model, fused: bool) -> None:
    model = copy.deepcopy(model)
    if fused:
        assert fuse_projections(model).fused
    tree = at_bits(model, 2)
    assert storages(tree) == storages(model)
    assert {layer.bits for layer in packed_linears(tree).values()} == {2}
    assert {layer.bits for layer in packed_linears(model).values()} == {8}
    ids = torch.tensor(PROMPTS[1])
    with torch.no_grad():
        narrow, wide = tree(ids).logits, model(ids).logits
        assert torch.equal(narrow, set_bits(copy.deepcopy(model), 2)(ids).logits)
        assert torch.equal(wide, model(ids).logits)
    shared = {id(layer.fused) for layer in packed_linears(model).values() if layer.fused}
    for layer in packed_linears(tree).values():
        assert id(layer.fused) not in shared
        assert layer.fused is None or layer.fused.holds(layer)


@pytest.fixture(scope="module")
def greedy(model) -> list[torch.Tensor]:
    return [model.generate(torch.tensor(ids), max_new_tokens=NEW_TOKENS, do_sample=False) for ids in PROMPTS]


@pytest.mark.parametrize(("draft_bits", "draft_tokens"), [(2, 1), (2, 5), (4, 3)])
def test_tokens_are_those_of_greedy_decoding(model, greedy, draft_bits: int, draft_tokens: int) -> None:
    draft = at_bits(model, draft_bits)
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        found = speculate(model, draft, torch.tensor(prompt), draft_tokens, max_new_tokens=NEW_TOKENS)
        assert torch.equal(found.sequences, expected)
        assert found.tokens == NEW_TOKENS == found.rounds + found.accepted
        assert 0 <= found.accepted <= found.drafted <= draft_tokens * found.rounds


@pytest.mark.parametrize("draft_tokens", [2, 16])
def test_end_of_text_ends_it_at_the_same_token(model, greedy, draft_tokens: int) -> None:
    ids = torch.tensor(PROMPTS[1])
    draft = at_bits(model, 4)
    for end in list(dict.fromkeys(greedy[1][0, ids.shape[1] :].tolist()))[:3]:
        settings = {"max_new_tokens": NEW_TOKENS, "eos_token_id": end}
        expected = model.generate(ids, do_sample=False, **settings)
        assert expected[0, -1] == end
        assert torch.equal(speculate(model, draft, ids, draft_tokens, **settings).sequences, expected)


def test_a_draft_of_the_same_width_is_always_accepted(model) -> None:
    found = speculate(model, at_bits(model, 8), torch.tensor(PROMPTS[1]), 3, max_new_tokens=NEW_TOKENS)
    assert found.accepted == found.drafted
    assert found.rounds == NEW_TOKENS / 4
    assert "(100 %), 3 verifying passes" in str(found)


@pytest.mark.parametrize("draft_tokens", [0, -1, 1.5, True])
def test_bad_lengths_are_refused(model, draft_tokens) -> None:
    with pytest.raises(ValueError, match="draft_tokens"):
        speculate(model, model, torch.tensor([[1]]), draft_tokens)
    with pytest.raises(ValueError, match="one sequence"):
        speculate(model, model, torch.tensor([[1], [2]]))
