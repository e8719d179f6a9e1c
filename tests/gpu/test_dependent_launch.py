"""Launches that start before those before them are complete give what the same launches give one after the other.

Expected values come from launches with BBB_AO_PDL=off and a synchronization after each; all comparisons are bitwise.
"""

from dataclasses import replace
from math import log2

import pytest
import torch
from packed_case import make_case, random_x
from torch import Tensor

from bbb_ao.kernels import packed_linear, packed_linear_dynamic

pytest.importorskip("triton", reason="the kernels are written in Triton and Gluon")
pytestmark = pytest.mark.gpu

REPLAYS = 50
PADDED = 40  # columns that an index of `make_case` adds
# (columns, bits, indexed); the outputs of each are the inputs of the next.
LAYERS = ((512, 2, False), (1152, 4, True), (4224, 2, False), (512, 8, True))


class Chain:
    """Layers of `LAYERS` on the GPU, with outputs of about the size of their inputs."""

    def __init__(self, act_bits: int | None) -> None:
        inputs = [columns - PADDED * indexed for columns, _, indexed in LAYERS]
        self.act_bits, self.in_features, self.operands = act_bits, inputs[0], []
        for number, (columns, bits, indexed) in enumerate(LAYERS):
            case = make_case(number, columns, 4, True, [*inputs[1:], 130][number], indexed)
            exponent = torch.tensor(round(-log2(columns**0.5)), dtype=torch.int32)
            case = replace(case, scale_codes=case.scale_codes % 9 + 48, exponent=exponent)
            moved = [None if t is None else t.cuda() for t in case.operands(bits)]
            self.operands.append((moved, case.settings(bits)))

    def layer(self, x: Tensor, number: int) -> Tensor:
        operands, settings = self.operands[number]
        if self.act_bits is None:
            return packed_linear(x, *operands, None, *settings)
        return packed_linear_dynamic(x, *operands, None, *settings, self.act_bits, True)

    def run(self, x: Tensor, numbers: range = range(len(LAYERS))) -> Tensor:
        for number in numbers:
            x = self.layer(x, number)
        return x

    def inputs(self, m: int) -> list[Tensor]:
        return [random_x(seed, (m, self.in_features), dtype=torch.bfloat16).cuda() for seed in range(REPLAYS)]

    def expected(self, inputs: list[Tensor]) -> list[Tensor]:
        results = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BBB_AO_PDL", "off")
            for x in inputs:
                for number in range(len(LAYERS)):
                    x = self.layer(x, number)
                    torch.cuda.synchronize()
                results.append(x)
        return results


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBB_AO_TUNING", "off")


def captured(call, *arguments) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call that ran before, and what the call returned."""
    call(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*arguments)
    return graph, result


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.cuda.synchronize()
    assert all(bool(each.isfinite().all()) and bool(each.any()) for each in expected)
    wrong = [place for place, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)]
    assert not wrong, f"{len(wrong)} of {len(expected)} differ, first {wrong[0]}"


rows = pytest.mark.parametrize("m", [1, 2, 5, 40, 300])
act_widths = pytest.mark.parametrize("act_bits", [None, 2])


@rows
@act_widths
def test_a_chain_of_launches_in_one_graph(m: int, act_bits: int | None) -> None:
    chain = Chain(act_bits)
    inputs = chain.inputs(m)
    expected, x = chain.expected(inputs), inputs[0].clone()
    graph, y = captured(chain.run, x)
    found = []
    for each in inputs:
        x.copy_(each)
        graph.replay()
        found.append(y.clone())
    same(found, expected)


@rows
def test_several_chains_in_one_graph(m: int) -> None:
    """All inputs go through in one replay, so that nothing but these kernels comes between."""
    chain = Chain(None)
    inputs = chain.inputs(m)[:10]
    expected = chain.expected(inputs)
    stacked = torch.stack(inputs)
    graph, results = captured(lambda: [chain.run(x) for x in stacked])
    for _ in range(5):
        for y in results:
            y.fill_(torch.nan)
        graph.replay()
        same(list(results), expected)


@rows
@act_widths
def test_two_graphs_back_to_back(m: int, act_bits: int | None) -> None:
    chain = Chain(act_bits)
    inputs = chain.inputs(m)
    expected, x = chain.expected(inputs), inputs[0].clone()
    first, middle = captured(chain.run, x, range(2))
    second, y = captured(chain.run, middle, range(2, len(LAYERS)))
    found = []
    for each in inputs:
        x.copy_(each)
        first.replay()
        second.replay()
        found.append(y.clone())
    same(found, expected)


@rows
def test_without_a_graph(m: int) -> None:
    chain = Chain(None)
    inputs = chain.inputs(m)
    expected = chain.expected(inputs)
    same([chain.run(x) for x in inputs], expected)


@pytest.mark.parametrize("m", [1, 40])
def test_a_weight_written_just_before_without_a_graph(m: int) -> None:
    chain = Chain(None)
    x = chain.inputs(m)[0]
    operands, settings = chain.operands[0]
    planes = [torch.randint_like(operands[0], 256) for _ in range(REPLAYS)]
    expected = []
    for plane in planes:
        expected.append(packed_linear(x, plane, *operands[1:], None, *settings))
        torch.cuda.synchronize()
    weight, found = torch.empty_like(planes[0]), []
    for plane in planes:
        weight.copy_(plane)
        found.append(packed_linear(x, weight, *operands[1:], None, *settings))
    same(found, expected)


@pytest.mark.parametrize("m", [1, 40])
def test_after_a_join_of_two_streams(m: int) -> None:
    """A launch waits for those of its own stream and for those that its stream waits for."""
    chain = Chain(None)
    inputs = chain.inputs(m)
    expected, x = chain.expected(inputs), inputs[0].clone()

    def call() -> Tensor:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            of_side = chain.run(x, range(2))
        of_main = chain.run(x, range(2))
        main.wait_stream(side)
        return torch.cat([chain.run(each, range(2, len(LAYERS))) for each in (of_side, of_main)])

    graph, y = captured(call)
    found = []
    for each in inputs:
        x.copy_(each)
        graph.replay()
        found.append(y.clone())
    same(found, [torch.cat([each, each]) for each in expected])
