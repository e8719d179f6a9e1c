"""Products with a norm between them in a captured graph: the bits of single launches, one after the other."""

from dataclasses import replace

import pytest
import torch
from packed_case import make_case, random_x, row_exponents
from torch import Tensor

from bbb_ao.kernels.packed_norm import packed_linear_normed_op, packed_linear_residual_op

pytest.importorskip("triton", reason="the kernels are written in Triton and Gluon")
pytestmark = pytest.mark.gpu

CHANNELS, REPLAYS, EPS = 472, 30, 1e-5
PADDED = 40  # columns that an index of `make_case` adds


class Blocks:
    """Several times: a product of the stream's norm, and one that is added to the stream."""

    def __init__(self, rows: int, dtype: torch.dtype, indexed: bool, gated: bool) -> None:
        self.dtype, self.gated = dtype, gated
        columns = CHANNELS + PADDED if indexed else 512
        self.channels = CHANNELS if indexed else 512
        self.squares = torch.ones(rows, -(-self.channels // 16), device="cuda")
        self.norm_weight = random_x(1, (self.channels,), dtype=dtype).cuda() + 1
        inner = 1280 if gated else 640
        self.pairs = [
            (self.layer(2 * n, columns, inner, indexed), self.layer(2 * n + 1, 640, self.channels, False))
            for n in range(3)
        ]

    def layer(self, seed: int, columns: int, rows: int, indexed: bool) -> list:
        case = make_case(seed, columns, 4, True, rows, indexed)
        case = row_exponents(replace(case, scale_codes=case.scale_codes % 9 + 48), -6, 3)
        return [*(None if t is None else t.cuda() for t in case.operands(2)), None, *case.settings(2)]

    def run(self, hidden: Tensor, single: bool = False) -> Tensor:
        weighted, squares, stream = hidden, self.squares, hidden
        for first, second in self.pairs:
            y = packed_linear_normed_op(weighted, squares, EPS, self.gated, *first)
            if single:
                torch.cuda.synchronize()
            stream, weighted, squares = packed_linear_residual_op(y, stream, self.norm_weight, *second)
            if single:
                torch.cuda.synchronize()
        return torch.cat([stream, weighted, squares.to(self.dtype)], -1)


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBB_AO_TUNING", "off")


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("gated", [False, True])
def test_a_captured_graph_gives_the_bits_of_single_launches(
    rows: int, dtype: torch.dtype, indexed: bool, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks(rows, dtype, indexed, gated)
    inputs = [random_x(seed, (rows, blocks.channels), dtype=dtype).cuda() for seed in range(REPLAYS)]
    monkeypatch.setenv("BBB_AO_PDL", "off")
    expected = [blocks.run(x, single=True) for x in inputs]
    monkeypatch.delenv("BBB_AO_PDL")
    x = inputs[0].clone()
    blocks.run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = blocks.run(x)
    for each, wanted in zip(inputs, expected, strict=True):
        x.copy_(each)
        y.fill_(torch.nan)
        graph.replay()
        assert bool(wanted.isfinite().all())
        assert torch.equal(y, wanted)
