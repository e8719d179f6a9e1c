"""The shipped baselines, at a size for tests: same engine, same checkpoint, each with its own marks."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import bbb_ao.huggingface  # noqa: F401  registers the quantizer
from bbb_ao.packed_linear import packed_linears
from bbb_ao.recipes.compress import compress
from bbb_ao.recipes.loader import load_recipe

CPU = torch.device("cpu")
SMALL = ["sequences=8", "sequence_length=32", "micro_batch=4", "stages.*.batch_size=4", "stages.*.lr=1e-3"]
NAMES = ["rtn", "efficientqat", "efficientqat_small", "bitdistiller", "bitdistiller_small", "paretoq", "paretoq_small"]


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_trains_packs_and_loads(name, make_model, ids, tmp_path):
    recipe = load_recipe(name, SMALL)
    if recipe.generated:
        recipe = load_recipe(name, [*SMALL, "generated=4"])
    model = make_model("llama")
    result = compress(model, recipe, ids, tmp_path / "out", device=CPU)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, found = (m(ids, use_cache=False).logits for m in (result.model, loaded))
    assert torch.equal(found, expected)
    layers = packed_linears(loaded).values()
    assert {(layer.bits, layer.max_bits, layer.grid.group_size) for layer in layers} == {(2, 2, recipe.grid.group_size)}
    assert all(layer.ocs_index is None or layer.padding for layer in layers), "no baseline splits channels"
    assert not any("norm" in name and "weight" in name for name in changed(model, loaded)) or recipe.train_norms
    losses = [(fit.first_loss, fit.last_loss) for fits in result.fits for fit in fits]
    assert bool(losses) is (name != "rtn")


def changed(model, other):
    """Names of the parameters of `model` that `other` has with other values."""
    values = dict(other.named_parameters())
    return [n for n, p in model.named_parameters() if n in values and not torch.equal(p, values[n])]


def test_the_baselines_differ_as_their_papers_do():
    recipes = {name: load_recipe(name) for name in NAMES}
    for name in ("efficientqat", "efficientqat_small"):
        block, model = recipes[name].stages
        assert (block.scope, block.train, model.scope, model.train) == ("block", "all", "model", "scales")
        assert recipes[name].learned_scales
        assert recipes[name].grid.kind == "integer"
    for name in ("bitdistiller", "bitdistiller_small"):
        (stage,) = recipes[name].stages
        assert (stage.scope, stage.objective) == ("model", "mixed_kl")
        assert recipes[name].clip.asymmetric
    for name in ("paretoq", "paretoq_small"):
        (stage,) = recipes[name].stages
        assert (stage.scope, stage.objective) == ("model", "next_token")
        assert (recipes[name].grid.kind, recipes[name].grid.zero_point_bits) == ("half_step", 0)
    assert all(recipe.split is None for recipe in recipes.values())
