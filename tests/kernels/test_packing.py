"""Packing: dense rows at every width, planes and their slices, and the view of planes as words."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_case import FEW, columns, seeds, widths

from bbb_ao.kernels import pack_codes, pack_planes, unpack_codes, unpack_planes
from bbb_ao.kernels.packing.words import WordLayout, assemble_words, plane_words, word_activation


def random_codes(seed: int, bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@FEW
@given(seed=seeds, bits=st.integers(1, 8), features=st.integers(0, 70), leading=st.lists(st.integers(0, 3), max_size=2))
def test_pack_then_unpack_is_identity(seed: int, bits: int, features: int, leading: list[int]) -> None:
    codes = random_codes(seed, bits, *leading, features)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*leading, -(-features * bits // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, features), codes)


@FEW
@given(seed=seeds, bits=st.integers(1, 8), features=st.integers(1, 40))
def test_packed_row_is_one_string_of_bits(seed: int, bits: int, features: int) -> None:
    codes = random_codes(seed, bits, 1, features)
    number = sum(int(code) << (bits * k) for k, code in enumerate(codes[0]))
    expected = number.to_bytes(-(-features * bits // 8), "little")
    assert bytes(pack_codes(codes, bits)[0].tolist()) == expected


def test_non_contiguous_codes_pack_alike() -> None:
    codes = random_codes(0, 3, 20, 7).T
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))
    planes = random_codes(0, 8, 64, 6).T
    assert all(torch.equal(a, b) for a, b in zip(pack_planes(planes), pack_planes(planes.contiguous()), strict=True))


@pytest.mark.parametrize("bits", [0, 9])
def test_width_outside_1_to_8_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), bits, 4)


def test_bad_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"below 2\*\*bits = 8: found 8"):
        pack_codes(torch.tensor([1, 8], dtype=torch.uint8), 3)
    with pytest.raises(TypeError, match="codes must be uint8"):
        pack_codes(torch.zeros(4), 2)
    with pytest.raises(ValueError, match="3 bytes a row for 5 codes of 4 bits: found 2"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5)


@FEW
@given(seed=seeds, features=columns, bits=widths)
def test_planes_slices_equal_shifts(seed: int, features: int, bits: int) -> None:
    codes = random_codes(seed, 8, 3, features)
    high, mid, low = pack_planes(codes)
    assert torch.equal(unpack_planes(high, mid, low, features, bits), codes >> (8 - bits))
    needed = (high, mid if bits > 2 else None, low if bits > 4 else None)
    assert torch.equal(unpack_planes(*needed, features, bits), codes >> (8 - bits))


@FEW
@given(seed=seeds, features=columns)
def test_plane_layout_is_the_documented_one(seed: int, features: int) -> None:
    codes = random_codes(seed, 8, 1, features)
    for plane, width, part in zip(pack_planes(codes), (2, 2, 4), (codes >> 6, codes >> 4, codes), strict=True):
        per_byte, expected = 8 // width, []
        for start in range(0, features, 128):
            length = min(128, features - start)
            for i in range(length // per_byte):
                quarter, u = divmod(i, length // 4)
                column = length // 4 * quarter + u // 2 + length // 8 * (u % 2)
                places = [start + length // per_byte * j + column for j in range(per_byte)]
                expected.append(sum((int(part[0, c]) & (2**width - 1)) << (width * j) for j, c in enumerate(places)))
        assert plane[0].tolist() == expected, f"width {width}"


def test_bad_planes_are_refused() -> None:
    high, mid, low = pack_planes(random_codes(0, 8, 2, 64))
    with pytest.raises(ValueError, match="multiple of 32: found 40; pad to 64"):
        pack_planes(random_codes(0, 8, 2, 40))
    with pytest.raises(ValueError, match="4 bits need the plane mid"):
        unpack_planes(high, None, low, 64, 4)
    with pytest.raises(ValueError, match="5 bits need the plane low, which is not stored; use at most 4"):
        unpack_planes(high, mid, None, 64, 5)
    with pytest.raises(ValueError, match="bits must be 2 to 8: found 1"):
        unpack_planes(high, mid, low, 64, 1)
    with pytest.raises(ValueError, match=r"plane low must have shape \(2, 32\): found \(2, 16\)"):
        unpack_planes(high, mid, mid, 64, 8)
    with pytest.raises(TypeError, match="plane mid must be uint8"):
        unpack_planes(high, mid.int(), low, 64, 4)


@FEW
@given(seed=seeds, features=columns, bits=st.sampled_from([2, 4, 8]))
def test_masked_fields_of_words_select_each_column_once(seed: int, features: int, bits: int) -> None:
    codes = random_codes(seed, 8, 3, features)
    layout = WordLayout(bits, features)
    blocks, tail = plane_words(list(pack_planes(codes))[: {2: 1, 4: 2, 8: 3}[bits]], layout)
    gather, factors = word_activation(layout)
    split = layout.blocks * 128
    # Row c of the activation is the c-th unit vector, so that the products below are the codes of each column.
    shares = torch.eye(features + 1)[:features].index_select(1, gather) * factors
    selected = torch.zeros(3, features)
    for words, part, shape in (
        (blocks, shares[:, :split], layout.block_shape[1:]),
        (tail, shares[:, split:], layout.tail_shape[1:]),
    ):
        if words:
            sets, part = assemble_words(words), part.unflatten(1, (-1, *shape))
            for k in range(4):
                for q in range(4):
                    field = layout.masked_field(sets, k, q).reshape(3, -1, shape[-1])
                    selected += torch.einsum("rbl,cbl->rc", field.expand(3, part.shape[1], -1), part[:, :, k, q])
    assert torch.equal(selected, (codes >> (8 - bits)).float())
