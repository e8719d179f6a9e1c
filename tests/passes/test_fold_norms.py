"""FoldNorms on graphs of Inductor: what it folds, what it leaves alone, and that results stay within bounds."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from packed_case import EPS, make_case, random_x
from torch import Tensor, fx, nn

from bbb_ao import fuse_projections, set_bits
from bbb_ao.kernels import packed_linear
from bbb_ao.passes.fold_norms import FoldNorms, packed_linear_normed, packed_linear_residual
from bbb_ao.splitting import expand_channels

CHANNELS, INNER = 96, 64
SETTINGS = (2, 4, True, 32)


class Counting(FoldNorms):
    """FoldNorms that keeps how many of its two operators each graph has."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.gated: list[int] = []

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        targets = [node.target for node in graph.nodes]
        self.counts.append((targets.count(packed_linear_residual), targets.count(packed_linear_normed)))
        self.gated.append(sum(node.args[3] for node in graph.nodes if node.target == packed_linear_normed))

    def uuid(self) -> None:
        """Without one nothing is cached, so that the pass runs."""


class Norm(nn.Module):
    """A Llama's RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_x(1, (CHANNELS,), dtype=torch.bfloat16) + 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class TorchNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (CHANNELS,), self.weight, 1e-6)


class ComputedWeight(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (CHANNELS,), 1 + self.weight, 1e-6)


class OtherAxis(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-2, keepdim=True) + 1e-6)).to(x.dtype)


class Chain(nn.Module):
    """A product, the residual sum, a norm and a product; subclasses change one thing each."""

    def __init__(self, norm: type[Norm] = Norm, gathers: str = "") -> None:
        super().__init__()
        self.norm, self.gathers = norm(), gathers
        exponent = torch.tensor(-12, dtype=torch.int32)
        self.first = replace(make_case(1, INNER, rows=CHANNELS), exponent=exponent)
        self.second = replace(make_case(2, 128 if gathers else CHANNELS, rows=40), exponent=exponent)
        self.operands = [case.operands(2)[:-1] for case in (self.first, self.second)]
        copies = torch.tensor([5, 5, 80, 0] + [CHANNELS] * 28)
        self.index = torch.cat([torch.arange(CHANNELS), copies]).to(torch.int32) if gathers else None

    def product(self, x: Tensor, number: int) -> Tensor:
        index = self.index if number and self.gathers == "layer" else None
        return packed_linear(x, *self.operands[number], index, None, *SETTINGS)

    def normed(self, hidden: Tensor) -> Tensor:
        y = self.norm(hidden)
        return expand_channels(y, self.index) if self.gathers == "norm" else y

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden = residual + self.product(x, 0)
        return hidden, self.product(self.normed(hidden), 1)


class NormReadTwice(Chain):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden = residual + self.product(x, 0)
        normed = self.normed(hidden)
        return hidden, self.product(normed, 1), normed


class ProductReadTwice(Chain):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        product = self.product(x, 0)
        hidden = residual + product
        return hidden, self.product(self.normed(hidden), 1), product + 1


class SpreadResidual(Chain):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x, residual[..., :1])


class SwiGLU(Chain):
    """A gate and an up projection as one product behind the norm, and a third product; subclasses change one thing."""

    index_of_up: Tensor | None = None

    def __init__(self, gathers: bool = False) -> None:
        super().__init__()
        exponent = torch.tensor(-12, dtype=torch.int32)
        self.second = replace(make_case(5, CHANNELS, rows=2 * INNER), exponent=exponent)
        self.third = replace(make_case(6, 96 if gathers else INNER, rows=24), exponent=exponent)
        self.operands = [case.operands(2)[:-1] for case in (self.first, self.second, self.third)]
        copies = torch.tensor([5, 5, 63, 0] + [INNER] * 28)
        self.index = torch.cat([torch.arange(INNER), copies]).to(torch.int32) if gathers else None
        self.gathers = ""

    def halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., :INNER], y[..., INNER:]

    def activation(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def gated(self, y: Tensor) -> Tensor:
        gate, up = self.halves(y)
        if self.index is not None:
            index = self.index if self.index_of_up is None else self.index_of_up
            gate, up = expand_channels(gate, self.index), expand_channels(up, index)
        return self.activation(gate) * up

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden, y = super().forward(x, residual)
        return hidden, self.product(self.gated(y), 2)


class UpFirst(SwiGLU):
    def gated(self, y: Tensor) -> Tensor:
        gate, up = self.halves(y)
        return up * self.activation(gate)


class GateBehindUp(SwiGLU):
    def halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., INNER:], y[..., :INNER]


class Uneven(SwiGLU):
    def halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., :INNER], y[..., INNER - 1 : -1]


class GeGLU(SwiGLU):
    def activation(self, gate: Tensor) -> Tensor:
        return F.gelu(gate)


class Scaled(SwiGLU):
    def gated(self, y: Tensor) -> Tensor:
        return self.activation(self.halves(y)[0]) * 2.0


class GateReadTwice(SwiGLU):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden, y = Chain.forward(self, x, residual)
        return hidden, self.product(self.gated(y), 2), y[..., :INNER] + 1


class OtherIndex(SwiGLU):
    """Equal values prove nothing in a graph."""

    def __init__(self) -> None:
        super().__init__(gathers=True)
        self.index_of_up = self.index.clone()


class GatheredReadTwice(SwiGLU):
    def __init__(self) -> None:
        super().__init__(gathers=True)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden, y = Chain.forward(self, x, residual)
        gated = self.gated(y)
        return hidden, self.product(gated, 2), gated + 1


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def inputs(rows: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return random_x(3, (1, rows, INNER), dtype=dtype), random_x(4, (1, rows, CHANNELS), 10.0, dtype)


def compiled(chain: nn.Module, arguments: tuple[Tensor, ...], **settings: bool) -> tuple[list, tuple[Tensor, ...]]:
    """(operators in each graph, results)."""
    counting, results = compiled_counting(chain, arguments, **settings)
    return counting.counts, results


def compiled_counting(
    chain: nn.Module, arguments: tuple[Tensor, ...], **settings: bool
) -> tuple[Counting, tuple[Tensor, ...]]:
    torch._dynamo.reset()
    counting = Counting()
    options = {"post_grad_custom_pre_pass": counting}
    with torch.no_grad():
        results = torch.compile(chain, fullgraph=True, options=options, **settings)(*arguments)
    return counting, results


@pytest.mark.parametrize("norm", [Norm, TorchNorm])
@pytest.mark.parametrize("gathers", ["", "layer", "norm"])
def test_a_norm_between_two_products_is_folded_within_the_bound(norm: type[Norm], gathers: str) -> None:
    chain, arguments = Chain(norm, gathers), inputs()
    counts, (hidden, y) = compiled(chain, arguments)
    assert counts == [(1, 1)]
    exact, dense, _ = chain.first.linear(arguments[0], 2)
    exact += arguments[1].double()
    eps = EPS[torch.bfloat16]
    # The product is rounded, its weights twice, and the sum.
    lost = 3 * eps * dense + eps * exact.abs()
    assert bool(((hidden.double() - exact).abs() <= lost).all())
    # Of the sum as it came out: two roundings in the norm, each half of eps, and three in the product.
    normed = F.rms_norm(hidden.double(), (CHANNELS,), chain.norm.weight.double(), 1e-6)
    columns = normed if chain.index is None else expand_channels(normed, chain.index)
    expected, mass, _ = chain.second.linear(columns, 2)
    assert bool(((y.double() - expected).abs() <= 4.1 * eps * mass).all())


def check_left_alone(chain: Chain, arguments: tuple[Tensor, ...]) -> None:
    counts, results = compiled(chain, arguments)
    assert counts == [(0, 0)]
    with torch.no_grad():
        expected = chain(*arguments)
    # Inductor keeps a bfloat16 in float32 where it fuses.
    torch.testing.assert_close(results, expected, rtol=0.05, atol=0.05 * float(expected[1].abs().max()))


@pytest.mark.parametrize("kind", [NormReadTwice, ProductReadTwice, SpreadResidual])
def test_values_with_other_readers_or_shapes_stay(kind: type[Chain]) -> None:
    check_left_alone(kind(), inputs())


@pytest.mark.parametrize(("kind", "gathers"), [(SwiGLU, False), (UpFirst, False), (SwiGLU, True)])
def test_swiglu_behind_a_folded_norm_is_folded_within_the_bound(kind: type[SwiGLU], gathers: bool) -> None:
    chain, arguments = kind(gathers), inputs()
    counting, (hidden, result) = compiled_counting(chain, arguments)
    assert (counting.counts, counting.gated) == ([(1, 1)], [1])
    eps = EPS[torch.bfloat16]
    normed = F.rms_norm(hidden.double(), (CHANNELS,), chain.norm.weight.double(), 1e-6)
    y, mass, _ = chain.second.linear(normed, 2)
    (gate, up), (gate_lost, up_lost) = y.chunk(2, -1), (4.1 * eps * mass).chunk(2, -1)
    gated = F.silu(gate) * up
    # |silu'| < 1.1; silu and its product are rounded.
    lost = 1.1 * gate_lost * (up.abs() + up_lost) + F.silu(gate).abs() * up_lost + 1.1 * eps * gated.abs()
    if chain.index is not None:
        gated, lost = expand_channels(gated, chain.index), expand_channels(lost, chain.index)
    expected, mass, _ = chain.third.linear(gated, 2)
    bound = 3 * eps * mass + lost @ chain.third.weight(2).abs().double().T
    assert bool(((result.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("kind", [GateBehindUp, Uneven, GeGLU, Scaled, GateReadTwice, OtherIndex, GatheredReadTwice])
def test_other_readers_of_a_folded_norm_stay(kind: type[SwiGLU]) -> None:
    chain, arguments = kind(), inputs()
    counting, results = compiled_counting(chain, arguments)
    assert (counting.counts, counting.gated) == ([(1, 1)], [0])
    with torch.no_grad():
        expected = chain(*arguments)
    torch.testing.assert_close(results, expected, rtol=0.05, atol=0.05 * float(expected[1].abs().max()))


@pytest.mark.parametrize("norm", [ComputedWeight, OtherAxis])
def test_other_norms_stay(norm: type[Norm]) -> None:
    check_left_alone(Chain(norm), inputs())


@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.bfloat16), (2, torch.float32)])
def test_more_rows_and_other_types_stay(rows: int, dtype: torch.dtype) -> None:
    check_left_alone(Chain().to(dtype), inputs(rows, dtype))


@pytest.mark.parametrize(("name", "folds"), [("llama", 3), ("qwen3", 3), ("gemma2", 0)])
def test_models_fold_every_norm_behind_a_sum(make_packed, name: str, folds: int) -> None:
    """Two blocks: all but the norm of the embedding; the last one's reader is no packed layer."""
    model = set_bits(make_packed(name), 2).to(torch.bfloat16)
    fuse_projections(model)
    ids = torch.randint(2, 128, (1, 2), generator=torch.Generator().manual_seed(2))
    wrapped = Logits(model)
    counting, logits = compiled_counting(wrapped, (ids,), dynamic=False)
    # In each block the norm before the multilayer perceptron, whose SwiGLU follows.
    assert (counting.counts, counting.gated) == ([(folds, folds)], [min(folds, 2)])
    with torch.no_grad():
        rounded = wrapped(ids)
        exact = Logits(model.double())(ids)
    # Folding leaves roundings out, and eager mode rounds every step.
    errors = [(each.double() - exact).square().mean().sqrt() for each in (logits, rounded)]
    assert errors[0] <= 1.5 * errors[1]
