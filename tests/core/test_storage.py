"""Bits per weight against figures computed by hand."""

import pytest
import torch
from torch import nn

from bbb_ao.duplication import duplicate_output
from bbb_ao.grid import Grid
from bbb_ao.packed_linear import PackedLinear
from bbb_ao.qat_linear import QATLinear
from bbb_ao.splitting import choose_index
from bbb_ao.storage import Footprint, footprint, layer_footprint
from core.strategies import make_linear


def packed(
    width: int, rows: int, ratio: float = 0.0, max_bits: int = 8, grid: Grid | None = None, **rest
) -> PackedLinear:
    linear = make_linear(0, width, rows)
    index = choose_index(torch.arange(width, dtype=torch.float32), ratio)
    return PackedLinear.from_qat(QATLinear.from_linear(linear, 2, None, grid, index, **rest), max_bits)


@pytest.mark.parametrize(
    ("zero_point_bits", "expected"), [(0, 2.25), (2, 2.3125), (4, 2.375), (8, 2.5)], ids=lambda value: str(value)
)
def test_bits_per_weight_of_the_documented_grids(zero_point_bits: int, expected: float) -> None:
    layer = packed(1024, 64, max_bits=2, grid=Grid(zero_point_bits=zero_point_bits))
    # Beyond the documented figure only the second level: 32 bits a layer.
    assert layer_footprint(layer).bits_per_weight == pytest.approx(expected + 32 / (1024 * 64), abs=1e-12)


def test_split_and_padded_layer_counts_every_stored_byte() -> None:
    # 100 channels at ratio 0.3: 128 stored columns, 4 groups, 24 rows.
    layer = packed(100, 24, 0.3)
    shared = 24 * 4 + 4 + 24 * 2 + 128 * 4
    assert [layer_footprint(layer, bits).bytes for bits in (2, 3, 4, 5, 8)] == [
        24 * 128 * planes // 8 + shared for planes in (2, 4, 4, 8, 8)
    ]
    assert layer_footprint(layer) == layer_footprint(layer, 8)
    assert layer_footprint(layer, 2).weights == 2400
    stored = sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if n != "bias")
    assert layer_footprint(layer).bytes == stored


def test_ragged_zero_offsets_fill_whole_bytes() -> None:
    # 3 groups of 4 bits take 2 bytes a row.
    layer = packed(96, 8, max_bits=2)
    assert layer_footprint(layer).bytes == 8 * 96 // 4 + 8 * 3 + 4 + 8 * 2


def test_integer_slices_read_the_bit_that_rounds_them() -> None:
    grid = Grid(kind="integer", zero_point_bits=2)
    layer = packed(64, 8, grid=grid)
    planes = {2: 4, 3: 4, 4: 8, 8: 8}
    shared = 8 * 2 + 4 + 8
    assert {b: layer_footprint(layer, b).bytes - shared for b in planes} == {b: 64 * p for b, p in planes.items()}


def test_model_adds_layers_and_the_norms_indices() -> None:
    norm = nn.LayerNorm(64)
    duplicate_output(norm, torch.arange(64, dtype=torch.int32))
    model = nn.Sequential(norm, packed(64, 64), packed(64, 32))
    expected = layer_footprint(model[1]) + layer_footprint(model[2]) + Footprint(0, 64 * 4)
    assert footprint(model) == expected
    assert footprint(model, 2).bytes < expected.bytes
    with pytest.raises(ValueError, match="no packed layers"):
        footprint(nn.Linear(2, 2))
