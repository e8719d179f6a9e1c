"""Linear layer on a packed weight with dynamically quantized activations."""

from bbb_ao.kernels.packed_linear_dynamic.dispatch import packed_linear_dynamic

__all__ = ["packed_linear_dynamic"]
