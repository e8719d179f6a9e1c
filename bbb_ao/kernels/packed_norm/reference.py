"""What stands around the products of `packed_norm`, in plain torch: for many rows, other types and CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 16  # channels of each sum of squares: the rows of a tile of the weight


def square_sums(rows: int) -> int:
    """Sums of squares for so many channels."""
    return -(-rows // PART)


def normed_features(rows: int, gated: bool) -> int:
    """Channels that `packed_linear_normed` gives for so many rows of the weight.

    Raises:
        ValueError: an odd number of rows to be gated.
    """
    if gated and rows % 2:
        raise ValueError(f"gated: expected as many rows of the weight in both halves, got {rows} rows")
    return rows // 2 if gated else rows


def gate_halves(y: Tensor) -> Tensor:
    """silu(first half) * second half of the channels, SwiGLU."""
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums of squares."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_residual(x: Tensor, residual: Tensor, norm_weight: Tensor, rows: int) -> None:
    """Raise unless `residual` and `norm_weight` fit a product of x with `rows` channels."""
    shape = (*x.shape[:-1], rows)
    if residual.shape != shape or residual.dtype != x.dtype:
        found = f"{residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"residual must be {x.dtype} {shape}, as the product: found {found}")
    if norm_weight.shape != (rows,):
        raise ValueError(f"norm_weight must have shape ({rows},): found {tuple(norm_weight.shape)}")


def check_squares(weighted: Tensor, squares: Tensor) -> None:
    """Raise unless `squares` has the sums of squares of `weighted`'s channels."""
    shape, dtype = (*weighted.shape[:-1], square_sums(weighted.shape[-1])), sum_dtype(weighted.dtype)
    if squares.shape != shape or squares.dtype != dtype:
        found = f"{squares.dtype} {tuple(squares.shape)}"
        raise ValueError(f"squares must be {dtype} {shape}: found {found}")


def add_residual(product: Tensor, residual: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weighted, squares) of `packed_linear_residual`."""
    hidden = residual + product
    wide = hidden.to(sum_dtype(hidden.dtype))
    channels = hidden.shape[-1]
    squares = F.pad(wide.square(), (0, square_sums(channels) * PART - channels)).unflatten(-1, (-1, PART)).sum(-1)
    return hidden, (hidden * norm_weight).to(hidden.dtype), squares


def divide_by_norm(weighted: Tensor, squares: Tensor, eps: float) -> Tensor:
    """weighted / sqrt(sum(squares) / channels + eps), in the type of `weighted`."""
    mean = squares.sum(-1, keepdim=True) / weighted.shape[-1]
    return (weighted * torch.rsqrt(mean + eps)).to(weighted.dtype)
