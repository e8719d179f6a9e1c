"""packed_linear_residual and packed_linear_normed against float64 with derived bounds, on a CPU and a GPU.

Everything that a call allocates is filled with NaN first. The bounds follow from the products' own (tests/gpu
/test_packed_linear.py): each weight is rounded twice, sums run in float32, over codes and offsets apart.
"""

from dataclasses import replace

import pytest
import torch
from packed_case import EPS, Case, make_case, random_x
from torch import Tensor

from bbb_ao.kernels.packed_norm import packed_linear_normed_op, packed_linear_residual_op

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
# (columns, rows of the weight, indexed, bits, rows of x): ragged tiles, one and several iterations of `decode`.
SHAPES = [
    (128, 16, False, 2, 1),
    (512, 100, True, 2, 1),
    (384, 41, True, 4, 2),
    (2176, 130, False, 2, 1),
    (4224, 64, True, 2, 2),
    (1152, 17, False, 8, 2),
    (416, 33, True, 2, 1),
    (512, 40, True, 2, 3),
]
shapes = pytest.mark.parametrize(("features", "out_features", "indexed", "bits", "rows"), SHAPES)
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}
STEP = 2.0**-23  # of float32


def plain_case(features: int, out_features: int, indexed: bool) -> Case:
    """Half-step weights of about one, in range of every dtype."""
    case = make_case(features, features, 4, True, out_features, indexed)
    return replace(case, exponent=torch.tensor(-12, dtype=torch.int32))


def placed(case: Case, bits: int, device: str, bias: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in (*case.operands(bits), bias)]


def poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations get."""
    sizes, kinds = (16, 256, 2**12, 2**18), (torch.bfloat16, torch.float16, torch.float32)
    held = [torch.full((size,), torch.nan, dtype=dtype, device=device) for size in sizes for dtype in 3 * kinds]
    del held


@devices
@dtypes
@shapes
def test_residual(
    device: str, dtype: torch.dtype, features: int, out_features: int, indexed: bool, bits: int, rows: int
) -> None:
    case = plain_case(features, out_features, indexed)
    x = random_x(rows, (rows, case.in_features), dtype=dtype)
    residual = random_x(2, (rows, out_features), 30.0, dtype)
    norm_weight = random_x(3, (out_features,), dtype=dtype)
    bias = random_x(4, (out_features,), dtype=dtype) if bits > 2 else None
    operands = placed(case, bits, device, bias)
    poison(device)
    results = packed_linear_residual_op(
        x.to(device), residual.to(device), norm_weight.to(device), *operands, *case.settings(bits)
    )
    hidden, weighted, squares = (result.cpu() for result in results)
    assert (hidden.dtype, weighted.dtype, squares.dtype) == (dtype, dtype, torch.float32)
    assert squares.shape == (rows, -(-out_features // 16))
    product, dense, factored = case.linear(x, bits, bias)
    exact = product + residual.double()
    lost = TINY[dtype] * (case.columns_of(x).abs().sum(-1, keepdim=True) + 1)
    # The sum is rounded once more than the product.
    bound = 3 * EPS[dtype] * dense + (features + 2) * STEP * factored + EPS[dtype] * exact.abs() + 2 * lost
    assert bool(((hidden.double() - exact).abs() <= bound).all())
    # What follows is of the rounded sum: one rounding, and one for each of 16 squares and sums.
    given = hidden.double()
    expected = given * norm_weight.double()
    assert bool(((weighted.double() - expected).abs() <= EPS[dtype] / 2 * expected.abs() + TINY[dtype]).all())
    padded = torch.nn.functional.pad(given.square(), (0, -out_features % 16)).unflatten(-1, (-1, 16)).sum(-1)
    assert bool(((squares.double() - padded).abs() <= 17 * STEP * padded).all())


@devices
@dtypes
@shapes
@pytest.mark.parametrize("gated", [False, True])
def test_normed(
    device: str, dtype: torch.dtype, features: int, out_features: int, indexed: bool, bits: int, rows: int, gated: bool
) -> None:
    out_features += out_features % 2
    case = plain_case(features, out_features, indexed)
    weighted = random_x(rows, (rows, case.in_features), 4.0, dtype)
    parts, eps = -(-case.in_features // 16), 0.25
    squares = random_x(5, (rows, parts)).abs() * torch.tensor([[8.0], [100.0], [3.0]])[:rows]
    bias = random_x(4, (out_features,), dtype=dtype) if bits > 2 else None
    operands = placed(case, bits, device, bias)
    poison(device)
    settings = case.settings(bits)
    y = packed_linear_normed_op(weighted.to(device), squares.to(device), eps, gated, *operands, *settings).cpu()
    assert y.dtype == dtype
    x = weighted.double() / (squares.double().sum(-1, keepdim=True) / case.in_features + eps).sqrt()
    exact, dense, factored = case.linear(x, bits, bias)
    lost = TINY[dtype] * (case.weight(bits).abs().sum(-1) + 1)
    # x is rounded, or the norm has an error of `parts` sums, a division and a reciprocal root of 2 steps each.
    bound = 4 * EPS[dtype] * dense + (features + parts + 8) * STEP * factored + lost
    if gated:
        exact, bound = swiglu_bound(exact, bound, dtype)
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


def swiglu_bound(y: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(silu(gate) * up, bound of its error) for halves of y that are off by at most `error`.

    |silu'| is below 1.1; silu and the product are rounded, silu after an exponential, a sum and a quotient in float32.
    """
    (gate, up), (gate_error, up_error) = y.chunk(2, -1), error.chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    silu_error = 1.1 * gate_error + (EPS[dtype] + 16 * STEP) * (silu.abs() + 1.1 * gate_error) + TINY[dtype]
    product_error = silu_error * (up.abs() + up_error) + silu.abs() * up_error
    return silu * up, product_error + EPS[dtype] * ((silu * up).abs() + product_error) + TINY[dtype]


@pytest.mark.parametrize("indexed", [False, True])
def test_together_they_are_a_norm_between_two_products(indexed: bool) -> None:
    first, second = plain_case(64, 120, False), plain_case(160, 24, True)
    if not indexed:
        second = plain_case(128, 24, False)
        first = plain_case(64, 128, False)
    channels = second.in_features
    x, residual = random_x(1, (2, 64), dtype=torch.float64), random_x(2, (2, channels), dtype=torch.float64)
    norm_weight = random_x(3, (channels,), dtype=torch.float64)
    hidden, weighted, squares = packed_linear_residual_op(
        x, residual, norm_weight, *first.operands(), None, *first.settings(2)
    )
    y = packed_linear_normed_op(weighted, squares, 1e-6, False, *second.operands(), None, *second.settings(2))
    expected_hidden = first.linear(x, 2)[0] + residual
    normed = torch.nn.functional.rms_norm(expected_hidden, (channels,), norm_weight, 1e-6)
    expected, dense, _ = second.linear(normed, 2)
    torch.testing.assert_close(hidden, expected_hidden, rtol=1e-13, atol=1e-13)
    assert bool(((y - expected).abs() <= 1e-13 * dense).all())


@devices
@pytest.mark.parametrize("rows", [1, 17])
def test_opcheck(device: str, rows: int) -> None:
    case = plain_case(256, 48, True)
    x = random_x(6, (rows, case.in_features), dtype=torch.bfloat16).to(device)
    residual, norm_weight = (random_x(7, shape, dtype=torch.bfloat16).to(device) for shape in ((rows, 48), (48,)))
    squares = random_x(8, (rows, -(-case.in_features // 16))).abs().to(device)
    operands = (*placed(case, 2, device, None), *case.settings(2))
    torch.library.opcheck(torch.ops.bbb_ao.packed_linear_residual.default, (x, residual, norm_weight, *operands))
    for gated in (False, True):
        arguments = (x, squares, 1e-6, gated, *operands)
        torch.library.opcheck(torch.ops.bbb_ao.packed_linear_normed.default, arguments)


def test_operands_that_do_not_fit_are_refused() -> None:
    case = plain_case(64, 16, False)
    x, operands = random_x(1, (2, 64)), (*case.operands(), None, *case.settings(2))
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \(2, 16\)"):
        packed_linear_residual_op(x, x, torch.ones(16), *operands)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \(2, 16\), .* found torch.float64"):
        packed_linear_residual_op(x, torch.ones(2, 16, dtype=torch.float64), torch.ones(16), *operands)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(16,\): found \(64,\)"):
        packed_linear_residual_op(x, torch.ones(2, 16), torch.ones(64), *operands)
    with pytest.raises(ValueError, match=r"squares must be torch.float32 \(2, 4\): found torch.float32 \(2, 1\)"):
        packed_linear_normed_op(x, torch.ones(2, 1), 1e-6, False, *operands)
    odd = plain_case(64, 15, False)
    with pytest.raises(ValueError, match="gated: expected as many rows of the weight in both halves, got 15 rows"):
        packed_linear_normed_op(x, torch.ones(2, 4), 1e-6, True, *odd.operands(), None, *odd.settings(2))
