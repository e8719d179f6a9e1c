"""One row of quantized activations through the integer kernel, at every launch setting, against float64 on the CPU.

Codes must be those of `quantize_activation`, for one code more or less is far outside the bound. Sums of products are
exact, those over groups run in float32, over codes and offsets apart, and the result is rounded once:
|error| <= eps / 2 |y| + (K + 2) 2**-23 factored mass.
"""

from dataclasses import replace

import pytest
import torch
from packed_case import EPS, Case, make_case, random_x, row_exponents
from torch import Tensor

from bbb_ao.kernels import packed_linear_dynamic, quantize_activation

pytest.importorskip("triton", reason="the kernel is written in Gluon")
pytestmark = pytest.mark.gpu

WIDTHS = [(bits, act_bits) for bits in (2, 3, 4, 5, 8) for act_bits in (2, 3, 4, 7, 8)]
COLUMNS = (128, 384, 1152, 4224)
ROWS = 37
# A float16 result has steps of 2**-24 at least.
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def settings() -> list[tuple[int, ...]]:
    from bbb_ao.kernels.packed_linear_dynamic import cuda

    return cuda.DECODE_SETTINGS


def use(choice: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from bbb_ao.kernels.packed_linear_dynamic import cuda

    monkeypatch.setattr(cuda, "settings_for", lambda *_: choice)


def call(case: Case, x: Tensor, bits: int, act_bits: int, act_half_step: bool, bias: Tensor | None = None) -> Tensor:
    operands = [None if t is None else t.cuda() for t in case.operands(bits if case.half_step else None)]
    moved = None if bias is None else bias.cuda()
    held = torch.full((2, ROWS), torch.nan, dtype=x.dtype, device="cuda")
    del held
    y = packed_linear_dynamic(x.cuda(), *operands, moved, *case.settings(bits), act_bits, act_half_step)  # type: ignore[arg-type]
    return y.cpu()


def expected(
    case: Case, x: Tensor, bits: int, act_bits: int, act_half_step: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, bound), float64."""
    grouped = case.columns_of(x).float().unflatten(-1, (-1, 32))
    codes, step, zero = (t.double() for t in quantize_activation(grouped, act_bits, act_half_step))
    shift = zero.unsqueeze(-1) - (0.5 if act_half_step else 0.0)
    features = case.parent.shape[1]
    padding = torch.zeros(features, dtype=torch.bool) if case.index is None else case.index == case.in_features
    values = ((codes - shift) * step.unsqueeze(-1)).flatten(-2).masked_fill(padding, 0.0)
    # 8-bit codes are counted from -128.
    reach = ((codes + shift.abs() + 128 * (act_bits == 8)) * step.unsqueeze(-1)).flatten(-2)
    weight_codes, offset, scale = case.levels(bits)
    weight = (weight_codes + offset) * scale
    y = values @ weight.T + (0.0 if bias is None else bias.double())
    factored = reach @ ((2.0**bits + offset.abs()) * scale).T + (0.0 if bias is None else bias.double().abs())
    return y, EPS[x.dtype] / 2 * y.abs() + (features + 2) * 2.0**-23 * factored + TINY[x.dtype]


def hard_row(seed: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Groups of zeros, of one value, of one sign, of whole numbers (ties), small ones, and an outlier."""
    x = random_x(seed, (1, in_features))
    x[:, ::96] *= 2.0**-12
    x[:, 32:64] = (x[:, 32:64] * 2).round() / 2
    x[:, 64:96] = 0.0
    x[:, 96:100] = x[:, 96:100].abs()
    x[:, 7] = 100.0
    return x.to(dtype)


@pytest.mark.parametrize(("bits", "act_bits"), WIDTHS)
def test_the_integer_kernel_equals_the_fake_quant_model(
    bits: int, act_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = WIDTHS.index((bits, act_bits))
    for number, choice in enumerate(settings()):
        use(choice, monkeypatch)
        this = turn + number
        dtype = (torch.bfloat16, torch.float16)[this % 2]
        half_step = bits < 8 or this % 3 > 0
        zero_point_bits = (0, 2, 4, 8)[this % 4] if half_step else 2
        case = make_case(this, COLUMNS[this // 2 % 4], zero_point_bits, half_step, ROWS, indexed=this % 3 == 0)
        case = row_exponents(case) if this % 2 else replace(case, exponent=torch.tensor(-12, dtype=torch.int32))
        bias = random_x(this, (ROWS,), dtype=dtype) if this % 5 == 0 else None
        for act_half_step in (True, False):
            x = hard_row(this, case.in_features, dtype)
            y = call(case, x, bits, act_bits, act_half_step, bias)
            exact, bound = expected(case, x, bits, act_bits, act_half_step, bias)
            wrong = ~((y.double() - exact).abs() <= bound)
            assert y.dtype == dtype
            assert not wrong.any(), f"{choice}, {case.parent.shape}, {dtype}: {int(wrong.sum())} of {ROWS} wrong"


@pytest.mark.parametrize("act_half_step", [True, False])
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-20, 1e20, 1e29])
def test_extreme_activations(magnitude: float, act_half_step: bool) -> None:
    case = replace(make_case(3, 1152, 4, True, ROWS), exponent=torch.tensor(-12, dtype=torch.int32))
    x = random_x(3, (1, 1152), magnitude, torch.bfloat16)
    y = call(case, x, 2, 4, act_half_step)
    exact, bound = expected(case, x, 2, 4, act_half_step, None)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("act_bits", [2, 8])
@pytest.mark.parametrize(("first", "step"), [(0, 1), (100, 1), (-70, 1), (-60, 2), (0, 0)])
def test_groups_of_all_magnitudes_beside_each_other(first: int, step: int, act_bits: int) -> None:
    # Group g has numbers of 2**(first - step * g), and row n of the weight sees group n alone.
    case = replace(make_case(5, 128 * (ROWS // 4), 4, True, ROWS), exponent=torch.tensor(-12, dtype=torch.int32))
    groups = case.scale_codes.shape[1]
    seen = torch.eye(ROWS, groups, dtype=torch.bool)
    case = replace(case, scale_codes=torch.where(seen, case.scale_codes, 0))
    powers = 2.0 ** (first - step * torch.arange(groups, dtype=torch.float64))
    x = (random_x(5, (1, groups, 32)) * powers[:, None]).flatten(1).to(torch.bfloat16)
    assert powers.min() / powers.max() < 2.0**-14 or step == 0
    y = call(case, x, 2, act_bits, True)
    exact, bound = expected(case, x, 2, act_bits, True, None)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_result(value: float) -> None:
    case = replace(make_case(3, 1152, 4, True, ROWS), exponent=torch.tensor(-12, dtype=torch.int32))
    x = random_x(3, (1, 1152), dtype=torch.bfloat16)
    x[0, 77] = value
    assert call(case, x, 2, 2, True).isnan().all()
