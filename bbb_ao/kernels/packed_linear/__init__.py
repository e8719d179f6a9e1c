"""Linear layer on a packed weight, activations as they are."""

from bbb_ao.kernels.packed_linear.dispatch import packed_linear
from bbb_ao.kernels.packed_linear.reference import dequantize_packed

__all__ = ["dequantize_packed", "packed_linear"]
