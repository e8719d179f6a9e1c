"""Dense rows of codes at any width from 1 to 8 bits, without gaps.

A row is one little-endian string of bits: code k takes bits bits*k to bits*k + bits - 1, and bit n is bit n % 8 of byte
n // 8. The last byte is filled with zero bits.
"""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes densely.

    Args:
        codes: [..., K], uint8, each < 2**bits; any K, 0 included.
        bits: 1 to 8.
    Returns:
        packed, [..., ceil(K * bits / 8)], uint8.
    Raises:
        TypeError: codes are not uint8.
        ValueError: bits is not 1 to 8, or a code does not fit.
    """
    _check_bits(bits)
    _check_uint8(codes, "codes")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes must be below 2**bits = {2**bits}: found {int(codes.max())}; pack at more bits")
    features = codes.shape[-1]
    # Eight codes of b bits fill exactly b bytes, whatever b is: they are one int64 word.
    octets = torch.nn.functional.pad(codes, (0, -features % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
    words = (octets << (bits * torch.arange(8, device=codes.device))).sum(-1)
    packed = (words.unsqueeze(-1) >> (8 * torch.arange(bits, device=codes.device))) & 0xFF
    return packed.to(torch.uint8).flatten(-2)[..., : packed_bytes(features, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, features: int) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: [..., ceil(features * bits / 8)], uint8.
        bits: 1 to 8.
        features: codes in a row, >= 0.
    Returns:
        codes, [..., features], uint8.
    Raises:
        TypeError: packed is not uint8.
        ValueError: bits is not 1 to 8, or the rows have another length.
    """
    _check_bits(bits)
    _check_uint8(packed, "packed")
    expected = packed_bytes(features, bits)
    if packed.shape[-1] != expected:
        raise ValueError(
            f"packed must have ceil(features * bits / 8) = {expected} bytes a row for {features} codes of {bits} bits:"
            f" found {packed.shape[-1]}"
        )
    octets = torch.nn.functional.pad(packed, (0, -expected % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    words = (octets << (8 * torch.arange(bits, device=packed.device))).sum(-1)
    codes = (words.unsqueeze(-1) >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :features]


def packed_bytes(features: int, bits: int) -> int:
    """Bytes of a row of `features` codes: ceil(features * bits / 8)."""
    return (features * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8: found {bits}")


def _check_uint8(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8: found {tensor.dtype}; convert with .to(torch.uint8)")
