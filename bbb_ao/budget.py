"""Opening a nested checkpoint under a limit of bytes: the widest width that fits, and only its planes."""

import math

from torch import nn

from bbb_ao.errors import ModelError, ResourceError
from bbb_ao.packed_linear import common_widths, free_layers
from bbb_ao.storage import layer_footprint


def fit_budget(model: nn.Module, budget_gb: float) -> int:
    """Select the widest width at which the model's weights take at most `budget_gb`, and drop the planes beyond it.

    All parameters and buffers count, in the types that they have; the cache of keys and values and the activations do
    not. On the integer grid narrower widths read all planes, so that all widths are of one size.

    Args:
        model: with empty packed layers on the meta device, before its weights are loaded.
        budget_gb: 10**9 bytes.
    Returns:
        the width, of those that every layer stores; every packed layer that is not fixed runs at it.
    Raises:
        ModelError: budget_gb is no positive number, or no width is stored by every layer.
        ResourceError: no width fits; names the smallest size.
    """
    if isinstance(budget_gb, bool) or not isinstance(budget_gb, int | float) or not 0 < budget_gb < math.inf:
        raise ModelError(f"budget_gb: expected a positive number of GB, got {budget_gb!r}; fix: give one")
    sizes = {bits: loaded_bytes(model, bits) for bits in common_widths(model)}
    if not sizes:
        raise ModelError("budget_gb: expected a width that every layer stores, got none; fix: leave it out")
    fitting = [bits for bits, size in sizes.items() if size <= budget_gb * 1e9]
    if not fitting:
        bits, size = min(sizes.items(), key=lambda item: item[1])
        raise ResourceError(
            f"budget_gb: expected at least {math.ceil(size / 1e6) / 1e3} GB, the size at {bits} bits, got "
            f"{budget_gb:g}; fix: raise it"
        )
    for layer in free_layers(model).values():
        if layer.grid.half_step:
            layer.drop_planes(max(fitting))
        layer.set_bits(max(fitting))
    return max(fitting)


def loaded_bytes(model: nn.Module, bits: int) -> int:
    """Bytes of all parameters and buffers when the packed layers hold what they need at width `bits`."""
    # transformers ties weights after it has loaded them.
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    total = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name not in tied)
    layers = [layer for layer in free_layers(model).values() if layer.grid.half_step]
    return total - sum(layer_footprint(layer).bytes - layer_footprint(layer, bits).bytes for layer in layers)
