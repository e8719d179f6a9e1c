"""The head alone gives the model's own logits from the states behind the last block, and holds nothing else."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from bbb_ao.errors import ModelError
from bbb_ao.passes import find_blocks
from bbb_ao.recipes import compress
from bbb_ao.recipes.head import Head
from bbb_ao.recipes.streams import working_copy

CPU = torch.device("cpu")
KINDS = ["llama", "tied", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi", "falcon", "bloom", "bamba", "mixtral"]


@pytest.fixture
def make(make_model):
    """A function: architecture -> a model, whose embedding and head are one where it is "tied"."""

    def model(name):
        made = make_model("llama" if name == "tied" else name)
        if name == "tied":
            made.lm_head.weight = made.model.embed_tokens.weight
        return made

    return model


def last_states(model, ids):
    """What leaves the last block, and the logits."""
    found = []
    handle = find_blocks(model)[-1][1].register_forward_hook(lambda block, args, output: found.append(output))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    handle.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0]), logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_the_models_own(name, dtype, make, ids):
    model = make(name).to(dtype)
    states, logits = last_states(model, ids)
    head = Head(model, ids[:1])
    assert torch.equal(head(states), logits)
    assert torch.equal(model(ids, use_cache=False).logits, logits), "the model is as it was"
    working = working_copy(head, CPU)
    assert {tensor.dtype for tensor in working.parameters()} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in working.parameters())
    if dtype == torch.float32:
        assert torch.equal(working(states), logits)


@pytest.mark.parametrize("name", KINDS)
def test_it_shares_the_weights_outside_the_blocks_alone(name, make, ids):
    model = make(name)
    head = Head(model, ids[:1])
    inside = {id(tensor) for _, block in find_blocks(model) for tensor in block.parameters()}
    embedding, projection = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = {id(tensor) for tensor in model.parameters()} - inside
    if embedding is not projection:
        outside.remove(id(embedding))
    assert {id(tensor) for tensor in head.parameters()} == outside


def test_the_gradient_reaches_the_states(make, ids):
    model = make("gemma2")
    states, _ = last_states(model, ids)
    given = states.clone().requires_grad_()
    working_copy(Head(model, ids[:1]), CPU)(given).square().mean().backward()
    expected = states.clone().requires_grad_()
    logits = model.lm_head(model.model.norm(expected))
    cap = model.config.final_logit_softcapping
    (cap * torch.tanh(logits / cap)).square().mean().backward()
    torch.testing.assert_close(given.grad, expected.grad)


def test_a_working_copy_is_gone_when_nobody_holds_it(make, ids):
    """At once: memory of a GPU would otherwise wait for the garbage collector."""
    working = working_copy(Head(make("llama"), ids[:1]), CPU)
    working(torch.randn(2, 8, 64))
    alive = weakref.ref(working.get_parameter("model.lm_head.weight"))
    gc.disable()
    try:
        del working
        assert alive() is None
    finally:
        gc.enable()


def test_logits_that_need_more_than_the_last_states_are_refused(make, ids):
    model = copy.deepcopy(make("llama"))

    class WithTokens(type(model)):
        def forward(self, input_ids=None, **values):
            output = super().forward(input_ids, **values)
            if input_ids is not None:
                output.logits = output.logits + input_ids[..., None]
            return output

    model.__class__ = WithTokens
    with pytest.raises(ModelError, match=r"^WithTokens: logits: expected them to follow .*; fix: --set logits=0"):
        Head(model, ids[:1])


class Checking(LlamaForCausalLM):
    """Needs ids."""

    def forward(self, input_ids=None, **values):
        if input_ids is None:
            raise IndexError("no ids")
        return super().forward(input_ids, **values)


def test_a_model_that_does_not_run_on_the_states_alone_is_refused_before_it_writes_text(
    make, ids, make_recipe, monkeypatch
):
    model = copy.deepcopy(make("llama"))
    model.__class__ = Checking
    monkeypatch.setattr(compress, "generate_sequences", lambda *arguments: pytest.fail("text was written"))
    with pytest.raises(ModelError, match=r"^Checking: logits: .*, got IndexError: no ids; fix: --set logits=0"):
        compress.train(model, ids, make_recipe(lookahead=1, logits=1.0, generated=2), CPU)


def test_logits_that_overflow_in_the_model_are_not_compared(make, ids):
    model = copy.deepcopy(make("llama"))
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.inf
    states, logits = last_states(model, ids)
    assert not bool(logits[..., 3].isfinite().any())
    assert torch.equal(Head(model, ids[:1])(states)[..., 4:], logits[..., 4:])
