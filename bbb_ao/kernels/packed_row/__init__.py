"""The activation's way into a packed product, and the fused path for a single row on a CPU."""

from bbb_ao.kernels.packed_row.inputs import expand_input, fake_quantize_input
from bbb_ao.kernels.packed_row.linear import packed_linear_row, takes_row_path
from bbb_ao.kernels.packed_row.op import prepare_row

__all__ = ["expand_input", "fake_quantize_input", "packed_linear_row", "prepare_row", "takes_row_path"]
