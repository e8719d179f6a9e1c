"""The packed ops on a GPU against float64 on the CPU, with derived bounds; the same functions run on a CPU, on fewer M.

What may differ from float64: each weight is rounded twice (times its scale, to x's dtype), the result once, and sums
run in float32, over codes and offsets apart: |error| <= 3 eps mass + (K + 2) 2**-23 factored mass, where the masses
are those of `Case.linear`. Everything that a call allocates is filled with NaN first.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_case import EPS, FEW, Case, columns, make_case, random_x, seeds, widths, zero_point_widths
from torch import Tensor

from bbb_ao.kernels import packed_linear, packed_linear_dynamic, quantize_activation

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])

ROWS = (0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65, 128, 300, 1100)
FEW_ROWS = (0, 1, 3, 17, 65)
OUT_FEATURES = (1, 17, 100, 130)
COLUMNS = (32, 96, 160, 416, 1024)
ZERO_POINT_BITS = (0, 2, 4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRIDS = [(bits, half_step) for bits in range(2, 9) for half_step in (True, False)]
# Half precision has a smallest normal number of 2**-14 and steps of 2**-24 below it; the others go down to 2**-126.
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}


def rows_for(device: str) -> tuple[int, ...]:
    return ROWS if device == "cuda" else FEW_ROWS


def moved(operands: tuple[Tensor | None, ...], device: str) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in operands]


def poison(device: str, *shape: int) -> None:
    """Leave NaN in the memory that the next allocations of about this size get."""
    sizes = [max(1, torch.Size(shape).numel()), 2**12, 2**18]
    held = [torch.full((size,), torch.nan, dtype=dtype, device=device) for size in sizes for dtype in 2 * DTYPES]
    del held


def call(case: Case, x: Tensor, bits: int, bias: Tensor | None = None, act_bits: int | None = None) -> Tensor:
    """The op on x's device; with act_bits the dynamic one, on the half-step grid."""
    device = x.device.type
    operands = moved(case.operands(bits if case.half_step else None), device)
    moved_bias = None if bias is None else bias.to(device)
    poison(device, *x.shape[:-1], case.parent.shape[0])
    if act_bits is None:
        return packed_linear(x, *operands, moved_bias, *case.settings(bits))  # type: ignore[arg-type]
    return packed_linear_dynamic(x, *operands, moved_bias, *case.settings(bits), act_bits, True)  # type: ignore[arg-type]


def bound_for(case: Case, x: Tensor, bits: int, dense: Tensor, factored: Tensor) -> Tensor:
    """The bound of the module's first lines, and what numbers below the normal ones of x's dtype lose."""
    lost = TINY[x.dtype] * (case.columns_of(x).abs().sum(-1, keepdim=True) + 1)
    return 3 * EPS[x.dtype] * dense + (case.parent.shape[1] + 2) * 2.0**-23 * factored + lost


def check(
    case: Case, x: Tensor, bits: int, device: str, bias: Tensor | None = None, placed: Tensor | None = None
) -> Tensor:
    """Assert the bound for x on `device` (`placed` is x there, with strides of its own); returns what the op gave."""
    y = call(case, x.to(device) if placed is None else placed, bits, bias)
    exact, dense, factored = case.linear(x, bits, bias)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    error, bound = (y.cpu().double() - exact).abs(), bound_for(case, x, bits, dense, factored)
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}: "
        f"error {error[wrong][0]:.3g}, bound {bound[wrong][0]:.3g}, expected {exact[wrong][0]:.6g}; "
        f"shape {tuple(x.shape)} x {tuple(case.parent.shape)}, {bits} bits, {x.dtype}"
    )
    return y


def plain_case(seed: int, features: int, out_features: int = 100, indexed: bool = False) -> Case:
    """A half-step case with weights of about one, in range of every dtype."""
    case = make_case(seed, features, 4, True, out_features, indexed)
    return replace(case, exponent=torch.tensor(-12, dtype=torch.int32))


@devices
@pytest.mark.parametrize(("bits", "half_step"), GRIDS)
def test_every_width_and_grid_at_every_number_of_rows(device: str, bits: int, half_step: bool) -> None:
    turn = GRIDS.index((bits, half_step))
    dtype, indexed = DTYPES[turn % 3], turn // 2 % 2 == 0
    zero_point_bits, out_features = ZERO_POINT_BITS[(turn + turn // 4) % 4], OUT_FEATURES[turn % 4]
    case = make_case(turn, COLUMNS[turn % 5], zero_point_bits, half_step, out_features, indexed)
    if dtype == torch.float16:
        case = replace(case, exponent=torch.tensor(-12, dtype=torch.int32))
    bias = random_x(turn, (out_features,), dtype=dtype) if turn % 5 < 2 else None
    for m in rows_for(device):
        check(case, random_x(m, (m, case.in_features), dtype=dtype), bits, device, bias)


@devices
@pytest.mark.parametrize("out_features", OUT_FEATURES)
@pytest.mark.parametrize("features", COLUMNS)
def test_ragged_shapes_with_index_and_bias(device: str, features: int, out_features: int) -> None:
    for bits, indexed in ((2, True), (4, False), (8, True)):
        case = make_case(features + out_features, features, 4, True, out_features, indexed)
        bias = random_x(bits, (out_features,), dtype=torch.bfloat16)
        for m in (1, 5, 16, 65):
            check(case, random_x(m, (m, case.in_features), dtype=torch.bfloat16), bits, device, bias)


@devices
@FEW
@given(
    seed=seeds,
    features=columns,
    out_features=st.integers(1, 150),
    m=st.integers(0, 70),
    bits=widths,
    zero_point_bits=zero_point_widths,
    half_step=st.booleans(),
    indexed=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    magnitude=st.sampled_from([0.0, 1e-20, 1.0, 1e18]),
)
def test_random_cases(
    device: str,
    seed: int,
    features: int,
    out_features: int,
    m: int,
    bits: int,
    zero_point_bits: int,
    half_step: bool,
    indexed: bool,
    dtype: torch.dtype,
    magnitude: float,
) -> None:
    case = make_case(seed, features, zero_point_bits, half_step, out_features, indexed)
    check(case, random_x(seed, (m, case.in_features), magnitude, dtype), bits, device)


@devices
@pytest.mark.parametrize("act_bits", [2, 4, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_quantized_activations_equal_the_fake_quant_model(device: str, bits: int, act_bits: int) -> None:
    kinds = ((416, True, torch.bfloat16), (1024, False, torch.float32), (96, True, torch.float32))
    for features, indexed, dtype in kinds:
        case = plain_case(features, features, indexed=indexed)
        codes, offset, scale = case.levels(bits)
        padding = torch.zeros(features, dtype=torch.bool) if case.index is None else case.index == case.in_features
        for m in rows_for(device):
            x = random_x(m, (m, case.in_features), dtype=dtype)
            grouped = case.columns_of(x).float().unflatten(-1, (-1, 32))
            act_codes, act_scale, act_zero = (t.double() for t in quantize_activation(grouped, act_bits, True))
            shift, act_step = act_zero.unsqueeze(-1) - 0.5, act_scale.unsqueeze(-1)
            values = ((act_codes - shift) * act_step).flatten(-2).masked_fill(padding, 0.0)
            reach = ((act_codes + shift.abs()) * act_step).flatten(-2)
            weight = (codes + offset) * scale
            exact, mass = values @ weight.T, values.abs() @ weight.abs().T
            factored = reach @ ((codes + offset.abs()) * scale).T
            # One rounding more than without quantization: the quantized activation is rounded to dtype.
            bound = 4 * EPS[dtype] * mass + (features + 2) * 2.0**-23 * factored
            error = (call(case, x.to(device), bits, act_bits=act_bits).cpu().double() - exact).abs()
            wrong = ~(error <= bound)
            assert not wrong.any(), f"{features} columns, {m} rows, {dtype}: {wrong.sum()} of {wrong.numel()} wrong"


@devices
@pytest.mark.parametrize("m", [1, 5, 40])
def test_non_contiguous_input(device: str, m: int) -> None:
    case = plain_case(4, 160)
    wide = random_x(m, (2 * m, 320), dtype=torch.bfloat16).to(device)
    turned = random_x(m, (160, m), dtype=torch.bfloat16).to(device).T
    deep = random_x(m, (2, m, 320), dtype=torch.bfloat16).to(device)[:, :, ::2]
    for x in (wide[::2, ::2], wide[:m, 160:], turned, wide[:1, :160].expand(m, 160), deep):
        for bits in (2, 4):
            check(case, x.cpu(), bits, device, placed=x)


@devices
@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_extreme_scales(device: str, exponent: int) -> None:
    for bits, half_step in ((2, True), (4, False), (8, True)):
        case = replace(make_case(bits, 160, 4, half_step, 33), exponent=torch.tensor(exponent, dtype=torch.int32))
        magnitude = 2.0 ** (-60 if exponent > 0 else 60)
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 17):
                y = check(case, random_x(m, (m, 160), magnitude, dtype), bits, device)
                assert bool(y.isfinite().all())
                assert bool(y.any()), "nothing but zeros"


@devices
@pytest.mark.parametrize("m", [1, 17, 65])
def test_zero_and_constant_groups(device: str, m: int) -> None:
    case = plain_case(1, 160)
    silent = replace(case, scale_codes=torch.zeros_like(case.scale_codes))
    x = random_x(m, (m, 160), 1e30, torch.bfloat16)
    for bits in (2, 4, 8):
        assert not call(silent, x.to(device), bits).any(), f"{bits} bits: zero scales must give exact zeros"
        for code in (0, 255):
            constant = replace(case, parent=torch.full_like(case.parent, code))
            check(constant, random_x(m, (m, 160), dtype=torch.bfloat16), bits, device)
    zeros = torch.zeros(m, 160, dtype=torch.bfloat16, device=device)
    assert not call(case, zeros, 2).any()
    assert not call(case, zeros, 2, act_bits=2).any()


@devices
@pytest.mark.memcheck
@pytest.mark.parametrize("act_bits", [None, 4])
@pytest.mark.parametrize("m", [1, 5, 17, 65])
def test_every_run_gives_the_same_bits(device: str, m: int, act_bits: int | None) -> None:
    for features, out_features, indexed in ((1024, 130, False), (416, 100, True)):
        case = plain_case(m, features, out_features, indexed=indexed)
        x = random_x(m, (m, case.in_features), dtype=torch.bfloat16).to(device)
        first = call(case, x, 2, act_bits=act_bits)
        assert bool(first.isfinite().all())
        for _ in range(5):
            assert torch.equal(call(case, x, 2, act_bits=act_bits), first)


@on_gpu
@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_opcheck(device: str, bits: int, m: int) -> None:
    case = plain_case(6, 160, indexed=True)
    x = random_x(6, (m, case.in_features), dtype=torch.bfloat16).to(device)
    bias = random_x(7, (100,), dtype=torch.bfloat16).to(device)
    operands = (x, *moved(case.operands(bits), device), bias, *case.settings(bits))
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear.default, operands)
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear_dynamic.default, (*operands, 4, True))


@on_gpu
@pytest.mark.parametrize("act_bits", [None, 2])
@pytest.mark.parametrize("m", [1, 8, 64, 300])
def test_a_captured_graph_replays_on_changed_input(device: str, m: int, act_bits: int | None) -> None:
    case = plain_case(m, 416, indexed=True)
    operands = moved(case.operands(2), device)
    settings = case.settings(2) if act_bits is None else (*case.settings(2), act_bits, True)
    op = packed_linear if act_bits is None else packed_linear_dynamic
    x = random_x(m, (m, case.in_features), dtype=torch.bfloat16).to(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        op(x, *operands, None, *settings)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = op(x, *operands, None, *settings)
    for seed in (1, 2, 3):
        x.copy_(random_x(seed, (m, case.in_features), dtype=torch.bfloat16))
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, op(x, *operands, None, *settings))


# Inductor suggests TF32; the suite turns warnings into errors.
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@on_gpu
@pytest.mark.parametrize("m", [1, 17])
def test_compiled_without_a_graph_break_gives_the_same(device: str, m: int) -> None:
    case = plain_case(m, 416, indexed=True)
    operands, settings = moved(case.operands(2), device), case.settings(2)
    x = random_x(m, (m, case.in_features), dtype=torch.bfloat16).to(device)

    def layer(x: Tensor) -> Tensor:
        return packed_linear(x * 1.0, *operands, None, *settings) * 1.0  # type: ignore[arg-type]

    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
