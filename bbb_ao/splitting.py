"""Outlier channel splitting: an input channel is duplicated, and its weight column shared between two copies.

y = sum_m x_m w_m is unchanged when channel m appears twice with columns w_m/2 - d and w_m/2 + d. On the integer grid
d = s/4 makes the two copies' codes add up to the code of w_m (Hermite: floor(y) + floor(y + 1/2) = floor(2y)); on the
half-step grid plain halves (d = 0) do. Duplicates follow all original channels, and zero columns with zero activations
fill the last group. Source: design.md, sections 1.7, 2.3 and 2.4.

An index describes the stored columns: int32 [stored_features]; column k reads input channel index[k], and a value of
`in_features` means padding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bbb_ao.kernels import PLANE_BLOCK


def channel_metric(weights: Sequence[Tensor], activation_norm: Tensor | None = None) -> Tensor:
    """How much an input channel stands out: ||X_m||_2 * max_j |W_jm|, over all Linears that share the input.

    Args:
        weights: each [out_features, in_features], the same in_features.
        activation_norm: ||X_m||_2 over the calibration tokens, [in_features]; None ranks by the weights alone.
    Returns:
        [in_features], float32.
    """
    if not weights:
        raise ValueError("weights: expected at least one matrix, got none")
    largest = torch.stack([weight.detach().abs().amax(0).float() for weight in weights]).amax(0)
    if activation_norm is None:
        return largest
    if activation_norm.shape != largest.shape:
        raise ValueError(f"activation_norm: expected shape {tuple(largest.shape)}, got {tuple(activation_norm.shape)}")
    return largest * activation_norm.to(largest)


def split_ratio(block: int, blocks: int, ratio_min: float, ratio_max: float) -> float:
    """Share of channels to split in a block: linear in depth from ratio_min (first) to ratio_max (last)."""
    if not 0 <= block < blocks:
        raise ValueError(f"block: expected 0 to {blocks - 1}, got {block}")
    return ratio_min if blocks == 1 else ratio_min + (ratio_max - ratio_min) * block / (blocks - 1)


def choose_index(metric: Tensor, ratio: float, group_size: int = 32) -> Tensor | None:
    """The stored columns for a split of about `ratio` of the channels, the highest metric first.

    The number of stored columns is the multiple of group_size nearest to (1 + ratio) * in_features, and duplicates fill
    it: padding would cost the same bits. Where that is fine enough (in_features at least 16 blocks of 128 and divided
    by 128) it is a multiple of 128, so that the last block of the planes is full and kernels need no tail. Ties are
    broken by channel number.

    Args:
        metric: [in_features], finite.
        ratio: 0 to 1.
    Returns:
        index, int32 [stored_features], or None where the columns stay as they are (ratio rounds to none, no padding).
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected 0 to 1, got {ratio}")
    if metric.dim() != 1 or not bool(torch.isfinite(metric).all()):
        raise ValueError("metric: expected one finite value for each input channel")
    channels = metric.numel()
    padded = -(-channels // group_size) * group_size
    multiple = PLANE_BLOCK if channels % PLANE_BLOCK == 0 and channels >= 16 * PLANE_BLOCK else group_size
    stored = max(padded, int((1 + ratio) * channels / multiple + 0.5) * multiple)
    if stored == channels:
        return None
    original = torch.arange(channels, dtype=torch.int32, device=metric.device)
    ranked = metric.sort(descending=True, stable=True).indices.to(torch.int32)
    tail = ranked[: stored - channels if ratio > 0 else 0]
    return F.pad(torch.cat([original, tail]), (0, stored - channels - tail.numel()), value=channels)


def check_index(index: Tensor, in_features: int, group_size: int, where: str = "index") -> None:
    """Refuse an index that does not hold every channel once, then duplicates at most once each, then padding.

    On the meta device it has a shape and a type alone.

    Raises:
        ValueError: with `where` in the message.
    """
    fix = "fix: copy all files again, or rebuild it with choose_index"
    if index.dtype != torch.int32 or index.dim() != 1 or index.numel() % group_size or index.numel() < in_features:
        raise ValueError(
            f"{where}: expected int32 of a length divisible by {group_size} and at least {in_features}, "
            f"got {index.dtype} {tuple(index.shape)}; {fix}"
        )
    if index.is_meta:
        return
    values = index.detach().cpu().long()
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > in_features):
        raise ValueError(
            f"{where}: expected values from 0 to {in_features}, got {int(values.min())} to {int(values.max())}; {fix}"
        )
    if not torch.equal(values[:in_features], torch.arange(in_features)):
        raise ValueError(f"{where}: expected the original channels 0 to {in_features - 1} first, got others; {fix}")
    tail = values[in_features:]
    duplicates = tail[tail < in_features]
    if duplicates.unique().numel() != duplicates.numel():
        raise ValueError(f"{where}: expected each channel duplicated at most once, got one more often; {fix}")
    if bool((tail[: duplicates.numel()] == in_features).any()):
        raise ValueError(f"{where}: expected padding after the last duplicate only, got it before; {fix}")


def split_mask(index: Tensor, in_features: int) -> Tensor:
    """True for stored columns that are one of two copies: bool [stored_features]."""
    counts = index.new_zeros(in_features + 1).index_add(0, index.long(), torch.ones_like(index))
    counts[in_features] = 0
    return counts[index.long()] == 2


def split_channels(weight: Tensor, index: Tensor, offset: Tensor | None = None) -> Tensor:
    """Share each split column between its copies: w/2 - d in the original's place and w/2 + d in the duplicate's.

    Args:
        weight: [out_features, in_features], floating point.
        index: int32 [stored_features].
        offset: d for each output row and input channel, [out_features, in_features], or None for plain halves.
    Returns:
        [out_features, stored_features], weight's dtype; padding columns are zero.
    """
    in_features = weight.shape[1]
    mask = split_mask(index, in_features)
    columns = F.pad(weight, (0, 1)).index_select(1, index.long())
    columns = torch.where(mask, columns / 2, columns)
    if offset is None:
        return columns
    shift = F.pad(offset, (0, 1)).index_select(1, index.long()) * mask
    first = torch.arange(index.numel(), device=index.device) < in_features
    return torch.where(first, columns - shift, columns + shift)


def merge_channels(weight: Tensor, index: Tensor, in_features: int) -> Tensor:
    """The inverse of `split_channels`: the copies summed, the padding dropped.

    Args:
        weight: [out_features, stored_features].
    Returns:
        [out_features, in_features], the same dtype.
    """
    merged = weight.new_zeros(weight.shape[0], in_features + 1)
    return merged.index_add(1, index.long(), weight)[:, :in_features]


def expand_channels(x: Tensor, index: Tensor) -> Tensor:
    """Activations of the stored columns: [..., in_features] -> [..., stored_features]; padding reads zero.

    Args:
        index: as from `choose_index`: every channel once and in order, then duplicates and padding.
    """
    tail = index[x.shape[-1] :]
    if x.requires_grad and torch.is_grad_enabled():
        return _ExpandChannels.apply(x, tail)  # type: ignore[return-value]
    return torch.cat([x, F.pad(x, (0, 1)).index_select(-1, tail)], -1)


class _ExpandChannels(torch.autograd.Function):
    """`expand_channels` for training: one pass over x each way, where pad, gather and join take two and back five.

    Joined, not gathered as a whole: the gradient of a gather adds every channel by index, ten times as slow on a CPU.

    With no gradient the plain operations stay: Inductor fuses them, and `passes.fold_norms` looks for them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, tail: Tensor) -> Tensor:
        channels = x.shape[-1]
        padding, source = tail == channels, tail.clamp(max=channels - 1)
        ctx.save_for_backward(padding, source)
        return torch.cat([x, x.index_select(-1, source).masked_fill_(padding, 0)], -1)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        padding, source = ctx.saved_tensors
        kept, copies = gradients[0].tensor_split([gradients[0].shape[-1] - source.numel()], -1)
        return kept.index_add(-1, source, copies.masked_fill(padding, 0)), None
