"""Perplexity of a causal language model."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbb_ao.errors import DataError, NumericsError


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean cross-entropy of tokens 2 .. window of every window, from float32 logits.

    Args:
        model: returns an object with `logits`, [batch, window, vocabulary]. It is put in evaluation mode and back.
        windows: int64 [windows, window], window >= 2, as from `evaluation_windows`.
        batch_size: windows in one forward pass.
        device: where the model is; None takes that of its first parameter.
        on_batch: called with the number of windows after each batch.
    Returns:
        the perplexity, >= 1.
    Raises:
        DataError: no window, or windows of fewer than 2 tokens.
        NumericsError: NaN or infinite loss (names the windows), or a perplexity beyond float64.
    """
    if windows.dim() != 2 or not windows.shape[0] or windows.shape[1] < 2:
        raise DataError(
            f"windows: expected [windows, window >= 2] ids, got {tuple(windows.shape)}; fix: give more text"
        )
    if device is None:
        device = next(model.parameters()).device
    total = 0.0
    training = model.training
    model.eval()
    try:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            if not math.isfinite(loss):
                raise NumericsError(
                    f"logits: expected a finite loss, got {loss} in windows {start} to {start + len(batch) - 1}; "
                    "fix: check the checkpoint, or train with a lower lr"
                )
            total += loss
            if on_batch:
                on_batch(len(batch))
    finally:
        model.train(training)
    mean = total / windows[:, 1:].numel()
    try:
        return math.exp(mean)
    except OverflowError:
        raise NumericsError(f"loss: expected below 709, got {mean:.4g}; fix: train with a lower lr") from None
