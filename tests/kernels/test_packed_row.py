"""The fused path of one row: equal to the op to a derived bound, chosen by its rule, compiled, exported."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_case import EPS, FEW, Case, columns, magnitudes, make_case, random_x, row_zero_point_widths, seeds
from torch import Tensor

from bbb_ao.kernels import packed_linear, packed_linear_dynamic
from bbb_ao.kernels.packed_row import fake_quantize_input, packed_linear_row, prepare_row

row_widths = st.sampled_from([2, 4, 8])


def row_bound(y: Tensor, mass: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """|error| of the row path: float32 sums of at most K + 16 terms, each of at most 8 roundings, then one to dtype.

    Codes and offsets are summed apart, so that `mass` is that of the factored product. An activation below 2**-96 loses
    bits when the power of two of its field makes it subnormal.
    """
    return (features + 24) * EPS[torch.float32] * mass + EPS[dtype] * y.abs() + 1e-30


@FEW
@given(
    seed=seeds,
    features=columns,
    bits=row_widths,
    zero_point_bits=row_zero_point_widths,
    half_step=st.booleans(),
    indexed=st.booleans(),
    magnitude=magnitudes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_row_path_equals_float64_to_rounding(
    seed: int,
    features: int,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    indexed: bool,
    magnitude: float,
    dtype: torch.dtype,
) -> None:
    # On the integer grid a slice is rounded; 8 bits are not a slice.
    case = make_case(seed, features, zero_point_bits, half_step or bits < 8, indexed=indexed)
    x = random_x(seed, (1, case.in_features), magnitude, dtype)
    bias = random_x(seed + 7, (5,), magnitude, dtype)
    y = packed_linear_row(x, *case.operands(bits), bias, *case.settings(bits)[:3])
    exact, _, mass = case.linear(x, bits, bias)
    error, bound = (y.double() - exact).abs(), row_bound(exact, mass, features, dtype)
    assert y.dtype == dtype
    assert bool((error <= bound).all()), f"error {error.max()} above {bound.min()}"


@FEW
@given(seed=seeds, features=columns, bits=row_widths, act_bits=row_widths, half=st.booleans(), indexed=st.booleans())
def test_row_path_quantizes_the_activation(
    seed: int, features: int, bits: int, act_bits: int, half: bool, indexed: bool
) -> None:
    case = make_case(seed, features, indexed=indexed)
    x = random_x(seed, (1, 1, case.in_features))
    y = packed_linear_row(x, *case.operands(bits), None, *case.settings(bits)[:3], act_bits, half)
    gathered = case.columns_of(x).float()
    quantized = fake_quantize_input(gathered, case.index, case.in_features, act_bits, half, 32)
    direct = Case(**{**vars(case), "index": None, "in_features": features})
    exact, _, mass = direct.linear(quantized, bits)
    assert y.shape == (1, 1, 5)
    assert bool(((y.double() - exact).abs() <= row_bound(exact, mass, features, torch.float32)).all())


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("features", [96, 128, 224])
def test_opcheck_of_prepare_row(bits: int, features: int) -> None:
    case = make_case(1, features, indexed=True)
    x = random_x(1, (1, case.in_features), dtype=torch.bfloat16)
    for act_bits in (None, 4):
        torch.library.opcheck(prepare_row, (x, case.index, features, bits, act_bits, True))


class Graphs:
    """A torch.compile backend that runs the graph as it is and keeps it."""

    def __init__(self) -> None:
        self.calls: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.calls.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward


def takes_row(case: Case, x: Tensor, bits: int, group_size: int = 32) -> bool:
    torch._dynamo.reset()
    graphs = Graphs()
    operands = (*case.operands(bits), None, *case.settings(bits)[:3], group_size)
    torch.compile(lambda x: packed_linear(x, *operands), backend=graphs, fullgraph=True)(x)
    (calls,) = graphs.calls
    assert ("bbb_ao.prepare_row.default" in calls) != ("bbb_ao.packed_linear.default" in calls)
    return "bbb_ao.prepare_row.default" in calls


def test_rule_of_the_row_path() -> None:
    case, x = make_case(0, 64), random_x(0, (1, 64))
    assert all(takes_row(case, x, bits) for bits in (2, 4, 8))
    assert takes_row(case, x.to(torch.float16).reshape(1, 1, 64), 2)
    assert takes_row(case, x.reshape(64), 2)
    assert not takes_row(case, x, 3)
    assert not takes_row(case, x.expand(2, 64), 2)
    assert not takes_row(case, x.double(), 2)
    assert not takes_row(make_case(0, 64, zero_point_bits=3), x, 2)
    integer = make_case(0, 64, zero_point_bits=2, half_step=False)
    assert takes_row(integer, x, 8)
    assert takes_row(integer, x, 2), "without planes below, there is nothing to round"
    rounded = (x, *integer.operands(), None, *integer.settings(2))
    graphs = Graphs()
    torch.compile(packed_linear, backend=graphs, fullgraph=True)(*rounded)
    assert "bbb_ao.packed_linear.default" in graphs.calls[0]


@pytest.mark.parametrize(("bits", "features", "indexed"), [(2, 352, True), (8, 160, False)])
def test_inductor_one_row_equals_the_op(bits: int, features: int, indexed: bool) -> None:
    torch._dynamo.reset()
    case = make_case(11, features, indexed=indexed, rows=16)
    x = random_x(11, (1, 1, case.in_features), dtype=torch.bfloat16)
    bias = random_x(12, (16,), dtype=torch.bfloat16)

    y = torch.compile(packed_linear, fullgraph=True)(x, *case.operands(bits), bias, *case.settings(bits))
    exact, _, mass = case.linear(x, bits, bias)
    assert y.shape == (1, 1, 16)
    assert bool(((y.double() - exact).abs() <= row_bound(exact, mass, features, torch.bfloat16)).all())


def test_dynamic_sizes_compile_without_breaks() -> None:
    torch._dynamo.reset()
    case = make_case(13, 160, indexed=True)
    compiled = torch.compile(packed_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3, 0, 5, 1):
        x = random_x(rows, (rows, case.in_features))
        y = compiled(x, *case.operands(2), None, *case.settings(2))
        exact, _, mass = case.linear(x, 2)
        assert bool(((y.double() - exact).abs() <= row_bound(exact, mass, 160, torch.float32)).all()), f"{rows} rows"


class Layer(torch.nn.Module):
    """A module with a packed weight in its buffers."""

    def __init__(self, case: Case, bits: int, act_bits: int | None) -> None:
        super().__init__()
        names = ("high", "mid", "low", "scale", "exponent", "zero", "index")
        for name, value in zip(names, case.operands(bits), strict=True):
            self.register_buffer(name, value)
        self.settings, self.act_bits = case.settings(bits), act_bits

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.high, self.mid, self.low, self.scale, self.exponent, self.zero, self.index, None)
        if self.act_bits is None:
            return packed_linear(x, *weight, *self.settings)
        return packed_linear_dynamic(x, *weight, *self.settings, self.act_bits, True)


@pytest.mark.parametrize("act_bits", [None, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_export_runs_as_the_module(rows: int, act_bits: int | None) -> None:
    case = make_case(17, 96, indexed=True)
    # torch.export trips over absent buffers of the root module itself (torch 2.13), hence the container.
    layer = torch.nn.Sequential(Layer(case, 2, act_bits))
    x = random_x(17, (rows, case.in_features))
    dynamic = None if rows == 1 else ({0: torch.export.Dim("rows", min=2)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert ("bbb_ao.prepare_row.default" in targets) == (rows == 1)
    for count in (rows,) if rows == 1 else (rows, 2, 9):
        x = random_x(count, (count, case.in_features))
        _, _, mass = case.linear(x, 2)
        # Both round; quantizing the activation to 4 bits changes |x| by at most a group's largest.
        bound = 2 * row_bound(layer(x), mass + 2 * case.linear(torch.ones_like(x), 2)[2] * x.abs().max(), 96, x.dtype)
        assert bool(((exported.module()(x) - layer(x)).abs() <= bound).all()), f"{count} rows"
