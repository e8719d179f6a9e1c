"""The three planes of a nested weight: bits 7..6, 5..4 and 3..0 of its 8-bit parent codes.

They are separate tensors so that two bits read only their own bytes and a change of width copies nothing.

Layout of a plane of b bits (b = 2 or 4, P = 8 / b codes a byte). Columns are cut into blocks of 128; the last block may
have 32, 64 or 96. A block of L columns has four quarters and takes L / P bytes. With v, u = divmod(i, L / 4), byte i
holds at bit position b * j the code of the column

    (L / P) * j + (L / 4) * v + u // 2 + (L / 8) * (u % 2),

so that the low bytes of consecutive 16-bit words are consecutive columns, and so are the high bytes. In a full block
every field j of the 2-bit planes is exactly one group of 32.
"""

import torch
from torch import Tensor

BLOCK = 128
GRANULE = 32
PAIR_BITS, LOW_BITS = 2, 4


def pack_planes(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split 8-bit parent codes into their planes.

    Args:
        codes: [out_features, K], uint8, K a multiple of 32.
    Returns:
        (high, mid, low), uint8: [out_features, K / 4], [out_features, K / 4] and [out_features, K / 2].
    Raises:
        TypeError: codes are not uint8.
        ValueError: codes are not a matrix, or 32 does not divide K.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8: found {codes.dtype}; convert with .to(torch.uint8)")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [out_features, K]: found shape {tuple(codes.shape)}")
    check_stored_features(codes.shape[-1])
    return (
        _pack_plane(codes >> 6, PAIR_BITS),
        _pack_plane((codes >> 4) & 3, PAIR_BITS),
        _pack_plane(codes & 15, LOW_BITS),
    )


def unpack_planes(high: Tensor, mid: Tensor | None, low: Tensor | None, features: int, bits: int) -> Tensor:
    """The top `bits` bits of the parent codes: c_8 >> (8 - bits).

    Only the planes that hold these bits are read: 2 reads high; 3 and 4 also mid; 5 to 8 all of them.

    Args:
        high, mid: [out_features, features / 4], uint8; mid may be None at 2 bits.
        low: [out_features, features / 2], uint8; may be None up to 4 bits.
        features: columns, a multiple of 32.
        bits: 2 to 8.
    Returns:
        codes, [out_features, features], uint8, each < 2**bits.
    Raises:
        TypeError: a plane is not uint8.
        ValueError: bits is not 2 to 8, 32 does not divide features, or a plane is missing or of another shape.
    """
    check_planes(high, mid, low, features, bits)
    codes = _unpack_plane(high, PAIR_BITS, features)
    if bits == 2:
        return codes
    assert mid is not None, "check_planes found it"
    codes = (codes << 2) | _unpack_plane(mid, PAIR_BITS, features)
    if bits <= 4:
        return codes >> (4 - bits)
    assert low is not None, "check_planes found it"
    return ((codes << 4) | _unpack_plane(low, LOW_BITS, features)) >> (8 - bits)


def stored_bits(mid: Tensor | None, low: Tensor | None) -> int:
    """The widest slice that the planes hold: 2, 4 or 8 bits."""
    return 8 if low is not None else 4 if mid is not None else 2


def check_planes(high: Tensor, mid: Tensor | None, low: Tensor | None, features: int, bits: int) -> None:
    """Raise unless the planes hold `bits` bits of [out_features, features] codes; see `unpack_planes`."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8: found {bits}")
    check_stored_features(features)
    planes = (("high", high, 2, PAIR_BITS), ("mid", mid, 3, PAIR_BITS), ("low", low, 5, LOW_BITS))
    for name, plane, first_width, width in planes:
        if plane is None:
            if bits >= first_width:
                raise ValueError(
                    f"{bits} bits need the plane {name}, which is not stored; use at most {first_width - 1}"
                )
            continue
        if plane.dtype != torch.uint8:
            raise TypeError(f"plane {name} must be uint8: found {plane.dtype}")
        expected = (high.shape[0], features * width // 8)
        if tuple(plane.shape) != expected:
            raise ValueError(f"plane {name} must have shape {expected}: found {tuple(plane.shape)}")


def check_stored_features(features: int) -> None:
    """Raise unless 32 divides the number of stored columns."""
    if features % GRANULE:
        raise ValueError(
            f"columns must be a multiple of {GRANULE}: found {features}; pad to {features + -features % GRANULE}"
        )


def _split_fields(values: Tensor, fields: int) -> Tensor:
    """[..., K] in column order -> [..., fields, K / fields]: row j holds field j of each byte. This is the layout."""
    whole = values.shape[-1] // BLOCK * BLOCK
    parts = []
    for part, blocks in ((values[..., :whole], whole // BLOCK), (values[..., whole:], 1)):
        if part.shape[-1]:
            halves = part.unflatten(-1, (blocks, fields, 4 // fields, 2, -1))
            parts.append(halves.transpose(-1, -2).transpose(-5, -4).flatten(-4))
    return torch.cat(parts, -1) if len(parts) != 1 else parts[0]


def _join_fields(fields: Tensor) -> Tensor:
    """Inverse of `_split_fields`: [..., P, K / P] -> [..., K]."""
    per_byte, size = fields.shape[-2], fields.shape[-1]
    whole = size * per_byte // BLOCK * (BLOCK // per_byte)
    parts = []
    for part, blocks in ((fields[..., :whole], whole * per_byte // BLOCK), (fields[..., whole:], 1)):
        if part.shape[-1]:
            words = part.unflatten(-1, (blocks, 4 // per_byte, -1, 2))
            parts.append(words.transpose(-1, -2).transpose(-5, -4).flatten(-5))
    return torch.cat(parts, -1) if len(parts) != 1 else parts[0]


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """[out_features, K] codes of `width` bits -> [out_features, K * width / 8]."""
    fields = _split_fields(codes, 8 // width)
    packed = fields[..., 0, :].clone()
    for j in range(1, 8 // width):
        packed |= fields[..., j, :] << (width * j)
    return packed


def _unpack_plane(plane: Tensor, width: int, features: int) -> Tensor:
    """Inverse of `_pack_plane`."""
    if features == 0:
        return plane.new_empty(plane.shape[0], 0)
    fields = torch.stack([(plane >> (width * j)) & (2**width - 1) for j in range(8 // width)], -2)
    return _join_fields(fields)
