"""Attention of one token in one launch, in Triton's interpreter where there is no GPU, against float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytest.importorskip("triton", reason="the kernel needs Triton, whose interpreter runs it on a CPU")

from decode_attention import decode_attention

# The interpreter multiplies the bits of bfloat16.
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
EPS = torch.finfo(DTYPE).eps
SCALING = 0.09


def draw(batch: int, heads: int, groups: int, length: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Query, key and value as parts of one product, cosine and sine of an angle, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn((batch, 1, heads + 2 * groups, size), generator=generator).to(DEVICE, DTYPE)
    angle = torch.rand((1, 1, size // 2), generator=generator).repeat(1, 1, 2) * 6
    stored = [torch.randn((batch, groups, length, size), generator=generator).to(DEVICE, DTYPE) for _ in range(2)]
    own = product.split((heads, groups, groups), 2)
    return [*own, angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE), *stored]


def expected_cache(operands: list[torch.Tensor], position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(turned query, keys, values) with the token's own, in float64, each rounded once as what is stored."""
    query, key, value, cosine, sine, keys, values = operands
    wide = (part.double() for part in (query.transpose(1, 2), key.transpose(1, 2), cosine, sine))
    turned, own = (part.to(DTYPE).double() for part in apply_rotary_pos_emb(*wide))
    keys, values = keys.double(), values.double()
    keys[:, :, position], values[:, :, position] = own[:, :, 0], value.double()[:, 0]
    return turned, keys, values


@pytest.mark.memcheck
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "size", "position"),
    [
        (1, 4, 2, 9, 32, 0),  # the first place alone, all other tiles empty
        (2, 8, 2, 300, 32, 299),
        (1, 8, 1, 512, 64, 100),
        (2, 2, 2, 257, 16, 256),  # a head of its own for each query
    ],
)
def test_it_turns_stores_and_attends_up_to_the_position(batch, heads, groups, length, size, position) -> None:
    operands = draw(batch, heads, groups, length, size)
    keys, values = operands[5:]
    # What comes later, and what is replaced, must not be seen.
    keys[:, :, position:] = 1e4
    values[:, :, position:] = 1e4
    query, all_keys, all_values = expected_cache(operands, position)
    y = decode_attention(*operands, torch.tensor([position], device=DEVICE), SCALING)
    # Sums in float32 may round a turned key to its neighbour.
    assert torch.allclose(keys.double(), all_keys, rtol=EPS, atol=1e-6)
    assert torch.equal(values.double(), all_values)
    seen = [part[:, :, : position + 1].repeat_interleave(heads // groups, 1) for part in (keys.double(), all_values)]
    weights = (query @ seen[0].transpose(-1, -2) * SCALING).softmax(-1)
    expected = (weights @ seen[1]).transpose(1, 2)
    assert y.shape == (batch, 1, heads, size)
    # Weights and result are each rounded once, by half of EPS; where a turned query was rounded to its neighbour,
    # scores move by no more than EPS of their sizes.
    moved = EPS * (query.abs() @ seen[0].abs().transpose(-1, -2)).amax() * SCALING
    bound = (EPS * 0.51 + 2 * moved) * ((weights @ seen[1].abs()).transpose(1, 2) + expected.abs()) + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()


def test_every_launch_leaves_no_trace_in_the_next() -> None:
    operands = draw(1, 8, 2, 64, 32)
    position = torch.tensor([63], device=DEVICE)
    first = decode_attention(*operands, position, SCALING)
    decode_attention(*draw(1, 8, 2, 64, 32, seed=1), position, SCALING)
    assert torch.equal(decode_attention(*operands, position, SCALING), first)


def test_shapes_that_it_does_not_take_are_refused_and_nothing_is_stored() -> None:
    position = torch.tensor([3], device=DEVICE)
    for shape in ((1, 4, 2, 4096, 32), (1, 6, 2, 64, 32), (1, 4, 2, 64, 24)):
        operands = draw(*shape)
        before = operands[5].clone()
        with pytest.raises(ValueError, match="attention: expected one token"):
            decode_attention(*operands, position, SCALING)
        assert torch.equal(operands[5], before)
    operands = draw(1, 4, 2, 64, 32)
    operands[5] = operands[5].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(*operands, position, SCALING)


def test_the_operator_is_registered_rightly() -> None:
    operands = (*draw(1, 4, 2, 32, 16), torch.tensor([7], device=DEVICE), 0.25)
    torch.library.opcheck(decode_attention, operands)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_in_a_graph_it_sees_what_the_launch_before_it_wrote() -> None:
    operands = draw(1, 32, 8, 512, 128)
    source, position = torch.empty(1, 1, 48, 128, device=DEVICE, dtype=DTYPE), torch.tensor([0], device=DEVICE)

    # Lets the next launch start before it has written.
    @torch.compile(options={"triton.enable_pdl": True})
    def product(source):
        return source * 2

    def step() -> torch.Tensor:
        return decode_attention(*product(source).split((32, 8, 8), 2), *operands[3:], position, SCALING)

    source.normal_()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for place in (0, 31, 32, 300, 511):
        position.fill_(place)
        source.normal_()
        own = [*(source * 2).split((32, 8, 8), 2), operands[3], operands[4]]
        query, keys, values = expected_cache([*own, *operands[5:]], place)
        graph.replay()
        assert torch.equal(operands[6].double(), values)
        assert torch.allclose(operands[5].double(), keys, rtol=EPS, atol=1e-6)
        seen = [part[:, :, : place + 1].repeat_interleave(4, 1) for part in (keys, values)]
        expected = ((query @ seen[0].transpose(-1, -2) * SCALING).softmax(-1) @ seen[1]).transpose(1, 2)
        torch.testing.assert_close(y.double(), expected, rtol=8 * EPS, atol=8 * EPS)
