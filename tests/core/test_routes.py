"""Which implementation runs and why: the kernels' own rules, asked for every property that matters."""

import pytest
import torch

from bbb_ao.grid import Grid
from bbb_ao.routes import LayerKind, cpu_route, gpu_route

FITTING = LayerKind(4096, 4096, 2, 8, None, Grid(), torch.bfloat16)


def kind(**change) -> LayerKind:
    return LayerKind(**(vars(FITTING) | change))


@pytest.mark.parametrize(
    ("rows", "capability", "name"),
    [
        (1, (9, 0), "decode"),
        (2, (9, 0), "decode"),
        (3, (9, 0), "few_rows"),
        (8, (9, 0), "few_rows"),
        (9, (9, 0), "warpgroup"),
        (16, (9, 0), "warpgroup"),
        (256, (9, 0), "warpgroup"),
        (5000, (9, 0), "warpgroup"),
        (8, (8, 9), "few_rows"),
        (9, (8, 9), "dequantize"),
        (1, (12, 0), "decode"),
    ],
)
def test_fitting_layers_take_the_kernels(rows: int, capability: tuple[int, int], name: str) -> None:
    pytest.importorskip("triton")
    assert gpu_route(FITTING, rows, capability) == (name, "")


@pytest.mark.parametrize(
    ("bits", "rows", "name"), [(4, 1025, "warpgroup"), (8, 1024, "warpgroup"), (5, 1025, "dequantize")]
)
def test_many_rows_of_wide_codes_take_the_dense_way(bits: int, rows: int, name: str) -> None:
    pytest.importorskip("triton")
    assert gpu_route(kind(bits=bits), rows, (9, 0)) == (name, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "x is float32"),
        ({"grid": Grid(group_size=64)}, "groups of 64"),
        ({"grid": Grid(group_size=96), "stored_features": 4128}, "groups of 96, 4128 columns are no multiple of 128"),
        ({"stored_features": 4128}, "4128 columns are no multiple of 128"),
        ({"grid": Grid(zero_point_bits=3)}, "3-bit zero points"),
        ({"grid": Grid("integer", zero_point_bits=2)}, "2 of 8 bits are rounded"),
        ({"dtype": torch.float32, "stored_features": 96}, "x is float32, 96 columns are no multiple of 128"),
    ],
)
def test_the_reason_is_named(change: dict, reason: str) -> None:
    pytest.importorskip("triton")
    assert gpu_route(kind(**change), 1, (9, 0)) == ("dequantize", reason)


def test_old_gpus_are_named() -> None:
    pytest.importorskip("triton")
    assert gpu_route(FITTING, 1, (7, 5)) == ("dequantize", "compute capability 7.5")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("fused row", "")),
        ({"bits": 3}, ("dequantize", "3 bits (not 2, 4 or 8)")),
        ({"grid": Grid(group_size=64)}, ("dequantize", "groups of 64")),
        ({"grid": Grid(zero_point_bits=3)}, ("dequantize", "3-bit zero points")),
        ({"grid": Grid("integer", zero_point_bits=2)}, ("dequantize", "2 of 8 bits are rounded")),
        ({"grid": Grid("integer", zero_point_bits=2), "bits": 8}, ("fused row", "")),
    ],
)
def test_one_row_on_a_cpu(change: dict, expected: tuple[str, str]) -> None:
    assert cpu_route(kind(**change), 1) == expected
    assert cpu_route(kind(**change), 16) == ("dequantize", "")
