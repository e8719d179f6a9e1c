"""A packed model on a GPU: compiled, replayed from CUDA graphs, fused; all equal to eager single products."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, StaticCache

from bbb_ao import fuse_projections, pack_head, set_bits, unfuse_projections
from bbb_ao.convert import convert_model
from bbb_ao.packed_linear import packed_linears
from bbb_ao.passes.fold_norms import FoldNorms
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import Recipe, Split, Stage

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice: TF32 for the float32 product of the rotary embedding, how it splits a softmax.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"),
]
MODES = [None, "reduce-overhead", "max-autotune"]
# bfloat16 keeps 8 bits; a compiled model rounds elsewhere than an eager one, through two blocks.
CLOSE = {"rtol": 0.05, "atol": 0.05}


@pytest.fixture(scope="module")
def model():
    """A 2-layer Llama with split channels, all widths and biases in its attention, in bfloat16; do not change it."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=416,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    split = Split(ratio_min=0.2, ratio_max=0.2, metric="weight")
    prepare_student(made, Recipe(name="test", stages=(Stage(weight_bits=2),), split=split), None)
    set_training_bits(made, 8, None)
    return convert_model(made, 8).to(torch.bfloat16).cuda()


def own(model, bits: int = 2, act_bits: int | None = None, fused: bool = True):
    twin = set_bits(copy.deepcopy(model), bits)
    for layer in packed_linears(twin).values():
        layer.act_bits = act_bits
    if fused:
        assert len(fuse_projections(twin).fused) == 4
    return twin


def make_ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(2, 512, (rows, tokens), generator=torch.Generator().manual_seed(0)).cuda()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("act_bits", [None, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 40)])
def test_fused_equals_single_products(model, shape: tuple[int, int], bits: int, act_bits: int | None) -> None:
    fused, ids = own(model, bits, act_bits), make_ids(*shape)
    got = logits(fused, ids)
    unfuse_projections(fused)
    expected = logits(fused, ids)
    if act_bits is None:
        torch.testing.assert_close(got, expected, **CLOSE)
    else:
        # A last bit of bfloat16 may move an activation to the next of four levels, here and there.
        assert (got - expected).square().mean() <= 0.02 * expected.square().mean()
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_and_replayed_equals_eager(model, mode: str | None, fused: bool) -> None:
    twin = own(model, fused=fused)
    torch._dynamo.reset()
    compiled = torch.compile(twin, mode=mode, fullgraph=True, dynamic=False)
    for seed in range(4):
        ids = (make_ids() + seed) % 512
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(logits(compiled, ids), logits(twin, ids), **CLOSE)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 9)])
def test_norms_in_products_equal_eager(model, shape: tuple[int, int]) -> None:
    twin = own(model)
    torch._dynamo.reset()
    options = {"post_grad_custom_pre_pass": FoldNorms(), "triton.cudagraphs": True}
    compiled = torch.compile(twin, fullgraph=True, dynamic=False, options=options)
    for seed in range(4):
        ids = (make_ids(*shape) + seed) % 512
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(logits(compiled, ids), logits(twin, ids), **CLOSE)


@pytest.mark.parametrize("act_bits", [None, 2])
def test_captured_graph_equals_eager_and_replays_bit_for_bit(model, act_bits: int | None) -> None:
    twin, ids = own(model, act_bits=act_bits), make_ids(1, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [logits(twin, torch.full_like(ids, token)).clone() for token in (5, 77, 300)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = logits(twin, ids)
    replays: list[list[torch.Tensor]] = []
    for _ in range(3):
        replays.append([])
        for token in (5, 77, 300):
            ids.fill_(token)
            graph.replay()
            replays[-1].append(output.clone())
    for results in replays:
        for got, first, eager in zip(results, replays[0], expected, strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, eager, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_static_cache_steps_equal_the_whole_sequence(model, mode: str | None) -> None:
    """Decoding with a static cache, compiled, gives the logits of one pass over all tokens."""
    twin, ids = own(model, 4), make_ids(2, 12)
    expected = logits(twin, ids)
    torch._dynamo.reset()
    step = torch.compile(twin.forward, mode=mode, fullgraph=True, dynamic=False)
    cache = StaticCache(config=twin.config, max_cache_len=16)
    with torch.no_grad():
        twin(ids[:, :4], past_key_values=cache, use_cache=True)
        for place in range(4, 12):
            torch.compiler.cudagraph_mark_step_begin()
            token = ids[:, place : place + 1].clone()
            got = step(token, past_key_values=cache, use_cache=True).logits[:, 0].float()
            torch.testing.assert_close(got, expected[:, place], **CLOSE)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_generate_compiles_its_steps_without_breaks(model, mode: str) -> None:
    twin = pack_head(own(model, 4), 8)
    ids = make_ids(2, 6)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = twin.generate(ids, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
    tokens = twin.generate(ids, cache_implementation="static", compile_config=config, **settings)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "generate() compiled nothing"
    # Greedy choices may differ where two logits are within rounding; the first ones must not.
    assert torch.equal(tokens[:, :8], expected[:, :8])
