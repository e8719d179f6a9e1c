"""One and two rows at every launch setting, against float64 on the CPU with the bound of `test_packed_linear`."""

from dataclasses import replace

import pytest
import torch
from packed_case import make_case, random_x, row_exponents

from .test_packed_linear import check

pytest.importorskip("triton", reason="the kernel is written in Gluon")
pytestmark = pytest.mark.gpu

# One turn of the warps over the columns and several; the last turn may be a part of one.
COLUMNS = (128, 1152, 4224)
OUT_FEATURES = (37, 130, 300)
ZERO_POINT_BITS = (0, 2, 4, 8)


def choices() -> list[tuple[int, ...]]:
    from bbb_ao.kernels.packed_linear import launch

    # More tiles than divide what is ahead.
    return [*launch.DECODE_SETTINGS, (3, 4, 0, 2), (2, 8, 0, 3)]


@pytest.mark.parametrize("turn", range(12))
def test_every_setting_gives_the_product(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bbb_ao.kernels.packed_linear import launch

    assert len(choices()) == 12, "as many as there are turns"
    monkeypatch.setattr(launch, "settings_for", lambda *_: choices()[turn])
    for number, (features, out_features) in enumerate(zip(COLUMNS, OUT_FEATURES, strict=True)):
        this = turn + number
        bits, dtype = (2, 4, 8, 3)[this % 4], (torch.bfloat16, torch.float16)[this // 2 % 2]
        case = make_case(turn, features, ZERO_POINT_BITS[this // 3 % 4], True, out_features, this % 2 == 0)
        case = row_exponents(case) if this % 3 else replace(case, exponent=torch.tensor(-12, dtype=torch.int32))
        bias = random_x(turn, (out_features,), dtype=dtype) if number == 1 else None
        for m in (1, 2):
            check(case, random_x(m, (m, case.in_features), dtype=dtype), bits, "cuda", bias)
