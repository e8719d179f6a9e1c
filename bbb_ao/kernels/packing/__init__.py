"""Packed codes: dense rows of any width, and the three planes of a nested weight."""

from bbb_ao.kernels.packing.dense import pack_codes, unpack_codes
from bbb_ao.kernels.packing.planes import pack_planes, unpack_planes

__all__ = ["pack_codes", "pack_planes", "unpack_codes", "unpack_planes"]
