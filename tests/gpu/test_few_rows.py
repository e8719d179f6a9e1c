"""Three to eight rows at every launch setting, against float64 on the CPU with the bound of `test_packed_linear`."""

from dataclasses import replace

import pytest
import torch
from packed_case import make_case, random_x, row_exponents

from .test_packed_linear import check

pytest.importorskip("triton", reason="the kernel is written in Gluon")
pytestmark = pytest.mark.gpu

COLUMNS = (128, 384, 1152, 4224)
OUT_FEATURES = (1, 37, 300, 9000)  # the last one takes programs to more than one tile
ZERO_POINT_BITS = (0, 2, 4, 8)


@pytest.mark.parametrize("turn", range(12))
def test_every_setting_gives_the_product(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bbb_ao.kernels.packed_linear import launch

    choices = launch.FEW_ROWS_SETTINGS
    assert len(choices) == 12, "as many as there are turns"
    monkeypatch.setattr(launch, "settings_for", lambda *_: choices[turn])
    for number, (features, out_features) in enumerate(zip(COLUMNS, OUT_FEATURES, strict=True)):
        bits, dtype = (2, 4, 8, 3)[(turn + number) % 4], (torch.bfloat16, torch.float16)[(turn + number) % 2]
        case = make_case(turn, features, ZERO_POINT_BITS[(turn // 2 + number) % 4], True, out_features, number % 2 == 0)
        case = row_exponents(case) if number % 2 else replace(case, exponent=torch.tensor(-12, dtype=torch.int32))
        bias = random_x(turn, (out_features,), dtype=dtype) if number % 3 == 0 else None
        for m in (3, 5, 8):
            check(case, random_x(m, (m, case.in_features), dtype=dtype), bits, "cuda", bias)
