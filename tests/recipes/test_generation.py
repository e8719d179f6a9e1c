"""Text of the full-precision model's own."""

import pytest
import torch
from torch import nn

from bbb_ao.errors import DataError, NumericsError
from bbb_ao.recipes.compress import train
from bbb_ao.recipes.generation import PROMPT, generate_sequences
from bbb_ao.recipes.stages import Stage

CPU = torch.device("cpu")


def test_at_a_low_temperature_it_is_greedy_generation(make_model, ids):
    model = make_model("llama")
    written = generate_sequences(model, ids, 3, 0, CPU, batch_size=2, temperature=1e-6)
    greedy = model.generate(ids[:3, :PROMPT], do_sample=False, max_length=ids.shape[1], min_length=ids.shape[1])
    assert torch.equal(written, greedy)


def test_a_model_that_hands_over_no_cache_writes_the_same(make_model, ids):
    class Cacheless(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, past_key_values, use_cache):
            assert past_key_values is None
            return self.model(ids, use_cache=False)

    model = make_model("llama")
    expected = generate_sequences(model, ids[:, :12], 4, 0, CPU)
    assert torch.equal(generate_sequences(Cacheless(model), ids[:, :12], 4, 0, CPU), expected)


def test_samples_follow_the_seed_and_the_distribution(make_model, ids):
    model = make_model("llama")
    first, same, other = (generate_sequences(model, ids, 400, seed, CPU) for seed in (0, 0, 1))
    assert first.shape == (400, ids.shape[1])
    assert first.dtype == torch.int64
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :PROMPT], ids[torch.arange(400) % 8, :PROMPT])
    with torch.no_grad():
        log_p = model(first, use_cache=False).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    surprise = -log_p.gather(-1, first[:, PROMPT:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    # Sampling gives the entropy on average; 5 standard errors.
    error = float((surprise - entropy).std() / surprise.numel() ** 0.5)
    assert abs(float((surprise - entropy).mean())) < 5 * error


def test_a_recipe_writes_its_text_or_takes_what_is_given(make_model, make_recipe, ids):
    stages = (Stage(epochs=0.5), Stage(scope="model", text="both", epochs=0.5, lr=1e-3))
    recipe = make_recipe(stages=stages, generated=4)
    model = make_model("llama")
    text = generate_sequences(model, ids, 4, recipe.seed, CPU)
    states = [train(model, ids, recipe, CPU, generated=given).model.state_dict() for given in (None, text)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(DataError, match=r"^generated: expected \[4, 32\] ids, got \[3, 32\]; fix: "):
        train(model, ids, recipe, CPU, generated=text[:3])


def test_a_model_of_nan_is_refused(make_model, ids):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^generation: .*; fix: "):
        generate_sequences(model, ids, 1, 0, CPU)
