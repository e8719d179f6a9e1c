"""generate() with a static cache on a packed model: compiled without graph breaks, the same tokens as without."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

from bbb_ao import fuse_projections, set_bits


def generate(model, **settings) -> torch.Tensor:
    ids = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(3))
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, **settings
    )


@pytest.mark.parametrize(
    ("name", "fused"),
    [("llama", False), ("llama", True), ("qwen3", True), ("mistral", True), ("gemma2", True), ("phi3", False)],
)
def test_compiled_static_cache_gives_the_tokens_of_the_dynamic_one(make_packed, name: str, fused: bool) -> None:
    model = set_bits(make_packed(name), 4)
    expected = generate(model)
    if fused:
        fuse_projections(model)
    graphs: list[int] = []

    def backend(gm, inputs):
        graphs.append(sum("packed_linear" in str(node.target) for node in gm.graph.nodes))
        return gm.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    # generate() compiles on accelerators only, unless told.
    config._compile_all_devices = True
    tokens = generate(model, cache_implementation="static", compile_config=config)
    assert torch.equal(tokens, expected)
    blocks = model.config.num_hidden_layers
    projections = 4 if fused or name == "phi3" else 7
    assert set(graphs) == {projections * blocks}, "no break in any graph"
    # The position in a sliding window is a Python number in transformers, and a dense model compiles as often.
    sliding = getattr(model.config, "sliding_window", None) is not None
    assert len(graphs) == 1 or sliding, "one graph for all decoding steps"


def test_compiled_decoding_step_equals_eager_with_inductor(make_packed) -> None:
    """One row through Inductor, caches and all: the CPU's row path on the fused weight."""
    model = set_bits(make_packed("llama", ratio=0.0), 2)
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    fuse_projections(model)
    ids = torch.randint(2, 128, (1, 5), generator=torch.Generator().manual_seed(3))
    results = []
    for step in (model.forward, torch.compile(model.forward, fullgraph=True, dynamic=False)):
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            out = [step(ids[:, :1] + i, past_key_values=cache, use_cache=True).logits for i in range(2)]
        results.append(torch.cat(out))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
