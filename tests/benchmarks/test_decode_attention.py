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
NAMES = ("query", "key", "value", "cosine", "sine", "keys", "values")
SHAPES = [
    (1, 4, 2, 9, 32, 0),  # the first place alone, all other tiles empty
    (2, 8, 2, 300, 32, 299),
    (1, 8, 1, 512, 64, 100),
    (2, 2, 2, 257, 16, 256),  # a head of its own for each query
]
shapes = pytest.mark.parametrize(("batch", "heads", "groups", "length", "size", "position"), SHAPES)


def draw(batch: int, heads: int, groups: int, length: int, size: int, turns: float = 6.0) -> dict[str, torch.Tensor]:
    """Query, key and value as parts of one product; cosine and sine of angles up to `turns`; keys and values."""
    generator = torch.Generator().manual_seed(0)
    product = torch.randn((batch, 1, heads + 2 * groups, size), generator=generator).to(DEVICE, DTYPE)
    angle = torch.rand((1, 1, size // 2), generator=generator).repeat(1, 1, 2) * turns
    stored = [torch.randn((batch, groups, length, size), generator=generator).to(DEVICE, DTYPE) for _ in range(2)]
    own = product.split((heads, groups, groups), 2)
    return dict(zip(NAMES, (*own, angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE), *stored), strict=True))


def attend(operands: dict[str, torch.Tensor], position: int | torch.Tensor) -> torch.Tensor:
    place = position if isinstance(position, torch.Tensor) else torch.tensor([position], device=DEVICE)
    # What the launch allocates is where these were.
    held = [torch.full((2**size,), torch.nan, device=DEVICE, dtype=DTYPE) for size in range(6, 18) for _ in range(3)]
    del held
    return decode_attention(*operands.values(), place, SCALING)


def turned(operands: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key with their rotary embedding, [batch, heads, 1, head_dim], in float64, rounded once."""
    parts = [operands[name].transpose(1, 2) for name in ("query", "key")] + [operands["cosine"], operands["sine"]]
    query, key = (part.to(DTYPE).double() for part in apply_rotary_pos_emb(*(part.double() for part in parts)))
    return query, key


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax attention, its bound): weights and result are each rounded once, by half of EPS; the rest is float32."""
    keys, values = (part.double().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
    weights = (query @ keys.transpose(-1, -2) * SCALING).softmax(-1)
    y = weights @ values
    return y.transpose(1, 2), (EPS * 0.51 * (weights @ values.abs() + y.abs()) + 1e-6).transpose(1, 2)


@pytest.mark.memcheck
@shapes
def test_it_stores_and_attends_up_to_the_position(batch, heads, groups, length, size, position) -> None:
    # Turned by nothing, so that query and key are exact.
    operands = draw(batch, heads, groups, length, size, turns=0)
    keys, values = operands["keys"], operands["values"]
    # What comes later, and what is replaced, must not be seen.
    keys[:, :, position:] = 1e4
    values[:, :, position:] = 1e4
    y = attend(operands, position)
    assert y.shape == (batch, 1, heads, size)
    assert torch.equal(keys[:, :, position], operands["key"][:, 0])
    assert torch.equal(values[:, :, position], operands["value"][:, 0])
    assert (keys[:, :, position + 1 :] == 1e4).all()
    query = operands["query"].transpose(1, 2).double()
    exact, bound = expected(query, keys[:, :, : position + 1], values[:, :, : position + 1])
    assert ((y.double() - exact).abs() <= bound).all()


@shapes
def test_query_and_key_are_turned(batch, heads, groups, length, size, position) -> None:
    operands = draw(batch, heads, groups, length, size)
    query, key = turned(operands)
    y = attend(operands, position)
    # Sums in float32 may round a turned key to its neighbour.
    assert torch.allclose(operands["keys"][:, :, position].double(), key[:, :, 0], rtol=EPS, atol=1e-6)
    seen = [operands[name][:, :, : position + 1] for name in ("keys", "values")]
    exact, bound = expected(query, *seen)
    # Where the query was rounded to its neighbour, scores move by no more than EPS of their terms' sizes.
    sizes = query.abs() @ seen[0].double().abs().repeat_interleave(heads // groups, 1).transpose(-1, -2)
    moved = EPS * SCALING * sizes.amax(-1, keepdim=True).transpose(1, 2)
    assert ((y.double() - exact).abs() <= bound + 2 * moved * bound / (EPS * 0.51)).all()


def test_every_launch_leaves_no_trace_in_the_next() -> None:
    operands = draw(1, 8, 2, 64, 32)
    first = attend(operands, 63)
    attend(draw(1, 8, 2, 300, 32), 17)
    assert torch.equal(attend(operands, 63), first)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 2, 4096, 32), "at most 2048 places, got 2 heads, head_dim 32 and 4096 places"),
        ((1, 6, 2, 64, 32), "got 3 heads"),
        ((1, 4, 2, 64, 24), "got 2 heads, head_dim 24"),
    ],
)
def test_sizes_that_it_does_not_take_are_refused(shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        attend(draw(*shape), 3)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_disagree_are_refused_by_name(name) -> None:
    operands = draw(2, 4, 2, 64, 32)
    before = operands["keys"].clone()
    wrong = operands[name][..., :31] if name == "query" else operands[name].repeat_interleave(2, 1)
    with pytest.raises(ValueError, match=r"expected (shape|contiguous heads)"):
        attend(operands | {name: wrong}, 3)
    assert torch.equal(operands["keys"], before)


def test_heads_that_lie_apart_are_refused() -> None:
    for name, apart in (("query", (1, 3)), ("keys", (1, 2))):
        operands = draw(1, 4, 2, 64, 32)
        operands[name] = operands[name].transpose(*apart).contiguous().transpose(*apart)
        with pytest.raises(ValueError, match=f"{name}: expected contiguous heads, got strides"):
            attend(operands, 3)


def test_the_operator_is_registered_rightly() -> None:
    operands = (*draw(1, 4, 2, 32, 16).values(), torch.tensor([7], device=DEVICE), 0.25)
    torch.library.opcheck(decode_attention, operands)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_in_a_graph_it_sees_what_the_launch_before_it_wrote() -> None:
    operands = draw(1, 32, 8, 512, 128, turns=0)
    source, position = torch.empty(1, 1, 48, 128, device=DEVICE, dtype=DTYPE), torch.tensor([0], device=DEVICE)

    # Lets the next launch start before it has written.
    @torch.compile(options={"triton.enable_pdl": True})
    def product(source):
        return source * 2

    def step() -> torch.Tensor:
        own = dict(zip(NAMES, product(source).split((32, 8, 8), 2), strict=False))
        return attend(operands | own, position)

    source.normal_()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for place in (0, 31, 32, 300, 511, 5):
        position.fill_(place)
        source.normal_()
        graph.replay()
        query, key, value = (source * 2).split((32, 8, 8), 2)
        keys, values = (operands[name][:, :, : place + 1] for name in ("keys", "values"))
        assert torch.equal(keys[:, :, place], key[:, 0])
        assert torch.equal(values[:, :, place], value[:, 0])
        exact, bound = expected(query.transpose(1, 2).double(), keys, values)
        assert ((y.double() - exact).abs() <= bound).all()
